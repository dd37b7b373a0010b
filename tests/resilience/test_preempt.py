"""Signals only leave a mark; all ranks save together and exit 75, whichever of them heard."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from megalite.checkpoint.store import open_checkpoint
from megalite.errors import PreemptedError
from megalite.parallel.collectives import all_reduce
from megalite.parallel.mesh import build_mesh
from megalite.resilience import preempt
from megalite.resilience.preempt import PreemptionFlag
from tests.checkpoint.helpers import check, save_step
from tests.ranks import join_ranks, spawn_ranks


@pytest.mark.parametrize("number", PreemptionFlag.signals)
def test_a_signal_sets_the_flag_and_nothing_else(number: signal.Signals) -> None:
    with PreemptionFlag() as flag:
        assert not flag.requested
        os.kill(os.getpid(), number)
        assert flag.requested
        assert flag.cause == number.name


def test_the_first_cause_is_remembered() -> None:
    with PreemptionFlag() as flag:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
    assert flag.cause == "SIGUSR1"


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in PreemptionFlag.signals]
    with pytest.raises(ZeroDivisionError), PreemptionFlag():
        assert [signal.getsignal(number) for number in PreemptionFlag.signals] != before
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in PreemptionFlag.signals] == before


def test_one_key_press_that_arrives_twice_is_one() -> None:
    with PreemptionFlag() as flag:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert flag.requested


def interrupt_twice() -> None:
    """Press Ctrl-C, wait, and press it again: nothing after that runs."""
    preempt._REPEAT_S = 0.05
    try:
        with PreemptionFlag():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        os._exit(3)


def test_a_second_interrupt_ends_the_process_at_once() -> None:
    assert join_ranks(spawn_ranks(interrupt_twice, 1)) == [-signal.SIGINT]


@contextmanager
def exit_code_of_errors() -> Iterator[None]:
    """As the command line does."""
    try:
        yield
    except PreemptedError as error:
        sys.exit(error.exit_code)


def train_until_asked(root: str) -> None:
    """Steps that agree on the flag, a save by all, exit 75; reports readiness by a file."""
    mesh = build_mesh()
    with exit_code_of_errors(), PreemptionFlag() as flag:
        for step in range(1, 10_000):
            asked = all_reduce(torch.tensor([float(flag.requested)]), mesh.world)
            if asked:
                save_step(mesh, root, step)
                raise PreemptedError("saved")
            Path(root, f"ready_{mesh.rank}").touch()
            time.sleep(0.002)


@pytest.mark.parametrize("who", [(0,), (1,), (1, 0)])
def test_whoever_hears_it_all_save_and_exit_75(tmp_path: Path, who: tuple[int, ...]) -> None:
    processes = spawn_ranks(train_until_asked, 2, str(tmp_path))
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("ready_*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    for rank in who:
        os.kill(processes[rank].pid or 0, signal.SIGTERM)
        time.sleep(0.01)  # as a launcher that signals its ranks one after another
    assert join_ranks(processes, timeout_s=20) == [75, 75]
    check(open_checkpoint(tmp_path))


ORPHAN = """
import os, time
from megalite.resilience.preempt import PreemptionFlag

if os.fork():
    time.sleep(0.2)
    os._exit(0)
flag = PreemptionFlag()
assert not flag.requested
deadline = time.monotonic() + 60
while not flag.requested and time.monotonic() < deadline:
    time.sleep(0.05)
print(flag.cause, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "cause"), [({"TORCHELASTIC_RUN_ID": "x"}, "launcher gone"), ({}, None)]
)
def test_only_a_launcher_that_dies_is_a_request_to_stop(variables: dict[str, str], cause: str | None) -> None:
    text = ORPHAN if cause else ORPHAN.replace("+ 60", "+ 2")
    environment = {k: v for k, v in os.environ.items() if k != "TORCHELASTIC_RUN_ID"} | variables
    done = subprocess.run(
        [sys.executable, "-c", text], env=environment, capture_output=True, text=True, timeout=90
    )
    assert done.stdout == f"{cause or ''}\n", done.stderr


LATE_SIGNAL = """
import os, signal, sys
from megalite.errors import PreemptedError
from megalite.resilience.preempt import PreemptionFlag

class Late:
    def __del__(self):  # among the last things the interpreter does, its signal handlers long gone
        os.kill(os.getpid(), {number})

late = Late()
try:
    with PreemptionFlag():
        raise PreemptedError("saved")
except PreemptedError as error:
    os.kill(os.getpid(), {number})
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("number", PreemptionFlag.signals)
def test_a_signal_after_the_save_does_not_change_the_exit_code(number: signal.Signals) -> None:
    done = subprocess.run([sys.executable, "-c", LATE_SIGNAL.format(number=int(number))], timeout=60)
    assert done.returncode == PreemptedError.exit_code
