"""Steps that are computed again: whether the data or a processor is to blame, and what follows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megalite.config import Config
from megalite.data.batch import Batch
from megalite.engines.engine import StepSums
from megalite.log import read_json_lines
from megalite.parallel.mesh import Mesh
from megalite.resilience.preempt import PreemptionFlag
from megalite.trainer import Trainer
from tests.ranks import run_ranks
from tests.trainer.poison import failing
from tests.trainer.runs import curve, lay_out, metrics, tiny


def disturbed(mesh: Mesh, config: Config, wrong: list[float]) -> Any:
    """A run in whose 5th step the last rank computes these factors of its loss, one a try."""
    trainer = Trainer(config, lay_out(mesh, config))
    compute, left = trainer.engine.forward_backward, list(wrong)

    def erring(batches: list[Batch]) -> StepSums:
        sums = compute(batches)
        if trainer.step == 4 and mesh.rank == mesh.size - 1 and left:
            return replace(sums, loss=sums.loss * left.pop(0))
        return sums

    trainer.engine.forward_backward = erring  # type: ignore[method-assign]
    trainer.fit(PreemptionFlag())
    return curve(metrics(Path(config.run_dir)))


def test_an_error_that_goes_away_is_the_hardware_s_and_costs_nothing(root: Path) -> None:
    common = ["train.steps=8", "train.micro_batch_size=12", "mesh.pp=2"]
    found = run_ranks(disturbed, 2, tiny(root, *common), [math.nan])
    clean = run_ranks(disturbed, 2, tiny(root, *common, f"run_dir={root}/clean"), [])
    assert found == clean
    (event,) = [e for e in read_json_lines(root / "run/ledger.jsonl") if e["event"] == "hardware"]
    assert (event["cause"], event["ranks"], event["step"]) == ("transient", [1], 5)
    assert [r["events"] for r in metrics(root / "run")][4] == ["hardware"]


def test_only_a_finite_loss_is_an_overflow(root: Path, alone: Mesh) -> None:
    """That is computed once; a loss that is not finite once more, for no scale helps it."""
    common = ["train.precision=fp16", "train.steps=3", f"train.loss_scale={2.0**28}"]
    trainer = failing(tiny(root, *common, "train.micro_batch_size=24"), alone, {2})
    computed, forward_backward = [], trainer.engine.forward_backward

    def counted(batches: Sequence[Batch]) -> StepSums:
        computed.append(trainer.step + 1)
        return forward_backward(batches)

    trainer.engine.forward_backward = counted  # type: ignore[method-assign]
    trainer.fit(PreemptionFlag())
    records = metrics(root / "run")
    assert [record["events"] for record in records] == [["overflow"], ["skip"], ["overflow"]]
    assert [record["lr"] for record in records] == pytest.approx(
        [1e-2 / 3, 2e-2 / 3, 1e-2]
    )  # warms up all the same
    assert computed == [1, 2, 2, 3]


def test_an_error_that_stays_ends_the_run_and_names_the_rank(root: Path) -> None:
    config = tiny(root, "train.steps=8", "train.micro_batch_size=12")
    with pytest.raises(Exception, match="persistent error on rank 1; take its host out"):
        run_ranks(disturbed, 2, config, [math.nan, 3.0, 2.0])
