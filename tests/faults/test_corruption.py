"""Flipped bits, cut, grown, missing and swapped files: each is noticed, and the checkpoint before is used."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from megalite.checkpoint.store import newest, open_checkpoint
from megalite.errors import CheckpointError
from tests.checkpoint.helpers import check, save_step
from tests.faults.seeds import replayable, seeds
from tests.ranks import SOLO, run_ranks


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


@pytest.mark.slow
def test_1000_flipped_bits_are_all_noticed(two: Path) -> None:
    files = sorted((two / "step_00000002").iterdir())
    assert [path.name for path in files] == [
        "manifest.json",
        "rank_00000.safetensors",
        "rank_00001.safetensors",
    ]
    for seed in seeds(1000):
        path = files[seed % 3]
        bit = random.Random(seed).randrange(8 * path.stat().st_size)
        flip(path, bit)
        with replayable(seed):
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


@pytest.mark.slow
def test_100_files_cut_or_grown_anywhere_are_refused(two: Path) -> None:
    files = sorted((two / "step_00000002").iterdir())
    for seed in seeds(100):
        path = files[seed % 3]
        whole = path.read_bytes()
        cut = (0, len(whole) - 1)[seed // 3] if seed < 6 else random.Random(seed).randrange(len(whole))
        with replayable(seed):
            path.write_bytes(whole[:cut])
            assert_refused(two)
            path.write_bytes(whole + b"\0" * (seed + 1))
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
