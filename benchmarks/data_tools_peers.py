"""What others need for the same steps of a corpus: one contender of benchmarks/data_tools.py, run by itself.

    python benchmarks/data_tools_peers.py CONTENDER INPUT.jsonl FOLDER

Runs with the Python that has the contender's package. INPUT holds one {"id", "text"} a line. Writes what it
made below FOLDER; for near-duplicates, FOLDER/kept.txt holds the ids that are left. The caller measures the
process, which is why imports are inside and everything is one process and one thread.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

NUM_HASHES, BANDS, ROWS, SHINGLE = 112, 14, 8, 5


def documents(path: Path) -> Iterator[dict[str, str]]:
    """The documents of a file, one a line."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def write_kept(folder: Path, ids: Iterable[str]) -> None:
    """The ids that are left after near-duplicates are removed."""
    (folder / "kept.txt").write_text("\n".join(ids) + "\n", encoding="utf-8")


def shingles(text: str) -> list[str]:
    """Five-word shingles by the fastest of Python's own means, for packages that leave them to their user."""
    words = re.findall(r"\w+", text.lower())
    in_a_row = zip(*(words[n:] for n in range(SHINGLE)), strict=False)
    return list(map(" ".join, in_a_row)) or [" ".join(words)]


# --- near-duplicates ----------------------------------------------------------------------------------------


def near_datatrove(path: Path, folder: Path) -> None:
    """Four stages over disk, 64-bit hashes."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.hashing import HashConfig

    config = MinhashConfig(
        n_grams=SHINGLE, num_buckets=BANDS, hashes_per_bucket=ROWS, hash_config=HashConfig(precision=64)
    )
    reader = JsonlReader(str(path.parent), glob_pattern=path.name)
    at = {name: str(folder / name) for name in ("signatures", "buckets", "remove", "out", "logs")}
    stages: list[tuple[list[Any], int]] = [
        ([reader, MinhashDedupSignature(at["signatures"], config)], 1),
        ([MinhashDedupBuckets(at["signatures"], at["buckets"], config=config)], BANDS),
        ([MinhashDedupCluster(at["buckets"], at["remove"], config=config)], 1),
        (
            [reader, MinhashDedupFilter(at["remove"]), JsonlWriter(at["out"], "out.jsonl", compression=None)],
            1,
        ),
    ]
    for number, (pipeline, tasks) in enumerate(stages):
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=1, logging_dir=f"{at['logs']}/{number}").run()
    write_kept(folder, (document["id"] for document in documents(Path(at["out"]) / "out.jsonl")))


def near_rensa(path: Path, folder: Path) -> None:
    """MinHash and LSH in Rust, shingles in Python; a document goes if one kept before it is a candidate."""
    from rensa import RMinHash, RMinHashLSH

    lsh = RMinHashLSH(threshold=0.8, num_perm=NUM_HASHES, num_bands=BANDS)
    write_greedily(path, folder, lsh, lambda parts: _rensa(RMinHash, parts))


def _rensa(kind: Any, parts: list[str]) -> Any:
    made = kind(num_perm=NUM_HASHES, seed=42)
    made.update(parts)
    return made


def near_datasketch(path: Path, folder: Path) -> None:
    """MinHash with numpy, LSH in Python, shingles in Python."""
    from datasketch import MinHash, MinHashLSH

    class Lsh:
        def __init__(self) -> None:
            self._inner = MinHashLSH(num_perm=NUM_HASHES, params=(BANDS, ROWS))

        def query(self, made: Any) -> Any:
            return self._inner.query(made)

        def insert(self, key: int, made: Any) -> None:
            self._inner.insert(key, made)

    def minhash(parts: list[str]) -> Any:
        made = MinHash(num_perm=NUM_HASHES)
        made.update_batch([part.encode() for part in parts])
        return made

    write_greedily(path, folder, Lsh(), minhash)


def write_greedily(path: Path, folder: Path, lsh: Any, minhash: Callable[[list[str]], Any]) -> None:
    """Keep each document that has no candidate among those kept before it."""
    kept = []
    with (folder / "out.jsonl").open("w", encoding="utf-8") as out:
        for number, document in enumerate(documents(path)):
            made = minhash(shingles(document["text"]))
            if not lsh.query(made):
                kept.append(document["id"])
                out.write(json.dumps(document, ensure_ascii=False) + "\n")
                lsh.insert(number, made)
    write_kept(folder, kept)


# --- statistics and filters ---------------------------------------------------------------------------------


def filters_datatrove(path: Path, folder: Path) -> None:
    """Gopher repetition and quality, C4 and FineWeb, as FineWeb orders them, all documents through all."""
    from datatrove.data import Document
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )

    filters = (
        GopherRepetitionFilter(),
        GopherQualityFilter(),
        C4QualityFilter(filter_no_terminal_punct=False),
        FineWebQualityFilter(),
    )
    with (folder / "verdicts.txt").open("w") as out:
        for document in documents(path):
            verdicts = (item.filter(Document(document["text"], document["id"])) for item in filters)
            out.write(" ".join(str(verdict) for verdict in verdicts) + "\n")


def filters_dolma(path: Path, folder: Path) -> None:
    """Gopher and C4 as attributes; it has no FineWeb rules."""
    from dolma.core.data_types import Document
    from dolma.core.registry import TaggerRegistry

    taggers = [TaggerRegistry.get(name)() for name in ("gopher_v1", "c4_v2")]
    with (folder / "attributes.jsonl").open("w", encoding="utf-8") as out:
        for document in documents(path):
            item = Document(source="", id=document["id"], text=document["text"])
            out.write(json.dumps([tagger.predict(item).to_json() for tagger in taggers]) + "\n")


# --- tokenization -------------------------------------------------------------------------------------------


def tokenize_tiktoken(path: Path, folder: Path) -> None:
    """GPT-2 by tiktoken, from its ranks, by the fastest of its ways."""
    import numpy as np
    from tiktoken import Encoding
    from tiktoken.load import load_tiktoken_bpe

    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    ranks = load_tiktoken_bpe(os.environ["RANKS"])
    encoding = Encoding(
        "gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}
    )
    with (folder / "tokens.bin").open("wb") as out:
        for document in documents(path):
            ids = encoding.encode_to_numpy(document["text"], disallowed_special=())
            out.write(np.append(ids, 50256).astype(np.uint16).tobytes())


def tokenize_tokenizers(path: Path, folder: Path) -> None:
    """GPT-2 by tokenizers, a thousand documents at a time, from a tokenizer.json."""
    import numpy as np
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(os.environ["TOKENIZER"])
    tokenizer.encode_special_tokens = True
    with (folder / "tokens.bin").open("wb") as out:
        batch: list[str] = []

        def flush() -> None:
            for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                out.write(np.array([*encoding.ids, 50256], np.uint16).tobytes())
            batch.clear()

        for document in documents(path):
            batch.append(document["text"])
            if len(batch) == 1000:
                flush()
        flush()


# --- the whole recipe ---------------------------------------------------------------------------------------


def recipe_datatrove(path: Path, folder: Path) -> None:
    """Filters, PII, exact and near-duplicates, tokens: what it has of megalite's whole recipe."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )
    from datatrove.pipeline.formatters import FTFYFormatter, PIIFormatter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.hashing import HashConfig

    config = MinhashConfig(
        n_grams=SHINGLE, num_buckets=BANDS, hashes_per_bucket=ROWS, hash_config=HashConfig(precision=64)
    )
    at = {name: str(folder / name) for name in ("clean", "signatures", "buckets", "remove", "out", "tokens")}
    clean = [
        JsonlReader(str(path.parent), glob_pattern=path.name),
        FTFYFormatter(),
        GopherRepetitionFilter(),
        GopherQualityFilter(),
        C4QualityFilter(filter_no_terminal_punct=False),
        FineWebQualityFilter(),
        PIIFormatter(),
        JsonlWriter(at["clean"], "clean.jsonl", compression=None),
    ]
    again = JsonlReader(at["clean"])
    stages: list[tuple[list[Any], int]] = [
        (clean, 1),
        ([again, MinhashDedupSignature(at["signatures"], config)], 1),
        ([MinhashDedupBuckets(at["signatures"], at["buckets"], config=config)], BANDS),
        ([MinhashDedupCluster(at["buckets"], at["remove"], config=config)], 1),
        ([again, MinhashDedupFilter(at["remove"]), JsonlWriter(at["out"], "out.jsonl", compression=None)], 1),
        (
            [
                JsonlReader(at["out"]),
                DocumentTokenizer(at["tokens"], tokenizer_name_or_path=os.environ["TOKENIZER"]),
            ],
            1,
        ),
    ]
    for number, (pipeline, tasks) in enumerate(stages):
        LocalPipelineExecutor(
            pipeline, tasks=tasks, workers=1, logging_dir=str(folder / f"logs{number}")
        ).run()


CONTENDERS = {
    name: function
    for name, function in globals().items()
    if name.startswith(("near_", "filters_", "tokenize_", "recipe_"))
}


if __name__ == "__main__":
    CONTENDERS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
