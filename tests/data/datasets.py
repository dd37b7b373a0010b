"""Small datasets for the tests of this folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megalite.data.shards import Dataset
from megalite.data.tokenizer import ByteTokenizer
from megalite.data.writer import ShardWriter


class WideTokenizer(ByteTokenizer):
    """A byte tokenizer that claims a vocabulary too large for uint16."""

    vocab_size = 70_000


def random_documents(
    lengths: Sequence[int], vocab_size: int = 257, eos_id: int = 256, seed: int = 0
) -> list[NDArray[np.int64]]:
    """Documents of the given lengths, each ending in eos; eos also occurs inside, to catch scans for it."""
    rng = np.random.default_rng(seed)
    documents = [rng.integers(0, vocab_size, length) for length in lengths]
    for document in documents:
        document[-1] = eos_id
    return documents


def write(folder: Path, documents: Sequence[NDArray[np.int64]], **options: object) -> Dataset:
    """A dataset of these documents, ids doc0, doc1, …"""
    tokenizer = options.pop("tokenizer", ByteTokenizer())
    with ShardWriter(folder, tokenizer, **options) as writer:  # type: ignore[arg-type]
        for n, document in enumerate(documents):
            writer.write(f"doc{n}", "test", document)
    return Dataset(folder)
