"""How a kernel becomes a torch operator, and how it is started.

A launcher is a plain function that allocates outputs and calls `launch`. `operator` registers it with
torch, so that torch.compile, fake tensors and autograd know it. With meta tensors and a recorder a
launcher tells which kernels it would start, which is how `aot` compiles exactly what ships.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.library import custom_op, triton_op, wrap_triton

from megalite_kernels.dispatch import is_interpreted

Recorder = Callable[[Any, tuple[Any, ...], dict[str, Any]], None]
_recorder: Recorder | None = None


def operator(
    name: str, fake: Callable[..., Any], mutates_args: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Register a launcher as the operator megalite::`name`; `fake` gives its outputs' shapes.

    torch.compile looks into it and schedules the kernels with its own. Interpreted kernels are no
    kernels to it, so there the operator is opaque.
    """

    def register(launcher: Callable[..., Any]) -> CustomOpDef:
        kind: Any = custom_op if is_interpreted() else triton_op
        defined: CustomOpDef = kind(f"megalite::{name}", launcher, mutates_args=mutates_args)
        defined.register_fake(fake)
        return defined

    return register


def launch(kernel: Any, grid: Any, *args: Any, **options: Any) -> None:
    """Start `kernel` on `grid`; options are its constants, num_warps and num_stages.

    It runs on the device of its first argument, a tensor, which need not be the current device.
    """
    if _recorder is not None:
        _recorder(kernel, args, options)
    elif is_interpreted():
        kernel[grid](*args, **options)
    else:
        with torch.cuda.device(args[0].device) if args[0].is_cuda else nullcontext():
            wrap_triton(kernel)[grid](*args, **options)


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Within it nothing is started: `recorder` gets every kernel with its arguments and options."""
    global _recorder
    before, _recorder = _recorder, recorder
    try:
        yield
    finally:
        _recorder = before


@triton.jit
def narrow(number):
    """A number that came as Python's float, in fp32: it is that already unless torch compiled the kernel."""
    return tl.cast(number, tl.float32)


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of the device, for kernels that start one program on each."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4  # interpreted, or only compiled


DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Case(NamedTuple):
    """A shipped configuration: its name, and a call of its launcher on meta tensors."""

    name: str
    call: Callable[[], Any]


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def like(x: Tensor) -> Tensor:
    """Memory for a tensor of x's shape and dtype, contiguous whatever x is."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)
