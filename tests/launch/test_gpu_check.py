"""launch/gpu_check where there is no GPU: one line and exit code 2; and all of it rehearsed, tiny, on CPU."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import check, races
from benchmarks.gpu.workloads import Workload
from tests import early
from tests.gpu import checks

ROOT = Path(__file__).parents[2]


def _gpu_check(*args: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "launch/gpu_check", *args],
        cwd=cwd,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=1200,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.slow
def test_without_a_gpu_it_says_so_and_exits_2(tmp_path: Path) -> None:
    done = _gpu_check("--out", str(tmp_path / "out"), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "gpu_check: no CUDA GPU here; the checks that need none are in launch/test\n"
    assert not (tmp_path / "out").exists()


def test_without_torch_it_says_so_and_exits_2(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError")
    done = _gpu_check(PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("gpu_check: no torch in ")
    assert done.stderr.count("\n") == 1


_rehearsals: dict[str, tuple[Path, Future[early.Done]]] = {}


def begin_early(items: Sequence[pytest.Function]) -> None:
    """Both halves of the rehearsal, if they were asked for: kernels are interpreted, models are not."""
    if not any("rehearsal" in item.name for item in items):
        return
    for stages, interpret in (("tests,kernels", "1"), ("steps,convergence", "0")):
        folder = Path(tempfile.mkdtemp(prefix="megalite-rehearsal-"))
        command = [
            ROOT / "launch/gpu_check",
            "--rehearse",
            "--out",
            folder,
            "--only",
            stages,
            "--minutes",
            "60",
        ]
        done = early.begin(command, PYTHON=sys.executable, TRITON_INTERPRET=interpret)
        _rehearsals[stages] = folder, done


def _rehearsed(stages: str, to: Path) -> Path:
    """What a rehearsal left, moved to a test's folder."""
    folder, run = _rehearsals[stages]
    done = run.result()
    assert done.returncode == 0, done.stdout[-6000:]
    return Path(shutil.move(folder, to))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="no Triton")
def test_a_rehearsal_runs_every_stage_and_reports_no_figure(tmp_path: Path) -> None:
    out = _rehearsed("tests,kernels", tmp_path / "kernels")
    kernels = _stages(out)["kernels"]
    assert not (out / "choices.json").exists()
    assert all(
        kernels[f"ceiling/{name}"].keys() <= {"flops_per_s", "bytes_per_s", "took_s"}
        for name in ("gemm", "copy")
    )
    for name, result in kernels.items():
        if not name.startswith("ceiling/"):
            assert result["cost"], name
            assert not any(result["seconds"].values()), name
    assert all(result["passed"] for result in _stages(out)["tests"].values())

    out = _rehearsed("steps,convergence", tmp_path / "steps")
    steps = _stages(out)["steps"]
    assert {name.split("/")[1] for name in steps} == {"125m", "1b", "3b", "8b"}
    assert not any("tokens_per_s" in result for result in steps.values())
    assert _stages(out)["convergence"]["convergence"]["steps"] == 3


def _stages(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "results.json").read_text())["stages"]
    return content


@pytest.mark.slow
def test_without_pydantic_the_stages_that_need_it_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "pydantic.py").write_text("raise ImportError")
    done = _gpu_check(
        "--rehearse", "--out", str(tmp_path / "out"), "--only", "steps,convergence", PYTHONPATH=str(tmp_path)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("steps", "convergence"):
        assert _stages(tmp_path / "out")[name][name]["left_out"].startswith("needs pydantic")


# --- a stage's process that dies, hangs or is cut short -----------------------------------------------

WORKER = """
import json, os, sys, time
done = json.loads(sys.stdin.read())
print("a library prints", flush=True)
for name in ("first", "second", "third"):
    if name in done:
        continue
    print("\\x1e" + json.dumps({"begin": name}), flush=True)
    if name == "second":
        print("what it died of", file=sys.stderr, flush=True)
        ACTION
    print("\\x1e" + json.dumps({"item": name, "passed": True}), flush=True)
"""


def _stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str, budget_s: float) -> dict[str, Any]:
    program = tmp_path / "worker.py"
    program.write_text(WORKER.replace("ACTION", action))
    shim = tmp_path / "python"
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{program}" "$@"\n')
    shim.chmod(0o755)
    monkeypatch.setattr(check.sys, "executable", str(shim))
    return dict(check._run_stage("tests", "cpu", budget_s))


def test_an_item_that_kills_its_process_is_told_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _stage(tmp_path, monkeypatch, "os._exit(9)", 60)
    assert found == {
        "first": {"passed": True},
        "second": {"failed": "its process ended with 9: what it died of"},
        "third": {"passed": True},
    }


@pytest.mark.slow
def test_an_item_that_hangs_is_cut_at_its_stages_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "_GRACE_S", 2)
    found = _stage(tmp_path, monkeypatch, "time.sleep(600)", 0)
    assert found["second"] == {"failed": "it did not end within its stage's time"}
    assert found["first"] == found["third"] == {"passed": True}


@pytest.mark.slow
def test_what_an_item_has_started_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilers have workers, which would hold the pipes and the GPU."""
    monkeypatch.setattr(check, "_GRACE_S", 2)
    child = tmp_path / "child"
    action = (
        f"import subprocess; open({str(child)!r}, 'w').write(str(subprocess.Popen(['sleep', '600']).pid))"
    )
    found = _stage(tmp_path, monkeypatch, f"{action}; time.sleep(600)", 0)
    assert found["second"] == {"failed": "it did not end within its stage's time"}
    assert found["third"] == {"passed": True}
    _wait_for_the_end_of(int(child.read_text()))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_ends_the_check_ends_its_workers(tmp_path: Path, number: signal.Signals) -> None:
    """Also with what `timeout` and schedulers send, and what was found before is there."""
    child, program = tmp_path / "child", tmp_path / "worker.py"
    program.write_text(
        WORKER.replace("ACTION", f"open({str(child)!r}, 'w').write(str(os.getpid())); time.sleep(600)")
    )
    shim = tmp_path / "python"
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{program}" "$@"\n')
    shim.chmod(0o755)
    arguments = ["--rehearse", "--only", "tests", "--out", str(tmp_path / "out")]
    command = f"import sys; from benchmarks.gpu.check import main; sys.executable = {str(shim)!r}; "
    command += f"main({arguments})"
    running = subprocess.Popen([sys.executable, "-c", command], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            if child.exists() and child.read_text():
                break
            time.sleep(0.05)
        running.send_signal(number)
        assert running.wait(timeout=30) != 0
    finally:
        running.kill()
    _wait_for_the_end_of(int(child.read_text()))
    assert _stages(tmp_path / "out") == {"tests": {"first": {"passed": True}}}


class _FakeTorch(ModuleType):
    """Of a machine whose driver lacks the calls that expandable segments are made of."""

    def __init__(self, fails: bool) -> None:
        super().__init__("torch")
        self.fails = fails
        self.__version__, self.version = "2", SimpleNamespace(cuda="13.0")
        self.backends = SimpleNamespace(cudnn=SimpleNamespace(version=lambda: 1))
        properties = SimpleNamespace(name="G", total_memory=1, multi_processor_count=1, major=9, minor=0)
        self.cuda = SimpleNamespace(is_available=lambda: True, get_device_properties=lambda _: properties)

    def empty(self, *_: Any, **__: Any) -> None:
        if self.fails:
            raise RuntimeError("operation not supported")


@pytest.mark.parametrize("fails", [False, True])
def test_memory_in_segments_that_grow_is_tried_first(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    monkeypatch.setattr(check.os, "environ", {})
    monkeypatch.setitem(sys.modules, "torch", _FakeTorch(fails))
    triton = ModuleType("triton")
    triton.__version__ = "3"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton", triton)
    machine = check._machine()
    assert isinstance(machine, dict)
    assert machine["allocator"] == ("torch's default" if fails else "expandable_segments:True")
    assert ("PYTORCH_ALLOC_CONF" in check._environment()) is not fails


def _wait_for_the_end_of(process: int) -> None:
    status = Path(f"/proc/{process}/stat")
    for _ in range(100):
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError(f"process {process} lives on")


def _sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> dict[str, Any]:
    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return checks.sanitizer("memcheck")


@pytest.mark.slow
def test_a_sanitizer_that_takes_too_long_leaves_nobody_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "_SANITIZER_S", 1)
    found = _sanitizer(tmp_path, monkeypatch, f"sleep 600 &\necho $! > {tmp_path}/child\nwait")
    assert found == {"left_out": "it had not ended after 1 s"}
    _wait_for_the_end_of(int((tmp_path / "child").read_text()))


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("exit 0", {"passed": True}),
        (
            "echo '========= Error: Device not supported'; exit 1",
            {"left_out": "compute-sanitizer does not support the device here"},
        ),
        (
            "echo '========= Invalid __global__ read'; exit 99",
            {"passed": False, "why": "========= Invalid __global__ read"},
        ),
        ("exit 7", {"passed": False, "why": "exit code 7"}),
    ],
)
def test_what_a_sanitizer_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, found: dict[str, Any]
) -> None:
    assert _sanitizer(tmp_path, monkeypatch, script) == found


def test_it_takes_ten_minutes_at_most_even_where_the_last_item_hangs() -> None:
    assert check.COMPILING_S + sum(check.BUDGETS.values()) + check._GRACE_S <= 600
    assert checks._SANITIZER_S < check._GRACE_S


@pytest.mark.slow
def test_compiling_ahead_ends_within_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first process is done at once, the second would take for ever, the third fails."""
    shim = tmp_path / "python"
    action = "case $3 in 1) exec sleep 600 ;; 2) exit 1 ;; esac"
    shim.write_text(f'#!/bin/sh\necho "$3 $4 $5" >> {tmp_path}/asked\n{action}\n')
    shim.chmod(0o755)
    monkeypatch.setattr(check.sys, "executable", str(shim))
    monkeypatch.setattr(check.os, "cpu_count", lambda: 6)
    results = check.Results(tmp_path / "out", {})
    assert -1 < check._compile_ahead(results, "cuda", 2) < 0.5
    assert sorted((tmp_path / "asked").read_text().splitlines()) == ["0 3 cuda", "1 3 cuda", "2 3 cuda"]
    said = results.content["compiled_ahead"]
    assert said == {"processes": 3, "finished": 1, "failed": 1, "took_s": said["took_s"]}
    assert capsys.readouterr().out == "compiled ahead: 1 of 3 processes finished in 2 s, 1 failed\n"


def test_compiling_ahead_does_not_run_what_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own attention with documents needs 33 GiB, more than a share of the memory."""
    asked = []

    def run(impl: str, x: torch.Tensor) -> torch.Tensor:
        asked.append(impl)
        return x * 2

    workload = Workload("n", lambda: [torch.ones(2)], run, lambda x: x * 2, lambda x: (), peers={})
    monkeypatch.setattr(races, "can_run_kernels", lambda device: True)
    races.run_each(workload, torch.device("cpu"))
    assert asked == ["triton", "triton"]  # forward and backward


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="no Triton")
def test_a_share_of_what_is_compiled_ahead() -> None:
    """Every fortieth action, of kernels that are interpreted."""
    command = [sys.executable, "-m", "benchmarks.gpu.compiling", "7", "40", "cpu"]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["7", "47"]


def test_results_are_on_disk_after_each_item(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = check.Results(tmp_path, {"gpu": "x"})
    results.add("tests", "a", {"passed": True, "error": 0.1, "allowed": 0.2})
    assert _stages(tmp_path) == {"tests": {"a": {"passed": True, "error": 0.1, "allowed": 0.2}}}
    results.add("tests", "b", {"passed": False, "why": "bits"})
    results.add("tests", "c", {"failed": "it died"})
    assert results.failures() == ["b", "c"]
    said = capsys.readouterr().out
    assert (tmp_path / "table.txt").read_text() == said
    assert said.splitlines() == [
        "a  ok (error 1.00e-01, allowed 2.00e-01)",
        "b  WRONG: bits",
        "c  FAILED: it died",
    ]
