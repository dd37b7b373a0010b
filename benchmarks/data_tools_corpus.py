"""The corpus of benchmarks/data_tools.py, with duplicates planted in it, and what a dedup found of them.

    python -P benchmarks/data_tools_corpus.py prepare ROOT TEXT GPT2 MB    makes, below ROOT:

all.jsonl, quarter.jsonl, eighth.jsonl   {"id", "text"} a line; a copy is in the files that its original is in
truth.json                               what was planted: original, copy, how they differ, exact Jaccard
gpt2.json, gpt2.tiktoken                 GPT-2's tokenizer as two peers want it

    python -P benchmarks/data_tools_corpus.py near ROOT FILE.jsonl KEPT... what each dedup found, as JSON
    python -P benchmarks/data_tools_corpus.py tokens BIN BIN               documents with different ids
"""

from __future__ import annotations

import base64
import json
import random
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

COPIES = 2400
SHARES = {"all": 1, "quarter": 4, "eighth": 8}
EOS = 50256
FAR = 0.5  # a removed document whose best match is less alike was removed in error


def prepare(root: Path, text: Path, gpt2: Path, megabytes: float) -> None:
    """Write everything; the same for the same TEXT."""
    from tests.data_tools.planted import plant

    originals = list(_draw(text, megabytes * 1e6))
    copies = plant(originals, COPIES)
    # Its number decides which files an original is in, and its copies with it.
    rows = [(number, f"d{number:06d}", body) for number, body in enumerate(originals)]
    rows += [(copy.of, f"c{number:06d}", copy.text) for number, copy in enumerate(copies)]
    random.Random(1).shuffle(rows)
    for name, share in SHARES.items():
        with (root / f"{name}.jsonl").open("w", encoding="utf-8") as out:
            for number, key, body in rows:
                if number % share == 0:
                    out.write(json.dumps({"id": key, "text": body}, ensure_ascii=False) + "\n")
    truth = [(f"d{copy.of:06d}", f"c{n:06d}", copy.kind, copy.jaccard) for n, copy in enumerate(copies)]
    (root / "truth.json").write_text(json.dumps(truth))
    _write_tokenizers(root, gpt2)


def _draw(folder: Path, wanted: float) -> Iterator[str]:
    """Texts of all *.jsonl of a folder, in an order by hash, until there are as many bytes."""
    places = []
    for path in sorted(folder.glob("*.jsonl")):
        with path.open("rb") as file:
            at = 0
            for number, line in enumerate(file):
                places.append((zlib.crc32(f"{path.name}:{number}".encode()), path, at))
                at += len(line)
    places.sort()
    chosen, size = [], 0
    for _, path, at in places:
        with path.open("rb") as file:
            file.seek(at)
            chosen.append(json.loads(file.readline())["text"])
        size += len(chosen[-1].encode())
        if size >= wanted:
            return iter(chosen)
    raise SystemExit(f"{folder} has {size / 1e6:.0f} MB of text, {wanted / 1e6:.0f} are wanted: give --mb")


def _write_tokenizers(root: Path, gpt2: Path) -> None:
    """GPT-2's vocab.bpe and encoder.json as a tokenizer.json and as tiktoken's ranks."""
    vocab = json.loads((gpt2 / "encoder.json").read_text(encoding="utf-8"))
    lines = (gpt2 / "vocab.bpe").read_text(encoding="utf-8").splitlines()
    merges = [line for line in lines if line and not line.startswith("#version")]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {"id": EOS, "content": "<|endoftext|>", "special": True, "normalized": True}
    end |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    content = {
        "version": "1.0",
        "added_tokens": [end],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    (root / "gpt2.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    # GPT-2 writes bytes that do not print as the characters from U+0100 on.
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    byte_of = {chr(byte): byte for byte in printed} | {chr(256 + n): byte for n, byte in enumerate(others)}
    with (root / "gpt2.tiktoken").open("wb") as out:
        for token, rank in sorted(vocab.items(), key=lambda item: item[1]):
            if rank != EOS:
                raw = bytes(byte_of[character] for character in token)
                out.write(base64.b64encode(raw) + b" " + str(rank).encode() + b"\n")


# --- what was found -----------------------------------------------------------------------------------------


def judge_near(root: Path, corpus: Path, kept_files: Sequence[Path]) -> dict[str, Any]:
    """By file of kept ids: recall of planted pairs by Jaccard, and how many removed are like nothing else.

    A pair is found if not both are kept.
    """
    with corpus.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    ids = [row["id"] for row in rows]
    present = set(ids)
    truth = [row for row in json.loads((root / "truth.json").read_text()) if row[0] in present]
    kept = {path: set(path.read_text().split()) for path in kept_files}
    removed = sorted({n for names in kept.values() for n, key in enumerate(ids) if key not in names})
    best = dict(zip(removed, _best_jaccards([row["text"] for row in rows], removed), strict=True))
    found: dict[str, Any] = {}
    for path, names in kept.items():
        by_bin: dict[str, list[bool]] = {}
        for original, copy, _, jaccard in truth:
            hit = not (original in names and copy in names)
            by_bin.setdefault(f"{min(int(jaccard * 10 + 1e-9), 9) / 10}", []).append(hit)
            if jaccard >= 0.8:
                by_bin.setdefault(">=0.8", []).append(hit)
        gone = [n for n, key in enumerate(ids) if key not in names]
        found[str(path)] = {
            "removed": len(gone),
            "removed_like_nothing": sum(best[n] < FAR for n in gone),
            "recall": {key: round(sum(hits) / len(hits), 4) for key, hits in sorted(by_bin.items())},
            "pairs": {key: len(hits) for key, hits in sorted(by_bin.items())},
        }
    return found


def _best_jaccards(texts: Sequence[str], wanted: Sequence[int]) -> list[float]:
    """The largest exact Jaccard similarity of each wanted text with any other, over five-word shingles."""
    from data_tools.dedup.near import NearSettings, shingle_sets
    from data_tools.documents import Texts

    raw = [text.encode() for text in texts]
    offsets = np.concatenate([[0], np.cumsum([len(item) for item in raw])]).astype(np.int64)
    column = Texts(np.frombuffer(b"".join(raw), np.uint8), offsets)
    hashes, bounds = shingle_sets(NearSettings(), column, np.arange(len(raw)))
    sets = [np.unique(hashes[bounds[n] : bounds[n + 1]]) for n in range(len(raw))]
    sizes = np.array([len(item) for item in sets])
    flat, owner = np.concatenate(sets), np.repeat(np.arange(len(sets)), sizes)
    order = np.argsort(flat, kind="stable")
    flat, owner = flat[order], owner[order]
    best = []
    for n in wanted:
        first, last = np.searchsorted(flat, sets[n]), np.searchsorted(flat, sets[n], side="right")
        counts = last - first
        places = np.repeat(first - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts)
        shared = np.bincount(owner[places + np.arange(counts.sum())], minlength=len(sets))
        jaccard = shared / np.maximum(sizes + sizes[n] - shared, 1)
        jaccard[n] = 0.0
        best.append(float(jaccard.max()))
    return best


def different_documents(one: Path, other: Path) -> int:
    """How many documents of two files of ids, each ended by EOS, are not the same."""
    streams = [np.fromfile(path, np.uint16) for path in (one, other)]
    if np.array_equal(*streams):
        return 0
    documents = [np.split(ids, np.flatnonzero(ids == EOS) + 1) for ids in streams]
    missing = abs(len(documents[0]) - len(documents[1]))
    return missing + sum(not np.array_equal(*pair) for pair in zip(*documents, strict=False))


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what == "prepare":
        prepare(*map(Path, arguments[:3]), float(arguments[3]))
    elif what == "near":
        first, second, *rest = map(Path, arguments)
        print(json.dumps(judge_near(first, second, rest)))
    else:
        print(different_documents(*map(Path, arguments)))
