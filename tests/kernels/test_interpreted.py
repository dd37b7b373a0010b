"""Runs the tests of interpreted kernels, each file in a process of its own that begins with the session.

Triton decides when it is imported whether kernels are compiled or interpreted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import pytest

from tests import early

FOLDER = Path(__file__).parent / "interpreted"
EVERY_DAY = ("test_rope.py", "test_norm.py")  # each takes seconds
FILES = sorted(path.name for path in FOLDER.glob("test_*.py"))

pytest.importorskip("triton")

_runs: dict[str, Future[early.Done]] = {}


def begin_early(items: Sequence[pytest.Function]) -> None:
    """A run for each file asked for, the longest first."""
    names = [item.callspec.params["name"] for item in items]
    for name in sorted(names, key=lambda name: (name != "test_training.py", name)):
        options = ["-q", "-p", "no:cacheprovider", "-W", "ignore"]
        command = [sys.executable, "-m", "pytest", *options, str(FOLDER / name)]
        _runs[name] = early.begin(command, TRITON_INTERPRET="1")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in EVERY_DAY)) for name in FILES]
)
def test_interpreted(name: str) -> None:
    done = _runs[name].result()
    assert done.returncode == 0, done.stdout[-6000:]
