"""Small datasets for the tests of this folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megalite.config import DataConfig
from megalite.data.loader import DataLoader
from megalite.data.shards import Block, CorruptBlockError, Dataset
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


def loader(
    datasets: Dataset | Sequence[Dataset], seq_len: int, *, seed: int = 0, **settings: object
) -> DataLoader:
    """A loader of these datasets with `[data]` settings; `sources` are all but the paths."""
    datasets = [datasets] if isinstance(datasets, Dataset) else list(datasets)
    sources = settings.pop("sources", [{}] * len(datasets))
    named = [{"path": str(d.path), **s} for d, s in zip(datasets, sources, strict=True)]  # type: ignore[call-overload]
    values = {"seq_len": seq_len, "sources": named, **settings}
    return DataLoader(DataConfig.model_validate(values), seed, datasets)


class MaskedDataset(Dataset):
    """A dataset in which every third token, counted through the stream, does not count for the loss."""

    def block(self, number: int) -> Block:
        """The block with a mask."""
        block = super().block(number)
        first = int(self.block_ends[number]) - block.tokens.size
        counts = (first + np.arange(block.tokens.size)) % 3 > 0
        return Block(block.tokens, block.offsets, counts, block._names)


class DamagedDataset(Dataset):
    """A dataset some of whose blocks cannot be read."""

    damaged: frozenset[int] = frozenset()

    def block(self, number: int) -> Block:
        """The block, if it is sound."""
        if number in self.damaged:
            raise CorruptBlockError(str(self.path / "shard_00000.arrow"), number, number, "is corrupt: CRC 1")
        return super().block(number)
