"""Full disks and other failed writes: told to all, older checkpoints whole, training goes on."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch

from megalite.checkpoint import commit, retention
from megalite.checkpoint import format as checkpoint_format
from megalite.checkpoint.commit import save
from megalite.checkpoint.format import FileEntry, TensorSlice
from megalite.checkpoint.retention import Retention
from megalite.checkpoint.snapshots import Snapshot
from megalite.checkpoint.store import newest, open_checkpoint
from megalite.errors import CheckpointError, DivergedError
from megalite.parallel.collectives import PeerError
from megalite.parallel.mesh import Mesh
from tests.checkpoint.helpers import check, save_step
from tests.faults.acts import Held, open_writer
from tests.ranks import SOLO, run_ranks

# ------------------------------------------------------------------------------------- one save


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
        vars(commit)["open"] = lambda path, mode: open("/dev/full", "wb")
    try:
        with pytest.raises(CheckpointError) as caught:
            save(Path(root), step, 0, slices, {}, mesh, Retention())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        for module in (checkpoint_format, commit):
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

    monkeypatch.setattr(commit, "_prepare", refuse)
    with pytest.raises(CheckpointError, match=r"Permission denied \(EACCES\).*make the folder writable"):
        save_step(SOLO, tmp_path, 1)


def test_a_run_folder_in_one_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As /scratch/NAME often is."""

    def refuse(folder: Path) -> None:
        if folder == tmp_path:
            raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(commit, "fsync_folder", refuse)
    save_step(SOLO, tmp_path / "run" / "checkpoints", 1)
    check(open_checkpoint(tmp_path / "run"), 1)


def test_old_ones_that_cannot_be_deleted_do_not_fail_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    save_step(SOLO, tmp_path, 1, keep_last=1)
    monkeypatch.setattr(retention, "discard", refuse)
    save_step(SOLO, tmp_path, 2, keep_last=1)
    check(open_checkpoint(tmp_path), 2)
    assert "old checkpoints stay behind: Permission denied (EACCES)" in caplog.text


def test_an_empty_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"files=\(\): Tuple should have at least 1 item"):
        save(tmp_path, 1, 0, list, {}, SOLO, Retention())
    assert os.listdir(tmp_path) == []


def test_keeping_none_is_refused() -> None:
    with pytest.raises(CheckpointError, match="keep_last=0; keep at least 1"):
        Retention(last=0)


# --------------------------------------------------------------------------- saves of a whole run


class Spoilt(Held):
    """State that cannot be copied, or whose copy does not stay what it was."""

    def __init__(self, mesh: Mesh, step: int, fault: str) -> None:
        super().__init__(mesh, step)
        self.fault = fault

    def snapshot(self, reuse: Snapshot | None = None) -> Snapshot:
        """As told."""
        if self.fault == "memory":
            raise MemoryError("no memory for the copy")
        snapshot = super().snapshot(reuse)
        if self.fault == "flip":
            snapshot.verify()  # the CRCs have been taken
            next(iter(snapshot.tensors.values())).view(torch.int32)[0] ^= 1
        return snapshot


@contextmanager
def disk_that_takes(size: int) -> Iterator[None]:
    """No file of this process grows beyond so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def save_three(mesh: Mesh, root: str, fault: str, overrides: list[str]) -> str:
    """Saves of steps 1 to 3, of which the second fails on rank 1; what this rank says to its user."""
    log, writer = open_writer(mesh, root, *overrides)
    said = StringIO()
    with log, writer, redirect_stderr(said):
        writer.save(1, 10, {"version": 0}, Held(mesh, 1))
        writer.wait()
        spoils = mesh.rank == 1
        with disk_that_takes(200) if spoils and fault == "disk" else nullcontext():
            writer.save(2, 20, {"version": 0}, Spoilt(mesh, 2, fault if spoils else ""))
            writer.wait()
        writer.poll()
        assert mesh.rank > 0 or os.listdir(root) == ["step_00000001"]  # rank 0 has cleaned up
        writer.save(3, 30, {"version": 0}, Held(mesh, 3))
    return said.getvalue()


@pytest.mark.parametrize(
    ("fault", "overrides", "reason"),
    [
        ("disk", [], r"rank 1: File too large \(EFBIG\)"),
        ("disk", ["checkpoint.asynchronous=false"], r"rank 1: File too large \(EFBIG\)"),
        ("memory", [], "rank 1: MemoryError: no memory for the copy"),
        ("flip", [], r"rank 1: weight \S+ \d+ changed in host memory since it was copied: CRC"),
    ],
)
def test_a_save_that_fails_is_one_alert_and_the_next_succeeds(
    tmp_path: Path, fault: str, overrides: list[str], reason: str
) -> None:
    root = tmp_path / "run" / "checkpoints"
    said, nothing = run_ranks(save_three, 2, str(root), fault, overrides)
    assert nothing == ""
    assert said.count("\n") == 1
    assert re.match(rf"alert: cannot save \S+step_00000002: {reason}", said)
    assert said.endswith(
        "older checkpoints are intact; training goes on, the next save is tried as planned\n"
    )
    events = [json.loads(line) for line in (root.parent / "ledger.jsonl").read_text().splitlines()]
    assert [(event["event"], event["step"]) for event in events] == [("save_failed", 2)]
    assert events[0]["reason"] in said
    check(open_checkpoint(root), 3)
    assert sorted(os.listdir(root)) == ["step_00000001", "step_00000003"]


def fail_last(mesh: Mesh, root: str) -> str:
    """The last save meets a full disk on rank 1; the error this rank raises."""
    log, writer = open_writer(mesh, root)
    with log, pytest.raises(CheckpointError) as caught, writer:
        writer.save(1, 10, {"version": 0}, Held(mesh, 1))
        writer.wait()
        with disk_that_takes(200) if mesh.rank == 1 else nullcontext():
            writer.save(2, 20, {"version": 0}, Held(mesh, 2), is_last=True)
    return str(caught.value)


def test_the_last_save_must_succeed(tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    first, second = run_ranks(fail_last, 2, str(root))
    assert first == second
    assert "rank 1: File too large (EFBIG)" in first
    assert CheckpointError.exit_code == 2
    assert os.listdir(root) == ["step_00000001"]
    check(open_checkpoint(root), 1)


@contextmanager
def slow_disk() -> Iterator[None]:
    """Each file takes half a second more."""
    original = commit.write_file

    def write_slowly(path: Path, slices: Sequence[TensorSlice]) -> FileEntry:
        time.sleep(0.5)
        return original(path, slices)

    with patch.object(commit, "write_file", write_slowly):
        yield


def slow_saves(mesh: Mesh, root: str) -> tuple[float, list[str]]:
    """Two saves in a row, slow to write: seconds of the first, and of a step after it; what each found."""
    log, writer = open_writer(mesh, root)
    with slow_disk(), log, writer:
        began = time.perf_counter()
        writer.save(1, 10, {"version": 0}, Held(mesh, 1))
        writer.poll()
        stall_s = time.perf_counter() - began
        before = (
            [name for name in os.listdir(root) if not name.endswith(".tmp")] if os.path.isdir(root) else []
        )
        writer.save(2, 20, {"version": 0}, Held(mesh, 2))
        between = [name for name in os.listdir(root) if not name.endswith(".tmp")]
        writer.wait()
        found = newest(Path(root), mesh, before=5)
        assert found is not None
        check(found, 2)
    return stall_s, [*before, "then", *between]


@pytest.mark.slow
def test_the_next_save_waits_for_the_one_before(tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    for stall_s, found in run_ranks(slow_saves, 2, str(root)):
        assert stall_s < 0.4
        assert found == ["then", "step_00000001"]
    assert sorted(os.listdir(root)) == ["step_00000001", "step_00000002"]
    check(open_checkpoint(root), 2)


def test_what_ends_a_run_does_not_end_its_save(tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    log, writer = open_writer(SOLO, root)
    with slow_disk(), pytest.raises(DivergedError), log, writer:
        writer.save(1, 10, {"version": 0}, Held(SOLO, 1))
        raise DivergedError("too many spikes")
    check(open_checkpoint(root), 1)


def test_a_peer_that_is_lost_is_no_failed_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training would go on, and wait for it."""
    monkeypatch.setattr("megalite.checkpoint.writer.save", Mock(side_effect=PeerError("gone")))
    log, writer = open_writer(SOLO, tmp_path / "run" / "checkpoints")
    with log:
        writer.save(1, 10, {"version": 0}, Held(SOLO, 1))
        with pytest.raises(PeerError):
            writer.wait()
