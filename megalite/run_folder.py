"""A run's folder: one run at a time is at work in it, and it is told what that run is.

A second run there would replace the first one's checkpoints and metrics, and go on from either's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from megalite.agreement import together
from megalite.config import Config
from megalite.config_file import to_toml
from megalite.data.loader import DataLoader
from megalite.data.tokenizer import load_tokenizer
from megalite.errors import ConfigError
from megalite.lock import Lock
from megalite.parallel.mesh import Mesh
from megalite.run_data import PACKING_FOLDER

LOCK = "lock"


class RunFolder:
    """Locked by a run's first process: from its making, if the folder is there, until the context ends."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        """Before a checkpoint is chosen: nobody else may be about to write one. Only the lock is written.

        Raises:  BusyError, ConfigError, on every rank alike
        """
        self.path = Path(config.run_dir)
        self._config, self._mesh = config, mesh
        self._lock: Lock | None = None
        together(lambda: self._hold() if mesh.rank == 0 and self.path.is_dir() else None, mesh)

    @property
    def has_locks(self) -> bool:
        """Whether its file system does."""
        return self._lock is None or self._lock.is_held

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
        if self._lock is not None:
            self._lock.release()

    def _hold(self) -> None:
        if self._lock is None:
            with self._refusals():
                what = f"run_dir={str(self.path)!r}"
                self._lock = Lock(self.path / LOCK, what, otherwise="name another run_dir")

    def _prepare(self, loader: DataLoader) -> None:
        if self._mesh.rank > 0:
            return
        with self._refusals():
            self.path.mkdir(parents=True, exist_ok=True)
        self._hold()
        with self._refusals():
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
