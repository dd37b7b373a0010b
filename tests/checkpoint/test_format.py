"""The format: what is written is read back, and hostile records are refused before anything is allocated."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from megalite.checkpoint.format import (
    _SEAL,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    Manifest,
    TensorSlice,
    encode_manifest,
    read_manifest,
    verify_file,
    write_file,
    zlib,
)
from megalite.checkpoint.store import Checkpoint
from megalite.errors import CheckpointError


def seal(body: bytes) -> bytes:
    """A manifest's file with a right CRC, as an attacker would make it."""
    return _SEAL % (zlib.crc32(body), body)


def write(folder: Path, *files: list[TensorSlice]) -> Checkpoint:
    """Files and manifest in `folder`, one file per list of slices."""
    entries = [write_file(folder / f"rank_{n:05d}.safetensors", slices) for n, slices in enumerate(files)]
    manifest = Manifest(step=3, position=30, world={"size": len(files)}, meta={}, files=tuple(entries))
    (folder / MANIFEST).write_bytes(encode_manifest(manifest))
    return Checkpoint(folder, read_manifest(folder / MANIFEST))


def part(start: int, stop: int, shape: tuple[int, ...] = (2, 3), name: str = "w") -> TensorSlice:
    """A slice whose values are its indices."""
    return TensorSlice("weight", name, shape, start, stop, torch.arange(float(start), float(stop)))


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), max_size=4),
    cuts=st.lists(st.integers(1, 200), max_size=6),
    owners=st.lists(st.integers(0, 3), min_size=7, max_size=7),
    ends=st.tuples(st.integers(0, 300), st.integers(0, 300)),
)
def test_any_cut_reads_back_at_any_range(
    tmp_path_factory: pytest.TempPathFactory,
    shape: list[int],
    cuts: list[int],
    owners: list[int],
    ends: tuple[int, int],
) -> None:
    size = math.prod(shape)
    bounds = sorted({0, size, *(cut for cut in cuts if cut < size)})
    files: list[list[TensorSlice]] = [[], [], [], []]
    for (start, stop), owner in zip(zip(bounds, bounds[1:], strict=False), owners, strict=False):
        files[owner].append(part(start, stop, tuple(shape)))
    checkpoint = write(tmp_path_factory.mktemp("cut"), *(slices for slices in files if slices))
    checkpoint.verify()
    low, high = sorted(min(end, size) for end in ends)
    assert checkpoint.shape("w") == tuple(shape)
    assert torch.equal(checkpoint.read("weight", "w", low, high), torch.arange(float(low), float(high)))


def test_large_and_special_values_keep_their_bits(tmp_path: Path) -> None:
    values = torch.randn(3_000_001)  # several chunks and a rest
    values[:5] = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45])
    checkpoint = write(tmp_path, [TensorSlice("exp_avg", "w", (3_000_001,), 0, 3_000_001, values)])
    checkpoint.verify()
    assert torch.equal(checkpoint.read("exp_avg", "w").view(torch.int32), values.view(torch.int32))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_values_may_lie_on_the_device(tmp_path: Path) -> None:
    values = torch.randn(3_000_001, device="cuda")
    checkpoint = write(tmp_path, [TensorSlice("weight", "w", (3_000_001,), 0, 3_000_001, values)])
    checkpoint.verify()
    assert torch.equal(checkpoint.read("weight", "w"), values.cpu())


def test_any_safetensors_reader_can_open_a_file(tmp_path: Path) -> None:
    write(tmp_path, [part(0, 6), part(0, 4, (9,), "v")], [part(4, 9, (9,), "v")])
    with safe_open(tmp_path / "rank_00000.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["weight.v@0", "weight.w"]
        assert torch.equal(file.get_tensor("weight.w"), torch.arange(6.0).view(2, 3))
    with safe_open(tmp_path / "rank_00001.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("weight.v@4"), torch.arange(4.0, 9.0))


def test_meta_keeps_its_values(tmp_path: Path) -> None:
    meta = {"a": [1, 2.5, None, True, "ü\n"], "nan": math.nan, "inf": math.inf, "big": 2**70, "t": {"x": {}}}
    path, files = tmp_path / MANIFEST, write(tmp_path, [part(0, 6)]).manifest.files
    path.write_bytes(encode_manifest(Manifest(step=0, position=0, world={}, meta=meta, files=files)))
    assert repr(read_manifest(path).meta) == repr(meta)
    assert json.loads(path.read_bytes())["manifest"]["format"] == "megalite-checkpoint"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (part(0, 7), r"weight w: slice \[0, 7\) is empty or outside shape \[2, 3\]"),
        (part(2, 2), r"slice \[2, 2\) is empty"),
        (part(0, 1, name="a/../b"), r"name='a/\.\./b'"),
        (part(0, 1, name=""), "name=''"),
        (part(0, 1, shape=(0,)), r"shape\.0=0"),
        (TensorSlice("weight", "w", (4,), 0, 4, torch.zeros(3)), r"give \[4\] of torch.float32"),
        (TensorSlice("weight", "w", (4,), 0, 4, torch.zeros(4).bfloat16()), "torch.bfloat16; give"),
    ],
)
def test_a_malformed_slice_is_refused_before_the_file_exists(
    tmp_path: Path, bad: TensorSlice, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_file(tmp_path / "rank_00000.safetensors", [bad])
    assert not os.listdir(tmp_path)


def test_meta_that_is_not_json_is_refused(tmp_path: Path) -> None:
    files = write(tmp_path, [part(0, 6)]).manifest.files
    with pytest.raises(CheckpointError, match="meta cannot be written as JSON: .*set"):
        encode_manifest(Manifest(step=0, position=0, world={}, meta={"x": {1}}, files=files))


def test_a_slice_that_changed_is_named(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, [part(0, 6), part(0, 4, (4,), "v")])
    path = tmp_path / "rank_00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 64
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"rank_00000.safetensors is damaged: weight v\[0:4\] has CRC"):
        checkpoint.verify()


ENTRY = {"kind": "weight", "name": "w", "shape": [2], "start": 0, "stop": 2, "dtype": "F32", "crc32": 0}
FILE = {"name": "rank_00000.safetensors", "bytes": 80, "slices": [ENTRY]}
WHOLE = {"format": "megalite-checkpoint", "version": 1, "step": 1, "position": 0, "world": {}, "meta": {}}


def changed(entry: dict[str, Any] | None = None, file: dict[str, Any] | None = None, **top: Any) -> bytes:
    """A manifest's body, right but for the given fields."""
    record = {**FILE, "slices": [{**ENTRY, **(entry or {})}], **(file or {})}
    return json.dumps({**WHOLE, "files": [record], **top}, separators=(",", ":")).encode()


def test_the_unchanged_manifest_is_accepted(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(seal(changed()))
    assert read_manifest(tmp_path / MANIFEST).files[0].slices[0].shape == (2,)


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "traversal": (lambda: changed(file={"name": "../rank_00000.safetensors"}), "files.0.name='../rank"),
    "absolute": (lambda: changed(file={"name": "/etc/passwd"}), "files.0.name='/etc/passwd'"),
    "other name": (lambda: changed(file={"name": "manifest.json"}), "files.0.name="),
    "huge shape": (lambda: changed({"shape": [2**40, 2**40], "stop": 2**80}), "bytes=80, but its slices"),
    "huger shape": (lambda: changed({"shape": [2**62, 2**62]}), "shape.0=4611686018427387904"),
    "huge rest": (
        lambda: changed({"shape": [2**40]}, {"bytes": 80}),
        r"weight w: elements \[2, 1099511627776\) are missing",
    ),
    "too many dims": (lambda: changed({"shape": [1] * 9}), "shape"),
    "negative dim": (lambda: changed({"shape": [-2, -1]}), "shape.0=-2"),
    "negative start": (lambda: changed({"start": -2}), "start=-2"),
    "beyond shape": (lambda: changed({"stop": 3}), r"slice \[0, 3\) is empty or outside shape \[2\]"),
    "float": (lambda: changed({"stop": 2.0}), "stop=2.0"),
    "bool": (lambda: changed({"start": False}), "start=False"),
    "dtype": (lambda: changed({"dtype": "O"}), "dtype='O'"),
    "bad tensor name": (lambda: changed({"name": "../w"}), "name='../w'"),
    "newline in name": (lambda: changed({"name": "w\n"}), "name="),
    "wrong bytes": (lambda: changed(file={"bytes": 2**50}), "bytes=1125899906842624, but its slices make"),
    "overlap": (
        lambda: changed(file={"slices": [ENTRY, {**ENTRY, "start": 1}], "bytes": 148}),
        r"weight w: elements \[1, 2\) are stored twice",
    ),
    "two shapes": (
        lambda: changed(
            file={"slices": [{**ENTRY, "stop": 1}, {**ENTRY, "start": 1, "shape": [1, 2]}], "bytes": 144}
        ),
        r"w has shapes \[2\] and \[1, 2\]",
    ),
    "file twice": (lambda: changed(files=[FILE, FILE]), "1 files are listed twice"),
    "empty file": (lambda: changed(file={"slices": []}), "slices"),
    "unknown key": (lambda: changed(script="print()"), "script"),
    "no step": (lambda: json.dumps({**WHOLE, "step": None, "files": []}).encode(), "step=None"),
    "newer version": (lambda: changed(version=2), "has version 2; this megalite reads version 1"),
    "not JSON": (lambda: b"\x80\x04K\x01.", "Invalid JSON"),
    "deep": (lambda: b'{"meta":' + b"[" * 100_000, "Invalid JSON: recursion"),
    "many faults": (lambda: changed(file={"slices": [{}] * 200_000}), "kind: Field required"),
    "long": (lambda: b" " * MAX_MANIFEST_BYTES, "over 8,388,608 bytes"),
    "many lists": (lambda: changed(meta={"x": [[]] * 240_000}, step=-1), "step=-1"),
    "many tables": (lambda: changed(meta={"x": [{"a": {}}] * 160_000}, step=-1), "step=-1"),
    "many strings": (lambda: changed(meta={"x": ["12345678"] * 499_000}, step=-1), "step=-1"),
    "too many": (lambda: changed(meta={"x": [0] * 500_000}), "500,000 values"),
    "long number": (lambda: changed().replace(b'"step":1', b'"step":' + b"9" * 1_000_000), "out of range"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_manifests_are_refused(tmp_path: Path, case: str) -> None:
    make, message = HOSTILE[case]
    path = tmp_path / MANIFEST
    path.write_bytes(seal(make()))
    begin = time.process_time()
    with pytest.raises(CheckpointError, match=message) as caught:
        read_manifest(path)
    assert time.process_time() - begin < 1
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(path))


def test_links_pipes_and_folders_are_no_files(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, [part(0, 6)])
    entry, path = checkpoint.manifest.files[0], tmp_path / "rank_00000.safetensors"
    real = path.rename(tmp_path / "elsewhere")
    path.symlink_to(real)
    with pytest.raises(CheckpointError, match="symbolic link"):
        verify_file(tmp_path, entry)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        verify_file(tmp_path, entry)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match="not a regular file"):
        verify_file(tmp_path, entry)
    path.rmdir()
    with pytest.raises(CheckpointError, match="No such file"):
        verify_file(tmp_path, entry)
