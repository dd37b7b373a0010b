"""A gradient that is not finite, in one element of one bucket, of one micro-batch, on one rank.

All ranks must see it in that step and leave the step out, and the run must be bit for bit one without that
batch, however the model is divided.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import NamedTuple

import pytest
from torch import Tensor

from megalite.config import Config
from megalite.data.batch import Batch
from megalite.engines.engine import StepSums
from megalite.engines.native import NativeEngine
from megalite.log import read_json_lines
from megalite.meter import StepReport
from megalite.parallel.mesh import Mesh
from megalite.resilience.preempt import PreemptionFlag
from megalite.trainer import Trainer
from tests.ranks import run_ranks
from tests.trainer.runs import curve, lay_out, metrics, tiny

BUCKETS = 10  # as many as any rank has, or more
VALUES = (math.nan, math.inf, -math.inf)


class Found(NamedTuple):
    """What a rank has seen of a run: which steps moved the weights, and a digest of all it has at the end."""

    is_applied: list[bool]
    curve: list[tuple[float, float]]
    state: dict[str, str]
    applied_steps: int


def places(trainer: Trainer) -> list[str]:
    """A parameter of each of this rank's buckets; all parameters where DeepSpeed makes them."""
    if isinstance(trainer.engine, NativeEngine):
        return [bucket.slots[-1].name for bucket in trainer.engine.optimizer.layout.buckets]
    return [name for name, _ in trainer.engine.model.named_parameters()]  # type: ignore[attr-defined]


def is_good(step: int) -> bool:
    """Of three steps two go wrong; the first does not."""
    return step % 3 == 0


def break_gradients(trainer: Trainer) -> None:
    """In each bad step one element goes wrong: on each rank and in each of its buckets in turn, in one
    micro-batch or another."""
    compute, names = trainer.engine.forward_backward, places(trainer)

    def broken(batches: list[Batch]) -> StepSums:
        case = 2 * (trainer.step // 3) + trainer.step % 3 - 1
        place, rank = divmod(case, trainer.mesh.size)
        if is_good(trainer.step) or rank != trainer.mesh.rank:
            return compute(batches)
        came = 0

        def hook(gradient: Tensor) -> Tensor:
            nonlocal came
            came += 1
            if came != 1 + case % len(batches):
                return gradient
            wrong = gradient.clone()
            wrong.view(-1)[case % gradient.numel() - 1] = VALUES[case % len(VALUES)]
            return wrong

        name = names[place * len(names) // BUCKETS]
        parameter = trainer.engine.model.get_parameter(name)  # type: ignore[attr-defined]
        handle = parameter.register_hook(hook)
        sums = compute(batches)
        handle.remove()
        assert came == len(batches), f"{name} got {came} gradients of {len(batches)} micro-batches"
        return sums

    trainer.engine.forward_backward = broken  # type: ignore[method-assign]


def train(mesh: Mesh, config: Config, is_broken: bool, skipped: list[tuple[int, int]]) -> Found:
    """Train with gradients that go wrong, or without these samples."""
    trainer = Trainer(config, lay_out(mesh, config))
    trainer.loader.skip(skipped)
    if is_broken:
        assert len(places(trainer)) <= BUCKETS or config.mesh.zero_engine == "deepspeed"
        break_gradients(trainer)
    step, is_applied = trainer.train_step, []

    def watched(batches: list[Batch], lr: float, wants_stop: bool = False) -> StepReport:
        report = step(batches, lr, wants_stop)
        is_applied.append(report.is_applied)
        return report

    trainer.train_step = watched  # type: ignore[method-assign]
    trainer.fit(PreemptionFlag())
    kept = trainer.engine.snapshot().tensors
    state = {name: hashlib.sha256(values.numpy().tobytes()).hexdigest() for name, values in kept.items()}
    return Found(is_applied, curve(metrics(Path(config.run_dir))), state, trainer.engine.applied_steps)


EVERY_DAY = ("", "mesh.zero_stage=2")
LAYOUTS = [
    (1, ""),
    (2, "mesh.zero_stage=0"),
    (2, "mesh.zero_stage=1"),
    (2, "mesh.zero_stage=2"),
    (2, "mesh.zero_stage=3"),
    (2, "mesh.zero_stage=2 train.precision=bf16"),
    (2, "mesh.tp=2"),
    (2, "mesh.tp=2 mesh.sequence_parallel=true"),
    (2, "mesh.pp=2 model.tie_embeddings=true"),
    (2, "mesh.pp=2 mesh.pp_schedule=zero_bubble"),
    (4, "mesh.zero_stage=3 mesh.zero_shard_size=2 train.global_batch_size=8"),
    (4, "mesh.tp=4 mesh.zero_stage=0"),  # two ranks share each key head
    (4, "mesh.tp=2 mesh.zero_stage=1"),
    (4, "mesh.tp=2 mesh.zero_stage=3 mesh.sequence_parallel=true"),
    (4, "mesh.pp=2 mesh.zero_stage=2 model.tie_embeddings=true"),
    (4, "mesh.pp=2 mesh.tp=2 mesh.sequence_parallel=true"),
    (2, "mesh.zero_engine=deepspeed mesh.zero_stage=1"),
    (2, "mesh.zero_engine=deepspeed mesh.zero_stage=2"),
    (2, "mesh.zero_engine=deepspeed mesh.zero_stage=3"),
    (4, "mesh.zero_engine=deepspeed mesh.zero_stage=2 mesh.tp=2 mesh.sequence_parallel=true"),
]


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        pytest.param(world, keys, id=f"{world}-{keys}", marks=[pytest.mark.slow] * (keys not in EVERY_DAY))
        for world, keys in LAYOUTS
    ],
)
def test_one_bad_gradient_costs_its_batch_and_no_more(root: Path, world: int, layout: str) -> None:
    common = ["train.global_batch_size=4", "optim.schedule=constant", "optim.warmup_steps=0"]
    common += ["train.micro_batch_size=1", "resilience.max_rollbacks=0", "resilience.rerun_steps=false"]
    common += ["data.validation=[]", *layout.split()]
    steps = world * BUCKETS * 3 // 2 + 1
    config = tiny(root, *common, f"train.steps={steps}")
    found = run_ranks(train, world, config, True, [], timeout_s=240)
    good = [is_good(step) for step in range(steps)]
    assert [rank.is_applied for rank in found] == [good] * world
    batch = config.train.global_batch_size
    skipped = [(batch * step, batch * (step + 1)) for step in range(steps) if not is_good(step)]
    events = [event for event in read_json_lines(root / "run/ledger.jsonl") if event["event"] == "skip"]
    assert [tuple(event["samples"]) for event in events] == skipped
    assert [record["events"] == [] for record in metrics(root / "run")] == good
    oracle = tiny(root, *common, f"train.steps={sum(good)}", f"run_dir={root}/oracle")
    for rank, never in zip(
        found, run_ranks(train, world, oracle, False, skipped, timeout_s=240), strict=True
    ):
        assert rank.curve[::3] == never.curve
        assert (rank.state, rank.applied_steps) == (never.state, sum(good))
        # What went wrong is the gradient alone.
        assert all(loss > 0 and norm is None for step, (loss, norm) in enumerate(rank.curve) if step % 3)
