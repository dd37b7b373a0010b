"""The contract between the trainer and whatever computes a step.

The trainer decides (data, learning rate, skip, save); an engine computes. Between
`forward_backward` and `optimizer_step` lies the one point where every rank agrees on what the step
was worth, so an engine must not touch weights or optimizer state in the first call.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from megalite.checkpoint.format import TensorSlice
from megalite.checkpoint.snapshots import Snapshot
from megalite.checkpoint.store import Checkpoint
from megalite.config import Config
from megalite.data.batch import Batch
from megalite.model.transformer import dropout_keys
from megalite.optim.loss_scale import LossScale
from megalite.parallel.sharding import Replica

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepSums:
    """One rank's share of a step's sums; adding the shares of all ranks gives the global batch's.

    `loss` is cross-entropy without z-loss, in nats; gradients are those of
    (loss + z_loss) / `tokens_per_step`, summed over ranks; `grad_norm_squared` is theirs.
    """

    loss: float
    z_loss: float
    tokens: float
    grad_norm_squared: float


class Inputs(NamedTuple):
    """A micro-batch on the device: `Batch`'s arrays, and a key for each sample's dropout, int64 [batch]."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    doc_starts: Tensor | None
    dropout_keys: Tensor | None


def to_device(batch: Batch, config: Config, device: torch.device, is_training: bool) -> Inputs:
    """Copy what the model reads of a micro-batch; nothing is dropped out but in training."""

    def moved(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    drops = is_training and config.model.dropout
    return Inputs(
        moved(batch.tokens),
        moved(batch.labels),
        moved(batch.positions),
        None if batch.doc_starts is None else moved(batch.doc_starts),
        dropout_keys(config.seed, moved(batch.sample_ids)) if drops else None,
    )


class Engine(Protocol):
    """Holds the model, its gradients and its optimizer state on this rank.

    The trainer tells `loss_scale` which steps were applied; what the engine reports is without it.
    """

    num_parameters: int
    loss_scale: LossScale

    @property
    def applied_steps(self) -> int:
        """Optimizer steps taken: AdamW's t, which a skipped step does not advance."""

    def forward_backward(self, micro_batches: Sequence[Batch]) -> StepSums:
        """Gradients of this rank's micro-batches, reduced over the data-parallel axis."""

    def optimizer_step(self, lr: float, grad_scale: float) -> None:
        """Update the weights with the reduced gradients times `grad_scale`."""

    def evaluate(self, micro_batches: Iterable[Batch]) -> tuple[float, float]:
        """This rank's share of the summed cross-entropy in nats and of the valid tokens, as in `StepSums`.

        Every data-parallel rank brings as many micro-batches, of the same shapes.
        """

    def initialize(self) -> None:
        """Set fresh weights, a function of the seed alone, and an optimizer that has done nothing."""

    def state_slices(self) -> Iterable[TensorSlice]:
        """What this rank contributes to a checkpoint: weights and optimizer state in fp32."""

    def replicas(self) -> Iterable[Replica]:
        """What this rank holds that other ranks must hold bit for bit as well, between two steps."""

    def load_state(self, checkpoint: Checkpoint) -> None:
        """Restore weights, optimizer state and step count from a checkpoint of any layout."""

    def snapshot(self, reuse: Snapshot | None = None) -> Snapshot:
        """Copy this rank's state to host memory, `reuse`'s where given; nothing is communicated."""

    def load_snapshot(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot this engine took, bit for bit; all ranks together, to the same step."""
