"""Kills at every line of a save, flipped bits, cut files and full disks: never a broken or a wrong resume."""

from __future__ import annotations

import inspect
import io
import os
import random
import re
import resource
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from megalite.checkpoint import format as checkpoint_format
from megalite.checkpoint import store
from megalite.checkpoint.format import TensorSlice
from megalite.checkpoint.store import newest, open_checkpoint, save
from megalite.errors import CheckpointError
from megalite.parallel.mesh import Mesh, build_mesh
from tests.checkpoint.helpers import check, owned, save_step
from tests.ranks import SOLO, join_ranks, run_ranks, spawn_ranks

# shutil, because a kill in the middle of rmtree is a kill in the middle of retention.
TRACED = tuple(module.__file__ or "" for module in (store, checkpoint_format, shutil))
Point = tuple[str, int, int]  # file, line, how often it has run

# ---------------------------------------------------------------------------- kill -9 at every line


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


# What may be found after a kill: (step, version). Step 4 is of the future that the save ends.
SCENARIOS: dict[str, tuple[Callable[[Path], None], set[tuple[int, int]]]] = {
    "retention": (before_retention, {(2, 0), (3, 0)}),
    "replacement": (before_replacement, {(4, 9), (3, 9), (3, 0)}),
}


def on_each_line(seen: Callable[[Point], None]) -> Callable[..., Any]:
    """A trace function that reports each line of the traced files before it runs."""
    hits: Counter[tuple[str, int]] = Counter()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in TRACED:
            return None
        if event == "line":
            place = (frame.f_code.co_filename, frame.f_lineno)
            hits[place] += 1
            seen((*place, hits[place]))
        return trace

    return trace


def record_lines(mesh: Mesh, root: str) -> list[Point]:
    """Save step 3; every line that ran on this rank, the first and the last time it did."""
    first: dict[tuple[str, int], Point] = {}
    last: dict[tuple[str, int], Point] = {}

    def seen(point: Point) -> None:
        first.setdefault(point[:2], point)
        last[point[:2]] = point

    sys.settrace(on_each_line(seen))
    try:
        save_step(mesh, root, 3)
    finally:
        sys.settrace(None)
    return sorted({*first.values(), *last.values()})


def save_and_die(root: str, rank: int, at: Point) -> None:
    """Save step 3; `rank` is killed just before the given line."""
    mesh = build_mesh()

    def seen(point: Point) -> None:
        if point == at:
            os.kill(os.getpid(), signal.SIGKILL)

    if mesh.rank == rank:
        sys.settrace(on_each_line(seen))
    else:
        sys.stderr = io.StringIO()  # the survivor's traceback is expected
    save_step(mesh, root, 3)


def kill_at(point: Point, rank: int, template: Path, root: Path, allowed: set[tuple[int, int]]) -> None:
    """One case: kill there, find a whole checkpoint, save again, find nothing left over."""
    shutil.copytree(template, root)
    exits = join_ranks(spawn_ranks(save_and_die, 2, str(root), rank, tuple(point)))
    assert exits[rank] == -signal.SIGKILL
    found = newest(root, SOLO)
    assert found is not None
    assert found.refused == ()
    assert (found.step, found.meta["version"]) in allowed
    check(found)
    save_step(SOLO, root, 3, version=1)
    check(open_checkpoint(root), 3)
    assert open_checkpoint(root).meta == {"version": 1}
    assert sorted(os.listdir(root)) == ["step_00000002", "step_00000003"]
    shutil.rmtree(root)


def every_point(scenario: str, tmp_path: Path) -> Iterator[tuple[Point, int]]:
    """(point, rank) of a save in this scenario; leaves the state before it in tmp_path/template."""
    SCENARIOS[scenario][0](tmp_path / "template")
    shutil.copytree(tmp_path / "template", tmp_path / "recorded")
    for rank, points in enumerate(run_ranks(record_lines, 2, str(tmp_path / "recorded"))):
        for point in points:
            yield point, rank


def in_commit(point: Point) -> bool:
    """Whether the line is one of those that make the checkpoint visible."""
    lines, first = inspect.getsourcelines(store._commit)
    return point[0] == store.__file__ and first <= point[1] < first + len(lines)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_kill_at_some_lines_of_a_save(scenario: str, tmp_path: Path) -> None:
    cases = list(every_point(scenario, tmp_path))
    chosen = [case for number, case in enumerate(cases) if in_commit(case[0]) or number % 15 == 0]
    for point, rank in chosen:
        kill_at(point, rank, tmp_path / "template", tmp_path / "run", SCENARIOS[scenario][1])
    assert len(chosen) > 30


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_kill_at_every_line_of_a_save(scenario: str, tmp_path: Path) -> None:
    cases = list(every_point(scenario, tmp_path))
    for point, rank in cases:
        kill_at(point, rank, tmp_path / "template", tmp_path / "run", SCENARIOS[scenario][1])
    assert len(cases) > 300


# ------------------------------------------------------------------- flipped bits and cut files


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Steps 1 and 2, written by two ranks."""
    for step in (1, 2):
        run_ranks(save_step, 2, str(tmp_path), step)
    return tmp_path


def assert_refused(root: Path) -> None:
    """Step 2 is refused, by name, and step 1 is read instead."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(root / "step_00000002")
    assert str(root / "step_00000002") in str(caught.value)
    found = newest(root, SOLO)
    assert found is not None
    assert len(found.refused) == 1
    assert found.step == 1


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file in place."""
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def test_300_flipped_bits_are_all_noticed(two: Path) -> None:
    rng = random.Random(0)
    files = sorted((two / "step_00000002").iterdir())
    assert len(files) == 3
    for trial in range(300):
        path = files[trial % 3]
        bit = rng.randrange(8 * path.stat().st_size)
        flip(path, bit)
        assert_refused(two)
        flip(path, bit)
    check(open_checkpoint(two), 2)


@pytest.mark.slow
def test_every_single_bit_is_guarded(two: Path) -> None:
    folder = two / "step_00000002"
    for path in sorted(folder.iterdir()):
        for bit in range(8 * path.stat().st_size):
            flip(path, bit)
            with pytest.raises(CheckpointError):
                open_checkpoint(folder)
            flip(path, bit)
    check(open_checkpoint(two), 2)


def test_files_cut_or_grown_anywhere_are_refused(two: Path) -> None:
    rng = random.Random(0)
    files = sorted((two / "step_00000002").iterdir())
    for trial in range(50):
        path = files[trial % 3]
        whole = path.read_bytes()
        cut = (0, len(whole) - 1)[trial // 3] if trial < 6 else rng.randrange(len(whole))
        path.write_bytes(whole[:cut])
        assert_refused(two)
        path.write_bytes(whole + b"\0" * (trial + 1))
        assert_refused(two)
        path.write_bytes(whole)
    check(open_checkpoint(two), 2)


def test_files_missing_or_swapped_are_refused(two: Path) -> None:
    first, second = (two / "step_00000002" / f"rank_0000{rank}.safetensors" for rank in (0, 1))
    swapped = {first: second.read_bytes(), second: first.read_bytes()}
    for path in (first, second, two / "step_00000002" / "manifest.json"):
        whole = path.read_bytes()
        path.unlink()
        assert_refused(two)
        path.write_bytes(whole)
    for path, data in swapped.items():
        path.write_bytes(data)
    assert_refused(two)
    older = (two / "step_00000001" / first.name).read_bytes()  # of the same size, from another step
    first.write_bytes(older)
    second.write_bytes(swapped[first])
    assert_refused(two)


# ------------------------------------------------------------------------- failures while writing


def save_large(mesh: Mesh, root: str, step: int, fault: str, on: int) -> str:
    """Save 64 KiB per rank while rank `on` meets `fault`; the error this rank raises."""

    limits, size = resource.getrlimit(resource.RLIMIT_FSIZE), 16384
    start, stop = mesh.rank * size, (mesh.rank + 1) * size

    def slices() -> Iterator[TensorSlice]:
        yield TensorSlice("weight", "w", (mesh.size * size,), start, stop, torch.ones(size))
        if fault == "raises" and mesh.rank == on:
            raise ArithmeticError("the device is lost")

    if mesh.rank == on and fault == "EFBIG":
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    if mesh.rank == on and fault == "ENOSPC":
        vars(checkpoint_format)["open"] = lambda path, mode: open("/dev/full", "wb")
    if mesh.rank == on and fault == "late":
        vars(store)["open"] = lambda path, mode: open("/dev/full", "wb")
    try:
        with pytest.raises(CheckpointError) as caught:
            save(Path(root), step, 0, slices(), {}, mesh, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        for module in (checkpoint_format, store):
            vars(module).pop("open", None)
    return str(caught.value)


@pytest.mark.parametrize(
    ("fault", "on", "reason"),
    [
        ("EFBIG", 1, r"File too large \(EFBIG\).* bytes free; free some space, lower checkpoint.keep_last"),
        ("ENOSPC", 0, r"No space left on device \(ENOSPC\).* bytes free; free some space"),
        ("ENOSPC", 1, r"No space left on device \(ENOSPC\).* bytes free; free some space"),
        ("late", 0, r"No space left on device \(ENOSPC\).* bytes free; free some space"),
        ("raises", 1, "ArithmeticError: the device is lost"),
    ],
)
def test_a_failed_write_is_told_to_all_and_leaves_nothing(
    tmp_path: Path, fault: str, on: int, reason: str
) -> None:
    run_ranks(save_step, 2, str(tmp_path), 1)
    errors = run_ranks(save_large, 2, str(tmp_path), 2, fault, on)
    assert errors[0] == errors[1]
    assert "\n" not in errors[0]
    assert errors[0].startswith(f"cannot save {tmp_path}/step_00000002: rank {on}: ")
    assert errors[0].endswith("; older checkpoints are intact")
    assert re.search(reason, errors[0])
    assert os.listdir(tmp_path) == ["step_00000001"]
    check(open_checkpoint(tmp_path), 1)
    run_ranks(save_step, 2, str(tmp_path), 2)
    check(open_checkpoint(tmp_path), 2)


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("not a folder")
    with pytest.raises(CheckpointError, match=r"Not a directory \(ENOTDIR\) at .*; check the storage"):
        save_step(SOLO, tmp_path / "checkpoints", 1)


def test_a_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(store, "_prepare", refuse)
    with pytest.raises(CheckpointError, match=r"Permission denied \(EACCES\).*make the folder writable"):
        save_step(SOLO, tmp_path, 1)


def test_old_ones_that_cannot_be_deleted_do_not_fail_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    save_step(SOLO, tmp_path, 1, keep_last=1)
    monkeypatch.setattr(store, "_discard", refuse)
    save_step(SOLO, tmp_path, 2, keep_last=1)
    check(open_checkpoint(tmp_path), 2)
    assert "old checkpoints stay behind: Permission denied (EACCES)" in caplog.text


def test_an_empty_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"files=\(\): Tuple should have at least 1 item"):
        save(tmp_path, 1, 0, [], {}, SOLO, keep_last=1)
    assert os.listdir(tmp_path) == []


def test_keeping_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="keep_last=0; keep at least 1"):
        save(tmp_path, 1, 0, owned(0, 1, 1), {}, SOLO, keep_last=0)
