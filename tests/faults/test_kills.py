"""kill -9 at every line of a save, a save behind, retention and a load, on each rank; and at any moment."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pytest

from megalite.checkpoint import agree, commit, format, retention, snapshots, store, writer
from megalite.checkpoint.store import newest, open_checkpoint
from tests.checkpoint.helpers import check, save_step
from tests.daily import one_a_day
from tests.faults.acts import Held, load, open_writer, save_third, save_third_behind
from tests.faults.kills import Action, Point, kill, meet, one_rank_each, record_lines
from tests.faults.seeds import replayable, seeds
from tests.ranks import SOLO, join_ranks, run_ranks, spawn_ranks

SAVING = (commit.__file__, retention.__file__, agree.__file__, format.__file__)
# shutil, because a kill in the middle of rmtree is a kill in the middle of retention.
DELETING = (commit.__file__, retention.__file__, shutil.__file__)
BEHIND = (writer.__file__, snapshots.__file__, commit.__file__)
LOADING = (store.__file__,)


def before_retention(root: Path) -> None:
    """Step 3 will be saved as the third of two to keep, beside a leftover."""
    save_step(SOLO, root, 1)
    save_step(SOLO, root, 2)
    shutil.copytree(root / "step_00000001", root / "step_00000003.tmp")
    shutil.copytree(root / "step_00000001", root / "step_00000001.trash")


def before_replacement(root: Path) -> None:
    """Step 3 will be saved once more, after a run that went on to step 4 and came back."""
    for step in (2, 3, 4):
        save_step(SOLO, root, step, version=9, keep_last=9)
    shutil.copytree(root / "step_00000002", root / "step_00000003.old")


@dataclass(frozen=True)
class Scenario:
    """What lies there, what is done to it, in which files a kill strikes, and what may be found after.

    `found` holds (step, version). Step 4 is of the future that the save ends.
    """

    prepare: Callable[[Path], None]
    action: Action
    files: tuple[str, ...]
    found: set[tuple[int, int]]


SCENARIOS = {
    "save": Scenario(before_retention, save_third, SAVING, {(2, 0), (3, 0)}),
    "delete": Scenario(before_replacement, save_third, DELETING, {(4, 9), (3, 9), (3, 0)}),
    "behind": Scenario(before_retention, save_third_behind, BEHIND, {(2, 0), (3, 0)}),
    "load": Scenario(before_retention, load, LOADING, {(2, 0)}),
}


def kill_at(scenario: Scenario, point: Point, rank: int, template: Path, root: Path) -> None:
    """One case: kill there, find a whole checkpoint, save again, find nothing left over."""
    shutil.copytree(template, root)
    kill(scenario.action, str(root), scenario.files, rank, point)
    assert_whole(root, scenario.found)
    shutil.rmtree(root.parent)


def assert_whole(root: Path, allowed: set[tuple[int, int]]) -> None:
    """The newest is whole and one of these; the next save leaves nothing over."""
    found = newest(root, SOLO)
    assert found is not None
    assert found.refused == ()
    assert (found.step, found.meta["version"]) in allowed
    check(found)
    save_step(SOLO, root, 3, version=1)
    check(open_checkpoint(root), 3)
    assert open_checkpoint(root).meta == {"version": 1}
    assert sorted(os.listdir(root)) == ["step_00000002", "step_00000003"]


def recorded(scenario: Scenario, tmp_path: Path) -> list[list[Point]]:
    """Each rank's points in this scenario; leaves the state before it in tmp_path/template."""
    scenario.prepare(tmp_path / "template")
    root = tmp_path / "recorded" / "checkpoints"
    shutil.copytree(tmp_path / "template", root)
    return run_ranks(record_lines, 2, scenario.action, str(root), scenario.files)


@pytest.mark.parametrize("name", one_a_day(*SCENARIOS))
def test_kill_at_some_lines(name: str, tmp_path: Path) -> None:
    both = enumerate(recorded(SCENARIOS[name], tmp_path))
    cases = [(point, rank) for rank, points in both for point in points]
    for point, rank in cases[:: len(cases) // 8]:
        kill_at(SCENARIOS[name], point, rank, tmp_path / "template", tmp_path / "run" / "checkpoints")


# The fewest points of each scenario: a tracer that went blind must not pass.
POINTS = {"save": 120, "delete": 85, "behind": 80, "load": 45}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_kill_at_every_line(name: str, tmp_path: Path) -> None:
    cases = one_rank_each(recorded(SCENARIOS[name], tmp_path))
    assert len(cases) >= POINTS[name]
    for point, rank in cases:
        kill_at(SCENARIOS[name], point, rank, tmp_path / "template", tmp_path / "run" / "checkpoints")


# ----------------------------------------------------------------------------- kill -9 at any moment


def save_until_killed(root: str, delays_s: list[float | None]) -> None:
    """Save step after step behind the training's back; each rank dies after its delay, or of its peer's end.

    Rank 0 notes each step that it knows to be committed.
    """
    mesh = meet()
    sys.stderr = StringIO()
    log, writer = open_writer(mesh, root)
    delay_s = delays_s[mesh.rank]
    if delay_s is not None:
        threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
    with log, writer, open(Path(root).parent / "committed", "a", buffering=1) as committed:
        for step in range(1, 10_000):
            writer.save(step, 10 * step, {"version": 0}, Held(mesh, step))
            if mesh.rank == 0 and step > 1:  # the save before this one has been waited for
                committed.write(f"{step - 1}\n")


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(4))
def test_kill_at_50_random_moments(batch: int, tmp_path: Path) -> None:
    reached = []
    for seed in seeds(200):
        if seed % 4 != batch:
            continue
        rng = random.Random(seed)
        delays = [rng.uniform(0, 0.1), rng.uniform(0, 0.1)]
        victims = rng.choice([{0}, {1}, {0, 1}])
        if victims == {0, 1}:
            delays[1] = delays[0]
        with replayable(seed):
            root = tmp_path / str(seed) / "checkpoints"
            save_step(SOLO, root, 0)
            drawn = [delays[rank] if rank in victims else None for rank in (0, 1)]
            exits = join_ranks(spawn_ranks(save_until_killed, 2, str(root), drawn))
            # Of two, one may have died of its peer's end.
            assert any(exits[rank] == -signal.SIGKILL for rank in victims)
            told = (
                (root.parent / "committed").read_text().split()
                if (root.parent / "committed").exists()
                else []
            )
            found = newest(root, SOLO)
            assert found is not None
            assert found.refused == ()
            assert found.step >= int(told[-1] if told else 0)  # nothing lost beyond the last checkpoint
            check(found)
            reached.append(found.step)
            shutil.rmtree(root.parent)
    assert len(set(reached)) > 1  # the kills came at different stages of the work
