"""Attention with documents, grouped heads and a sliding window.

On CUDA our Triton kernel where it was measured to be faster, else torch's `scaled_dot_product_attention`
(SDPA); on CPU blocks of queries. What a query sees is one span of keys, see `key_spans`.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megalite_kernels.attention_cpu import attention_cpu
from megalite_kernels.cost import Cost
from megalite_kernels.dispatch import Impl, resolve

# Fastest first: on Hopper cuDNN's kernel is about twice as fast as the others for plain causal masks. And it
# alone takes a dense mask together with grouped heads, for which torch itself would on Ampere compute every
# score in memory.
_SDPA_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    doc_starts: Tensor | None = None,
    window: int = 0,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    impl: Impl = "auto",
) -> Tensor:
    """The output alone."""


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    doc_starts: Tensor | None = None,
    window: int = 0,
    scale: float | None = None,
    return_lse: Literal[True],
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """The output and its log-sum-exp."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    doc_starts: Tensor | None = None,
    window: int = 0,
    scale: float | None = None,
    return_lse: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of each query over the keys it sees.

    o[b, i, h] = Σ_j softmax_j(scale · q[b, i, h] · k[b, j, h / group]) · v[b, j, h / group]
    lse[b, h, i] = ln Σ_j exp(scale · q[b, i, h] · k[b, j, h / group])
    Causal queries see the j with max(doc_starts[b, i], i - window + 1) ≤ j ≤ i, others all of their
    document with |i - j| < window. window=0 sets no limit. With fewer queries than keys (a KV cache) the
    queries are the last positions. Gradients flow through both results.

    Shapes:  q [batch, queries, heads, head_dim]; k, v [batch, keys, kv_heads, head_dim];
             doc_starts [batch, queries] integer, the first key of each query's document, at most the
             query's own place and never decreasing along a row; returns o [batch, queries, heads,
             head_dim] or, with return_lse, (o, lse [batch, heads, queries] in at least fp32)
    Raises:  ValueError for shapes that do not fit, scale ≤ 0 or window < 0
    Source:  Vaswani et al. 2017, eq. 1; Ainslie et al. 2023 (grouped heads)
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    _check(q, k, v, doc_starts, window, scale)
    chosen = resolve(impl, "attention", q, _variant(q, k, causal, doc_starts, window))
    if chosen == "triton":
        from megalite_kernels.gpu.attention import attention_forward

        low = high = None
        if doc_starts is not None:
            low, high = key_spans(q, k, causal=causal, doc_starts=doc_starts, window=window)
        result: tuple[Tensor, Tensor] = attention_forward(q, k, v, low, high, causal, window, scale)
        return result if return_lse else result[0]
    if chosen == "torch" and not return_lse:
        if causal and q.device.type == "cpu" and q.shape[1] == k.shape[1] and q.shape[1] > 1:
            return attention_cpu(q, k, v, doc_starts, window, scale)
        return _attention_sdpa(q, k, v, causal, doc_starts, window, scale)
    # SDPA gives no log-sum-exp with a gradient: the formula does, in fp32 unless it is itself asked for.
    wide = q.dtype if chosen == "reference" else torch.promote_types(q.dtype, torch.float32)
    o, lse = attention_reference(
        *(x.to(wide) for x in (q, k, v)), causal=causal, doc_starts=doc_starts, window=window, scale=scale
    )
    return (o.to(q.dtype), lse) if return_lse else o


def _check(q: Tensor, k: Tensor, v: Tensor, doc_starts: Tensor | None, window: int, scale: float) -> None:
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key heads")
    if q.shape[1] > k.shape[1]:
        raise ValueError(f"{q.shape[1]} queries but only {k.shape[1]} keys")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: k and v must be alike, and share "
            "batch and head_dim with q"
        )
    if doc_starts is not None and doc_starts.shape != q.shape[:2]:
        raise ValueError(
            f"doc_starts is {tuple(doc_starts.shape)}; one for each of {tuple(q.shape[:2])} queries"
        )
    if scale <= 0:
        raise ValueError(f"scale={scale}; it must be positive")
    if window < 0:
        raise ValueError(f"window={window}; use 0 for none or a number of keys")


def _variant(q: Tensor, k: Tensor, causal: bool, doc_starts: Tensor | None, window: int) -> str:
    """The name of a case in the table of measured choices: "d128/causal".

    d is the padded head dim, 64, 128, 256 and so on; then "cache" with fewer queries than keys, else "doc"
    with documents, else "window", else "causal" or "full".
    """
    dim = max(1 << (q.shape[3] - 1).bit_length(), 64)
    kind = "causal" if causal else "full"
    if window:
        kind = "window"
    if doc_starts is not None:
        kind = "doc"
    if q.shape[1] < k.shape[1]:
        kind = "cache"
    return f"d{dim}/{kind}"


def key_spans(
    q: Tensor, k: Tensor, *, causal: bool, doc_starts: Tensor | None, window: int
) -> tuple[Tensor, Tensor]:
    """The keys [low, high) that each query sees; int32 [batch or 1, queries] each, never decreasing.

    Nothing waits for the device.
    """
    queries, keys = q.shape[1], k.shape[1]
    position = torch.arange(keys - queries, keys, dtype=torch.int32, device=q.device)[None]
    low, high = torch.zeros_like(position), torch.full_like(position, keys)
    if window:
        low, high = (position - window + 1).clamp(min=0), (position + window).clamp(max=keys)
    if doc_starts is not None:
        low = torch.maximum(low, doc_starts.int())
        if not causal:
            # A document ends where the first query of another one says that it starts.
            starts = doc_starts.int().contiguous()
            following = torch.searchsorted(starts, starts, right=True)
            ends = F.pad(starts, (0, 1), value=keys).gather(1, following)
            high = torch.minimum(high, ends)
    if causal:
        high = (position + 1).expand_as(low)
    return low.contiguous(), high.contiguous()


def doc_starts_of(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The doc_starts of one packed row of `tokens`; nothing waits for the device.

    Shapes:  cu_seqlens [documents + 1] integer, where each document starts and the last one ends (what
             follows counts as one more); returns int32 [1, tokens]
    """
    place = torch.arange(tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return cu_seqlens[torch.searchsorted(cu_seqlens, place, right=True) - 1].int()[None]


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, doc_starts: Tensor | None, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """`attention` with its log-sum-exp as the formulas read, all scores at once, in the inputs' precision."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    visible = _visible(q, k, causal, doc_starts, window)
    scores = scores.masked_fill(~visible, float("-inf"))
    lse = scores.to(torch.promote_types(scores.dtype, torch.float32)).logsumexp(-1)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v), lse


def _visible(q: Tensor, k: Tensor, causal: bool, doc_starts: Tensor | None, window: int) -> Tensor:
    """Which keys each query sees; bool [batch or 1, 1, queries, keys]."""
    low, high = key_spans(q, k, causal=causal, doc_starts=doc_starts, window=window)
    j = torch.arange(k.shape[1], device=q.device)
    return ((j >= low[..., None]) & (j < high[..., None]))[:, None]


def _attention_sdpa(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, doc_starts: Tensor | None, window: int, scale: float
) -> Tensor:
    is_plain = doc_starts is None and not window and (not causal or q.shape[1] == k.shape[1])
    with sdpa_kernel(_SDPA_ORDER, set_priority=True):
        o = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=None if is_plain else _visible(q, k, causal, doc_starts, window),
            is_causal=is_plain and causal,
            scale=scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
    return o.transpose(1, 2)


def attention_cost(
    q: Tensor, k: Tensor, *, causal: bool = True, visible: int | None = None
) -> tuple[Cost, Cost]:
    """The least work of `attention` forward (with its log-sum-exp) and backward on inputs like these.

    flops: 4 · visible · heads · head_dim forward (two products) and 10 backward (five); bytes: forward
    reads q, k, v and writes o and lse; backward reads q, k, v, o, do, lse and writes dq, dk, dv.
    `visible` counts the (query, key) pairs that see each other, over all rows of the batch; by default
    those without documents and window.
    """
    batch, queries, heads, head_dim = q.shape
    if visible is None:
        hidden = queries * (queries - 1) // 2 if causal else 0
        visible = batch * (queries * k.shape[1] - hidden)
    product = 2 * visible * heads * head_dim
    lse = 4 * batch * heads * queries
    q_bytes, k_bytes = q.numel() * q.element_size(), k.numel() * k.element_size()
    forward = Cost(2 * product, 2 * q_bytes + 2 * k_bytes + lse)
    backward = Cost(5 * product, 4 * q_bytes + 4 * k_bytes + lse)
    return forward, backward
