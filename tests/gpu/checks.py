"""What is checked of the kernels on a GPU. Plain functions: launch/gpu_check runs them without pytest.

Numerics at real shapes by FlashAttention's rule, a hundred repeats bit for bit, offsets past 2³¹, the
operators' contracts, torch.compile, and NVIDIA's sanitizer where it is installed.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.processes import end_group
from benchmarks.gpu.timing import can_run_kernels
from benchmarks.gpu.workloads import Workload, as_tuple, checked, far, small, upstream

Result = dict[str, Any]
Item = tuple[str, Callable[[], Result]]
ROOT = Path(__file__).parents[2]
REPEATS = 100
_TAIL = 2  # rows compared at the far end
_SANITIZER_S = 40  # less than what a stage may take beyond its time


def items(device: torch.device) -> Iterator[Item]:
    """Every check by name; off CUDA a rehearsal at small shapes, of interpreted kernels."""
    if not can_run_kernels(device):
        yield "tests", lambda: {"left_out": "no kernel runs here; set TRITON_INTERPRET=1"}
        return
    yield from _each("exact", exact, checked(device))
    yield from _each("repeats", repeats, checked(device))
    yield from _each("far", is_same_far_away, far(device))
    yield from _each("operators", operators, small(device))
    yield from _each("compiled", compiled, small(device))
    if device.type == "cuda":
        for tool in ("memcheck", "racecheck"):
            yield f"sanitizer/{tool}", lambda tool=tool: sanitizer(tool)  # type: ignore[misc]


def _each(
    check: str, function: Callable[[Workload], Result], workloads: Iterator[Workload]
) -> Iterator[Item]:
    def run(workload: Workload) -> Result:
        torch.manual_seed(0)  # so that what is found is found again
        return function(workload)

    for workload in workloads:
        yield f"{check}/{workload.name}", partial(run, workload)


def ours(workload: Workload) -> Callable[..., Any]:
    """The kernels."""
    return workload.implementation("triton")


def results(
    workload: Workload,
    function: Callable[..., Any],
    inputs: list[Tensor],
    draw: Callable[[list[Tensor]], list[Tensor]] = upstream,
) -> list[Tensor]:
    """Outputs, and the gradients of the inputs for a fixed gradient of the outputs."""
    ready = workload.leaves(inputs)
    outputs = as_tuple(function(*ready))
    found = [y.detach() for y in outputs]
    if workload.has_backward:
        differentiable = [y for y in outputs if y.requires_grad]
        wanted = [x for x in ready if x.requires_grad]
        found += torch.autograd.grad(differentiable, wanted, draw(differentiable))
    return found


def exact(workload: Workload) -> Result:
    """Our largest error against float64 is at most twice the plain formula's in the same dtype.

    Beyond that a rounding of the largest value is allowed, or of what fp32 sums end with in another order.

    Source:  the rule of FlashAttention's own tests (Dao et al., tests/test_flash_attn.py)
    """
    inputs = workload.inputs()
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    truth = results(workload, workload.reference, wide)
    plain = results(workload, workload.reference, inputs)
    found = results(workload, ours(workload), inputs)
    worst: Result = {"passed": True, "error": 0.0, "allowed": 0.0}
    for index, (a, b, c) in enumerate(zip(found, plain, truth, strict=True)):
        error, own = (float((x.double() - c).abs().max()) for x in (a, b))
        rounding = max(torch.finfo(b.dtype).eps, 4 * torch.finfo(torch.float32).eps)
        allowed = 2 * own + rounding * float(c.abs().max())
        if not error <= allowed < math.inf:  # NaN too; and what the plain formula overflows in proves nothing
            return {"passed": False, "error": error, "allowed": allowed, "why": f"result {index}"}
        if error > worst["error"]:
            worst |= {"error": error, "allowed": allowed}
    return worst


def repeats(workload: Workload) -> Result:
    """Every repeat gives the same bits."""
    inputs, function = workload.inputs(), ours(workload)
    first = results(workload, function, inputs)
    for turn in range(REPEATS if torch.cuda.is_available() else 2):
        again = results(workload, function, inputs)
        if not all(map(_same_bits, first, again)):
            return {"passed": False, "why": f"repeat {turn + 1} differs"}
    return {"passed": True}


def is_same_far_away(workload: Workload) -> Result:
    """The last rows of more than 2³¹ elements come out as they do alone."""
    inputs, function = workload.inputs(), ours(workload)
    tail = [x[-_TAIL:].clone() if i in workload.rows else x for i, x in enumerate(inputs)]
    rows = inputs[workload.rows[0]].shape[0]
    whole, alone = (results(workload, function, given, _same_for_each_row) for given in (inputs, tail))
    compared = 0
    for a, b in zip(whole, alone, strict=True):
        if a.dim() and a.shape[0] == rows:
            compared += 1
            if not _same_bits(a[-_TAIL:], b):
                return {"passed": False, "why": f"{(a[-_TAIL:] != b).sum()} elements differ"}
    return {"passed": compared > 0, "why": "nothing to compare"}


def _same_for_each_row(outputs: list[Tensor]) -> list[Tensor]:
    """A gradient that a row has wherever it lies."""
    return [
        g.expand_as(y).contiguous()
        for g, y in zip(upstream([y[:1] if y.dim() else y for y in outputs]), outputs, strict=True)
    ]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) and not bool(a.isnan().any())


class _Operators(TorchDispatchMode):
    """Collects the calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "megalite":
            copied = tuple(x.clone() if isinstance(x, Tensor) else x for x in args)
            self.calls.setdefault(str(func), (func, copied, dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


def operators(workload: Workload) -> Result:
    """torch.library.opcheck of each operator that a forward and backward call."""
    with _Operators() as seen:
        results(workload, ours(workload), workload.inputs())
    for func, args, kwargs in seen.calls.values():
        torch.library.opcheck(
            func, args, kwargs, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        )
    return {"passed": True, "operators": sorted(seen.calls)}


def compiled(workload: Workload) -> Result:
    """torch.compile takes it whole, and what it makes of it is as exact."""
    torch._dynamo.reset()
    inputs, function = workload.inputs(), ours(workload)
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    whole = torch.compile(function, fullgraph=True, backend=backend)
    for a, b in zip(results(workload, whole, inputs), results(workload, function, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    return {"passed": True}


def sanitizer(tool: str) -> Result:
    """compute-sanitizer over every kernel at small shapes, each tensor in memory of its own."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        return {"left_out": "compute-sanitizer is not installed"}
    command = [program, "--tool", tool, "--error-exitcode", "99", sys.executable, "-m", "tests.gpu.checks"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # In a process group of its own: what it looks at must not outlive it and slow down what is timed next.
    running = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", process_group=0,
    )  # fmt: skip
    try:
        output, _ = running.communicate(timeout=_SANITIZER_S)
    except subprocess.TimeoutExpired:
        return {"left_out": f"it had not ended after {_SANITIZER_S} s"}
    finally:
        end_group(running)
    if running.returncode == 0:
        return {"passed": True}
    said = [line for line in output.splitlines() if "=========" in line]
    if "Device not supported" in output:
        return {"left_out": "compute-sanitizer does not support the device here"}
    return {"passed": False, "why": " | ".join(said[:4])[:600] or f"exit code {running.returncode}"}


if __name__ == "__main__":  # what the sanitizer looks at
    for each in small(torch.device("cuda")):
        results(each, ours(each), each.inputs())
    torch.cuda.synchronize()
