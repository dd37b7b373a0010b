"""What a step was worth and what it took: the record that metrics.jsonl gets of it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megalite.config import Config
from megalite.data.batch import Batch
from megalite.engines.engine import Engine, StepSums
from megalite.model.flops import peak_flops, token_flops
from megalite.parallel.collectives import all_reduce
from megalite.parallel.mesh import Mesh


@dataclass(frozen=True)
class Measured:
    """What all ranks know of a step after their one all-reduce, and this rank's share of it."""

    loss: float  # nats per valid token
    z_loss: float
    grad_norm: float  # of the mean loss, before clipping
    tokens: int  # valid labels in the global batch
    correction: float  # what the engine's gradients are multiplied by, to be those of the mean loss
    is_preempted: bool  # whether any rank was asked to stop
    has_replaced: bool  # whether any rank could not read one of its samples
    sums: StepSums

    def grad_scale(self, clip: float) -> float:
        """What the engine's gradients are multiplied by: the correction, and clipping of the global norm to
        `clip`; 0 never clips."""
        return self.correction * (min(1.0, clip / self.grad_norm) if clip and self.grad_norm > 0 else 1.0)


@dataclass(frozen=True)
class StepReport(Measured):
    """And what was done about it."""

    is_applied: bool  # whether the weights moved
    is_overflow: bool  # not applied, but a smaller loss scale may do (fp16)
    cause: str  # why it was not applied: no labels; if it was computed again: data, or the hardware


def measure(
    engine: Engine, micro_batches: Sequence[Batch], config: Config, mesh: Mesh, wants_stop: bool = False
) -> Measured:
    """Gradients of a step, and what all ranks know of it after the step's one small all-reduce.

    Every later decision is a function of that.

    Comm:  an all-reduce of six numbers over the world
    """
    sums = engine.forward_backward(micro_batches)
    flags = float(wants_stop), float(any(batch.replaced for batch in micro_batches))
    values = (sums.loss, sums.z_loss, sums.tokens, sums.grad_norm_squared, *flags)
    vector = torch.tensor(values, dtype=torch.float64, device=mesh.device)
    loss, z_loss, tokens, squared, stop, replaced = all_reduce(vector, mesh.world).tolist()
    valid = max(tokens, 1.0)
    # The engine divided by the batch's nominal token count; labels that are ignored make it fewer.
    correction = config.tokens_per_step / valid
    norm = correction * math.sqrt(squared) if squared >= 0 else math.nan
    return Measured(loss / valid, z_loss / valid, norm, int(tokens), correction, stop > 0, replaced > 0, sums)


class Meter:
    """Speed, utilisation and goodput of a run from `start` on."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self._config = config
        # The peak is that of 16-bit products, which no product in fp32 can come near.
        peak = peak_flops(mesh.device) if config.train.precision != "fp32" else None
        self._peak = peak * mesh.size if peak else None
        self.start()

    def start(self) -> None:
        """Begin to count."""
        self._started = time.perf_counter()
        self._productive_s = 0.0

    def record(self, report: StepReport, seq_len: int, step_s: float, wait_s: float) -> dict[str, Any]:
        """A step's values, times in seconds.

        mfu is a share of the peak, null in fp32 and on a chip whose peak is unknown; goodput the share of the
        time since the start that went into steps that were applied.
        """
        self._productive_s += step_s if report.is_applied else 0.0
        per_s = self._config.tokens_per_step / step_s
        flops, peak = token_flops(self._config.model, seq_len), self._peak
        return {
            "loss": report.loss,
            "z_loss": report.z_loss,
            "grad_norm": report.grad_norm,
            "seq_len": seq_len,
            "tokens_per_s": round(per_s, 1),
            "mfu": per_s * flops.strict / peak if peak else None,
            "mfu_non_causal": per_s * flops.non_causal / peak if peak else None,
            "goodput": round(self._productive_s / (time.perf_counter() - self._started), 4),
            "step_s": round(step_s, 4),
            "data_wait_s": round(wait_s, 4),
            "events": _events(report),
        }


def _events(report: StepReport) -> list[str]:
    events = ["replaced"] if report.has_replaced else []
    if report.cause == "hardware":
        events.append("hardware")
    return events if report.is_applied else [*events, "overflow" if report.is_overflow else "skip"]
