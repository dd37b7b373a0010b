"""What a rollback goes back to, and what is there after a kill or a stop in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megalite.checkpoint.commit import save
from megalite.checkpoint.retention import Retention
from megalite.checkpoint.store import open_checkpoint
from megalite.cli import main
from megalite.data.batch import Batch
from megalite.errors import DivergedError, PreemptedError
from megalite.log import read_json_lines
from megalite.meter import StepReport
from megalite.parallel.mesh import Mesh
from megalite.resilience.ladder import Spike
from megalite.resilience.preempt import PreemptionFlag
from megalite.trainer import Trainer
from tests.trainer.poison import BATCH, SHORT, failing, rollbacks
from tests.trainer.runs import curve, metrics, tiny, train


def stop_at(trainer: Trainer, step: int) -> None:
    """Train until asked to stop at this step, from which on it is asked."""
    train_step, flag = trainer.train_step, PreemptionFlag()

    def asked(batches: list[Batch], lr: float, wants_stop: bool) -> StepReport:
        flag._is_heard |= trainer.step == step - 1
        return train_step(batches, lr, flag._is_heard)

    trainer.train_step = asked  # type: ignore[assignment]
    with pytest.raises(PreemptedError):
        trainer.fit(flag)


OFTEN = [*SHORT, "checkpoint.keep_last=9", "checkpoint.snapshot_every_steps=0", "train.micro_batch_size=24"]


def test_a_checkpoint_of_a_future_that_was_left_is_not_gone_back_to(root: Path, alone: Mesh) -> None:
    """Step 11, saved on the way out, is no multiple of 4: no later save takes its place."""
    config = tiny(root, *OFTEN, "checkpoint.every_steps=4")
    stop_at(Trainer(config, alone), 11)
    failing(config, alone, {14, 15}, {20, 21}).fit(PreemptionFlag())
    assert (root / "run/checkpoints/step_00000011").exists()
    assert [rollback.to_step for rollback in rollbacks(root / "run")] == [8, 8]


def test_no_rollback_throws_a_whole_run_away(root: Path, alone: Mesh) -> None:
    """The only checkpoint is of the first step that failed."""
    config = tiny(root, *OFTEN, "checkpoint.every_steps=0")
    stop_at(failing(config, alone, {12}), 12)
    assert "loss" not in open_checkpoint(root / "run").meta  # it was none that compares
    resumed = failing(config, alone, {13})
    assert (resumed.step, resumed.engine.applied_steps) == (12, 11)
    resumed.fit(PreemptionFlag())
    (rollback,) = rollbacks(root / "run")
    assert (rollback.onset, rollback.to_step, rollback.skipped[0]) == (12, 12, 12 * BATCH)
    snapshots = ["checkpoint.snapshot_every_steps=4", "checkpoint.snapshots_kept=1", f"run_dir={root}/memory"]
    failing(tiny(root, *OFTEN, "checkpoint.every_steps=0", *snapshots), alone, {12, 13}).fit(PreemptionFlag())
    assert [rollback.to_step for rollback in rollbacks(root / "memory")] == [12]


def test_a_kill_after_a_rollback_to_memory_costs_no_more_than_another(root: Path, alone: Mesh) -> None:
    """The only checkpoint is of the future that was left; what was gone back to takes its place."""
    common = [*OFTEN, "checkpoint.every_steps=10", "checkpoint.keep_last=1", "checkpoint.asynchronous=false"]
    config = tiny(root, *common, "checkpoint.snapshot_every_steps=3")
    trainer = failing(config, alone, {13, 14})
    train_step = trainer.train_step

    def killed(*args: Any) -> StepReport:
        if trainer.step == 7 and rollbacks(root / "run"):
            raise SystemExit(9)
        return train_step(*args)

    trainer.train_step = killed  # type: ignore[method-assign]
    with pytest.raises(SystemExit):
        trainer.fit(PreemptionFlag())
    assert [rollback.to_step for rollback in rollbacks(root / "run")] == [6]
    assert Trainer(config, alone).step == 6


@pytest.mark.parametrize(
    ("damaged", "keys", "to_step"),
    [
        ([], [], 8),  # nearer than the snapshot of step 6
        ([8], [], 6),
        ([4, 8], ["checkpoint.snapshot_every_steps=0"], 12),  # nothing whole is old enough
    ],
)
def test_the_newest_state_that_is_old_enough_on_disk_or_in_memory(
    root: Path, alone: Mesh, damaged: list[int], keys: list[str], to_step: int
) -> None:
    common = [
        "checkpoint.every_steps=4",
        "checkpoint.snapshot_every_steps=6",
        "checkpoint.asynchronous=false",
    ]
    trainer = failing(tiny(root, *OFTEN, *common, *keys), alone, {14, 15})
    go_back = trainer._go_back

    def damaging(spike: Spike) -> None:
        for step in damaged:
            (root / f"run/checkpoints/step_{step:08d}/manifest.json").write_text("{}")
        go_back(spike)

    trainer._go_back = damaging  # type: ignore[method-assign]
    trainer.fit(PreemptionFlag())
    assert [rollback.to_step for rollback in rollbacks(root / "run")] == [to_step]


def test_a_run_that_gives_up_names_no_checkpoint_that_it_went_back_from(root: Path, alone: Mesh) -> None:
    """Step 12 has not been saved again since."""
    keys = ["checkpoint.every_steps=4", "resilience.max_rollbacks_per_1000=1"]
    with pytest.raises(DivergedError):
        failing(tiny(root, *OFTEN, *keys), alone, {14, 15}, {10, 11}).fit(PreemptionFlag())
    assert (root / "run/checkpoints/step_00000012").exists()
    assert "Checkpoints: step 4, step 8. The best" in (root / "run/diverged.md").read_text()


def test_what_a_second_spike_goes_back_to_is_left_by_another_way(root: Path, alone: Mesh) -> None:
    """It would come to the weights of the first way back again, if the samples were the same."""
    config = tiny(root, *OFTEN, "checkpoint.every_steps=1", "checkpoint.keep_last=30", "train.steps=30")
    failing(config, alone, {24, 25}, {25, 26}).fit(PreemptionFlag())
    first, second = rollbacks(root / "run")
    assert (first.to_step, second.to_step) == (19, 16)
    before = {r["step"]: r["loss"] for r in read_json_lines(root / "run/spikes/rollback_0002.jsonl")}
    assert before[17] != metrics(root / "run")[16]["loss"]


@pytest.mark.slow
def test_being_asked_to_stop_at_the_step_that_makes_it_a_spike_changes_nothing(
    root: Path, alone: Mesh
) -> None:
    common = [*OFTEN, "checkpoint.every_steps=4"]
    failing(tiny(root, *common, f"run_dir={root}/whole"), alone, {13, 14}).fit(PreemptionFlag())
    stop_at(failing(tiny(root, *common), alone, {13, 14}), 14)
    assert sorted(path.name for path in (root / "run/checkpoints").iterdir())[-1] == "step_00000009"
    assert curve(train(alone, tiny(root, *common))) == curve(metrics(root / "whole"))
    assert rollbacks(root / "run") == rollbacks(root / "whole")


def test_each_rollback_keeps_its_curve(root: Path, alone: Mesh) -> None:
    trainer = failing(tiny(root, *OFTEN, "checkpoint.every_steps=4"), alone, {13, 14}, {13, 14})
    trainer.fit(PreemptionFlag())
    told = [e for e in read_json_lines(root / "run/ledger.jsonl") if e["event"] == "rollback"]
    first, second = (read_json_lines(root / "run" / event["curve"]) for event in told)
    assert [event["detected"] for event in told] == [14, 14]
    assert first[-1]["grad_norm"] != second[-1]["grad_norm"]


def test_back_to_before_the_mixture_was_changed(
    root: Path, alone: Mesh, capsys: pytest.CaptureFixture[str]
) -> None:
    """To an imported model: the new mixture begins there, and what the old one drew is not guessed at."""
    both = f"data.sources=[{{path='{root}/valid'}}, {{path='{root}/train'}}]"
    config = tiny(root, *OFTEN, "checkpoint.every_steps=4", "train.steps=6")
    seed = Trainer(tiny(root, f"run_dir={root}/seed"), alone)
    kept = {key: value for key, value in seed._meta().items() if key not in ("loader", "recovery")}
    save(root / "run/checkpoints", 0, 0, seed.engine.state_slices, kept, alone, Retention())
    stop_at(failing(config, alone, {4, 5}), 5)
    again = tiny(root, *OFTEN, both)
    trainer = failing(again, alone, set(), {8, 9})
    assert trainer.loader.blend.origin > 0
    trainer.fit(PreemptionFlag())
    one, two = rollbacks(root / "run")
    assert (one.to_step, two.to_step) == (0, 0)
    assert trainer.loader.blend.origin == 0
    other = tiny(root, *OFTEN, f"data.sources=[{{path='{root}/train'}}]", "train.steps=26")
    Trainer(other, alone).fit(PreemptionFlag())
    assert main(["spikes", str(root / "run"), "--documents", "3"]) == 0
    assert "were drawn from another mixture than today's" in capsys.readouterr().out
    assert main(["spikes", str(root / "run"), "--replay", "1"]) == 2
    assert "where the mixture of sources became another" in capsys.readouterr().err
