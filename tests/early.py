"""Long tests that are processes of their own begin with the session, on what the others leave of the cores.

A module names them in `begin_early(items)`, which is called with those of its tests that were asked for.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
NICE = 5  # tests that are under way come first

Done = subprocess.CompletedProcess[str]

_pool = ThreadPoolExecutor(2, thread_name_prefix="early")
_children: set[subprocess.Popen[str]] = set()


def begin(command: Sequence[str | Path], **environment: str) -> Future[Done]:
    """Run a command in the root of the repository when there is time; its output holds errors too."""
    return _pool.submit(_run, command, environment)


def stop() -> None:
    """End what is still under way."""
    _pool.shutdown(wait=False, cancel_futures=True)
    for child in list(_children):
        child.kill()


def _run(command: Sequence[str | Path], environment: dict[str, str]) -> Done:
    with subprocess.Popen(
        ["nice", "-n", str(NICE), *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as child:
        _children.add(child)
        output, _ = child.communicate()
        _children.discard(child)
        return subprocess.CompletedProcess(command, child.returncode, output)
