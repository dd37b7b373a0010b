"""Every dedup step gives the same files on any number of processes and ranks, after a kill anywhere, and out
of little memory."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools import crew as crews
from data_tools import decontaminate
from data_tools.dedup import exact, near, shuffle, spans
from data_tools.dedup.shuffle import ShuffleWriter, read_bucket, read_rows
from data_tools.step import read_report
from megalite.config.section import Section
from megalite.errors import DataError
from tests.data_tools.corpora import crew, files_of, write_step
from tests.data_tools.planted import plant

Run = Callable[..., Any]
SMALL = 1 << 12  # bytes of memory: tens of buckets


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three parts of texts with exact and near copies, and repeated spans."""
    draw = random.Random(1)
    vocabulary = ["".join(draw.choices("abcdefgh", k=draw.randrange(2, 7))) for _ in range(300)]
    texts = ["\n".join(" ".join(draw.choices(vocabulary, k=12)) for _ in range(6)) for _ in range(24)]
    texts += [copy.text for copy in plant(texts, 24, seed=2)]
    texts += ["new " + texts[number][:-40] for number in range(4)]
    rows = [[(f"{p}-{r}", f"s{r % 2}", text) for r, text in enumerate(texts[p::3])] for p in range(3)]
    return write_step(tmp_path_factory.mktemp("corpus") / "in", rows)


@pytest.fixture(params=["exact", "lines", "near", "spans", "span documents", "decontaminate"])
def case(request: pytest.FixtureRequest, source: Path) -> tuple[Run, Section, Section]:
    """A step with settings, and with such that use little memory."""
    if request.param == "decontaminate":
        path = source.parent / "eval.txt"
        path.write_text("\n\n".join(" ".join(f"w{n}" for n in range(20)) for _ in range(2)))
        files = [{"path": str(path)}]
        choice = decontaminate.DecontaminateSettings(files=files)
        return decontaminate.run, choice, choice
    run, kind, values = {
        "exact": (exact.run, exact.ExactSettings, {}),
        "lines": (exact.run, exact.ExactSettings, {"unit": "line"}),
        "near": (near.run, near.NearSettings, {}),
        "spans": (spans.run, spans.SpanSettings, {"span_words": 16}),
        "span documents": (spans.run, spans.SpanSettings, {"span_words": 16, "mode": "drop_document"}),
    }[request.param]
    return run, kind(**values), kind(**values, memory_bytes=SMALL)


def only_output(files: dict[str, bytes]) -> dict[str, bytes]:
    """Without what tells the settings and how many buckets there were."""
    return {name: data for name, data in files.items() if name.startswith(("parts", "report"))}


@pytest.mark.usefixtures("no_fsync")
def test_ranks_kills_and_little_memory_change_nothing(
    tmp_path: Path, source: Path, case: tuple[Run, Section, Section], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, choice, small = case
    whole, ranked, killed, tiny = (tmp_path / name for name in ("whole", "ranked", "killed", "tiny"))

    def once(out: Path, settings: Section, rank: int = 0, world: int = 1) -> None:
        with crew(out, 1, rank, world) as hands:
            run(settings, source, out, hands)

    once(whole, choice)
    expected = files_of(whole)
    assert {name.split("/")[0] for name in expected} == {"done", "parts", "report.json", "step.json"}

    threads = [threading.Thread(target=once, args=(ranked, choice, rank, 2)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert files_of(ranked) == expected

    once(tiny, small)
    assert len(files_of(tiny)) > len(expected) or small == choice  # more buckets, so more markers
    assert only_output(files_of(tiny)) == only_output(expected)

    # Die at every task in turn, after its work and before its marker, and at every removal: before or after.
    do, remove = crews._do, shuffle.remove_shuffle
    done = 0
    cleared: set[str] = set()

    def do_and_die(folder: Path, task: crews.Task) -> dict[str, Any]:
        nonlocal done
        done += 1
        if done == 2:
            task.run()
            raise InterruptedError
        return do(folder, task)

    def remove_and_die(folder: Path) -> None:
        dies = folder.name not in cleared
        cleared.add(folder.name)
        if not dies or len(cleared) % 2:
            remove(folder)
        if dies:
            raise InterruptedError

    monkeypatch.setattr(crews, "_do", do_and_die)
    for module in (exact, near, spans, decontaminate):
        monkeypatch.setattr(module, "remove_shuffle", remove_and_die)
    deaths = 0
    while not (killed / "report.json").exists():
        done = 0
        try:
            once(killed, choice)
        except InterruptedError:
            deaths += 1
    assert deaths >= 4
    assert files_of(killed) == expected


@pytest.mark.slow
def test_processes_change_nothing(tmp_path: Path, source: Path) -> None:
    for workers in (1, 2):
        with crew(tmp_path / str(workers), workers) as hands:
            near.run(near.NearSettings(), source, tmp_path / str(workers), hands)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")
    assert read_report(tmp_path / "2")["counters"]["clusters"] > 10


def test_a_shuffle_gives_back_all_rows_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shuffle, "RUN_BYTES", 400)
    draw = np.random.default_rng(0)
    files, expected = [], {bucket: [] for bucket in range(5)}
    for number in range(3):
        files.append(tmp_path / f"{number}.bin")
        with ShuffleWriter(files[-1], 5) as writer:
            for size in (0, 7, 30, 1):
                buckets = draw.integers(0, 4, size)  # none in the last
                rows = draw.integers(0, 2**64, (size, 2), dtype=np.uint64)
                writer.write(buckets, rows if number else [*rows])
                for bucket, row in zip(buckets.tolist(), rows.tolist(), strict=True):
                    expected[bucket].append(row)
    for bucket, rows in expected.items():
        assert read_rows(files, bucket, 2).tolist() == rows
        spilled = read_bucket(files, bucket, 8, tmp_path / "spill")
        assert spilled.tolist() == [value for row in rows for value in row]


def test_a_shuffle_file_that_is_missing_or_short_is_named(tmp_path: Path) -> None:
    with ShuffleWriter(tmp_path / "a.bin", 2) as writer:
        writer.write(np.zeros(9, dtype=np.int64), np.ones((9, 2), dtype=np.uint64))
    with pytest.raises(DataError, match=r"has 1 of 2 files; remove its step's folder"):
        shuffle.shuffle_files(tmp_path, 2)
    with pytest.raises(DataError, match=r"b\.bin is missing"):
        read_bucket([tmp_path / "b.bin"], 0)
    (tmp_path / "a.bin").write_bytes(b"short")
    with pytest.raises(DataError, match=r"a\.bin is damaged"):
        read_bucket([tmp_path / "a.bin"], 0)
