"""Contenders in processes of their own, driven over pipes: rounds go around them, each round is timed.

A worker is a program that builds its contender, calls `serve` with a function that takes one step, and
so lives through the whole comparison. A machine whose speed drifts then slows all contenders, and
ratios within a round hold although times between rounds do not.
"""

from __future__ import annotations

import json
import math
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

Step = Callable[[], Any]
_START_LIMIT_S = 300


def serve(step: Step, warm_up: int = 3, **facts: Any) -> None:
    """Warm up, say so along with some facts, then take as many steps as each line of stdin asks for."""
    for _ in range(warm_up):
        step()
    print(json.dumps({"ready": True, **facts}), flush=True)
    for line in sys.stdin:
        steps = int(line)
        began, busy = time.perf_counter(), time.process_time()
        for _ in range(steps):
            value = step()
        taken = {"s": (time.perf_counter() - began) / steps, "cpu_s": (time.process_time() - busy) / steps}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({**taken, "rss": peak, "value": value}), flush=True)


class Worker:
    """A contender's process, or its processes when it has several ranks, of one thread each."""

    def __init__(self, label: str, command: Sequence[str], ranks: int = 1) -> None:
        """Start `command` (after the interpreter) once a rank, with what a launcher would set."""
        self.label = label
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.rss_mib = 0.0
        self.facts: dict[str, Any] = {}
        self.value: Any = None  # what the last step returned, on the first rank that has a value
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if ranks > 1:
            environment |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
            environment |= {"MASTER_PORT": str(_free_port()), "GLOO_SOCKET_IFNAME": "lo"}
        self._errors = [tempfile.TemporaryFile("w+") for _ in range(ranks)]  # noqa: SIM115
        self.processes = [
            subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors[rank],
                text=True,
                env=environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}),
            )
            for rank in range(ranks)
        ]

    def wait_ready(self) -> str | None:
        """None once it is warm, else the last line of its complaint."""
        limit = threading.Timer(_START_LIMIT_S, self.kill)
        limit.start()
        try:
            for process in self.processes:
                answer = self._read(process)
                if answer is None:
                    self.kill()  # or ranks that wait for this one would be waited for
                    return self._complaint()
                self.facts = self.facts or answer
        finally:
            limit.cancel()
        return None

    def round(self, steps: int) -> None:
        """Take and time some steps; the slowest rank's time counts, and all ranks' processor time.

        Raises:  RuntimeError if a rank died
        """
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(f"{steps}\n")
            process.stdin.flush()
        answers = []
        for process in self.processes:
            answer = self._read(process)
            if answer is None:
                raise RuntimeError(f"{self.label} died: {self._complaint()}")
            answers.append(answer)
        self.seconds.append(max(answer["s"] for answer in answers))
        self.cpu_seconds.append(sum(answer["cpu_s"] for answer in answers))
        self.rss_mib = max(answer["rss"] for answer in answers) / 1024
        self.value = next((a["value"] for a in answers if a["value"] is not None), None)

    def kill(self) -> None:
        """End its processes."""
        for process in self.processes:
            process.kill()
            process.wait()

    def _complaint(self) -> str:
        """The last line of a rank's errors, rather of one that does not just miss another rank."""
        last = []
        for file in self._errors:
            file.seek(0)
            last += file.read().strip().splitlines()[-1:]
        own = [line for line in last if "onnection" not in line]
        return (own or last or [f"died silently, or was not ready within {_START_LIMIT_S} s"])[0]

    @staticmethod
    def _read(process: subprocess.Popen[str]) -> dict[str, Any] | None:
        """The next line that is a JSON object (libraries print as well); None at the end."""
        assert process.stdout is not None
        while line := process.stdout.readline():
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        return None


def race(starts: Sequence[Callable[[], Worker]], pairs: int, steps: int) -> tuple[list[Worker], list[str]]:
    """Start workers and go around those that run `pairs` times; these, and a word on each of the others."""
    running: list[Worker] = []
    left_out: list[str] = []
    try:
        for start in starts:  # one after another, so that compilers and imports do not compete
            worker = start()
            complaint = worker.wait_ready()
            if complaint is None:
                running.append(worker)
            else:
                worker.kill()
                left_out.append(f"{worker.label}: {complaint}")
                print(f"  left out {left_out[-1]}", file=sys.stderr)
        for index in range(pairs):
            for worker in running if index % 2 == 0 else reversed(running):
                worker.round(steps)
    finally:
        for worker in running:
            worker.kill()
    return running, left_out


def ratio(mine: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Mine over theirs within each round: the median, and its quartiles."""
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
    if len(ratios) < 2:
        return (ratios[0],) * 3 if ratios else (math.nan,) * 3
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, low, high


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
