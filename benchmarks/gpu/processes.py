"""Ending a process together with what it has started."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress


def end_group(process: subprocess.Popen[str]) -> None:
    """Kill a process that leads a group (`process_group=0`), and all in the group; wait for it alone.

    Compilers and sanitizers have processes of their own, which hold the pipes and the GPU.
    """
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
