"""Ranks saving and opening together: reshaping, choice of the newest, retention, one history a folder."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megalite.checkpoint import store
from megalite.checkpoint.commit import save
from megalite.checkpoint.format import TensorSlice
from megalite.checkpoint.retention import Retention, step_name
from megalite.checkpoint.store import newest, open_checkpoint
from megalite.errors import CheckpointError
from megalite.parallel.mesh import Mesh
from tests.checkpoint.helpers import KINDS, SHAPES, check, owned, save_step, values
from tests.ranks import SOLO, run_ranks


def listing(root: Path) -> list[str]:
    """What lies in the folder, sorted."""
    return sorted(os.listdir(root))


def damage(folder: Path, file: str = "rank_00000.safetensors") -> None:
    """Flip one bit in the middle of a file."""
    data = bytearray((folder / file).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / file).write_bytes(data)


def reload_and_save(mesh: Mesh, root: str, step: int) -> int:
    """Resume from the newest with this layout's ranges, and save what was read as `step`."""
    found = newest(Path(root), mesh)
    assert found is not None
    mine = [
        TensorSlice(s.kind, s.name, s.shape, s.start, s.stop, found.read(s.kind, s.name, s.start, s.stop))
        for s in owned(mesh.rank, mesh.size, step=0)
    ]
    save(Path(root), step, found.position, lambda: mine, found.meta, mesh, Retention(9))
    return found.step


def choose(mesh: Mesh, root: str) -> tuple[int, tuple[str, ...]]:
    """The step this rank would resume from, and what was refused on the way."""
    found = newest(Path(root), mesh)
    assert found is not None
    return found.step, found.refused


def fail_to_choose(mesh: Mesh, root: str) -> str:
    """The error this rank raises."""
    with pytest.raises(CheckpointError) as caught:
        newest(Path(root), mesh)
    return str(caught.value)


def test_one_writer_and_one_reader(tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    assert newest(root, SOLO) is None
    assert save_step(SOLO, root, 100) == "step_00000100"
    found = newest(root, SOLO)
    assert found is not None
    check(found, 100)
    assert found.refused == ()
    assert found.manifest.world == {"size": 1}


def test_saved_and_read_at_1_2_4_1_ranks(tmp_path: Path) -> None:
    save_step(SOLO, tmp_path, 100)
    for hop, world in enumerate([2, 4, 1]):
        step = 100 + hop
        assert run_ranks(reload_and_save, world, str(tmp_path), step + 1) == [step] * world
        found = open_checkpoint(tmp_path)
        assert len(found.manifest.files) == world
        for kind in KINDS:
            for name in SHAPES:
                assert torch.equal(found.read(kind, name), values(kind, name, 100))


def test_a_read_touches_only_the_bytes_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_ranks(save_step, 4, str(tmp_path), 7)
    found = open_checkpoint(tmp_path)
    read, original = [], store.read_exactly
    monkeypatch.setattr(store, "read_exactly", lambda f, b, o: (read.append(len(b)), original(f, b, o)))
    for name in SHAPES:
        for start, stop in [(0, 0), (0, 1), (3, 5), (0, 5)]:
            if stop <= values("weight", name, 7).numel():
                read.clear()
                part = found.read("weight", name, start, stop)
                assert torch.equal(part, values("weight", name, 7)[start:stop])
                assert sum(read) == 4 * (stop - start)


def test_a_rank_may_own_nothing(tmp_path: Path) -> None:
    assert run_ranks(save_from_rank_0, 2, str(tmp_path)) == ["step_00000001"] * 2
    check(open_checkpoint(tmp_path), 1)
    assert listing(tmp_path / "step_00000001") == ["manifest.json", "rank_00000.safetensors"]


def save_from_rank_0(mesh: Mesh, root: str) -> str:
    """As under ZeRO-0: rank 0 has everything, the others one empty slice."""
    empty = TensorSlice("weight", "scale", (), 0, 0, torch.empty(0))
    slices = owned(0, 1, 1) if mesh.rank == 0 else [empty]
    return save(Path(root), 1, 10, lambda: slices, {"version": 0}, mesh, Retention()).name


def test_a_copy_is_verified_once_it_is_written(tmp_path: Path) -> None:
    """Before that it may still change, and what was written would be another."""
    seen: list[str] = []
    save(
        *(tmp_path, 1, 10, lambda: owned(0, 1, 1), {}, SOLO, Retention()),
        verify=lambda: seen.extend(listing(tmp_path / "step_00000001.tmp")),
    )
    assert seen == ["rank_00000.safetensors"]


def test_newest_is_by_step_not_by_time(tmp_path: Path) -> None:
    for step in (5, 20, 100):
        save_step(SOLO, tmp_path, step, keep_last=9)
    for step, seconds in ((5, 3000), (20, 2000), (100, 1000)):
        os.utime(tmp_path / step_name(step), (seconds, seconds))
    assert run_ranks(choose, 2, str(tmp_path)) == [(100, ())] * 2


def test_a_run_at_work_may_put_a_newer_one_in_the_place_of_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With keep_last = 1, while the one before is being verified."""
    verify = store.verify_file

    def outrun(*args: Any) -> None:
        if not (tmp_path / step_name(2)).exists():
            save_step(SOLO, tmp_path, 2, keep_last=1)
        verify(*args)

    save_step(SOLO, tmp_path, 1, keep_last=1)
    monkeypatch.setattr(store, "verify_file", outrun)
    assert open_checkpoint(tmp_path).step == 2


def test_steps_beyond_eight_digits_still_sort_by_number(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        save_step(SOLO, tmp_path, step)
    check(open_checkpoint(tmp_path), 100_000_000)


@pytest.mark.parametrize("world", [1, 2])
def test_a_damaged_newest_is_passed_over_by_all(tmp_path: Path, world: int) -> None:
    for step in (1, 2, 3):
        run_ranks(save_step, world, str(tmp_path), step, 0, 9)
    damage(tmp_path / "step_00000003", f"rank_0000{world - 1}.safetensors")  # the last rank's share
    damage(tmp_path / "step_00000002", "manifest.json")
    first, *others = run_ranks(choose, world, str(tmp_path))
    assert all(other == first for other in others)
    step, refused = first
    assert step == 1
    assert len(refused) == 2
    assert "step_00000003 refused" in refused[0]
    assert f"rank_0000{world - 1}.safetensors is damaged" in refused[0]
    assert "manifest.json is damaged" in refused[1]


def test_a_refusal_is_one_line_of_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2):
        save_step(SOLO, tmp_path, step)
    damage(tmp_path / "step_00000002")
    found = newest(tmp_path, SOLO)
    assert found is not None
    assert [record.getMessage() for record in caplog.records] == list(found.refused)
    assert "\n" not in found.refused[0]


def test_with_nothing_that_verifies_no_run_starts_over_silently(tmp_path: Path) -> None:
    for step in (1, 2):
        run_ranks(save_step, 2, str(tmp_path), step)
        damage(tmp_path / step_name(step), "rank_00001.safetensors")
    errors = run_ranks(fail_to_choose, 2, str(tmp_path))
    assert errors[0] == errors[1]
    assert "none of the 2 checkpoints" in errors[0]
    assert "step_00000002 refused: rank 1: " in errors[0]
    assert "rank_00001.safetensors is damaged" in errors[0]


def fail_to_choose_apart(mesh: Mesh, root: str) -> str:
    """As `fail_to_choose`, each rank on a disk of its own."""
    return fail_to_choose(mesh, f"{root}/{mesh.rank}")


@pytest.mark.parametrize(
    ("held", "reason"),
    [
        ((5, None), "step_00000005 refused: rank 1: cannot open .*No such file"),  # rank 0 says what there is
        (
            (5, 6),
            "step_00000005 refused: ranks read different manifests in .*; put run_dir on shared storage",
        ),
    ],
)
def test_ranks_that_see_different_folders_take_none(
    tmp_path: Path, held: tuple[int, int | None], reason: str
) -> None:
    for rank, version in enumerate(held):
        (tmp_path / f"{rank}").mkdir()
        if version is not None:
            save_step(SOLO, tmp_path / f"{rank}", 5, version)
    first, second = run_ranks(fail_to_choose_apart, 2, str(tmp_path))
    assert re.search(reason, first)
    assert re.search(reason, second)


def test_what_is_not_whole_is_never_chosen(tmp_path: Path) -> None:
    save_step(SOLO, tmp_path, 1)
    whole = tmp_path / "step_00000001"
    for name in ("step_00000009.tmp", "step_00000009.trash", "step_9", "step_00000009x", "step_-0000009"):
        shutil.copytree(whole, tmp_path / name)
    (tmp_path / "step_00000008").mkdir()
    (tmp_path / "step_00000007").write_bytes(b"a file")
    (tmp_path / "step_00000006").symlink_to(whole)
    shutil.copytree(whole, tmp_path / "step_00000005")  # a copy under another step's name
    found = newest(tmp_path, SOLO)
    assert found is not None
    check(found, 1)
    reasons = ["No such file", "Not a directory", "is a symbolic link", "holds step 1"]
    assert len(found.refused) == 4
    assert all(reason in line for reason, line in zip(reasons, found.refused, strict=True))


def test_the_last_ones_are_kept_and_leftovers_removed(tmp_path: Path) -> None:
    (tmp_path / "step_00000002.tmp").mkdir()
    (tmp_path / "step_00000001.old.trash").mkdir()
    (tmp_path / "notes.txt").write_text("the user's own")
    for step in range(1, 6):
        save_step(SOLO, tmp_path, step, keep_last=2)
    assert listing(tmp_path) == ["notes.txt", "step_00000004", "step_00000005"]


def test_a_leftover_stays_until_a_newer_commit(tmp_path: Path) -> None:
    save_step(SOLO, tmp_path, 1)
    (tmp_path / "step_00000002.tmp").mkdir()
    newest(tmp_path, SOLO)
    assert "step_00000002.tmp" in listing(tmp_path)
    save_step(SOLO, tmp_path, 2)
    assert listing(tmp_path) == ["step_00000001", "step_00000002"]


def test_the_same_step_again_is_replaced(tmp_path: Path) -> None:
    save_step(SOLO, tmp_path, 1)
    save_step(SOLO, tmp_path, 2)
    run_ranks(save_step, 2, str(tmp_path), 2, 7)
    found = open_checkpoint(tmp_path)
    check(found, 2)
    assert found.meta == {"version": 7}
    assert listing(tmp_path) == ["step_00000001", "step_00000002"]


def test_a_kill_between_the_renames_of_a_replacement_loses_nothing(tmp_path: Path) -> None:
    for step in (1, 2):
        save_step(SOLO, tmp_path, step)
    (tmp_path / "step_00000002").rename(tmp_path / "step_00000002.old")
    check(open_checkpoint(tmp_path), 2)
    save_step(SOLO, tmp_path, 2, version=1)
    check(open_checkpoint(tmp_path), 2)
    assert listing(tmp_path) == ["step_00000001", "step_00000002"]


def test_going_back_ends_the_other_future(tmp_path: Path) -> None:
    for step in (100, 200, 300, 400):
        save_step(SOLO, tmp_path, step, keep_last=9)
    save_step(SOLO, tmp_path, 250, version=1, keep_last=9)
    assert listing(tmp_path) == [f"step_00000{step}" for step in (100, 200, 250)]
    check(open_checkpoint(tmp_path), 250)


@pytest.mark.parametrize("inside", ["", "checkpoints", "checkpoints/step_00000002"])
def test_tools_open_a_run_its_folder_or_one_checkpoint(tmp_path: Path, inside: str) -> None:
    for step in (1, 2):
        save_step(SOLO, tmp_path / "checkpoints", step)
    check(open_checkpoint(tmp_path / inside), 2)
    damage(tmp_path / "checkpoints" / "step_00000002")
    if inside.endswith("2"):
        with pytest.raises(CheckpointError, match="damaged"):
            open_checkpoint(tmp_path / inside)
    else:
        check(open_checkpoint(tmp_path / inside), 1)


def test_a_path_without_a_checkpoint_is_explained(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no checkpoint; give a run folder"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"no folder .*nowhere"):
        open_checkpoint(tmp_path / "nowhere")


def test_asking_for_what_is_not_stored(tmp_path: Path) -> None:
    save_step(SOLO, tmp_path, 1)
    found = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no weight head; it has 4, such as embed.weight"):
        found.read("weight", "head")
    with pytest.raises(CheckpointError, match="has no momentum scale; it has no momentum at all"):
        found.shape("scale", "momentum")
    with pytest.raises(CheckpointError, match=r"weight scale has 1 elements; \[0, 2\) is outside"):
        found.read("weight", "scale", 0, 2)


def save_with_fault(mesh: Mesh, root: str, fault: str) -> str:
    """Rank 1 stores its slices but for one fault; the error this rank raises."""
    slices = owned(mesh.rank, 2, 1)
    if mesh.rank == 1:
        slices = {"whole": slices[:-1], "part": slices[1:], "twice": [*slices, owned(0, 2, 1)[0]]}[fault]
    with pytest.raises(CheckpointError) as caught:
        save(Path(root), 1, 0, lambda: slices, {}, mesh, Retention())
    return str(caught.value)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("whole", "exp_avg_sq scale is missing; other tensors have their exp_avg_sq"),
        ("part", r"weight embed.weight: elements \[40, 55\) are missing"),
        ("twice", r"weight embed.weight: elements \[0, 40\) are stored twice"),
    ],
)
def test_slices_that_do_not_tile_are_never_committed(tmp_path: Path, fault: str, message: str) -> None:
    first, second = run_ranks(save_with_fault, 2, str(tmp_path), fault)
    assert first == second
    assert "\n" not in first
    assert re.search(message, first)
    assert listing(tmp_path) == []


def save_measured(root: Path, losses: dict[int, float | None], keep: Retention) -> list[int]:
    """Save steps with these validation losses; the steps that are left."""
    for step, loss in losses.items():
        meta = {"version": 0} | ({} if loss is None else {"val_loss": loss})
        save(root, step, 10 * step, lambda step=step: owned(0, 1, step), meta, SOLO, keep)  # type: ignore[misc]
        check(open_checkpoint(root), step)
    return [int(name[5:]) for name in listing(root)]


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (Retention(1), [80]),
        (Retention(3), [60, 70, 80]),
        (Retention(1, every=30), [30, 60, 80]),
        (Retention(1, best=1), [40, 80]),
        (Retention(1, best=2), [30, 40, 80]),  # of equals the newer: 30 and 20 have the same loss
        (Retention(1, every=60, best=1), [40, 60, 80]),
        (Retention(2, every=80, best=9), [20, 30, 40, 50, 70, 80]),  # not those without a loss to compare
    ],
    ids=str,
)
def test_what_none_of_the_three_rules_keeps_is_deleted(
    tmp_path: Path, keep: Retention, left: list[int]
) -> None:
    losses = {10: None, 20: 2.0, 30: 2.0, 40: 1.5, 50: 3.0, 60: float("nan"), 70: 2.5, 80: None}
    assert save_measured(tmp_path, losses, keep) == left


def test_a_damaged_checkpoint_is_not_the_best(tmp_path: Path) -> None:
    save_measured(tmp_path, {1: 1.0, 2: 2.0}, Retention(5))
    damage(tmp_path / "step_00000001", "manifest.json")
    assert save_measured(tmp_path, {3: 3.0}, Retention(1, best=1)) == [2, 3]


def test_the_newest_before_a_step(tmp_path: Path) -> None:
    for step in (5, 20, 100):
        save_step(SOLO, tmp_path, step, keep_last=9)
    for before, step in ((1000, 100), (100, 100), (99, 20), (5, 5)):
        found = newest(tmp_path, SOLO, before)
        assert found is not None
        assert found.step == step
    assert newest(tmp_path, SOLO, before=4) is None
    damage(tmp_path / "step_00000020")
    found = newest(tmp_path, SOLO, before=99)
    assert found is not None
    check(found, 5)
