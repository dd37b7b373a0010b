"""Runs that meet bad batches: left out, rolled back, and then bit-equal to a run that never had them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalite.checkpoint.history import Rollback
from megalite.cli import main
from megalite.config import Config
from megalite.data.batch import IGNORE, Batch
from megalite.engines.engine import StepSums
from megalite.engines.native import NativeEngine
from megalite.errors import CheckpointError, ConfigError, DivergedError
from megalite.log import read_json_lines
from megalite.parallel.mesh import Mesh
from megalite.resilience.preempt import PreemptionFlag
from megalite.trainer import Trainer
from tests.daily import one_a_day
from tests.ranks import run_ranks
from tests.trainer.poison import BATCH, SHORT, poison, rollbacks, run
from tests.trainer.runs import lay_out, metrics, tiny, train


def batches(first: int, last: int) -> range:
    """The samples of the steps `first` to `last`, where none was left out before."""
    return range((first - 1) * BATCH, last * BATCH)


@pytest.mark.parametrize(
    ("world", "layout"),
    one_a_day(
        (2, ["mesh.zero_stage=2", "checkpoint.every_steps=4"]),
        (1, []),
        (1, ["checkpoint.snapshot_every_steps=3"]),
        (1, ["checkpoint.every_steps=4", "train.precision=bf16"]),
        (1, ["checkpoint.every_steps=4", "train.precision=fp16"]),
        (2, ["checkpoint.snapshot_every_steps=3"]),
        (2, ["mesh.zero_stage=3", "checkpoint.snapshot_every_steps=5"]),
        (2, ["mesh.tp=2", "checkpoint.every_steps=4", "mesh.sequence_parallel=true"]),
        (2, ["mesh.pp=2", "checkpoint.snapshot_every_steps=3"]),
    ),
    ids=str,
)
def test_after_a_rollback_the_run_is_one_that_never_had_the_batches(
    root: Path,
    world: int,
    layout: list[str],
) -> None:
    """Back to a snapshot, to a checkpoint, to the seed; on every way of dividing a model."""
    common = [*SHORT, "train.micro_batch_size=12", "train.eval_samples=8", *layout]
    config = tiny(root, *common)
    found = run_ranks(run, world, config, [batches(13, 16)], "nan", [])
    (rollback,) = rollbacks(root / "run")
    assert (rollback.onset, rollback.detected) == (13, 14)
    assert rollback.to_step <= 12 - 4
    assert rollback.skipped[0] <= batches(13, 16)[0] <= batches(13, 16)[-1] < rollback.skipped[1]
    oracle = tiny(root, *common, f"run_dir={root}/oracle")
    assert found == run_ranks(run, world, oracle, [], "", [rollback.skipped])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_goes_back_too(root: Path, stage: int) -> None:
    layout = ["mesh.zero_engine=deepspeed", f"mesh.zero_stage={stage}", "checkpoint.snapshot_every_steps=3"]
    common = [*SHORT, "train.micro_batch_size=12", "train.eval_samples=8", *layout]
    found = run_ranks(run, 2, tiny(root, *common), [batches(13, 16)], "nan", [], timeout_s=180)
    (rollback,) = rollbacks(root / "run")
    oracle = tiny(root, *common, f"run_dir={root}/oracle")
    assert found == run_ranks(run, 2, oracle, [], "", [rollback.skipped], timeout_s=180)


@pytest.mark.slow
def test_a_wild_spike_and_a_second_one(root: Path, alone: Mesh) -> None:
    """Refused against what healthy steps had before, both, and both left out."""
    common = ["train.steps=140", "resilience.rewind_steps=10", "resilience.skip_steps=12", "optim.lr=1e-3"]
    common += ["checkpoint.snapshot_every_steps=20", "train.micro_batch_size=24", "train.eval_samples=8"]
    first, second = batches(90, 93), batches(120, 121)
    found = run(alone, tiny(root, *common), [first, second], "wild", [])
    one, two = rollbacks(root / "run")
    assert (one.onset, one.detected) == (90, 91)
    assert one.to_step <= 79
    assert two.skipped[0] <= second[0] <= second[-1] < two.skipped[1]
    assert found == run(
        alone, tiny(root, *common, f"run_dir={root}/oracle"), [], "", [one.skipped, two.skipped]
    )


@pytest.mark.slow
def test_less_than_asked_is_gone_back_before_all_is_lost(root: Path, alone: Mesh) -> None:
    """No state is as old as it should be: the oldest from before the spike, not the seed."""
    common = [*SHORT, "checkpoint.snapshot_every_steps=2", "checkpoint.snapshots_kept=2"]
    found = run(alone, tiny(root, *common), [batches(13, 16)], "nan", [])
    (rollback,) = rollbacks(root / "run")
    assert rollback.to_step == 10
    assert found == run(alone, tiny(root, *common, f"run_dir={root}/oracle"), [], "", [rollback.skipped])


def test_one_bad_batch_costs_that_batch_and_no_more(root: Path, alone: Mesh) -> None:
    common = ["train.steps=12", "optim.schedule=constant", "optim.warmup_steps=0"]
    found, state = run(alone, tiny(root, *common), [batches(6, 6)], "nan", [])
    assert rollbacks(root / "run") == []
    oracle = tiny(root, *common, "train.steps=11", f"run_dir={root}/oracle")
    kept, same = run(alone, oracle, [], "", [(batches(6, 6)[0], batches(6, 6)[-1] + 1)])
    assert found[:5] + found[6:] == kept
    assert state == same


@pytest.mark.slow
def test_steps_without_a_label_are_no_spike(root: Path, alone: Mesh) -> None:
    trainer = Trainer(tiny(root, *SHORT), alone)
    gather = trainer.loader._gather

    def unlabelled(ids: Any, *args: Any, **options: Any) -> Batch:
        batch = gather(ids, *args, **options)
        return (
            replace(batch, labels=np.full_like(batch.labels, IGNORE)) if ids[0] in batches(4, 16) else batch
        )

    trainer.loader._gather = unlabelled  # type: ignore[method-assign]
    trainer.fit(PreemptionFlag())
    assert rollbacks(root / "run") == []
    assert trainer.engine.applied_steps == 24 - 13
    told = [event for event in read_json_lines(root / "run/ledger.jsonl") if event["event"] == "skip"]
    assert [(event["step"], event["cause"]) for event in told] == [(n, "no labels") for n in range(4, 17)]


@pytest.mark.slow
def test_samples_left_out_by_hand(root: Path, alone: Mesh) -> None:
    """Ranges ahead of a run are left out, those behind it are refused."""
    plain, _ = run(alone, tiny(root, "train.steps=6", f"run_dir={root}/a"), [], "", [])
    other, _ = run(
        alone, tiny(root, "train.steps=6", "data.skip=[[72, 96]]", f"run_dir={root}/b"), [], "", []
    )
    assert plain[:3] == other[:3]
    assert plain[3] != other[3]
    assert other == run(alone, tiny(root, "train.steps=6", f"run_dir={root}/c"), [], "", [(72, 96)])[0]
    run(alone, tiny(root, "train.steps=8", "data.skip=[[144, 168]]", f"run_dir={root}/a"), [], "", [])
    with pytest.raises(ConfigError, match=r"data.skip=\[\(0, 24\)\] leaves out samples up to 215"):
        Trainer(tiny(root, "train.steps=9", "data.skip=[[0, 24]]", f"run_dir={root}/a"), alone)


@pytest.mark.slow
def test_a_rollback_to_before_a_change_of_the_batch_size(root: Path, alone: Mesh) -> None:
    """Steps before it had other samples; what was read stays read, and the bad batches are left out."""
    common = [*SHORT, "resilience.skip_steps=12", "checkpoint.every_steps=4", "checkpoint.keep_last=9"]
    common += ["checkpoint.snapshot_every_steps=0"]
    train(alone, tiny(root, *common, "train.steps=12"))
    trainer = Trainer(tiny(root, *common, "train.global_batch_size=48"), alone)
    bad = range(12 * 24 + 2 * 48, 12 * 24 + 4 * 48)
    poison(trainer, bad, "nan")
    trainer.fit(PreemptionFlag())
    (rollback,) = rollbacks(root / "run")
    assert rollback.to_step == 8
    assert rollback.skipped == (8 * 24, 8 * 24 + 12 * 48)
    assert trainer.step == 24


@pytest.mark.slow
def test_killed_between_the_ledger_and_the_rollback(root: Path, alone: Mesh) -> None:
    """The ledger has the line, nothing else has happened; newer checkpoints lie there to mislead."""
    common = [*SHORT, "checkpoint.every_steps=4", "checkpoint.keep_last=9"]
    trainer = Trainer(tiny(root, *common), alone)
    poison(trainer, batches(13, 16), "nan")

    def killed(*_: Any) -> None:
        raise SystemExit(9)

    trainer._restore = killed  # type: ignore[method-assign]
    with pytest.raises(SystemExit):
        trainer.fit(PreemptionFlag())
    (rollback,) = rollbacks(root / "run")
    assert (root / "run/checkpoints/step_00000012").exists()
    assert rollback.to_step == 8
    found = run(alone, tiny(root, *common), [batches(13, 16)], "nan", [])
    assert rollbacks(root / "run") == [rollback]
    oracle = tiny(root, *common, f"run_dir={root}/oracle")
    assert found == run(alone, oracle, [], "", [rollback.skipped])


def go_back_on_a_full_disk(mesh: Mesh, config: Config) -> int:
    """The step this rank ends at."""
    trainer = Trainer(config, lay_out(mesh, config))
    poison(trainer, batches(13, 16), "nan")
    commit = trainer.log.commit

    def on_a_full_disk(kind: str, step: int, **details: Any) -> None:
        if kind == "rollback" and trainer.log._ledger is not None:
            trainer.log._ledger._file = open("/dev/full", "w")
        commit(kind, step, **details)

    trainer.log.commit = on_a_full_disk  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=r"cannot write .*ledger.jsonl: No space left on device"):
        trainer.fit(PreemptionFlag())
    return trainer.step


def test_a_rollback_that_cannot_be_written_down_is_not_done(root: Path) -> None:
    config = tiny(root, *SHORT, "train.micro_batch_size=12")
    assert run_ranks(go_back_on_a_full_disk, 2, config) == [14, 14]


@pytest.mark.slow
def test_a_run_that_cannot_be_helped_ends_with_a_report(root: Path, alone: Mesh) -> None:
    config = tiny(root, *SHORT, "checkpoint.every_steps=4", "resilience.max_rollbacks_per_1000=2")
    trainer = Trainer(config, alone)
    poison(trainer, range(12 * BATCH, 10**6), "nan")
    with pytest.raises(DivergedError, match=r"2 rollbacks within 1000 steps.*diverged\.md") as caught:
        trainer.fit(PreemptionFlag())
    assert caught.value.exit_code == 77
    report = (root / "run/diverged.md").read_text()
    assert report.count("- spike at step") == 2
    assert "The best is that of step" in report
    assert "synthetic  doc-" in report  # source and name of what was read


@pytest.mark.parametrize("line", ['{"event": "rollback"}', '{"event": "rollback", "skipped": [1, "x"]}'])
def test_a_ledger_that_was_tampered_with_is_named(root: Path, alone: Mesh, line: str) -> None:
    run(alone, tiny(root, "train.steps=3"), [], "", [])
    with (root / "run/ledger.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(CheckpointError, match=r"ledger\.jsonl has a rollback that is not one"):
        Trainer(tiny(root, "train.steps=4"), alone)


def test_what_any_rollback_left_out_stays_left_out(root: Path, alone: Mesh) -> None:
    """Without a checkpoint that knows of them, too."""
    told = [
        Rollback(n, n + 1, "wild", 0, (24 * n, 24 * n + 24)).to_json() | {"event": "rollback"} for n in (3, 9)
    ]
    (root / "run").mkdir()
    (root / "run/ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
    assert Trainer(tiny(root), alone).loader.skips.ranges == ((72, 96), (216, 240))


@pytest.mark.slow
def test_earlier_rollbacks_are_told_at_the_start(
    root: Path, alone: Mesh, capsys: pytest.CaptureFixture[str]
) -> None:
    run(alone, tiny(root, *SHORT), [batches(13, 16)], "nan", [])
    capsys.readouterr()
    Trainer(tiny(root, *SHORT), alone)
    assert "note: ledger.jsonl has rollbacks; samples [(192, 384)] stay left out" in capsys.readouterr().err


@pytest.mark.slow
def test_the_spikes_command(
    root: Path, alone: Mesh, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = [*SHORT, "checkpoint.every_steps=4", f"run_dir={root}/run"]
    run(alone, tiny(root, *common), [batches(13, 16)], "nan", [])
    assert main(["spikes", str(root / "run"), "--documents", "3"]) == 0
    said = capsys.readouterr().out
    assert "step 13  left out: loss not finite" in said
    assert "rollback 1: spike at step 13" in said
    assert said.count("synthetic  doc-") == 3
    assert "loss      " in said
    # The data were never at fault here: with other weights the window is like its neighbours.
    assert main(["spikes", str(root / "run"), "--replay", "1"]) == 0
    said = capsys.readouterr().out
    assert "bad moment" in said
    assert said.count("in the window: samples") == 8
    assert main(["spikes", str(root / "run"), "--replay", "2"]) == 2
    compute = NativeEngine.forward_backward

    def wild(engine: NativeEngine, micro: list[Batch]) -> StepSums:
        sums = compute(engine, micro)
        return replace(sums, loss=2 * sums.loss) if micro[0].sample_ids[0] in batches(13, 16) else sums

    monkeypatch.setattr(NativeEngine, "forward_backward", wild)
    assert main(["spikes", str(root / "run"), "--replay", "1"]) == 0
    assert "bad data: 4 of 8 batches" in capsys.readouterr().out


@pytest.mark.slow
def test_the_learning_rate_is_lower_after_a_rollback_when_asked(root: Path, alone: Mesh) -> None:
    config = tiny(
        root,
        *SHORT,
        "optim.schedule=constant",
        "optim.warmup_steps=0",
        "resilience.calm_lr_factor=0.5",
        "resilience.calm_steps=4",
    )
    run(alone, config, [batches(13, 16)], "nan", [])
    rates = [record["lr"] for record in metrics(root / "run")]
    (rollback,) = rollbacks(root / "run")
    calm = range(rollback.to_step, rollback.detected + 4)
    assert rates == [1e-2 * (0.5 if step in calm else 1.0) for step in range(24)]
