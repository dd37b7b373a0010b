"""Checkpoints made by an enemy: each is refused with an error, in little time and memory; nothing runs."""

from __future__ import annotations

import json
import os
import pickle
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megalite.checkpoint.store import open_checkpoint
from megalite.convert import config_to_hf
from megalite.errors import CheckpointError
from megalite.hf_folder import read_hf
from tests.checkpoint.helpers import save_step
from tests.checkpoint.test_format import HOSTILE, seal
from tests.ranks import SOLO, join_ranks, spawn_ranks
from tests.tiny_runs import tiny_config

RANK = "rank_00000.safetensors"


def header(table: Any, length: int | None = None) -> bytes:
    """A safetensors header: as the table says, with a length of its own choice."""
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


def tensor(**changed: Any) -> dict[str, Any]:
    """An entry of a header, right but for the given fields."""
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changed}}


# Hostile headers; 8 bytes of data follow each.
HEADERS: dict[str, bytes] = {
    "huge header": header(b"{}", 2**62),
    "negative header": header(b"{}", 2**64 - 1),
    "header beyond the file": header(b"{}", 1000),
    "header of 99 MB promised": header(b"{}", 99_000_000),
    "no header": b"",
    "half a length": b"\x08\0\0",
    "overlapping offsets": header(tensor() | {"v": tensor(data_offsets=[4, 12])["w"]}),
    "same bytes twice": header(tensor() | {"v": tensor()["w"]}),
    "offsets beyond the file": header(tensor(data_offsets=[0, 2**40], shape=[2**38])),
    "offsets reversed": header(tensor(data_offsets=[8, 0])),
    "negative offsets": header(tensor(data_offsets=[-8, 0])),
    "offsets of 2^64": header(tensor(data_offsets=[2**64, 2**64 + 8])),
    "fractions": header(tensor(data_offsets=[0.5, 8.5])),
    "NaN": header(b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}'),
    "infinity": header(b'{"w":{"dtype":"F32","shape":[1e999],"data_offsets":[0,8]}}'),
    "negative shape": header(tensor(shape=[-2])),
    "shape product overflows": header(tensor(shape=[2**32, 2**32])),
    "shape product wraps to 2": header(tensor(shape=[2**63 + 1, 2])),
    "shape too small": header(tensor(shape=[1])),
    "wider dtype": header(tensor(dtype="F64")),
    "unknown dtype": header(tensor(dtype="O")),
    "dtype is a list": header(tensor(dtype=["F32"])),
    "deep nesting": header(b'{"w":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "deep metadata": header(b'{"__metadata__":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001),
    "duplicate keys": header(
        b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":{"dtype":"I32","shape":[2],"data_offsets":[0,8]}}'
    ),
    "slashes": header({"../../../etc/passwd": tensor()["w"]}),
    "another name": header({"weight.other": tensor()["w"]}),
    "not JSON": header(b"\x80\x04K\x01."),
    "not UTF-8": header(b'{"\xff\xfe":1}'),
    "a list": header([1, 2]),
    "nothing": header({}),
    "a million keys": header({str(n): 0 for n in range(300_000)}),
}


def hostile_file(data: bytes, pads: bool) -> Callable[[Path], None]:
    """Puts it in place of rank 0's file, if asked for at the size that file had."""

    def plant(folder: Path) -> None:
        size = (folder / RANK).stat().st_size
        (folder / RANK).write_bytes((data + b"\0" * size)[:size] if pads else data + b"\0" * 8)

    return plant


def hostile_manifest(body: bytes) -> Callable[[Path], None]:
    """Puts it in place of the manifest, with a right CRC."""
    return lambda folder: (folder / "manifest.json").write_bytes(seal(body)) and None


def link(name: str, target: str) -> Callable[[Path], None]:
    """Puts a link in place of a file."""

    def plant(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return plant


def pipe(name: str) -> Callable[[Path], None]:
    """Puts a pipe, which would be waited for, in place of a file."""

    def plant(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return plant


CORPUS: dict[str, Callable[[Path], None]] = {
    **{f"header: {name}": hostile_file(data, pads=False) for name, data in HEADERS.items()},
    **{f"header of the right size: {name}": hostile_file(data, pads=True) for name, data in HEADERS.items()},
    **{f"manifest: {name}": hostile_manifest(make()) for name, (make, _) in HOSTILE.items()},
    "manifest linked": link("manifest.json", "/etc/passwd"),
    "manifest endless": link("manifest.json", "/dev/zero"),
    "manifest a pipe": pipe("manifest.json"),
    "file linked": link(RANK, "/etc/passwd"),
    "file endless": link(RANK, "/dev/zero"),
    "file a pipe": pipe(RANK),
}


def refuse_all(folders: str) -> None:
    """Open every hostile checkpoint with 100 MiB to spare and a second of processor time for each."""
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + (100 << 20), resource.RLIM_INFINITY))
    for folder in sorted(Path(folders).iterdir()):
        began = time.process_time()
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(folder / "step_00000001")
        assert time.process_time() - began < 1, folder.name
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_hostile_checkpoints_are_refused_in_little_time_and_memory(tmp_path: Path) -> None:
    assert len(CORPUS) > 30
    for name, plant in CORPUS.items():
        root = tmp_path / name
        save_step(SOLO, root, 1)
        plant(root / "step_00000001")
    assert join_ranks(spawn_ranks(refuse_all, 1, str(tmp_path))) == [0]


def refuse_foreign(folders: str) -> None:
    """Read every hostile Hugging Face folder as `import` would, with 100 MiB to spare."""
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + (100 << 20), resource.RLIM_INFINITY))
    for folder in sorted(Path(folders).iterdir()):
        began = time.process_time()
        with pytest.raises(CheckpointError):
            dict(read_hf(folder)[1])
        assert time.process_time() - began < 1, folder.name


def test_hostile_safetensors_of_others_are_refused(tmp_path: Path) -> None:
    for name, data in HEADERS.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config_to_hf(tiny_config("llama"))))
        (folder / "model.safetensors").write_bytes(data + b"\0" * 8)
    assert join_ranks(spawn_ranks(refuse_foreign, 1, str(tmp_path))) == [0]


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_pickles_under_every_name_are_never_run(tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    payload = pickle.dumps(Bomb(trap))
    for number, name in enumerate(
        [
            "manifest.json",
            RANK,
            ".metadata",
            "data.pkl",
            "optimizer.pt",
            "mp_rank_00_model_states.pt",
            "latest",
        ]
    ):
        for form in (payload, payload.ljust(2000, b"."), seal(payload)):
            root = tmp_path / f"{number} {len(form)}"
            save_step(SOLO, root, 1)
            (root / "step_00000001" / name).write_bytes(form)
            (root / "latest").write_bytes(form)
            if name in ("manifest.json", RANK):
                with pytest.raises(CheckpointError):
                    open_checkpoint(root)
            else:
                assert open_checkpoint(root).step == 1
    assert not trap.exists()


def test_a_link_to_a_checkpoint_elsewhere_is_not_followed(tmp_path: Path) -> None:
    save_step(SOLO, tmp_path / "elsewhere", 1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "step_00000001").symlink_to(tmp_path / "elsewhere" / "step_00000001")
    with pytest.raises(CheckpointError, match="is a symbolic link"):
        open_checkpoint(tmp_path / "run")
