"""Other people's implementations of the same operations: torch's, its compiler's, Liger's.

Each function gives builders by name; a builder imports what it needs and raises `UnavailableError` where that
is not here or cannot do the workload. All take the inputs of the workload.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[..., Any]
Builders = dict[str, Callable[[], Function]]


class UnavailableError(Exception):
    """This peer is not here, or cannot do this workload; says why."""


def compiled(reference: Function) -> Callable[[], Function]:
    """torch.compile of the plain formula."""

    def build() -> Function:
        torch._dynamo.reset()  # each is compiled for its own shape, none for all
        backend = "inductor" if torch.cuda.is_available() else "eager"
        return torch.compile(reference, dynamic=False, backend=backend)

    return build


def attention(doc_starts: Tensor | None, causal: bool, window: int) -> Builders:
    """SDPA's backends where no mask is needed, FlexAttention where one is."""
    if doc_starts is not None or window:
        return {"flex": lambda: _flex(doc_starts, causal, window)}
    return {f"sdpa {name.lower()}": lambda name=name: _sdpa(name, causal) for name in ("FLASH", "CUDNN")}  # type: ignore[misc]


def _sdpa(name: str, causal: bool) -> Function:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if not torch.cuda.is_available():
        raise UnavailableError("no CUDA")
    backend = getattr(SDPBackend, f"{name}_ATTENTION")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel([backend]):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        return y.transpose(1, 2)

    return run


def _flex(doc_starts: Tensor | None, causal: bool, window: int) -> Function:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not torch.cuda.is_available():
        raise UnavailableError("no CUDA")

    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = (j <= i) if causal else (j >= 0)
        if window:
            seen = seen & (j > i - window)
        if doc_starts is not None:
            seen = seen & (j >= doc_starts[batch, i])
        return seen

    torch._dynamo.reset()
    call = torch.compile(flex_attention, dynamic=False)
    masks: dict[tuple[int, int], Any] = {}

    def run(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
        shape = (q.shape[0], q.shape[1])
        if shape not in masks:  # made once, outside every time taken
            batch = shape[0] if doc_starts is not None else None
            masks[shape] = create_block_mask(visible, batch, None, shape[1], shape[1], device=q.device)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return call(q, k, v, block_mask=masks[shape], enable_gqa=True).transpose(1, 2)

    return run


def _liger(module: str, name: str) -> Any:
    if find_spec("liger_kernel") is None:
        raise UnavailableError("not installed")
    return getattr(import_module(f"liger_kernel.ops.{module}"), name)


def rms_norm(eps: float) -> Builders:
    """torch's own, and Liger's."""

    def liger() -> Function:
        function = _liger("rms_norm", "LigerRMSNormFunction")
        return lambda x, weight: function.apply(x, weight, eps, 0.0, "llama", False)

    return {"F.rms_norm": lambda: lambda x, w: F.rms_norm(x, w.shape, w.to(x.dtype), eps), "liger": liger}


def add_rms_norm(eps: float) -> Builders:
    """Liger's, which returns the norm and the stream as ours does."""

    def build() -> Function:
        function = _liger("fused_add_rms_norm", "LigerFusedAddRMSNormFunction")
        return lambda x, branch, weight: function.apply(branch, x, weight, eps, 0.0, "llama", False)

    return {"liger": build}


def layer_norm(eps: float) -> Builders:
    """torch's own."""
    return {
        "F.layer_norm": lambda: lambda x, w, b: F.layer_norm(x, w.shape, w.to(x.dtype), b.to(x.dtype), eps)
    }


def swiglu() -> Builders:
    """Liger's, on the two halves."""

    def build() -> Function:
        function = _liger("swiglu", "LigerSiLUMulFunction")
        return lambda gate_up: function.apply(*gate_up.chunk(2, dim=-1))

    return {"liger": build}


def rope(heads: int, kv_heads: int) -> Builders:
    """Liger's, which rotates queries and keys of [batch, heads, seq, head_dim]; values stay as they are."""

    def build() -> Function:
        function = _liger("rope", "LigerRopeFunction")

        def run(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
            q, k, v = (x.transpose(1, 2) for x in qkv.split([heads, kv_heads, kv_heads], dim=2))
            return *function.apply(q, k, *(torch.cat((t, t), -1) for t in (cos, sin))), v

        return run

    return {"liger": build}


def cross_entropy() -> Builders:
    """Liger's, in place as ours."""

    def build() -> Function:
        function = _liger("cross_entropy", "LigerCrossEntropyFunction")
        return lambda logits, targets: function.apply(logits, targets, None, -100, 0.0, 0.0, "sum")[0]

    return {"liger": build}


def linear_cross_entropy() -> Builders:
    """torch's (from 2.13 on), and Liger's, which both form the gradients in chunks."""

    def ours_in_torch() -> Function:
        function = getattr(F, "linear_cross_entropy", None)
        if function is None:
            raise UnavailableError(f"torch {torch.__version__} has no F.linear_cross_entropy")
        return lambda x, weight, targets: function(x, weight, targets, reduction="sum")

    def liger() -> Function:
        function = _liger("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")
        return lambda x, weight, targets: function.apply(
            x, weight, targets, None, None, -100, 0.0, 0.0, "sum"
        )[0]

    return {"F.linear_cross_entropy": ours_in_torch, "liger": liger}


def embedding() -> Builders:
    """torch's own, whose gradient is summed in the weight's dtype."""
    return {"F.embedding": lambda: F.embedding}
