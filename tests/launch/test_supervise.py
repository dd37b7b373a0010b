"""launch/supervise.py on children of one shell line, and once on a real run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from runpy import run_path

import pytest

from megalite.config import ResilienceConfig
from megalite.config_file import to_toml
from tests.trainer.runs import curve, metrics, tiny, write_dataset

ROOT = Path(__file__).parents[2]
SUPERVISE = [sys.executable, str(ROOT / "launch/supervise.py")]
QUICK = ["--backoff-s", "0.01", "--max-failures", "3"]
# One line into a file for each start, and into n their number.
COUNT = "echo start >>$RUN/starts; n=$(wc -l <$RUN/starts); "
STEP = "mkdir -p $RUN/checkpoints/step_0000000$n; "


def _rank_leaves(code: int, rank: int = 0) -> str:
    return f'echo \'{{"rank": "{rank}", "host": "a", "code": {code}}}\' >>$MEGALITE_EXIT_FILE; '


def _start(run: Path, shell: str, *options: str) -> subprocess.Popen[str]:
    run.mkdir(exist_ok=True)
    command = [*SUPERVISE, "--run-dir", str(run), *QUICK, *options, "--", "bash", "-c", shell]
    return subprocess.Popen(command, env={**os.environ, "RUN": str(run)}, stderr=subprocess.PIPE, text=True)


def _supervise(run: Path, shell: str, *options: str) -> tuple[int, int, str]:
    """Exit code, number of starts, what it said."""
    process = _start(run, COUNT + shell, *options)
    said = process.communicate(timeout=120)[1]
    return process.returncode, len((run / "starts").read_text().splitlines()), said


def _wait_for(condition: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def orphan(tmp_path: Path) -> Iterator[Callable[[], bool]]:
    """Whether the process whose number a child left in RUN/pid lives."""

    def lives() -> bool:
        try:
            state = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat").read_text()
        except OSError:
            return False
        return state.rpartition(")")[2].split()[0] != "Z"

    yield lives
    if lives():
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


@pytest.mark.parametrize("code", [0, 2, 77])
def test_what_a_restart_cannot_mend_is_not_restarted(tmp_path: Path, code: int) -> None:
    ended, starts, said = _supervise(tmp_path, f"exit {code}")
    assert (ended, starts) == (code, 1)
    assert "restart" not in said
    assert f"the command left with {code}" in said


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("exit 75", "left with 75"),
        ("exit 76", "left with 76"),
        ("exit 1", "left with 1"),
        ("kill -9 $$", "killed by SIGKILL"),
        ("kill -SEGV $$", "killed by SIGSEGV"),
        (_rank_leaves(76) + "exit 0", "rank 0 on a left with 76, a rank hung, was lost or is in the way"),
    ],
)
def test_what_a_restart_mends_is_restarted(tmp_path: Path, end: str, reason: str) -> None:
    ended, starts, said = _supervise(tmp_path, f"[ $n = 2 ] || {{ {end}; }}")
    assert (ended, starts) == (0, 2)
    assert reason in said
    assert [line.split()[1] for line in said.splitlines()] == ["start", "end", "restart", "start", "end"]


def test_what_ranks_wrote_counts_before_the_launchers_code(tmp_path: Path) -> None:
    for name, ranks, code in [
        ("mistake", _rank_leaves(76) + _rank_leaves(2, 1) + "echo torn >>$MEGALITE_EXIT_FILE; ", 2),
        ("diverged", _rank_leaves(77), 77),
    ]:
        assert _supervise(tmp_path / name, ranks + "exit 1")[:2] == (code, 1)
    # Only what this start wrote: the 2 of an earlier one is history.
    assert _supervise(tmp_path / "mistake", "exit 0")[:2] == (0, 2)


def test_a_crash_loop_ends_and_the_pauses_grow_up_to_their_cap(tmp_path: Path) -> None:
    ended, starts, said = _supervise(tmp_path, "exit 9", "--max-failures", "4", "--max-backoff-s", "0.03")
    assert (ended, starts) == (9, 4)
    assert [line.split()[3] for line in said.splitlines() if " restart in " in line] == [
        "0.01",
        "0.02",
        "0.03",
    ]
    assert said.endswith("giving up: 4 failures in a row without a new checkpoint\n")


def test_it_does_not_give_up_before_what_a_lost_host_still_runs_has_ended(tmp_path: Path) -> None:
    """That holds the lock of run_dir, or the port, until it has waited for its peers."""
    options = run_path(SUPERVISE[1])["_parse"](["--run-dir", str(tmp_path), "--", "true"])
    pauses = [min(options.max_backoff_s, options.backoff_s * 2**n) for n in range(options.max_failures - 1)]
    assert sum(pauses) > ResilienceConfig.model_validate({}).comm_timeout_s


@pytest.mark.slow
def test_a_new_checkpoint_resets_the_count(tmp_path: Path) -> None:
    ended, starts, _ = _supervise(tmp_path, f"if [ $n -le 6 ]; then {STEP} fi; exit 9")
    assert (ended, starts) == (9, 9)  # six with progress, then three without
    # A folder that is still being written is no progress.
    ended, starts, _ = _supervise(tmp_path / "torn", "mkdir -p $RUN/checkpoints/step_0000000$n.tmp; exit 9")
    assert (ended, starts) == (9, 3)


def test_steps_done_again_after_a_rollback_are_progress(tmp_path: Path) -> None:
    (tmp_path / "checkpoints/step_00000009").mkdir(parents=True)
    back = "rm -rf $RUN/checkpoints/step_00000009; "
    ended, starts, _ = _supervise(tmp_path, f"{back} if [ $n -le 4 ]; then {STEP} fi; exit 9")
    assert (ended, starts) == (9, 7)


def test_a_signal_is_passed_on_and_the_save_waited_for(tmp_path: Path) -> None:
    shell = "trap 'sleep 0.5; touch $RUN/saved; exit 75' TERM; touch $RUN/ready; while :; do sleep 0.1; done"
    process = _start(tmp_path, shell)
    _wait_for((tmp_path / "ready").exists)
    process.terminate()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 75
    assert (tmp_path / "saved").exists()
    assert "SIGTERM: passed on" in said
    assert "restart" not in said


@pytest.mark.slow
def test_after_a_signal_ranks_that_their_launcher_left_behind_are_waited_for(tmp_path: Path) -> None:
    # As ranks on another host: not below the supervisor, and still saving when deepspeed has gone with 1.
    shell = "trap 'touch $RUN/asked; exit 1' TERM; touch $RUN/ready; while :; do sleep 0.1; done"
    process = _start(tmp_path, shell)
    _wait_for((tmp_path / "ready").exists)
    process.terminate()
    _wait_for((tmp_path / "asked").exists)
    time.sleep(1.5)
    subprocess.run(
        ["bash", "-c", _rank_leaves(75, 3)], env={"MEGALITE_EXIT_FILE": str(tmp_path / "exits.jsonl")}
    )
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 75, said
    assert "rank 3 on a left with 75, stopped after a save" in said


def test_a_signal_during_the_pause_ends_it(tmp_path: Path) -> None:
    process = _start(tmp_path, COUNT + "exit 76", "--backoff-s", "60")
    assert process.stderr is not None
    while "restart in 60 s" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 76


@pytest.mark.slow
def test_what_does_not_listen_is_killed_after_the_grace(tmp_path: Path, orphan: Callable[[], bool]) -> None:
    # In a session of its own, as torchrun starts ranks: the group's signal does not reach it.
    shell = "setsid bash -c 'trap \"\" TERM; echo $$ >$RUN/pid; exec sleep 60' & wait"
    process = _start(tmp_path, shell, "--grace-s", "0.5")
    _wait_for(orphan)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert not orphan()


@pytest.mark.slow
def test_ranks_of_a_dead_launcher_save_and_end_before_the_restart(
    tmp_path: Path, orphan: Callable[[], bool]
) -> None:
    rank = f"save() {{ {_rank_leaves(75)} exit 75; }}; trap save TERM; echo $$ >$RUN/pid; "
    rank += "while :; do sleep 0.1; done"
    (tmp_path / "rank").write_text(rank)
    # deepspeed leaves with 0 when its helper was killed, while the ranks go on.
    ended, starts, said = _supervise(
        tmp_path, "[ $n = 2 ] || { setsid bash $RUN/rank & while [ ! -e $RUN/pid ]; do sleep 0.02; done; }"
    )
    assert (ended, starts) == (0, 2)
    assert "left with 75, stopped after a save" in said
    assert not orphan()


def test_help_and_mistakes_in_one_line(tmp_path: Path) -> None:
    shown = subprocess.run([*SUPERVISE, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    assert "launch/supervise.py --run-dir runs/a -- torchrun" in shown.stdout
    for arguments in (
        ["x"],
        ["--run-dir", str(tmp_path)],
        ["--run-dir", str(tmp_path), "--", "no-such-thing"],
    ):
        done = subprocess.run([*SUPERVISE, *arguments], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith("supervise: ")
        assert done.stderr.count("\n") == 1
    (tmp_path / "gone").mkdir()
    in_gone = f"cd '{tmp_path}/gone' && rmdir ../gone && exec \"$@\""
    command = ["sh", "-c", in_gone, "sh", *SUPERVISE, "--run-dir", "r", "--", "true"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("supervise: the working folder is gone")


@pytest.mark.slow
def test_a_run_under_torchrun_that_is_preempted_and_killed_has_the_same_curve(tmp_path: Path) -> None:
    write_dataset(tmp_path / "train", seed=1, documents=40)
    write_dataset(tmp_path / "valid", seed=2, documents=10)
    config = tmp_path / "tiny.toml"
    config.write_text(to_toml(tiny(tmp_path, "train.steps=200", "checkpoint.every_steps=50")))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "megalite", "train", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    reference, run = tmp_path / "reference", tmp_path / "run"
    subprocess.run([*command, f"run_dir={reference}"], env=environment, check=True, capture_output=True)
    supervised = [*SUPERVISE, "--run-dir", str(run), *QUICK, "--", *command, f"run_dir={run}"]
    process = subprocess.Popen(supervised, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        for step, number in ((20, signal.SIGTERM), (120, signal.SIGKILL)):
            _wait_for(lambda step=step: (run / "metrics.jsonl").exists() and len(metrics(run)) >= step)
            os.kill(_rank_of(process.pid, 1), number)
            _wait_for(lambda number=number: (run / "exits.jsonl").exists())
        said = process.communicate(timeout=120)[1]
    finally:
        process.terminate()  # which takes along what it started
        process.wait()
    assert process.returncode == 0, said
    assert "left with 75, stopped after a save" in said
    assert "rank 0 on" in said
    assert "left with 76, a rank hung, was lost or is in the way" in said
    assert said.count("supervise: restart in") == 2
    assert curve(metrics(run)) == curve(metrics(reference))


def _rank_of(supervisor: int, rank: int) -> int:
    """The process number of a rank below a supervisor."""
    waiting = [supervisor]
    for pid in waiting:
        waiting += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        if f"\0RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
            return pid
    raise AssertionError(f"no rank {rank} below {supervisor}")
