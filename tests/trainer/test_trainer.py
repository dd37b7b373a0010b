"""The loop: exact resume, skipped steps, evaluation, preemption, and what a user may get wrong."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from megalite.checkpoint.store import open_checkpoint
from megalite.config import Config
from megalite.data.batch import Batch
from megalite.data.loader import Share
from megalite.engines.native import NativeEngine
from megalite.errors import CheckpointError, DivergedError, PreemptedError
from megalite.log import read_json_lines
from megalite.meter import StepReport
from megalite.parallel.mesh import Mesh, build_mesh, close_mesh
from megalite.resilience.preempt import PreemptionFlag
from megalite.trainer import Trainer
from tests.daily import one_a_day
from tests.ranks import join_ranks, run_ranks, spawn_ranks
from tests.trainer.poison import poison
from tests.trainer.runs import apart, curve, lay_out, losses, metrics, tiny, train


@pytest.mark.slow
def test_loss_falls_below_what_frequencies_alone_allow(root: Path, alone: Mesh) -> None:
    records = train(alone, tiny(root, "train.steps=60", "train.eval_every_steps=30"))
    assert records[-1]["val_loss"] < 2.5 < 4.1 < records[0]["loss"]  # 64 byte values: ln 64 = 4.16
    assert [r["step"] for r in records if "val_loss" in r] == [30, 60]
    assert records[-1]["position"] == 60 * 24


@pytest.mark.slow
def test_each_validation_dataset_has_a_loss_of_its_own(root: Path, alone: Mesh) -> None:
    common = ["train.steps=3", "train.eval_every_steps=3", "train.eval_samples=12"]
    sets = [f"{{path='{root}/valid'}}", f"{{path='{root}/train', weight=3}}"]
    both = f"data.validation=[{','.join(sets)}]"
    (*_, record) = train(alone, tiny(root, *common, both))
    losses, counts = [], []
    for number, (entry, samples) in enumerate(zip(sets, (3, 9), strict=True)):
        own = [f"data.validation=[{entry}]", f"train.eval_samples={samples}", f"run_dir={root}/{number}"]
        config = tiny(root, *common, *own)
        (*_, single) = train(alone, config)
        assert "val_losses" not in single
        validation = Trainer(config, alone).validation
        assert validation is not None
        losses.append(single["val_loss"])
        counts.append(int((validation.batch(range(samples)).labels >= 0).sum()))
    assert record["val_losses"] == pytest.approx(losses, rel=1e-6)
    assert record["val_loss"] == pytest.approx(float(np.dot(losses, counts)) / sum(counts), rel=1e-6)
    ranks = run_ranks(train, 2, tiny(root, *common, both, f"run_dir={root}/two"))[0]
    assert ranks[-1]["val_losses"] == pytest.approx(losses, rel=1e-5)


def test_validation_without_a_label_has_no_loss(
    root: Path, alone: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the lowest one, which `checkpoint.keep_best` would keep for ever."""
    trainer = Trainer(tiny(root, "train.steps=4", "train.eval_every_steps=4"), alone)
    monkeypatch.setattr(trainer.engine, "evaluate", lambda batches: (0.0, 0.0))
    trainer.fit(PreemptionFlag())
    assert metrics(root / "run")[-1]["val_loss"] is None
    assert "val_loss" not in open_checkpoint(root / "run").meta


@pytest.mark.parametrize(("has_bf16", "notes"), [(True, 0), (False, 1)])
def test_bf16_on_a_processor_without_it_is_worth_a_note(
    root: Path,
    alone: Mesh,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    has_bf16: bool,
    notes: int,
) -> None:
    monkeypatch.setattr("megalite.trainer.has_products", lambda device, precision: has_bf16)
    Trainer(tiny(root, "train.precision=bf16"), alone)
    assert capsys.readouterr().err.count("use train.precision=fp32 here") == notes


def test_tokens_are_counted_exactly(root: Path, alone: Mesh) -> None:
    config = tiny(root, "train.steps=3")
    loader = Trainer(config, alone).loader
    valid = [int((loader.batch(range(24 * step, 24 * (step + 1))).labels >= 0).sum()) for step in range(3)]
    assert 0 < valid[0] < 24 * 32  # some labels lie on a document's edge
    assert [r["tokens"] for r in train(alone, config)] == [sum(valid[: n + 1]) for n in range(3)]


@pytest.mark.parametrize("precision", one_a_day("fp32", "bf16"))
def test_resume_is_bit_identical(root: Path, alone: Mesh, precision: str) -> None:
    common = [
        f"train.precision={precision}",
        "train.steps=12",
        "model.dropout=0.1",
        "checkpoint.every_steps=5",
    ]
    whole = curve(train(alone, tiny(root, *common, f"run_dir={root}/whole")))
    trainer = Trainer(tiny(root, *common), alone)
    trainer.fit(PreemptionFlag())
    for step in (12, 10):  # as after a kill: the last two saves never happened
        folder = root / "run/checkpoints" / f"step_{step:08d}"
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    resumed = train(alone, tiny(root, *common))
    assert curve(resumed) == whole
    assert [r["step"] for r in resumed] == list(range(1, 13))


TP2, TP4 = ["mesh.tp=2"], ["mesh.tp=4"]
SPLIT_STREAM = ["mesh.tp=2", "mesh.sequence_parallel=true", "mesh.zero_stage=0"]
RESHAPES: list[tuple[int, list[str], int, list[str]]] = [
    (1, [], 2, []),
    (2, [], 1, []),
    (2, [], 4, ["mesh.zero_stage=0"]),
    (4, [], 3, []),
    (1, [], 2, TP2),
    (2, TP2, 1, []),
    (4, TP2, 2, []),
    (4, TP4, 4, TP2),
    (4, SPLIT_STREAM, 4, TP4),
    (3, [], 4, SPLIT_STREAM),
    (2, ["mesh.zero_stage=3"], 4, ["mesh.zero_stage=2", "mesh.zero_shard_size=2"]),
    (4, ["mesh.zero_stage=2", "mesh.tp=2"], 3, ["mesh.zero_stage=3"]),
    (2, ["mesh.pp=2"], 1, []),
    (4, ["mesh.pp=2", "mesh.tp=2"], 2, ["mesh.zero_stage=3"]),
    (2, TP2, 4, ["mesh.pp=2", "mesh.zero_stage=3"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "written", "after", "read"), RESHAPES, ids=str)
def test_resume_at_another_layout(
    root: Path, alone: Mesh, before: int, written: list[str], after: int, read: list[str]
) -> None:
    common = ["train.steps=10", "train.micro_batch_size=6", "model.num_layers=2"]
    whole = curve(train(alone, tiny(root, f"run_dir={root}/whole", *common)))
    common += ["train.micro_batch_size=2"]
    half = tiny(root, *common, *written, "checkpoint.every_steps=5", "checkpoint.keep_last=1")
    run_ranks(_stop_after, before, half, 5)
    resumed = curve(run_ranks(train, after, tiny(root, *common, *read))[0])
    assert apart(resumed, whole) < 1e-5


def _stop_after(mesh: Mesh, config: Config, steps: int) -> None:
    """Train and save as the run that is killed after `steps` would have."""
    trainer = Trainer(config, lay_out(mesh, config))
    step = trainer.train_step

    def stopping(batches, lr, wants_stop=False):  # type: ignore[no-untyped-def]
        return step(batches, lr, trainer.step == steps - 1)

    trainer.train_step = stopping  # type: ignore[method-assign]
    with pytest.raises(PreemptedError):
        trainer.fit(PreemptionFlag())


@pytest.mark.parametrize(
    ("world", "layout"),
    one_a_day((2, ["mesh.zero_stage=3"]), (1, []), (2, ["mesh.tp=2"]), (2, ["mesh.pp=2"])),
    ids=str,
)
def test_fp16_lowers_its_scale_on_all_ranks_until_no_gradient_overflows(
    root: Path, world: int, layout: list[str]
) -> None:
    common = ["train.precision=fp16", "train.steps=14", "train.micro_batch_size=12", *layout]
    common += ["resilience.max_skipped_steps=0", f"train.loss_scale={2.0**28}", "train.loss_scale_window=3"]
    records = run_ranks(train, world, tiny(root, *common))[0]
    scales = [r["loss_scale"] for r in records]
    overflows = [r["events"] == ["overflow"] for r in records]
    assert overflows[:3] == [True] * 3
    assert scales[0] == 2.0**27
    assert all(b == a / 2 for a, b, over in zip(scales, scales[1:], overflows[1:], strict=False) if over)
    first_good = overflows.index(False)
    assert records[first_good]["tokens"] > 0 == records[first_good - 1]["tokens"]
    assert any(b == 2 * a for a, b in zip(scales, scales[1:], strict=False))  # and tries a larger one again
    assert records[-1]["loss"] < records[0]["loss"]


def test_a_wild_step_leaves_the_loss_scale_alone(root: Path, alone: Mesh) -> None:
    common = ["train.precision=fp16", "train.steps=3", "train.loss_scale=64", "resilience.rerun_steps=false"]
    trainer, verdicts = Trainer(tiny(root, *common), alone), iter(["healthy", "wild", "healthy"])
    trainer.recovery.detector.judge = lambda *_: next(verdicts)  # type: ignore[assignment, return-value]
    trainer.fit(PreemptionFlag())
    records = metrics(root / "run")
    assert [record["events"] for record in records] == [[], ["skip"], []]
    assert [record["loss_scale"] for record in records] == [64.0] * 3


@pytest.mark.slow
def test_the_loss_scale_survives_a_resume(root: Path, alone: Mesh) -> None:
    common = [
        "train.precision=fp16",
        "train.steps=10",
        f"train.loss_scale={2.0**28}",
        "train.loss_scale_window=2",
    ]
    whole = train(alone, tiny(root, *common, f"run_dir={root}/whole"))
    _stop_after(alone, tiny(root, *common), 6)
    resumed = train(alone, tiny(root, *common))
    assert curve(resumed) == curve(whole)
    assert [r["loss_scale"] for r in resumed] == [r["loss_scale"] for r in whole]


def test_too_many_skipped_steps_end_the_run(root: Path, alone: Mesh) -> None:
    trainer = Trainer(tiny(root, "resilience.max_skipped_steps=2", "resilience.max_rollbacks=0"), alone)
    poison(trainer, range(2 * 24, 20 * 24), "nan")
    with pytest.raises(DivergedError, match="3 steps in a row"):
        trainer.fit(PreemptionFlag())
    assert DivergedError.exit_code == 77


def test_clipping_scales_the_update_and_reports_the_norm_before(root: Path, alone: Mesh) -> None:
    free = train(alone, tiny(root, "train.steps=3", "optim.grad_clip=0", f"run_dir={root}/free"))
    clipped = train(alone, tiny(root, "train.steps=3", "optim.grad_clip=1e-3", f"run_dir={root}/clipped"))
    assert curve(free)[0] == curve(clipped)[0]
    # AdamW forgives a constant factor, not the ε beside it: later steps tell the two apart.
    assert curve(free)[2] != curve(clipped)[2]


def _train_until_killed(config: Config) -> None:
    mesh = build_mesh(20)
    try:
        with PreemptionFlag() as flag:
            Trainer(config, mesh).fit(flag)
    except PreemptedError as error:
        raise SystemExit(error.exit_code) from None
    close_mesh(mesh)


def test_validation_leaves_the_gradients_alone(root: Path, alone: Mesh) -> None:
    """Of as many micro-batches as a step has, too."""
    trainer = Trainer(tiny(root), alone)
    engine, batches = trainer.engine, trainer.loader.micro_batches(0, Share(24, 2))
    assert isinstance(engine, NativeEngine)
    engine.forward_backward(batches)
    before = engine.optimizer.gradients.shard_values.clone()
    engine.evaluate(batches)
    assert torch.equal(engine.optimizer.gradients.shard_values, before)


def test_being_asked_to_stop_at_a_step_that_is_validated_saves_at_once(root: Path, alone: Mesh) -> None:
    every = ["train.eval_every_steps=2", "train.steps=6"]
    trainer, flag = Trainer(tiny(root, *every), alone), PreemptionFlag()
    train_step = trainer.train_step

    def asked(batches: list[Batch], lr: float, wants_stop: bool) -> StepReport:
        return train_step(batches, lr, wants_stop or trainer.step + 1 == 4)

    trainer.train_step = asked  # type: ignore[assignment]
    with pytest.raises(PreemptedError):
        trainer.fit(flag)
    assert [r["step"] for r in metrics(root / "run") if "val_loss" in r] == [2]
    assert [r["step"] for r in train(alone, tiny(root, *every)) if "val_loss" in r] == [2, 6]


def test_a_run_that_is_asked_to_stop_and_cannot_be_saved_says_so(
    root: Path, alone: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megalite.checkpoint.writer.save", Mock(side_effect=CheckpointError("no space")))
    flag = PreemptionFlag()
    flag._is_heard = True
    with pytest.raises(CheckpointError, match="no space"):
        Trainer(tiny(root), alone).fit(flag)


def stop_in_validation(mesh: Mesh, config: Config) -> tuple[list[dict[str, Any]], int]:
    """Ask the last rank to stop in the validation after step 4; what is left to read, the pieces computed."""
    trainer, flag, pieces = Trainer(config, mesh), PreemptionFlag(), []
    evaluate = trainer.engine.evaluate

    def heard(batches: Any) -> tuple[float, float]:
        pieces.append(trainer.step)
        flag._is_heard = trainer.step >= 4 and mesh.rank == mesh.size - 1
        return evaluate(batches)

    trainer.engine.evaluate = heard  # type: ignore[method-assign]
    with pytest.raises(PreemptedError):
        trainer.fit(flag)
    return metrics(Path(config.run_dir)), pieces.count(4)


@pytest.mark.slow
def test_being_asked_to_stop_in_a_validation_saves_at_once(root: Path, alone: Mesh) -> None:
    common = ["train.steps=6", "train.eval_every_steps=2", "train.eval_samples=50", "checkpoint.keep_best=1"]
    config = tiny(root, *common, "train.micro_batch_size=1", "model.num_layers=1")
    records, pieces = run_ranks(stop_in_validation, 2, config)[0]
    assert pieces == 1 < 50 // 16
    assert [r["step"] for r in records if "val_loss" in r] == [2]
    assert [path.name for path in (root / "run/checkpoints").iterdir()] == ["step_00000004"]
    whole = run_ranks(train, 2, config.model_copy(update={"run_dir": str(root / "whole")}))[0]
    resumed = run_ranks(train, 2, config)[0]
    assert curve(resumed) == curve(whole)
    assert resumed[-1]["val_loss"] == whole[-1]["val_loss"]


@pytest.mark.slow
def test_sigterm_on_one_rank_saves_on_all_and_exits_75(root: Path, alone: Mesh) -> None:
    config = tiny(root, "train.steps=100000", "optim.schedule=constant")
    processes = spawn_ranks(_train_until_killed, 2, config)
    file = root / "run/metrics.jsonl"
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not (file.exists() and len(file.read_bytes()) > 2000):
        time.sleep(0.02)
    pid = processes[1].pid
    assert pid is not None
    os.kill(pid, signal.SIGTERM)
    assert join_ranks(processes, timeout_s=30) == [75, 75]
    last = metrics(root / "run")[-1]["step"]
    saved = sorted(p.name for p in (root / "run/checkpoints").iterdir())
    assert saved == [f"step_{last:08d}"]
    # … and goes on from there as if nothing had happened.
    steps = f"train.steps={last + 3}"
    resumed = train(alone, tiny(root, steps, "optim.schedule=constant"))
    whole = train(alone, tiny(root, steps, "optim.schedule=constant", f"run_dir={root}/whole"))
    assert apart(losses(curve(resumed)), losses(curve(whole))) < 1e-4


def test_kill_9_in_mid_run_then_continue(root: Path, alone: Mesh) -> None:
    config = tiny(root, "train.steps=100000", "optim.schedule=constant", "checkpoint.every_steps=3")
    processes = spawn_ranks(_train_until_killed, 2, config)
    saves = root / "run/checkpoints"
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not (saves / "step_00000006").exists():
        time.sleep(0.02)
    for process in processes:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
    assert join_ranks(processes) == [-9, -9]
    newest = max(int(p.name[5:13]) for p in saves.iterdir() if not p.name.endswith(".tmp"))
    steps = f"train.steps={newest + 2}"
    resumed = train(alone, tiny(root, steps, "optim.schedule=constant"))
    whole = train(alone, tiny(root, steps, "optim.schedule=constant", f"run_dir={root}/whole"))
    assert [r["step"] for r in resumed] == [r["step"] for r in whole]
    assert apart(losses(curve(resumed)), losses(curve(whole))) < 1e-4


def test_a_finished_run_is_left_alone(root: Path, alone: Mesh) -> None:
    train(alone, tiny(root, "train.steps=3"))
    before = (root / "run/metrics.jsonl").read_bytes()
    train(alone, tiny(root, "train.steps=3"))
    assert (root / "run/metrics.jsonl").read_bytes() == before


def test_disk_full_while_saving_keeps_the_older_checkpoint(
    root: Path, alone: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    trainer = Trainer(tiny(root, "train.steps=8", "checkpoint.every_steps=2"), alone)
    save = trainer.save

    def save_on_a_full_disk(record: dict[str, Any], is_last: bool) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if trainer.step >= 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            save(record, is_last)
            trainer.writer.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(trainer, "save", save_on_a_full_disk)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with pytest.raises(CheckpointError):
        trainer.fit(PreemptionFlag())
    assert sorted(p.name for p in (root / "run/checkpoints").iterdir()) == ["step_00000002", "step_00000004"]
    assert [r["step"] for r in metrics(root / "run")] == list(range(1, 9))  # step 6's failure ended nothing
    events = [json.loads(line) for line in (root / "run/ledger.jsonl").read_text().splitlines()]
    assert [(e["event"], e["step"]) for e in events] == [("start", 0), ("save_failed", 6)]


def test_a_disk_full_of_logs_costs_their_lines_and_no_more(
    root: Path, alone: Mesh, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = curve(train(alone, tiny(root, "train.steps=6", f"run_dir={root}/reference")))
    trainer = Trainer(tiny(root, "train.steps=6"), alone)
    train_step = trainer.train_step

    def step_on_a_full_disk(*args: Any) -> StepReport:
        if trainer.step in (2, 4):
            for file in (trainer.log._metrics, trainer.log._ledger):
                assert file is not None
                file._file = (
                    open("/dev/full", "w") if trainer.step == 2 else file.path.open("a", encoding="utf-8")
                )
        trainer.log.event("data", trainer.step)
        return train_step(*args)

    trainer.train_step = step_on_a_full_disk  # type: ignore[method-assign]
    trainer.fit(PreemptionFlag())
    assert curve(metrics(root / "run")) == [*reference[:2], *reference[4:]]
    alerts = [line for line in capsys.readouterr().err.splitlines() if line.startswith("alert")]
    reason = "No space left on device; free some space or move run_dir; training goes on"
    assert alerts == [
        f"alert: cannot write {root}/run/{name}.jsonl: {reason}" for name in ("ledger", "metrics")
    ]


def test_a_torn_line_of_the_ledger_takes_no_other_with_it(root: Path, alone: Mesh) -> None:
    train(alone, tiny(root, "train.steps=3"))
    ledger = root / "run/ledger.jsonl"
    ledger.write_text(ledger.read_text() + '{"event": "skip", "st')
    train(alone, tiny(root, "train.steps=4"))
    assert [event["event"] for event in read_json_lines(ledger)] == ["start", "resume"]


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_an_interval_far_too_long_is_told_before_the_first_save(
    root: Path, alone: Mesh, capsys: pytest.CaptureFixture[str], asynchronous: str
) -> None:
    """Saved every 10⁶ steps, with a failure every 36 s. Without failures to speak of nothing is said."""
    common = ["train.steps=4", "checkpoint.every_steps=1000000", f"checkpoint.asynchronous={asynchronous}"]
    train(alone, tiny(root, *common, "resilience.mtbf_hours=0.01"))
    told = [line for line in capsys.readouterr().err.splitlines() if "every_steps" in line]
    assert len(told) == 1
    assert "far from the best: a save should cost about" in told[0]
    train(alone, tiny(root, *common, "resilience.mtbf_hours=1e12", f"run_dir={root}/steady"))
    assert "every_steps" not in capsys.readouterr().err
