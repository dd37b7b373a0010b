"""One process at a time is at work in a folder, and others are told which.

It is a record lock, which belongs to the process: children do not keep it, NFS has it too, and the system
takes it back however the process ends.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path

from megalite.errors import BusyError


class Lock:
    """Held from here until `release`; the file says who has it, or had.

    `is_held` is False on a file system without locks.
    """

    def __init__(self, path: Path, what: str, otherwise: str) -> None:
        """Raises:  BusyError, of `what` and what to do `otherwise`, if another process has it; OSError"""
        self._file = path.open("a+", encoding="utf-8", errors="replace")
        self.is_held = True
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                self._file.seek(0)
                holder = self._file.read(300).strip() or "another process"
                self._file.close()
                raise BusyError(
                    f"{what} is in use by {holder}; wait until it has ended, or {otherwise}"
                ) from None
            self.is_held = False
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def release(self) -> None:
        """Let others in."""
        self._file.close()
