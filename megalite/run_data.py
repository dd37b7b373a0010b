"""The loaders of a run, opened by all ranks together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

from megalite.agreement import together
from megalite.config import Config
from megalite.data.batch import Batch, Replacement
from megalite.data.best_fit import Chunks, Table
from megalite.data.loader import DataLoader, check_same_tokenizer, open_datasets
from megalite.data.shards import Dataset
from megalite.errors import ConfigError
from megalite.log import RunLog
from megalite.parallel.collectives import gather_json
from megalite.parallel.mesh import Mesh

PACKING_FOLDER = "packing"  # in the run folder: the tables of best-fit packing


def open_loaders(config: Config, mesh: Mesh) -> tuple[DataLoader, DataLoader | None]:
    """The training loader, and the validation loader if there is validation data.

    Raises:  ConfigError, DataError, on every rank alike
    """
    training, held_out = together(partial(_open_datasets, config), mesh)
    tables = _pack(training, config, mesh) if config.data.packing == "best_fit" else []
    allocate = _pinned if mesh.device.type == "cuda" else np.empty

    def build() -> tuple[DataLoader, DataLoader | None]:
        loader = DataLoader(config.data, config.seed, training, tables, allocate)
        loader.check_vocab(config.model.vocab_size)
        if not held_out:
            return loader, None
        return loader, DataLoader(config.data.held_out, config.seed, held_out, allocate=allocate)

    return together(build, mesh)


def _open_datasets(config: Config) -> tuple[list[Dataset], list[Dataset]]:
    data = config.data
    if not data.sources:
        raise ConfigError(
            "data.sources is empty; make a dataset with `megalite data tokenize` and name it: "
            'data.sources=[{path="data/train"}]'
        )
    training = open_datasets(source.path for source in data.sources)
    held_out = open_datasets(source.path for source in data.validation)
    check_same_tokenizer(training + held_out)
    for dataset in training + held_out:
        dataset.check_files()  # a run of weeks should not find at its end that a shard was cut short
    return training, held_out


def _pack(datasets: Sequence[Dataset], config: Config, mesh: Mesh) -> list[Table]:
    """Each dataset's packing table: the one the run has kept, or counted by all ranks in parts.

    Raises:  DataError, on every rank alike
    """
    tables = []
    for dataset in datasets:
        chunks = Chunks(dataset, config.data.seq_len)
        kept = Table.load(Path(config.run_dir) / PACKING_FOLDER, chunks) if mesh.rank == 0 else None
        whole = gather_json(kept and kept.to_json(), mesh.world, mesh.device)[0]
        if whole is None:
            part = together(partial(Table.build, chunks, mesh.rank, mesh.size), mesh)
            parts = gather_json(part.to_json(), mesh.world, mesh.device)
            tables.append(Table.join(map(Table.from_json, parts)))
        else:
            tables.append(Table.from_json(whole))
    return tables


def _pinned(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An array in pinned memory, from which a GPU copies beside its computation."""
    kind = torch.from_numpy(np.empty(0, dtype=dtype)).dtype
    array: NDArray[Any] = torch.empty(shape, dtype=kind, pin_memory=True).numpy()
    return array


def quarantine(loader: DataLoader, batches: Sequence[Batch], step: int, mesh: Mesh, log: RunLog) -> None:
    """Report the samples of a step that could not be read on any rank, and the record batches at fault.

    Raises:  DataError, on every rank alike, when these are too many
    """
    mine = [replacement for batch in batches for replacement in batch.replaced]
    told = gather_json(mine, mesh.world, mesh.device)
    found = sorted({Replacement(*each) for rank in told for each in rank})
    place = itemgetter(1, 2)
    for (file, block), group in groupby(sorted(found, key=place), key=place):
        samples = list(group)
        ids = [each.sample_id for each in samples]
        log.event("bad_block", step, file=file, batch=block, reason=samples[0].reason, samples=ids)
    loader.quarantine(found)
