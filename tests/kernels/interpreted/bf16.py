"""bf16 in Triton's interpreter, which reads its bits as integers: computed in fp32, rounded at the end.

Matches what compiled kernels do: products and sums in fp32, rounding to nearest even at each cast.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _widen(handle: Any) -> Any:
    bits = np.ascontiguousarray(handle.data).astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32).reshape(handle.data.shape), tl.float32)


def _narrow(handle: Any) -> Any:
    bits = np.ascontiguousarray(handle.data.astype(np.float32)).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    data = np.where(np.isnan(handle.data), np.uint16(0x7FC0), rounded.reshape(handle.data.shape))
    return interpreter.TensorHandle(data, tl.bfloat16)


def _is_bf16(value: Any) -> bool:
    return isinstance(value, interpreter.TensorHandle) and value.dtype.scalar == tl.bfloat16


def install() -> None:
    """Teach the interpreter bf16, for the whole process."""
    builder = interpreter.InterpreterBuilder

    def wrap(name: str, narrows: bool = True) -> None:
        inner = getattr(builder, name)

        def outer(self: Any, *args: Any, **options: Any) -> Any:
            if not any(map(_is_bf16, args)):
                return inner(self, *args, **options)
            result = inner(self, *[_widen(a) if _is_bf16(a) else a for a in args], **options)
            return _narrow(result) if narrows and result.dtype.scalar == tl.float32 else result

        setattr(builder, name, outer)

    for name in (
        *("binary_op", "unary_op", "create_fma", "create_clampf"),
        *("create_rsqrt", "create_fabs", "create_erf"),
    ):
        wrap(name)
    wrap("create_dot", narrows=False)  # its accumulator stays fp32

    cast, convert = builder.cast_impl, builder.create_fp_to_fp

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        scalar = target.scalar
        if _is_bf16(source) and scalar != tl.bfloat16:
            source = _widen(source)
        if scalar == tl.bfloat16 and source.dtype.scalar != tl.bfloat16:
            return _narrow(source if source.dtype.scalar == tl.float32 else cast(self, source, tl.float32))
        return source if source.dtype.scalar == scalar else cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, mode: Any) -> Any:
        if _is_bf16(source) or target.scalar == tl.bfloat16:
            return self.cast_impl(source, target)
        return convert(self, source, target, mode)

    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp
