"""Our steps as contenders of benchmarks/data_tools.py: one of them, run by itself, by one process.

    python -P benchmarks/data_tools_ours.py CONTENDER INPUT.jsonl FOLDER

INPUT holds one {"id", "text"} a line; INPUT.parts is the same as a finished ingest step. (-P: this folder
must not come first on the path, where data_tools.py would hide the package of that name.)
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from data_tools.crew import Crew
from data_tools.flow import Flow
from data_tools.step import step_parts
from megalite.config.section import Section

BATCH_BYTES = 8 << 20  # a row group's


def parts_of(path: Path) -> Path:
    """Where the parts of a file lie."""
    return path.with_suffix(".parts")


def ingest(path: Path, folder: Path) -> None:
    """Read the file into parts."""
    from data_tools.ingest import IngestSettings, SourceSettings, step

    settings = IngestSettings(sources=(SourceSettings(name="corpus", path=str(path)),))
    with Crew(folder, workers=1) as crew:
        step.run(settings, folder, crew)


# --- near-duplicates ----------------------------------------------------------------------------------------


def near_parts(path: Path, folder: Path) -> None:
    """Parts in, parts out."""
    _near(parts_of(path), folder)


def near_jsonl(path: Path, folder: Path) -> None:
    """The file to parts first."""
    ingest(path, folder / "ingest")
    _near(folder / "ingest", folder)


def _near(source: Path, folder: Path) -> None:
    from data_tools.dedup import near
    from data_tools.documents import read_part

    with Crew(folder, workers=1) as crew:
        near.run(near.NearSettings(), source, folder / "near", crew)
    parts = step_parts(folder / "near")
    kept = [key for part in parts for b in read_part(part, ["id"]) for key in b.column("id").to_pylist()]
    (folder / "kept.txt").write_text("\n".join(kept) + "\n", encoding="utf-8")


# --- statistics and filters ---------------------------------------------------------------------------------


def filters_alone(path: Path, folder: Path) -> None:
    """Parts in, nothing out: Gopher's, C4's and FineWeb's statistics of every document."""
    from data_tools.documents import read_part
    from data_tools.statistics.operation import Statistics
    from data_tools.statistics.settings import StatisticsSettings

    measure, rows = Statistics(StatisticsSettings()), 0
    for part in step_parts(parts_of(path)):
        for batch in read_part(part):
            rows += measure(batch, Flow()).num_rows
    (folder / "rows.txt").write_text(f"{rows}\n")


def filters_jsonl(path: Path, folder: Path) -> None:
    """The file to parts, statistics added to them, and the documents written that keep all rules."""
    from data_tools import clean, filter

    ingest(path, folder / "ingest")
    only = clean.CleanSettings(normalise=None, language=None, pii=None)
    with Crew(folder, workers=1) as crew:
        clean.run(only, folder / "ingest", folder / "clean", crew)
        filter.run(filter.FilterSettings(), folder / "clean", folder / "filter", crew)


# --- tokenization -------------------------------------------------------------------------------------------


def tokenize_encoder(path: Path, folder: Path) -> None:
    """The step's encoder on the file's texts, a row group's at a time; ids to tokens.bin as the peers do."""
    import numpy as np

    from data_tools.documents import Texts
    from data_tools.encoding import build_encoder, choose_engine
    from megalite.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(os.environ["TOKENIZER"])
    encoder = build_encoder(tokenizer, choose_engine(tokenizer)[0])
    with (folder / "tokens.bin").open("wb") as out, path.open(encoding="utf-8") as file:

        def flush(batch: list[bytes]) -> None:
            offsets = np.concatenate([[0], np.cumsum([len(text) for text in batch])]).astype(np.int64)
            ids = encoder.encode(Texts(np.frombuffer(b"".join(batch), np.uint8), offsets)).ids
            out.write(ids.astype(np.uint16).tobytes())

        batch: list[bytes] = []
        size = 0
        for line in file:
            batch.append(json.loads(line)["text"].encode())
            size += len(batch[-1])
            if size >= BATCH_BYTES:
                flush(batch)
                batch, size = [], 0
        flush(batch)


def tokenize_parts(path: Path, folder: Path) -> None:
    """The whole step: parts to checked, shuffled, indexed shards, a sample compared with the reference."""
    from data_tools import tokenize_parts as step

    with Crew(folder, workers=1) as crew:
        settings = step.TokenizeSettings(tokenizer=os.environ["TOKENIZER"])
        step.run(settings, parts_of(path), folder / "tokenize", crew)


# --- the whole recipe ---------------------------------------------------------------------------------------


def recipe_default(path: Path, folder: Path) -> None:
    """Ingest, clean, filter, exact, near, spans, tokenize; every step's default settings."""
    _recipe(path, folder, {})


def recipe_keeping(path: Path, folder: Path) -> None:
    """The same with no rule of the filter on, so that the steps after it have all the text to do."""
    off = dict.fromkeys(("gopher_quality", "gopher_repetition", "c4", "fineweb"), False)
    _recipe(path, folder, {"filter": off})


def _recipe(path: Path, folder: Path, tables: dict[str, Any]) -> None:
    """Build, and write what each step took to steps.json."""
    from data_tools import build
    from data_tools.recipe import Recipe

    values: dict[str, Any] = {"clean": {}, "filter": {}, "exact": {}, "near": {}, "spans": {}, **tables}
    values["out"] = str(folder / "out")
    values["ingest"] = {"sources": [{"name": "corpus", "path": str(path)}]}
    values["tokenize"] = {"tokenizer": os.environ["TOKENIZER"]}
    told: dict[str, Any] = {}
    find_step = build.find_step

    def find_told(name: str) -> tuple[type[Section], Callable[..., Flow]]:
        settings, run = find_step(name)
        return settings, partial(_told, told, name, run)

    build.find_step = find_told
    with Crew(folder / "out", workers=1) as crew:
        build.build(Recipe.model_validate(values), crew)
    (folder / "steps.json").write_text(json.dumps(told))


def _told(told: dict[str, Any], name: str, run: Callable[..., Flow], *args: Any, **options: Any) -> Flow:
    """Run a step, and note its time, memory and disk."""
    with Path("/proc/self/clear_refs").open("w") as file:
        file.write("5")  # the peak of memory is counted from here
    wall, cpu, written = time.perf_counter(), time.process_time(), _proc("io", "wchar")
    flow = run(*args, **options)
    documents_in, documents, bytes_in, size = flow.totals()
    folder: Path = args[-2]
    told[name] = {
        "documents_in": documents_in,
        "documents": documents,
        "bytes_in": bytes_in,
        "bytes": size,
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - wall,
        "written_bytes": _proc("io", "wchar") - written,
        "left_bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        "peak_bytes": _proc("status", "VmHWM") << 10,
    }
    return flow


def _proc(file: str, key: str) -> int:
    lines = Path(f"/proc/self/{file}").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[key].split()[0])


CONTENDERS = {
    name: function
    for name, function in globals().items()
    if name.startswith(("near_", "filters_", "tokenize_", "recipe_")) or name == "ingest"
}


if __name__ == "__main__":
    CONTENDERS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
