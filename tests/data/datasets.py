"""Small datasets for the tests of this folder."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.cli import add_commands
from data_tools.verify import find_faults
from megalite.config import DataConfig
from megalite.data import manifest as manifest_module
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
    """A dataset of these documents, ids doc0, doc1, …, perhaps with `spans` that count for the loss."""
    tokenizer = options.pop("tokenizer", ByteTokenizer())
    spans: Any = options.pop("spans", None)
    with ShardWriter(folder, tokenizer, has_loss_mask=spans is not None, **options) as writer:  # type: ignore[arg-type]
        for n, document in enumerate(documents):
            writer.write(f"doc{n}", "test", document, None if spans is None else spans[n])
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


class DamagedDataset(Dataset):
    """A dataset some of whose blocks cannot be read."""

    damaged: frozenset[int] = frozenset()

    def block(self, number: int) -> Block:
        """The block, if it is sound."""
        if number in self.damaged:
            raise CorruptBlockError(str(self.path / "shard_00000.arrow"), number, number, "is corrupt: CRC 1")
        return super().block(number)


def verify(folder: Path) -> Dataset:
    """The dataset, once every byte of it is checked; raises the first fault found."""
    dataset = Dataset(folder)
    for fault in find_faults(dataset):
        raise fault
    return dataset


def read_everything(dataset: Dataset) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """All tokens and document boundaries."""
    return dataset.read(0, dataset.total_tokens)[:2]


def edit_manifest(folder: Path, change: Callable[[Any], object]) -> None:
    """Apply `change` to the manifest and seal it again, as an attacker or a careless tool would."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    content.pop("crc32", None)
    path.write_bytes(manifest_module.seal(json.dumps(content).encode().removesuffix(b"}")))


def megalite(*arguments: object) -> int:
    """What `megalite data …` returns for these arguments."""
    parser = argparse.ArgumentParser(prog="megalite")
    add_commands(parser.add_subparsers(required=True))
    args = parser.parse_args([str(argument) for argument in arguments])
    return int(args.func(args))
