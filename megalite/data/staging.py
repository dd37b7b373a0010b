"""What is written before it has its name: how a file or a dataset's folder appears, and is cleared.

The journal is a text file, one JSON object a line. The first line says how the dataset is written,
each further one records a finished shard and how much of the input it and those before it hold. A
line is written once its shard is durable, so a killed writer continues after the last whole line.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from megalite.data.folder import LocalFolder, disk_errors
from megalite.data.manifest import (
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    Manifest,
    ShardInfo,
    dump_manifest,
    shard_from_json,
    shard_to_json,
)
from megalite.errors import DataError

JOURNAL_FILE = "journal.jsonl"

_OUR_FILES = re.compile(
    r"shard_\d{5,}\.arrow(\.zst)?|(manifest|tokenizer|tokenizer_config|stats)\.json|journal\.jsonl|(train|valid)(\.tmp)?"
)


class Progress(NamedTuple):
    """How much of its input a writer has put into finished shards; `names` digests their ids and sources."""

    documents: int
    empty: int
    names: str


class Journal:
    """The journal of a staging folder that is written as `head` says."""

    def __init__(self, staging: Path, head: dict[str, Any]) -> None:
        self._staging = staging
        self._path = staging / JOURNAL_FILE
        self._head = head

    def begin(self, finished: list[tuple[ShardInfo, Progress]]) -> None:
        """Start the journal anew with these shards."""
        self._path.write_text(json.dumps(self._head) + "\n", encoding="utf-8")
        for shard, progress in finished:
            self.append(shard, progress)

    def append(self, shard: ShardInfo, progress: Progress) -> None:
        """Record a shard that is durable."""
        line = json.dumps({"shard": shard_to_json(shard), **progress._asdict()})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
            file.flush()
            os.fsync(file.fileno())
        fsync(self._staging)

    def load(self) -> list[tuple[ShardInfo, Progress]]:
        """The shards a killed writer finished, as far as their files are what the journal says.

        Raises:  DataError if they were written in another way
        """
        try:
            lines = self._path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        except FileNotFoundError:
            return []
        entries = []
        for line in lines:
            try:
                entries.append(json.loads(line))
            except (ValueError, RecursionError):
                break
        if not entries:
            return []
        if entries[0] != self._head:
            raise DataError(
                f"{self._staging} was begun with {entries[0]}, not {self._head}; go on in the same way, or "
                "remove it to begin anew"
            )
        finished = []
        for number, entry in enumerate(entries[1:]):
            shard = shard_from_json(
                str(self._path), entry["shard"], self._head["compression"], f"line {number + 2}"
            )
            if not self._is_sound(shard):
                break
            finished.append((shard, Progress(entry["documents"], entry["empty"], entry["names"])))
        return finished

    def _is_sound(self, shard: ShardInfo) -> bool:
        crc = 0
        try:
            for chunk in LocalFolder(self._staging).stream(shard.file, shard.bytes):
                crc = zlib.crc32(chunk, crc)
        except DataError:
            return False
        return crc == shard.crc32


def clear_leftovers(staging: Path, keep: frozenset[str] = frozenset()) -> None:
    """Remove what a killed build left in its own staging folder, and nothing else.

    Raises:  DataError if the folder holds a file no build of ours writes
    """
    if not staging.exists():
        return
    inside = sorted(staging.rglob("*")) if staging.is_dir() else [staging]
    for path in inside:
        if not _OUR_FILES.fullmatch(path.name):
            raise DataError(f"{path} is in the way and was not written by megalite; move it elsewhere")
    with disk_errors(staging):
        if not keep:
            shutil.rmtree(staging)
            return
        for path in inside:
            if path.name not in keep:
                path.unlink()


def check_free(folder: Path) -> None:
    """Raises:  DataError if something other than an empty folder is already there"""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise DataError(f"{folder} is already there; choose another folder or remove it first")


def commit_dataset(staging: Path, folder: Path, manifest: Manifest) -> None:
    """Complete a staged dataset by its manifest and give it its name.

    Raises:  DataError if the manifest is larger than what is read again, or the disk refuses
    """
    content = dump_manifest(manifest)
    if len(content) > MAX_MANIFEST_BYTES:
        batches = sum(len(shard.batches) for shard in manifest.shards)
        raise DataError(
            f"{folder} would have {batches:,} record batches and a manifest of {len(content):,} bytes; at "
            f"most {MAX_MANIFEST_BYTES:,} are read: divide the text among several datasets"
        )
    with disk_errors(folder):
        (staging / MANIFEST_FILE).write_bytes(content)
        (staging / JOURNAL_FILE).unlink(missing_ok=True)
        commit_folder(staging, folder)


def commit_folder(staging: Path, folder: Path) -> None:
    """Make every file of `staging` durable, then let it appear under its name, whole or not at all."""
    for path in staging.iterdir():
        fsync(path)
    fsync(staging)
    staging.rename(folder)
    fsync(folder.parent)


def staging_of(path: Path) -> Path:
    """Where this process writes a file before `commit_file` gives it its name."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def commit_file(staging: Path, path: Path) -> None:
    """Make a file durable, then let it appear under its name."""
    fsync(staging)
    staging.rename(path)
    fsync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file that appears whole and durable, or not at all; lone surrogates as escapes.

    Raises:  DataError if the disk refuses
    """
    staging = staging_of(path)
    with disk_errors(path):
        try:
            staging.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
            commit_file(staging, path)
        finally:
            staging.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Make a file's content, or a folder's list of names, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
