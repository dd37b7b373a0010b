"""The deadline of a step: what it is, and what does not count against it."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from megalite.resilience import watchdog
from megalite.resilience.watchdog import Watchdog
from tests.ranks import SOLO, join_ranks, spawn_ranks


def test_the_deadline_is_ten_medians_and_at_least_the_floor(tmp_path: Path) -> None:
    dog = Watchdog(tmp_path, SOLO, 0.3)
    assert dog.deadline_s is None
    with dog.step(1):  # may compile, and does not count
        time.sleep(0.2)
    assert dog.deadline_s is None
    with dog.step(2):
        pass
    assert dog.deadline_s == 0.3
    for number in (3, 4):
        with dog.step(number):
            time.sleep(0.1)
    assert 1.0 <= (dog.deadline_s or 0) < 20


def alone(folder: str, what: str) -> None:
    """A process that hangs in a step, rests between two, or is stopped in one and continued."""
    with Watchdog(Path(folder), SOLO, 1.0) as dog:
        for number in (1, 2):
            with dog.step(number):
                pass
        if what == "rest":
            time.sleep(3)
        with dog.step(3):
            if what == "hang":
                time.sleep(60)
            if what == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
    sys.exit(7)


def test_a_process_alone_that_hangs_ends_with_76(tmp_path: Path) -> None:
    assert join_ranks(spawn_ranks(alone, 1, str(tmp_path), "hang")) == [76]
    (report,) = tmp_path.glob("hangs/*/report.txt")
    assert "is behind, in step 3 at" in report.read_text()
    assert "in alone" in report.read_text()


@pytest.mark.slow
def test_time_between_steps_and_time_stopped_do_not_count(tmp_path: Path) -> None:
    resting, stopped = (spawn_ranks(alone, 1, str(tmp_path), what)[0] for what in ("rest", "stop"))
    limit = time.monotonic() + 60
    stat = Path(f"/proc/{stopped.pid}/stat")
    while stat.read_text().rpartition(")")[2].split()[0] != "T" and time.monotonic() < limit:
        time.sleep(0.01)
    time.sleep(watchdog._STOPPED_S + 1)
    os.kill(stopped.pid or 0, signal.SIGCONT)
    assert join_ranks([resting, stopped]) == [7, 7]
    assert not (tmp_path / "hangs").exists()
