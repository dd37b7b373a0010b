"""A disk that may lose power: which states of a folder a power cut can leave, from a record of what was done.

The model is harsher than file systems are. A file is on the disk once it has been forced there, and before
that it is lost. What a folder lists is on the disk once the folder has been forced there; before that any
number of its latest changes, from the last one back, may be missing, whatever other folders have kept. A
rename within a folder is one change.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock


@dataclass
class Node:
    """A file or a folder: what it is now, and what of it is on the disk."""

    is_folder: bool
    data: bytes = b""  # a file's, on the disk
    entries: dict[str, Node] = field(default_factory=dict)  # a folder's, on the disk
    changes: list[tuple[dict[str, Node], set[str]]] = field(default_factory=list)  # since: put, removed


@dataclass(frozen=True)
class Event:
    """One system call: its name, the path, and what else it says (a new name, a file's bytes)."""

    name: str
    path: str
    more: Any = None


@contextmanager
def recording(root: Path) -> Iterator[list[Event]]:
    """Note every call under `root` that changes the disk, in order."""
    events: list[Event] = []
    real = {name: getattr(os, name) for name in ("fsync", "rename", "mkdir", "rmdir", "unlink")}

    def at(path: Any, folder: int | None = None) -> str:
        base = os.readlink(f"/proc/self/fd/{folder}") if folder is not None else os.getcwd()
        return os.path.relpath(os.path.join(base, os.fspath(path)), root)

    def fsync(descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        path = os.readlink(f"/proc/self/fd/{number}")
        data = None if os.path.isdir(path) else Path(path).read_bytes()
        events.append(Event("fsync", at(path), data))
        real["fsync"](descriptor)

    def rename(source: Any, target: Any, **options: Any) -> None:
        events.append(Event("rename", at(source), at(target)))
        real["rename"](source, target, **options)

    def mkdir(path: Any, *args: Any, **options: Any) -> None:
        real["mkdir"](path, *args, **options)
        events.append(Event("mkdir", at(path)))

    def remove(name: str) -> Any:
        def call(path: Any, *, dir_fd: int | None = None) -> None:
            events.append(Event("remove", at(path, dir_fd)))
            real[name](path, dir_fd=dir_fd)

        return call

    patched = {
        "fsync": fsync,
        "rename": rename,
        "mkdir": mkdir,
        "rmdir": remove("rmdir"),
        "unlink": remove("unlink"),
    }
    with mock.patch.multiple(os, **patched):
        yield events


class Disk:
    """The folder as the recorded calls leave it, with what of it is on the disk."""

    def __init__(self, root: Path) -> None:
        """A folder whose present contents are all on the disk."""
        self.root = _load(root)

    def apply(self, event: Event) -> None:
        """Do what the call did."""
        folder, name = self._place(event.path)
        if event.name == "fsync" and event.more is None:
            node = self._find(event.path)
            node.entries, node.changes = _now(node), []
        elif event.name == "fsync":
            node = _now(folder).get(name) or self._put(folder, name, Node(is_folder=False))
            node.data = event.more
        elif event.name == "mkdir":
            self._put(folder, name, Node(is_folder=True))
        elif event.name == "remove":
            folder.changes.append(({}, {name}))
        else:
            target = os.path.basename(event.more)
            folder.changes.append(({target: _now(folder)[name]}, {name}))

    def after_a_power_cut(self, rng: random.Random, to: Path) -> None:
        """Write one of the states that a power cut may leave to the new folder `to`."""
        _write(self.root, rng, to)

    def _place(self, path: str) -> tuple[Node, str]:
        parent, name = os.path.split(path)
        return self._find(parent or "."), name

    def _find(self, path: str) -> Node:
        node = self.root
        for name in Path(path).parts:
            node = _now(node)[name]
        return node

    @staticmethod
    def _put(folder: Node, name: str, node: Node) -> Node:
        folder.changes.append(({name: node}, set()))
        return node


def _now(folder: Node, changes: int | None = None) -> dict[str, Node]:
    """What a folder lists after the first so many of its changes that are not forced; all by default."""
    entries = dict(folder.entries)
    for put, removed in folder.changes[:changes]:
        for name in removed:
            entries.pop(name)
        entries |= put
    return entries


def _load(path: Path) -> Node:
    if not path.is_dir():
        return Node(is_folder=False, data=path.read_bytes())
    return Node(is_folder=True, entries={child.name: _load(child) for child in path.iterdir()})


def _write(node: Node, rng: random.Random, to: Path) -> None:
    if not node.is_folder:
        to.write_bytes(node.data)
        return
    to.mkdir()
    for name, child in _now(node, rng.randint(0, len(node.changes))).items():
        _write(child, rng, to / name)
