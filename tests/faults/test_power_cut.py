"""Power cuts: whatever a disk may have kept of the calls made so far, a whole checkpoint is found."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from megalite.checkpoint.store import newest, open_checkpoint
from tests.checkpoint.helpers import check, save_step
from tests.daily import one_a_day
from tests.faults.disk import Disk, recording
from tests.faults.seeds import replayable, seeds
from tests.faults.test_kills import SCENARIOS
from tests.ranks import SOLO

CUTS = 8  # states tried after each call


@pytest.mark.parametrize("name", one_a_day("save", "delete"))
def test_every_prefix_of_the_calls_leaves_a_whole_checkpoint(name: str, tmp_path: Path) -> None:
    scenario, root = SCENARIOS[name], tmp_path / "checkpoints"
    scenario.prepare(root)
    disk = Disk(root)
    with recording(root) as events:
        scenario.action(SOLO, str(root))
    assert {event.name for event in events} == {"fsync", "rename", "mkdir", "remove"}
    found_after = set()
    for number, event in enumerate(events):
        disk.apply(event)
        for seed in seeds(CUTS):
            cut = tmp_path / "cut"
            disk.after_a_power_cut(random.Random(f"{number} {seed}"), cut)
            with replayable(seed):
                found = newest(cut, SOLO)
                assert found is not None
                assert found.refused == (), event
                assert (found.step, found.meta["version"]) in scenario.found, event
                check(found)
                found_after.add((number, found.step, found.meta["version"]))
            shutil.rmtree(cut)
    # Once the parent folder is forced to the disk, and step 4 is gone, the new one is what is found, always.
    last = max(
        number
        for number, event in enumerate(events)
        if event.name == "rename" and (event.path.endswith("tmp") or event.path == "step_00000004")
    )
    forced = next(
        n for n, event in enumerate(events) if n > last and event.name == "fsync" and event.path == "."
    )
    assert {found[1:] for found in found_after if found[0] >= forced} == {(3, 0)}
    assert len({found[1:] for found in found_after}) > 1


def test_the_only_checkpoint_stays_until_the_run_that_went_back_has_another(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    save_step(SOLO, root, 4, keep_last=1)
    disk = Disk(root)
    with recording(root) as events:
        save_step(SOLO, root, 3, keep_last=1)
    for event in events:
        disk.apply(event)
        for seed in seeds(CUTS):
            disk.after_a_power_cut(random.Random(seed), tmp_path / "cut")
            check(open_checkpoint(tmp_path / "cut"))
            shutil.rmtree(tmp_path / "cut")
    assert [path.name for path in root.iterdir()] == ["step_00000003"]


def test_the_first_checkpoint_of_a_new_run_is_found_once_it_is_saved(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    with recording(tmp_path) as events:
        save_step(SOLO, tmp_path / "run" / "checkpoints", 1)
    for event in events:
        disk.apply(event)
    for seed in seeds(CUTS):
        disk.after_a_power_cut(random.Random(seed), tmp_path / f"cut-{seed}")
        check(open_checkpoint(tmp_path / f"cut-{seed}" / "run"), 1)


def test_the_same_cuts_break_a_save_that_does_not_force_its_files(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    save_step(SOLO, root, 1)
    disk = Disk(root)
    with recording(root) as events:
        save_step(SOLO, root, 2)
    for event in events:
        if event.name != "fsync":
            disk.apply(event)
    refused = set()
    for seed in range(CUTS):
        disk.after_a_power_cut(random.Random(seed), tmp_path / "cut")
        found = newest(tmp_path / "cut", SOLO)
        assert found is not None
        refused.add(len(found.refused))
        shutil.rmtree(tmp_path / "cut")
    assert refused == {0, 1}  # the rename was kept, and what it makes visible was not
