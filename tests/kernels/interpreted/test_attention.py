"""Attention's kernels against the formula: values and gradients."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from megalite_kernels import attention
from megalite_kernels.attention import doc_starts_of
from tests.kernels.helpers import assert_as_exact_as_torch, random, values_and_grads

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Call(NamedTuple):
    """Shapes and options of one call; documents are the lengths that fill each row."""

    keys: int
    dim: int
    heads: tuple[int, int] = (2, 2)
    dtype: torch.dtype = BF16
    queries: int | None = None
    documents: tuple[int, ...] | None = None
    window: int = 0
    causal: bool = True
    scale: float | None = None

    def inputs(self) -> list[Tensor]:
        batch, (heads, kv_heads) = 2 if self.keys < 100 else 1, self.heads
        shapes = [(self.queries or self.keys, heads), (self.keys, kv_heads), (self.keys, kv_heads)]
        return [random(batch, *shape, self.dim, seed=i) for i, shape in enumerate(shapes)]

    def options(self) -> dict[str, Any]:
        starts = None
        if self.documents is not None:
            ends = torch.tensor([0, *self.documents]).cumsum(0)
            starts = doc_starts_of(ends, self.keys)[:, -(self.queries or self.keys) :]
            starts = starts.expand(2 if self.keys < 100 else 1, -1)
        return {"doc_starts": starts, "window": self.window, "causal": self.causal, "scale": self.scale}


# Few of each, so that every pair of things that could meet in a kernel meets somewhere.
CALLS = [
    Call(1, 64, dtype=FP32),
    Call(1, 128, (4, 1), window=1),
    Call(17, 96, (2, 1), FP32, causal=False),
    Call(17, 8, dtype=FP16),
    Call(64, 64, (4, 1)),
    Call(64, 128, (2, 1), documents=(1, 1, 62), causal=False),
    Call(130, 64, (2, 2), FP16, causal=False),
    Call(130, 128, (2, 1), documents=(1, 127, 1, 1)),
    Call(130, 64, (1, 1), FP32, documents=(64, 64, 2), causal=False),
    Call(130, 96, (1, 1), window=40),
    Call(200, 64, (4, 2), documents=(3, 70, 1, 126), window=33),
    Call(200, 64, (1, 1), FP32, window=5, causal=False),
    Call(200, 128, (1, 1), FP16, documents=(200,)),
    Call(200, 64, (1, 1), documents=(128, 72), window=500, causal=False),
    Call(40, 192, (1, 1), documents=(30, 0, 10)),
    Call(40, 256, (2, 1), window=20, scale=0.3),
    # a cache: the queries are the last positions
    Call(150, 64, (4, 2), queries=1),
    Call(150, 128, (2, 1), queries=70, documents=(50, 60, 40)),
    Call(150, 64, (1, 1), FP32, queries=20, window=30),
    Call(150, 64, (1, 1), FP16, queries=70, documents=(50, 60, 40), causal=False),
    Call(0, 64),
]


def kernel(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return attention(q, k, v, impl="triton", **options)  # type: ignore[no-any-return]


def formula(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return attention(q, k, v, impl="reference", **options)  # type: ignore[no-any-return]


@pytest.mark.parametrize("call", [call for call in CALLS if call.keys], ids=str)
def test_values_and_gradients(call: Call) -> None:
    pair = partial(kernel, **call.options()), partial(formula, **call.options())
    # Probabilities are formed again from the log-sum-exp, and dP less delta cancels.
    assert_as_exact_as_torch(*pair, call.inputs(), call.dtype, roundings=4)


def test_summed_output_sends_back_a_gradient_without_strides() -> None:
    q, k, v = (x.float() for x in CALLS[8].inputs())
    found = values_and_grads(kernel, (q, k, v), None)
    expected = values_and_grads(formula, (q.double(), k.double(), v.double()), None)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_empty() -> None:
    for q, k, v in (CALLS[-1].inputs(), [x[:0] for x in CALLS[0].inputs()]):
        found = values_and_grads(kernel, (q.float(), k.float(), v.float()), None)
        assert [x.shape for x in found] == [q.shape, q.shape, k.shape, v.shape]
    q, k, v = (x.float() for x in CALLS[0].inputs())
    found = values_and_grads(kernel, (q[:, :0], k, v), None)
    assert not found[2].any()
    assert not found[3].any()
