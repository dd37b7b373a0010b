"""Which implementation of an operation runs: the caller's word, the environment's, or what we measured."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from megalite_kernels.tiles import architecture, choice

Impl = Literal["auto", "triton", "torch", "reference"]
Resolved = Literal["triton", "torch", "reference"]
IMPLS: tuple[Impl, ...] = ("auto", "triton", "torch", "reference")
VARIABLE = "MEGALITE_KERNELS"
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_asked: list[tuple[str, str]] | None = None


def resolve(impl: Impl, operation: str, x: Tensor, variant: str = "") -> Resolved:
    """The implementation of `operation` to run on tensors like `x` for a requested `impl`.

    "reference" is the plain formula that tests compare against; "torch" is the fastest torch code;
    "triton" our kernel; "auto" is what MEGALITE_KERNELS says where it is set, else on CUDA what our table
    of measurements says is faster for this `variant`, else "torch".

    Raises:  ValueError for any other word, naming where it came from, and for "triton" where no kernel
             can run
    """
    if _asked is not None:
        _asked.append((operation, variant))
    chosen: Resolved = _resolve(impl, operation, variant, x.device, x.dtype)
    return chosen


def _resolve(impl: Impl, operation: str, variant: str, device: torch.device, dtype: torch.dtype) -> Resolved:
    # Of constants alone, so that torch.compile asks once and traces nothing of this: neither the search for
    # Triton nor the reading of a table can be part of a graph.
    asked: str = impl
    origin = "impl"
    is_cuda = device.type == "cuda"
    if asked == "auto":
        asked = os.environ.get(VARIABLE, "auto")
        origin = VARIABLE
    if asked == "auto":
        if not is_cuda or not has_triton() or dtype not in KERNEL_DTYPES:
            return "torch"
        return choice(operation, variant, architecture(device))
    if asked == "torch":
        return "torch"
    if asked == "reference":
        return "reference"
    if asked == "triton":
        if not has_triton() or not (is_cuda or is_interpreted()):
            missing = f"tensors on {device}" if has_triton() else "no triton installed"
            raise ValueError(f"{origin}='triton' with {missing}: kernels run on CUDA; use torch")
        if dtype not in KERNEL_DTYPES:  # a kernel would compute in fp32 and say nothing
            raise ValueError(f"{origin}='triton' with {dtype}: kernels take bf16, fp16 and fp32; use torch")
        return "triton"
    raise ValueError(f"{origin}={asked!r} is no kernel implementation; use one of {', '.join(IMPLS)}")


# As torch.compiler.assume_constant_result does, but that imports the compiler: a second and 125 MiB.
_resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextmanager
def recording_choices() -> Iterator[list[tuple[str, str]]]:
    """Within it the list gets every operation and variant that `resolve` is asked about, in order."""
    global _asked
    before, _asked = _asked, []
    try:
        yield _asked
    finally:
        _asked = before


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def is_interpreted() -> bool:
    """Whether Triton runs kernels as numpy programs, for tests on CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"
