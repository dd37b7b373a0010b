"""A run's folder: one run at a time is at work in it, and it is told what that run is.

A second run there would replace the first one's checkpoints and metrics, and go on from either's.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self

from megalite.agreement import together
from megalite.config import Config
from megalite.config_file import to_toml
from megalite.data.loader import DataLoader
from megalite.data.tokenizer import load_tokenizer
from megalite.errors import BusyError, ConfigError
from megalite.parallel.mesh import Mesh
from megalite.run_data import PACKING_FOLDER

LOCK = "lock"  # says who has it, or had


class RunFolder:
    """Locked by the first process of a run: from its making, if the folder is there, until the context ends.

    The system takes the lock back however the process ends. It is a record lock, which belongs to the
    process: children do not keep it, and NFS has it too.
    """

    def __init__(self, config: Config, mesh: Mesh) -> None:
        """Before a checkpoint is chosen: nobody else may be about to write one. What is there stays as it is.

        Raises:  BusyError, ConfigError, on every rank alike
        """
        self.path = Path(config.run_dir)
        self.has_locks = True  # whether its file system does
        self._config, self._mesh = config, mesh
        self._file: FileIO | None = None
        together(lambda: self._lock() if mesh.rank == 0 and self.path.is_dir() else None, mesh)

    def prepare(self, loader: DataLoader) -> None:
        """Make the folder, and write down what `generate` and people need; an older run's is replaced.

        Raises:  BusyError, ConfigError, on every rank alike
        """
        together(lambda: self._prepare(loader), self._mesh)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def _lock(self) -> FileIO:
        if self._file is not None:
            return self._file
        with self._refusals():
            file = FileIO(os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = file.read(300).decode(errors="replace").strip() or "another process"
                file.close()
                raise BusyError(
                    f"run_dir={str(self.path)!r} is in use by {holder}; wait until it has ended, or name "
                    "another run_dir"
                ) from None
            self.has_locks = False
        self._file = file
        return file

    def _prepare(self, loader: DataLoader) -> None:
        if self._mesh.rank > 0:
            return
        with self._refusals():
            self.path.mkdir(parents=True, exist_ok=True)
        file = self._lock()
        with self._refusals():
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            fresh = self.path / "config.tmp"  # a run may be started from the file that this replaces
            fresh.write_text(to_toml(self._config), encoding="utf-8")
            fresh.replace(self.path / "config.toml")
            load_tokenizer(loader.datasets[0].path).save(self.path)
            loader.save_tables(self.path / PACKING_FOLDER)

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(f"run_dir={str(self.path)!r} cannot be written: {error.strerror}") from None
