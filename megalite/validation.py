"""The loss on held-out samples, the same ones every time, in pieces between which a run may be stopped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megalite.config import TrainConfig
from megalite.data.batch import IGNORE, Batch
from megalite.data.loader import DataLoader
from megalite.engines.engine import Engine
from megalite.parallel.collectives import all_reduce
from megalite.parallel.mesh import Mesh
from megalite.resilience.preempt import PreemptionFlag

_MICRO_BATCHES = 8  # of a piece, times the stages of a pipeline, which few would leave idle


def validate(
    engine: Engine, loader: DataLoader, config: TrainConfig, mesh: Mesh, flag: PreemptionFlag | None = None
) -> dict[str, Any] | None:
    """Mean cross-entropy in nats over the validation samples: `val_loss` of all of them, and with several
    datasets `val_losses` of those of each; nan where there is no label among them.

    None, on every rank, if the flag of any goes up: whoever asks a run to stop waits for its save.

    Comm:  an all-reduce of three numbers over the world for each piece
    """
    count = min(config.eval_samples, sum(loader.samples))
    source, _ = loader.locate(np.arange(count))
    piece = _MICRO_BATCHES * mesh.pp.size * mesh.dp.size * config.micro_batch_size
    sums = torch.zeros(len(loader.datasets), 2, dtype=torch.float64, device=mesh.device)
    for n, dataset_sums in enumerate(sums):
        ids = np.flatnonzero(source == n)
        for first in range(0, len(ids), piece):
            batches = _share(loader, ids[first : first + piece], config.micro_batch_size, mesh)
            values = *engine.evaluate(batches), float(flag is not None and flag.requested)
            vector = torch.tensor(values, dtype=torch.float64, device=mesh.device)
            if all_reduce(vector, mesh.world)[2]:
                return None
            dataset_sums += vector[:2]
    loss, tokens = sums.unbind(1)
    losses: dict[str, Any] = {"val_loss": float(loss.sum() / tokens.sum())}
    return losses | ({"val_losses": (loss / tokens).tolist()} if len(sums) > 1 else {})


def _share(loader: DataLoader, samples: NDArray[np.int64], width: int, mesh: Mesh) -> Iterator[Batch]:
    """This rank's micro-batches of validation samples, `width` samples each.

    Every rank takes as many, since a forward pass may need the others' weights: what is over is
    computed with no label asked.
    """
    dp, count = mesh.dp, len(samples)
    mine = np.arange(dp.rank, -(-count // dp.size) * dp.size, dp.size)
    for places in (mine[i : i + width] for i in range(0, len(mine), width)):
        found = loader.batch(samples[np.minimum(places, count - 1)])
        asked = (places < count)[:, None]
        yield replace(found, labels=np.where(asked, found.labels, IGNORE))
