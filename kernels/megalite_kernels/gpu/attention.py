"""Attention in Triton as an operator with gradients."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from megalite_kernels.gpu import attention_backward as backward
from megalite_kernels.gpu import attention_forward as forward
from megalite_kernels.gpu.launch import DTYPES, Case, meta, operator


def _forward_fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _dim = q.shape
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return o, q.new_empty(batch, heads, queries, dtype=torch.float32)


def _backward_fake(
    grad: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


attention_forward = operator("attention", _forward_fake)(forward.attention_forward)
attention_backward = operator("attention_backward", _backward_fake)(backward.attention_backward)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, low, high, ctx.causal, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, low, high)


def _autograd(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, o, lse, low, high = ctx.saved_tensors
    first = stop = None
    if low is not None:
        first, stop = query_spans(low, high, k.shape[1])
    mask = (ctx.causal, ctx.window, ctx.scale)
    grads = attention_backward(grad, grad_lse, q, k, v, o, lse, low, high, first, stop, *mask)
    return *grads, None, None, None, None, None


attention_forward.register_autograd(_autograd, setup_context=_save)


def query_spans(low: Tensor, high: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """The queries [first, stop) that see each key, int32 [batch, keys] each.

    low, high [batch, queries] int32 are the keys [low, high) that each query sees; neither ever decreases.
    """
    key = torch.arange(keys, dtype=low.dtype, device=low.device).expand(low.shape[0], -1).contiguous()
    first = torch.searchsorted(high, key, right=True, out_int32=True)
    stop = torch.searchsorted(low, key, right=True, out_int32=True)
    return first, stop


def cases() -> Iterator[Case]:
    """Every kernel that ships, for the check ahead of time."""
    masks = {"causal": (True, 0), "full": (False, 0), "window": (True, 128), "doc": (True, 0)}
    for dtype, dim, mask in [
        *product((torch.bfloat16,), (64, 128, 256), ("causal", "doc")),
        *product((torch.bfloat16,), (128,), ("full", "window")),
        (torch.bfloat16, 96, "causal"),
        (torch.float16, 128, "causal"),
        *product((torch.float32,), (64, 128, 256), ("doc",)),
    ]:
        q, k = meta(2, 1024, 8, dim, dtype=dtype), meta(2, 1024, 2, dim, dtype=dtype)
        lse = meta(2, 8, 1024, dtype=torch.float32)
        span = meta(2, 1024, dtype=torch.int32) if mask == "doc" else None
        name, last = f"{DTYPES[dtype]}/d{dim}/{mask}", (*masks[mask], dim**-0.5)
        yield Case(f"forward/{name}", partial(forward.attention_forward, q, k, k, span, span, *last))
        inputs = (q, lse, q, k, k, q, lse, span, span, span, span)
        yield Case(f"backward/{name}", partial(backward.attention_backward, *inputs, *last))
