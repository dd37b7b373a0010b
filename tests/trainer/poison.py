"""Runs that meet bad batches, and all that can be compared of two runs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from megalite.checkpoint.history import Rollback
from megalite.config import Config
from megalite.data.batch import Batch
from megalite.engines.engine import StepSums
from megalite.log import read_json_lines
from megalite.parallel.mesh import Mesh
from megalite.resilience.preempt import PreemptionFlag
from megalite.trainer import Trainer
from tests.trainer.runs import curve, lay_out, metrics

BATCH = 24  # samples a step
SHORT = ["train.steps=24", "resilience.rewind_steps=4", "resilience.skip_steps=8"]
SHORT += ["checkpoint.snapshots_kept=3"]


def poison(trainer: Trainer, bad: range, how: str) -> None:
    """Have the batches that hold a sample of `bad` come out not finite, or wild, whatever the weights."""
    compute = trainer.engine.forward_backward

    def poisoned(batches: list[Batch]) -> StepSums:
        sums = compute(batches)
        if not any(sample in bad for batch in batches for sample in batch.sample_ids.tolist()):
            return sums
        if how == "nan":
            return replace(sums, loss=math.nan)
        return replace(sums, loss=2 * sums.loss, grad_norm_squared=400 * sums.grad_norm_squared)

    trainer.engine.forward_backward = poisoned  # type: ignore[method-assign]


def failing(config: Config, mesh: Mesh, *steps: set[int]) -> Trainer:
    """A run whose n-th life, from one rollback to the next, fails at the n-th of these sets of steps."""
    trainer = Trainer(config, mesh)
    compute, lives = trainer.engine.forward_backward, list(steps)

    def erring(batches: list[Batch]) -> StepSums:
        sums = compute(batches)
        life = len(trainer.recovery.ladder.rollbacks)
        return replace(sums, loss=math.nan) if life < len(lives) and trainer.step + 1 in lives[life] else sums

    trainer.engine.forward_backward = erring  # type: ignore[method-assign]
    return trainer


def state_of(trainer: Trainer) -> list[Any]:
    """Every byte of what a checkpoint would keep, as values that can be sent between processes."""
    parts = sorted(trainer.engine.state_slices(), key=lambda part: (part.kind, part.name, part.start))
    return [(part.kind, part.name, part.start, part.values.detach().clone().tolist()) for part in parts]


def run(mesh: Mesh, config: Config, bad: list[range], how: str, skipped: list[tuple[int, int]]) -> Any:
    """Train on poisoned data, or without `skipped`; the curve and the state at the end."""
    trainer = Trainer(config, lay_out(mesh, config))
    for samples in bad:
        poison(trainer, samples, how)
    trainer.loader.skip(skipped)
    trainer.fit(PreemptionFlag())
    return curve(metrics(Path(config.run_dir))), state_of(trainer)


def rollbacks(run_dir: Path) -> list[Rollback]:
    """Those of a run's ledger."""
    return [
        Rollback.from_json(e) for e in read_json_lines(run_dir / "ledger.jsonl") if e["event"] == "rollback"
    ]
