"""Ranks that hang, stop, die or leave a collective out: the right one is named, and all end with 76."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megalite import meter
from megalite.cli import main
from megalite.config_file import to_toml
from megalite.data.loader import DataLoader
from megalite.engines.deepspeed import DeepSpeedEngine
from megalite.engines.native import NativeEngine
from megalite.errors import DataError
from tests.daily import one_a_day
from tests.ranks import RanksError, join_ranks, spawn_ranks
from tests.trainer.runs import tiny, write_dataset

FAULTY_STEP = 4
DEADLINE_S = 1.0


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hangs")
    write_dataset(root / "train", seed=1, documents=40)
    write_dataset(root / "valid", seed=2, documents=10)
    steps = ("train.steps=100000", "optim.schedule=constant", f"resilience.hang_timeout_s={DEADLINE_S}")
    path = root / "tiny.toml"
    path.write_text(to_toml(tiny(root, *steps)))
    return path


def sleep_for_ever() -> None:
    """A loop that other threads can run beside."""
    while True:
        time.sleep(0.05)


def hold_the_interpreter() -> None:
    """A call that keeps every other thread of this process out."""
    ctypes.PyDLL(None).sleep(60)


def stop() -> None:
    """As a debugger, a batch system or an operator would."""
    os.kill(os.getpid(), signal.SIGSTOP)


def die() -> None:
    """As the kernel ends a process when memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)


def refuse() -> None:
    """An error that only this rank has."""
    raise DataError("shard 7 is corrupt")


FAULTS = {f.__name__: f for f in (sleep_for_ever, hold_the_interpreter, stop, die, refuse)}


def train(config: str, run_dir: str, fault: str, where: str, faulty: int, *overrides: str) -> None:
    """The command, with a fault on one rank in its fourth step."""
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    rank = int(os.environ["RANK"])
    os.dup2(os.open(f"{run_dir}/said_{rank}", os.O_WRONLY | os.O_CREAT), 2)
    os.environ["MEGALITE_EXIT_FILE"] = f"{run_dir}/exits.jsonl"
    engine = DeepSpeedEngine if overrides else NativeEngine
    owner = {"forward_backward": engine, "_read": DataLoader, "all_reduce": meter}[where]
    real, calls = getattr(owner, where), []

    def faulty_one(self: Any, *args: Any) -> Any:
        calls.append(0)
        if rank == faulty and len(calls) == FAULTY_STEP:
            Path(run_dir, "struck").touch()
            if fault == "skip":
                return self  # the vector that was to be summed
            FAULTS[fault]()
        return real(self, *args)

    setattr(owner, where, faulty_one)
    sys.exit(main(["train", config, f"run_dir={run_dir}", *overrides]))


def hang(
    config: Path, run: Path, world: int, fault: str, where: str, faulty: int, *overrides: str
) -> tuple[list[int], float, str]:
    """Exit codes, seconds until the ranks without the fault had left, and what was said."""
    processes = spawn_ranks(train, world, str(config), str(run), fault, where, faulty, *overrides)
    try:
        limit = time.monotonic() + 60
        while not (run / "struck").exists():
            assert time.monotonic() < limit
            time.sleep(0.01)
        struck = time.monotonic()
        others = [process for rank, process in enumerate(processes) if rank != faulty]
        for process in others:
            process.join(30)
        took = time.monotonic() - struck
        codes = join_ranks(processes, 10 if fault not in ("stop", "hold_the_interpreter") else 3)
    except RanksError:  # one that is stopped stays so
        codes = [process.exitcode or 0 for process in processes]
    finally:
        for process in processes:
            process.kill()
    return codes, took, "".join(path.read_text() for path in sorted(run.glob("said_*")))


CASES = [
    (
        2,
        "sleep_for_ever",
        "forward_backward",
        1,
        ["rank 1 on", "is behind, in step 4 at", "in sleep_for_ever"],
    ),
    (
        2,
        "skip",
        "all_reduce",
        1,
        ["rank 1 began", "where rank 0 began all_reduce of 48 bytes", "left one out"],
    ),
    (3, "die", "forward_backward", 1, ["rank 1 on", "is gone (its last: all_gather number"]),
    (
        3,
        "sleep_for_ever",
        "_read",
        0,
        ["is behind", "in _take and at", "in sleep_for_ever", "ranks 1, 2 wait"],
    ),
    (
        2,
        "stop",
        "forward_backward",
        0,
        ["rank 0 on", "is stopped (its last: all_gather number", "rank 1 waits in red"],
    ),
    (2, "hold_the_interpreter", "forward_backward", 1, ["rank 1 on", "runs but does not answer"]),
    (3, "refuse", "forward_backward", 1, ["rank 1 on", "left with DataError: shard 7 is corrupt"]),
    (3, "skip", "all_reduce", 2, ["rank 2 began", "where ranks 0, 1 began all_reduce of 48 bytes"]),
]


@pytest.mark.parametrize(("world", "fault", "where", "faulty", "words"), one_a_day(*CASES))
def test_the_culprit_is_named(
    config: Path, tmp_path: Path, world: int, fault: str, where: str, faulty: int, words: list[str]
) -> None:
    run = tmp_path / "run"
    codes, took, said = hang(config, run, world, fault, where, faulty)
    told = [line for line in said.splitlines() if "HangError" in line and "stacks and flight logs" in line]
    assert len(told) == 1, said
    assert all(word in told[0] for word in words), told
    assert not any(f"rank {rank} on" in told[0] for rank in range(world) if rank != faulty)
    if fault != "skip":  # where gloo may abort the process of either
        assert [code for rank, code in enumerate(codes) if rank != faulty] == [76] * (world - 1)
    deadline = re.search(r"did not end within (\d+) s", said)
    # A busy machine has long steps, and so long deadlines; the backend's own is 60 s.
    assert took < (int(deadline[1]) if deadline else 0) + 8
    (folder,) = (run / "hangs").iterdir()
    assert "MainThread, innermost first:" in (folder / "report.txt").read_text()
    assert 76 in [json.loads(line)["code"] for line in (run / "exits.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeeds_own_collectives_are_seen(config: Path, tmp_path: Path, stage: int) -> None:
    engine = ('mesh.zero_engine="deepspeed"', f"mesh.zero_stage={stage}")
    codes, _, said = hang(config, tmp_path / "run", 2, "sleep_for_ever", "forward_backward", 1, *engine)
    assert codes == [76, 76]
    assert "rank 1 on" in said
    assert "is behind, in step 4 at" in said
    assert re.search(r"rank 0 waits in \w+ number \d+ of group world", said), said
