#!/usr/bin/env python3
"""Keep a training run going: start its command, and start it again when it ends in a way a restart mends.

A launcher's exit code says little: torchrun exits with 1 whatever its ranks did, and deepspeed with 0
when its own helper was killed. So each rank of megalite appends its code to the file that
MEGALITE_EXIT_FILE names (RUN_DIR/exits.jsonl), and what the ranks wrote counts first.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

_EPILOG = """\
examples:
  launch/supervise.py --run-dir runs/a -- torchrun --standalone --nproc-per-node 8 -m megalite \\
      train configs/1b.toml run_dir=runs/a
  launch/supervise.py --run-dir runs/a -- launch/cluster.sh --hostfile hosts configs/1b.toml run_dir=runs/a

restarted: 75 (stopped after a save), 76 (a rank hung, was lost or is in the way), death by a signal, any
           other failure.
never restarted: 0 (done), 2 (a mistake in the input), 77 (diverged).
SIGTERM, SIGINT and SIGUSR1 are passed on; then it waits for the command and exits with its code.
"""
MEANINGS = {
    2: "a mistake in the input",
    75: "stopped after a save",
    76: "a rank hung, was lost or is in the way",
    77: "diverged",
}
FINAL = {2, 77}  # a restart would meet the same again
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of prctl(2)
TOLD = {0, 2, 75, 76, 77}  # codes that only a rank's own can be
_REMOTE_S = 25.0  # for ranks on other hosts to save and say so, once their launcher has ended
_SETTLE_S = 1.0  # for processes that are ending on their own when their launcher has ended
_STEP = re.compile(r"step_([0-9]{8,18})")


class Supervisor:
    """One command, restarted until it is done, hopeless, or somebody asks to stop."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.command: list[str] = options.command
        self.checkpoints = options.run_dir / "checkpoints"
        self.exits = options.run_dir / "exits.jsonl"
        self.options = options
        self.process: subprocess.Popen[bytes] | None = None
        self.stop_by: float | None = None  # set by a signal: when what still runs is killed

    def run(self) -> int:
        """Start and restart; the exit code is the last one of the ranks."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._pass_on)
        step, failures, attempt = newest_step(self.checkpoints), 0, 0
        while True:
            attempt += 1
            words = " ".join(shlex.join(self.command).split())  # one line, whatever is quoted in it
            before = step  # lower than once it was, where the run has rolled back
            say(f"start {attempt} at {_at(before)}: {words}")
            began = time.monotonic()
            code, reason = self._attempt()
            step = newest_step(self.checkpoints)
            say(f"end {attempt} after {time.monotonic() - began:.0f} s at {_at(step)}: {reason}")
            if code == 0 or code in FINAL or self.stop_by is not None:
                return code
            failures = 0 if step > before else failures + 1
            if failures >= self.options.max_failures:
                say(f"giving up: {failures} failures in a row without a new checkpoint")
                return code
            delay = min(self.options.max_backoff_s, self.options.backoff_s * 2 ** max(0, failures - 1))
            say(
                f"restart in {delay:g} s; {failures} of {self.options.max_failures} failures in a row "
                "without a new checkpoint"
            )
            until = time.monotonic() + delay
            while time.monotonic() < until and self.stop_by is None:
                time.sleep(0.05)
            if self.stop_by is not None:
                return code

    def _attempt(self) -> tuple[int, str]:
        """Run the command once; its code as far as it can be known, and how it is known."""
        written = self.exits.stat().st_size if self.exits.exists() else 0
        environment = {**os.environ, "MEGALITE_EXIT_FILE": str(self.exits)}
        # A session of its own, so that a Ctrl-C reaches it once, through us.
        self.process = subprocess.Popen(self.command, env=environment, start_new_session=True)
        if self.stop_by is not None:  # the signal came before there was a process to pass it to
            self._signal_group(signal.SIGTERM)
        while self.process.poll() is None and not self._is_over(self.stop_by):
            time.sleep(0.05)
        leftovers = self._end_leftovers(self.process)
        status = self.process.wait()
        if self.stop_by is not None and status not in TOLD:
            # deepspeed leaves at once when it is told to stop, while ranks on other hosts still save.
            until = min(self.stop_by, time.monotonic() + _REMOTE_S)
            while not read_exits(self.exits, written) and not self._is_over(until):
                time.sleep(0.05)
        return judge(status, read_exits(self.exits, written), leftovers)

    def _end_leftovers(self, process: subprocess.Popen[bytes]) -> int:
        """End what outlives its launcher; how many processes there were that did not leave by themselves."""
        settled = time.monotonic() + _SETTLE_S
        while process.poll() is not None and descendants(os.getpid()) and not self._is_over(settled):
            time.sleep(0.02)
        left = descendants(os.getpid())
        if self.stop_by is None:
            for pid in left:
                _kill(pid, signal.SIGTERM)  # on which ranks save
        grace = time.monotonic() + self.options.grace_s
        while descendants(os.getpid()) and not self._is_over(self.stop_by or grace):
            time.sleep(0.05)
        while running := descendants(os.getpid()):
            for pid in running:
                _kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        process.wait()
        _reap()
        return len(left)

    def _is_over(self, deadline: float | None) -> bool:
        return deadline is not None and time.monotonic() >= deadline

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if self.stop_by is None:
            self.stop_by = time.monotonic() + self.options.grace_s
        say(f"{signal.Signals(number).name}: passed on; waiting up to {self.options.grace_s:g} s")
        self._signal_group(number)

    def _signal_group(self, number: int) -> None:
        """To the whole group: the deepspeed command alone would die of it and tell nobody."""
        if self.process is not None and self.process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)


def judge(status: int, exits: Sequence[dict[str, Any]], leftovers: int) -> tuple[int, str]:
    """The exit code that counts, and why: what ranks wrote before what the launcher returned.

    A mistake or a divergence is the cause wherever it stands; the peers of that rank only lost it.
    """
    final = [record for record in exits if record["code"] in FINAL]
    for record in final or exits:
        code = int(record["code"])
        what = MEANINGS.get(code, "an error nobody foresaw")
        return code, f"rank {record.get('rank')} on {record.get('host')} left with {code}, {what}"
    if status < 0:
        return 128 - status, f"the command was killed by {signal.Signals(-status).name}"
    if status == 0 and leftovers:
        return 1, f"the command left with 0, but {leftovers} of its processes were still running"
    return status, f"the command left with {status}" + (", done" if status == 0 else "")


def read_exits(path: Path, start: int) -> list[dict[str, Any]]:
    """What ranks wrote to the exit file from byte `start` on; lines that do not parse are left out."""
    records = []
    for line in path.read_bytes()[start:].splitlines() if path.exists() else ():
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("code"), int):
                records.append(record)
    return records


def newest_step(checkpoints: Path) -> int:
    """The newest step that has a checkpoint folder, or -1."""
    names = os.listdir(checkpoints) if checkpoints.is_dir() else []
    return max((int(found[1]) for name in names if (found := _STEP.fullmatch(name))), default=-1)


def descendants(root: int) -> list[int]:
    """Live processes below `root`, the zombies left out."""
    children: dict[int, list[int]] = {}
    zombies = set()
    for entry in os.listdir("/proc"):
        with suppress(OSError, ValueError):
            pid = int(entry)
            state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
            children.setdefault(int(parent), []).append(pid)
            if state in "ZX":
                zombies.add(pid)
    found = list(children.get(root, []))
    for pid in found:  # grows while it is walked
        found += children.get(pid, [])
    return [pid for pid in found if pid not in zombies]


def say(text: str) -> None:
    """One line on stderr."""
    with suppress(OSError):  # whoever watched may have left
        print(f"supervise: {text}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and supervise; returns the exit code."""
    options = _parse(argv)
    # Ranks whose launcher dies become our children instead of init's, so none is ever lost.
    ctypes.CDLL(None, use_errno=True).prctl(_SUBREAPER, 1, 0, 0, 0)
    try:
        options.run_dir.mkdir(parents=True, exist_ok=True)
        return Supervisor(options).run()
    except OSError as error:
        say(f"{error.filename or options.command[0]}: {error.strerror}")
        return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"supervise: {message}; see launch/supervise.py --help\n")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="supervise.py", description=(__doc__ or "").splitlines()[0], epilog=_EPILOG)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--run-dir", type=Path, required=True, help="the run's folder; a new checkpoint in it is progress")
    # Eight starts take over ten minutes: what a lost host still runs, and is in the way, has ended by then.
    add("--max-failures", type=int, default=8, help="give up after so many in a row without progress (8)")
    add("--backoff-s", type=float, default=5.0, help="first pause, doubled at each further failure (5)")
    add("--max-backoff-s", type=float, default=300.0, help="longest pause (300)")
    add("--grace-s", type=float, default=60.0, help="time to save after a signal, before SIGKILL (60)")
    add("command", nargs=argparse.REMAINDER, metavar="-- COMMAND ...", help="what to run")
    options = parser.parse_args(argv)
    options.command = options.command[options.command[:1] == ["--"] :]
    if not options.command:
        parser.error("no command given")
    if shutil.which(options.command[0]) is None:
        parser.error(f"no command {options.command[0]!r}")
    if options.max_failures < 1 or min(options.backoff_s, options.max_backoff_s, options.grace_s) < 0:
        parser.error("--max-failures must be 1 or more, and no time negative")
    try:
        options.run_dir = options.run_dir.resolve()  # for ranks that start in another folder
    except OSError as error:
        parser.error(f"the working folder is gone ({error.strerror}); cd to one that is there")
    return options


def _at(step: int) -> str:
    return f"step {step}" if step >= 0 else "no checkpoint"


def _kill(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _reap() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


if __name__ == "__main__":
    sys.exit(main())
