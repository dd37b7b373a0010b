"""What was set aside, kept for people to look at: a JSON line each, beside the step's parts."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from data_tools.ingest.found import HEAD_BYTES, SetAside
from megalite.data.folder import disk_errors
from megalite.data.staging import commit_file, staging_of

FOLDER = "aside"


class AsideWriter:
    """Write a file of what a task set aside; it appears durable at the end, if there is anything in it.

    Each line has the place, the reason with its detail, the size in bytes, and the first 4 KiB with what
    is not UTF-8 as backslash escapes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._staging = staging_of(path)
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        return self

    def write(self, source: str, item: SetAside) -> None:
        """Append one."""
        line = {
            "source": source,
            "place": item.place,
            "reason": str(item.reason),
            "why": item.why,
            "bytes": item.size,
            "head": head_text(item),
        }
        with disk_errors(self._path):
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._staging.open(
                    "w", encoding="utf-8", newline="\n", errors="backslashreplace"
                )
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None:
            return
        try:
            with disk_errors(self._path):
                self._file.close()
                if kind is None:
                    commit_file(self._staging, self._path)
        finally:
            self._staging.unlink(missing_ok=True)


def head_text(item: SetAside) -> str:
    """The head as text."""
    return item.head[:HEAD_BYTES].decode("utf-8", "backslashreplace")
