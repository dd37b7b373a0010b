"""The kernels as torch.compile sees them on a GPU: traced, then interpreted. A process of its own.

Where Triton interprets, an operator is opaque to torch; on a GPU torch traces its launcher, with symbols for
sizes, and reads from each kernel's code what it writes to. So here Triton is told of a chip and compiles for
it, and what would start a kernel runs it as a numpy program instead. What is wrong is printed.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch
from triton.runtime.driver import driver
from triton.runtime.interpreter import InterpretedFunction, _patch_lang
from triton.runtime.jit import JITFunction

from benchmarks.gpu import workloads
from megalite_kernels import dispatch
from megalite_kernels.aot import _Chip
from tests.gpu import checks

_CPU = torch.device("cpu")


class _First(_Chip):
    """The chip as torch numbers it."""

    def get_current_device(self) -> int:
        return 0


class _Warnings(logging.Handler):
    """Where torch cannot read a kernel it warns, and takes all of its arguments as written to."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage().splitlines()[0])


_interpreted: dict[int, Any] = {}


def _as_program(kernel: Any) -> Any:
    return _interpreted.setdefault(id(kernel), InterpretedFunction(kernel.fn))


def _run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    _as_program(kernel).run(*args, grid=grid, warmup=warmup, **options)


def _call(kernel: Any, *args: Any, **options: Any) -> Any:
    # What a kernel calls; the interpreter's own way leaves the language patched, and nothing would compile.
    scope = _patch_lang(kernel.fn)
    try:
        return _as_program(kernel).rewrite()(*args, **options)
    finally:
        scope.restore()


def _resolve(impl: str, *_: Any) -> str:
    return "triton" if impl == "triton" else "torch"


def _wrong(workload: workloads.Workload) -> str:
    """What is wrong with a workload's operators, or nothing."""
    try:
        with checks._Operators() as seen:
            checks.results(workload, checks.ours(workload), workload.inputs())
        for func, args, options in seen.calls.values():
            torch.library.opcheck(func, args, options, test_utils="test_aot_dispatch_dynamic")
        checks.compiled(workload)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:1000]}"
    return ""


def main() -> int:
    """Exit with 1 if anything is wrong."""
    driver.set_active(_First("sm_90"))
    JITFunction.run, JITFunction.__call__ = _run, _call
    dispatch._resolve = _resolve  # type: ignore[assignment]
    _resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)  # and fresh memory is NaN
    warnings = _Warnings()
    logging.getLogger("torch._higher_order_ops.triton_kernel_wrap").addHandler(warnings)
    is_wrong = False
    for workload in workloads.small(_CPU):
        warnings.said.clear()
        wrong = [*filter(None, [_wrong(workload)]), *dict.fromkeys(warnings.said)]
        is_wrong |= bool(wrong)
        print(workload.name, *(wrong or ["ok"]), sep="  ", flush=True)
    return int(is_wrong)


if __name__ == "__main__":
    sys.exit(main())
