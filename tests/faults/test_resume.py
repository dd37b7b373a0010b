"""Whole runs, killed and continued: no step lost beyond the last checkpoint, the same curve bit for bit."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from io import StringIO
from pathlib import Path
from unittest import mock

import pytest

from megalite.checkpoint.store import newest
from megalite.config import Config
from megalite.errors import CheckpointError
from megalite.parallel.mesh import Mesh, build_mesh, close_mesh
from megalite.resilience.preempt import PreemptionFlag
from megalite.run_folder import LOCK
from megalite.trainer import Trainer
from tests.faults.seeds import replayable, seeds
from tests.ranks import SOLO, join_ranks, run_ranks, spawn_ranks
from tests.trainer.runs import apart, curve, metrics, tiny, train, write_dataset

STEPS = 40


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets, shared by all runs."""
    root = tmp_path_factory.mktemp("data")
    write_dataset(root / "train", seed=1, documents=40)
    write_dataset(root / "valid", seed=2, documents=5)
    return root


@pytest.fixture
def root(data: Path, tmp_path: Path) -> Path:
    """A fresh folder that sees them."""
    for name in ("train", "valid"):
        (tmp_path / name).symlink_to(data / name)
    return tmp_path


def short(root: Path, run: str, *overrides: str) -> Config:
    """A run of 40 steps that saves every third."""
    common = (f"train.steps={STEPS}", "checkpoint.every_steps=3", "train.micro_batch_size=6")
    return tiny(root, *common, f"run_dir={root}/{run}", *overrides)


def train_until_killed(config: Config, delays_s: list[float | None]) -> None:
    """Train; each rank that has a delay is killed so long after the first step."""
    mesh = build_mesh()
    sys.stderr = StringIO()
    trainer = Trainer(config, mesh)
    delay_s = delays_s[mesh.rank]
    if delay_s is not None:
        threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
    trainer.fit(PreemptionFlag())
    close_mesh(mesh)
    os._exit(0)  # without waiting for the timer


@pytest.mark.slow
def test_a_run_killed_again_and_again_gives_the_curve_of_one_left_alone(root: Path) -> None:
    whole = curve(run_ranks(train, 2, short(root, "whole", "checkpoint.asynchronous=false"))[0])
    for seed in seeds(2):
        rng, config, kills = random.Random(seed), short(root, f"killed-{seed}"), 0
        for _ in range(40):
            victims = rng.choice([{0}, {1}, {0, 1}])
            delay_s = rng.uniform(0.02, 0.5)
            with replayable(seed):
                before = (
                    metrics(root / f"killed-{seed}")
                    if (root / f"killed-{seed}/metrics.jsonl").exists()
                    else []
                )
                delays = [delay_s if rank in victims else None for rank in (0, 1)]
                exits = join_ranks(spawn_ranks(train_until_killed, 2, config, delays))
                if exits == [0, 0]:
                    break
                kills += 1
                found = newest(root / f"killed-{seed}/checkpoints", SOLO)
                assert found is None or found.refused == ()
                # At most the interval, and the save that was under way, are done again.
                done = len(metrics(root / f"killed-{seed}"))
                assert done - (0 if found is None else found.step) <= 2 * 3
                assert done >= len(before) - 2 * 3
        else:
            run_ranks(train, 2, config)
        with replayable(seed):
            assert curve(metrics(root / f"killed-{seed}")) == whole
            assert kills > 2


def stop_at(mesh: Mesh, config: Config, step: int) -> None:
    """Train to a step, as a run that is asked to stop there."""
    trainer = Trainer(config, mesh)
    original = trainer.train_step

    def train_step(batches, lr, wants_stop=False):  # type: ignore[no-untyped-def]
        return original(batches, lr, trainer.step == step - 1)

    trainer.train_step = train_step  # type: ignore[method-assign]
    with pytest.raises(Exception, match="asked to stop"):
        trainer.fit(PreemptionFlag())


@pytest.mark.slow
def test_rank_counts_1_2_4_1_continue_the_same_curve(root: Path) -> None:
    config = short(root, "moved")
    whole = curve(run_ranks(train, 1, short(root, "whole"))[0])
    for world, step in ((1, 10), (2, 20), (4, 30)):
        run_ranks(stop_at, world, config, step)
    moved = metrics(root / "moved") if run_ranks(train, 1, config) else []
    assert [record["position"] for record in moved] == [24 * (step + 1) for step in range(STEPS)]
    assert apart(curve(moved), whole) < 1e-5
    assert curve(moved)[:10] == whole[:10]


@pytest.mark.slow
@pytest.mark.parametrize("jump_s", [-3600.0, 3600.0])
def test_a_clock_that_jumps_changes_nothing(root: Path, jump_s: float) -> None:
    config, clock = short(root, "jumps"), time.time
    whole = curve(run_ranks(train, 1, short(root, "whole"))[0])
    run_ranks(stop_at, 1, config, 10)
    with mock.patch("time.time", side_effect=lambda: clock() + jump_s):
        trainer = Trainer(config, SOLO)
        assert trainer.step == 10
        trainer.fit(PreemptionFlag())
    for folder in (root / "jumps/checkpoints").iterdir():  # and so says the file system
        os.utime(folder, (clock() + jump_s * int(folder.name[5:]), clock() + jump_s * int(folder.name[5:])))
    found = newest(root / "jumps/checkpoints", SOLO)
    assert found is not None
    assert found.step == STEPS
    assert curve(metrics(root / "jumps")) == whole


def test_another_models_configuration_is_refused_and_the_run_left_alone(root: Path) -> None:
    def files() -> dict[Path, bytes]:
        """All but the lock, which says who looked last."""
        paths = (path for path in (root / "run").rglob("*") if path.is_file() and path.name != LOCK)
        return {path: path.read_bytes() for path in paths}

    run_ranks(stop_at, 1, short(root, "run"), 5)
    kept = files()
    with pytest.raises(
        CheckpointError, match=r"holds \S+ of shape .* continue with the config it was trained"
    ):
        Trainer(short(root, "run", "model.hidden_size=64"), SOLO)
    with pytest.raises(
        CheckpointError, match=r"holds \S+ of shape \S+ \S+ the config's model has it not at all"
    ):
        Trainer(short(root, "run", "model.num_layers=1"), SOLO)
    assert files() == kept
