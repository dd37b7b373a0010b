"""Asked to stop through real launchers: whoever hears it, all save one checkpoint and leave with 75."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megalite.config_file import to_toml
from tests.trainer.runs import metrics, tiny, write_dataset

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SAVED_WITHIN_S = 25  # launchers kill 30 s after they passed a signal on
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("preemption")
    write_dataset(root / "train", seed=1, documents=40)
    write_dataset(root / "valid", seed=2, documents=10)
    path = root / "tiny.toml"
    path.write_text(to_toml(tiny(root, "train.steps=1000000", "optim.schedule=constant")))
    return path


def _command(launcher: str) -> list[str]:
    if launcher == "torchrun":
        return [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "-m", "megalite"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = ["--num_gpus", "2", "--master_port", port, "--no_local_rank", "--module", "megalite"]
    return [str(BIN / "deepspeed"), *words]


@contextmanager
def _running(command: list[str], config: Path, run: Path) -> Iterator[subprocess.Popen[str]]:
    """A run that has got to its third step; nothing of it is left afterwards."""
    run.mkdir()
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "MEGALITE_EXIT_FILE": str(run / "exits.jsonl"),
    }
    words = [*command, "train", str(config), f"run_dir={run}"]
    with (run / "said").open("w") as said:
        process = subprocess.Popen(words, env=environment, stdout=said, stderr=said, start_new_session=True)
    try:
        _wait_for(lambda: len(_metrics(run)) >= 3 or process.poll() is not None, 120)
        assert process.poll() is None, (run / "said").read_text()
        yield process
    finally:
        process.kill()
        process.wait()
        for pid in _processes(run):
            os.kill(pid, signal.SIGKILL)


def _metrics(run: Path) -> list[object]:
    return list(metrics(run)) if (run / "metrics.jsonl").exists() else []


def _wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _processes(run: Path, rank: int | None = None) -> list[int]:
    """Processes that have the run's folder in their command line; those of one rank."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            pid = int(entry.name)
            words = (entry / "cmdline").read_bytes()
            variables = b"\0" + (entry / "environ").read_bytes()
        except (OSError, ValueError):
            continue
        is_rank = rank is None or f"\0RANK={rank}\0".encode() in variables
        if f"run_dir={run}".encode() in words and is_rank:
            found.append(pid)
    return found


CASES = [
    ("torchrun", "launcher", signal.SIGTERM, 1),
    ("torchrun", "launcher", signal.SIGUSR1, -signal.SIGUSR1),  # which it dies of, and tells nobody
    ("torchrun", "rank 1", signal.SIGUSR1, 1),
    ("deepspeed", "launcher", signal.SIGTERM, -signal.SIGTERM),  # as above
    ("deepspeed", "rank 0", signal.SIGTERM, 75),
]


@pytest.mark.parametrize(("launcher", "who", "number", "code"), CASES)
def test_all_ranks_save_and_leave_with_75(
    config: Path, tmp_path: Path, launcher: str, who: str, number: signal.Signals, code: int
) -> None:
    run = tmp_path / "run"
    with _running(_command(launcher), config, run) as process:
        (pid,) = [process.pid] if who == "launcher" else _processes(run, rank=int(who[-1]))
        os.kill(pid, number)
        assert _wait_for(lambda: not _processes(run), SAVED_WITHIN_S), (run / "said").read_text()
        assert process.wait(10) == code
    _check_saved(run)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_supervisor_that_is_told_to_stop_leaves_with_75(
    config: Path, tmp_path: Path, launcher: str
) -> None:
    run = tmp_path / "run"
    supervise = [sys.executable, str(ROOT / "launch/supervise.py"), "--run-dir", str(run), "--"]
    with _running([*supervise, *_command(launcher)], config, run) as process:
        process.terminate()
        assert process.wait(SAVED_WITHIN_S) == 75, (run / "said").read_text()
        assert _processes(run) == []
    _check_saved(run)


def _check_saved(run: Path) -> None:
    exits = [json.loads(line) for line in (run / "exits.jsonl").read_text().splitlines()]
    assert sorted((record["rank"], record["code"]) for record in exits) == [("0", 75), ("1", 75)]
    last = metrics(run)[-1]["step"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step_{last:08d}"]
