"""Check and measure the kernels on this machine's GPU. See launch/gpu_check --help."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.gpu.figures import choices, row
from benchmarks.gpu.processes import end_group

ROOT = Path(__file__).parents[2]
# Seconds of each stage. With the compiling before them less than ten minutes; what a stage leaves over, or
# lacks, the next one has.
BUDGETS = {"tests": 85, "kernels": 165, "steps": 175, "convergence": 50}
COMPILING_S = 80
_COMPILED_FOR = {"tests", "kernels"}
NEEDS = {"steps": ("pydantic",), "convergence": ("pydantic",)}
_GRACE_S = 45  # how far beyond the budget an item may reach before its process is ended
_SEGMENTS = "expandable_segments:True"  # of the workers' memory: large tensors of many sizes leave holes
SPOILED = 70  # a worker's exit code: an item ruined the CUDA context, the next needs a fresh process


class Results:
    """What was found, on disk after each item, so that a run cut short is not lost: JSON and a table."""

    def __init__(self, folder: Path, machine: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.table = folder / "results.json", folder / "table.txt"
        self.table.write_text("")
        self.content: dict[str, Any] = {"machine": machine, "stages": {}}

    def add(self, stage: str, name: str, result: dict[str, Any]) -> None:
        """Keep one item's result, print its row and write the file."""
        self.content["stages"].setdefault(stage, {})[name] = result
        line = row(stage, name, result, self.ceilings)
        print(line, flush=True)
        with self.table.open("a") as table:
            table.write(line + "\n")
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(_writable(self.content), indent=1, allow_nan=False) + "\n")
        partial.replace(self.path)

    @property
    def ceilings(self) -> dict[str, float] | None:
        """Measured FLOP/s and bytes/s of the device, once both are there."""
        kernels = self.content["stages"].get("kernels", {})
        found = {**kernels.get("ceiling/gemm", {}), **kernels.get("ceiling/copy", {})}
        if found.get("flops_per_s") and found.get("bytes_per_s"):
            return {key: found[key] for key in ("flops_per_s", "bytes_per_s")}
        return None

    def failures(self) -> list[str]:
        """Items that failed, or were found wrong."""
        return [name for stage in self.content["stages"] for name in self.failures_of(stage)]

    def failures_of(self, stage: str) -> list[str]:
        """A stage's items that failed, or were found wrong."""
        found = self.content["stages"].get(stage, {})
        return [name for name, item in found.items() if "failed" in item or item.get("passed") is False]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; exit 0 if nothing failed, 1 if something did, 2 without a GPU."""
    options = _parser().parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):  # a time limit's; end the workers as at Ctrl-C
        signal.signal(number, _stop)
    device = "cpu" if options.rehearse else "cuda"
    machine = {} if options.rehearse else _machine()
    if isinstance(machine, str):
        print(f"gpu_check: {machine}", file=sys.stderr)
        return 2
    results = Results(options.out, machine)
    left_s = 0.0
    if device == "cuda" and _COMPILED_FOR & set(options.only):
        left_s = _compile_ahead(results, device, COMPILING_S * options.minutes / 10)
    for stage in options.only:
        missing = [name for name in NEEDS.get(stage, ()) if not _can_import(name)]
        if missing:
            why = f"needs {', '.join(missing)}, which Python {sys.version.split()[0]} here does not find"
            results.add(stage, stage, {"left_out": f"{why}; install it, or put it on PYTHONPATH"})
            continue
        began = time.monotonic()
        budget = BUDGETS[stage] * options.minutes / 10 + left_s
        for name, result in _run_stage(stage, device, budget):
            results.add(stage, name, result)
        left_s = budget - (time.monotonic() - began)
    if "kernels" in options.only:
        _propose(results, options.out)
    failed = results.failures()
    print(f"\n{results.path}: {'nothing failed' if not failed else f'{len(failed)} failed'}")
    for name in failed:
        print(f"  failed: {name}")
    return 1 if failed else 0


def _stop(number: int, _: object) -> None:
    sys.exit(128 + number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/gpu_check",
        description="Check the kernels on this machine's GPU, then measure them and whole training steps "
        "beside their best peers. Results are printed and written as they come.",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu_check", metavar="DIR")
    parser.add_argument(
        "--only",
        type=lambda text: [_stage(name) for name in text.split(",")],
        default=list(BUDGETS),
        metavar="STAGES",
        help=f"some of {','.join(BUDGETS)}",
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="for all stages together (default 10)")
    parser.add_argument("--rehearse", action="store_true", help=argparse.SUPPRESS)  # tiny, on CPU, no figures
    return parser


def _stage(name: str) -> str:
    if name not in BUDGETS:
        raise argparse.ArgumentTypeError(f"no stage {name!r}; use some of {', '.join(BUDGETS)}")
    return name


def _machine() -> dict[str, Any] | str:
    """What this machine is, or why nothing can be measured on it."""
    os.environ.setdefault("PYTORCH_ALLOC_CONF", _SEGMENTS)  # before torch is there: it looks once
    try:
        import torch
    except ImportError:
        return f"no torch in {sys.executable}; name a Python that has it: PYTHON=… launch/gpu_check"
    if not torch.cuda.is_available():
        return "no CUDA GPU here; the checks that need none are in launch/test"
    try:
        import triton
    except ImportError:
        return f"no triton in {sys.executable}; install the one that torch {torch.__version__} names"
    properties = torch.cuda.get_device_properties(0)
    try:
        torch.empty(1, device="cuda")
    except RuntimeError as error:
        # Not every container or virtual GPU has what these segments need, and then all that follows fails.
        tried = os.environ.pop("PYTORCH_ALLOC_CONF")
        print(f"gpu_check: no {tried} here: {str(error)[:200]}", file=sys.stderr)
    return {
        "gpu": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "architecture": f"sm_{properties.major}{properties.minor}",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": sys.version.split()[0],
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF", "torch's default"),
    }


def _can_import(name: str) -> bool:
    return subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True).returncode == 0


def _compile_ahead(results: Results, device: str, budget_s: float) -> float:
    """Fill the compilers' caches from several processes; returns the seconds that are left of the budget."""
    began = time.monotonic()
    count = max(min((os.cpu_count() or 1) // 2, 8), 1)
    environment = {**_environment(), "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    running: list[subprocess.Popen[str]] = []
    try:
        for share in range(count):
            command = [sys.executable, "-m", "benchmarks.gpu.compiling", str(share), str(count), device]
            silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            running.append(
                subprocess.Popen(command, cwd=ROOT, env=environment, text=True, process_group=0, **silent)
            )
        for process in running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(began + budget_s - time.monotonic(), 0.0))
        codes = [process.poll() for process in running]
    finally:
        for process in running:
            end_group(process)
    took_s = time.monotonic() - began
    finished, failed = codes.count(0), sum(code not in (0, None) for code in codes)
    results.content["compiled_ahead"] = {
        "processes": count,
        "finished": finished,
        "failed": failed,
        "took_s": round(took_s, 2),
    }
    why = f", {failed} failed" if failed else ""
    print(f"compiled ahead: {finished} of {count} processes finished in {took_s:.0f} s{why}", flush=True)
    return budget_s - took_s


def _run_stage(stage: str, device: str, budget_s: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Results of a stage's items as they come; a process that dies is followed by another."""
    deadline = time.monotonic() + budget_s
    done: list[str] = []
    while True:
        command = [sys.executable, "-m", "benchmarks.gpu.worker", stage, "--device", device]
        command += ["--budget", str(max(deadline - time.monotonic(), 0.0))]
        worker = subprocess.Popen(
            command, cwd=ROOT, env=_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, errors="replace", process_group=0,
        )  # fmt: skip
        assert worker.stdin is not None
        worker.stdin.write(json.dumps(done))
        worker.stdin.close()
        time_is_up = threading.Event()
        timer = threading.Timer(
            max(deadline - time.monotonic(), 0.0) + _GRACE_S, _end, args=(worker, time_is_up)
        )
        timer.start()
        last_words: list[str] = []
        listener = threading.Thread(target=_keep_last, args=(worker.stderr, last_words))
        listener.start()
        begun = None
        try:
            for line in _lines(worker.stdout):
                begun = line.get("begin", begun)
                if "item" in line:
                    name = line.pop("item")
                    done.append(name)
                    yield name, line
        finally:
            timer.cancel()
            if sys.exc_info()[0] is None:
                worker.wait()
            end_group(worker)  # interrupted or not: leave nobody behind
            code = worker.returncode
            listener.join()
        if code == 0:
            return
        is_crash = begun is not None and begun not in done
        if is_crash:
            assert begun is not None
            done.append(begun)
            said = f"its process ended with {code}: {' | '.join(last_words[-3:])[:600]}"
            yield begun, {"failed": "it did not end within its stage's time" if time_is_up.is_set() else said}
        elif code != SPOILED:
            yield stage, {"failed": f"the process ended with {code}: {' | '.join(last_words[-3:])[:600]}"}
            return


def _end(worker: subprocess.Popen[str], time_is_up: threading.Event) -> None:
    time_is_up.set()
    end_group(worker)


def _lines(stream: Any) -> Iterator[dict[str, Any]]:
    for text in stream:
        if "\x1e" in text:
            line: dict[str, Any] = json.loads(text.partition("\x1e")[2])
            yield line


def _keep_last(stream: Any, kept: list[str]) -> None:
    for text in stream:
        if text.strip():
            kept.append(text.strip())
            del kept[:-20]


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path}


def _propose(results: Results, folder: Path) -> None:
    """Write what the tile tables' "choices" would be by these measurements; nothing is applied.

    A kernel that was found wrong is no choice, however fast. Checks are named check/operation/shape; what is
    named otherwise, as a sanitizer's finding and the comparison of losses, may be of any kernel.
    """
    failed = results.failures_of("tests") + results.failures_of("convergence")
    if of_any := [name for name in failed if name.count("/") < 2]:
        print(f"\nno choices are proposed: {', '.join(of_any)} failed")
        return
    wrong = {name.split("/")[1] for name in failed}
    races = results.content["stages"].get("kernels", {})
    found = choices(result for name, result in races.items() if name.split("/")[0] not in wrong)
    if not found:
        return
    major = int(results.content["machine"]["architecture"].removeprefix("sm_")[:-1])
    proposal = {"architecture": "sm_90" if major >= 9 else "sm_80", "choices": found}
    path = folder / "choices.json"
    path.write_text(json.dumps(proposal, indent=1) + "\n")
    without = f" without {', '.join(sorted(wrong))}, which failed" if wrong else ""
    print(
        f"\n{path}: proposed choices{without}; python -m benchmarks.gpu.apply {path} writes them into the "
        "tables"
    )


def _writable(value: Any) -> Any:
    """As JSON has it, which knows no nan and inf."""
    if isinstance(value, dict):
        return {key: _writable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_writable(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
