"""Attention's kernels as operators: log-sum-exp, strides, repeatability, torch.compile, refusals."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.helpers import random, values_and_grads
from tests.kernels.interpreted.test_attention import BF16, CALLS, Call, formula, kernel


def with_lse(operation: Any, *inputs: Tensor, **options: Any) -> Tensor:
    """Output and log-sum-exp in one row, so that gradients come from both."""
    o, lse = operation(*inputs, return_lse=True, **options)
    return torch.cat([o.flatten().to(lse.dtype), lse.flatten()])


@pytest.mark.parametrize("call", [CALLS[0], CALLS[2], CALLS[8], CALLS[10], CALLS[16]], ids=str)
def test_log_sum_exp_and_its_gradient(call: Call) -> None:
    inputs = [x.float() for x in call.inputs()]
    lse = kernel(*inputs, return_lse=True, **call.options())[1]
    batch, queries, heads, _ = inputs[0].shape
    assert lse.shape == (batch, heads, queries)
    exact = [x.double() for x in inputs]
    grad = random(*with_lse(formula, *exact, **call.options()).shape, seed=9)
    found = values_and_grads(partial(with_lse, kernel, **call.options()), inputs, grad.float())
    expected = values_and_grads(partial(with_lse, formula, **call.options()), exact, grad.float().double())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_packed_projection_is_read_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    from megalite_kernels.gpu import attention_backward, attention_forward

    seen: list[Tensor] = []
    for module in (attention_backward, attention_forward):
        inner = module.launch
        monkeypatch.setattr(
            module, "launch", lambda *a, inner=inner, **o: (seen.extend(a[2:5]), inner(*a, **o))
        )
    packed = torch.cat([x.float() for x in CALLS[4].inputs()], dim=2).requires_grad_()
    q, k, v = packed.split([4, 1, 1], dim=2)
    o = kernel(q, k, v)
    o.square().sum().backward()
    assert len(seen) == 9
    assert {x.data_ptr() for x in seen} == {x.data_ptr() for x in (q, k, v)}
    leaf = packed.detach().double().requires_grad_()
    formula(*leaf.split([4, 1, 1], dim=2)).square().sum().backward()
    assert packed.grad is not None
    assert leaf.grad is not None
    torch.testing.assert_close(packed.grad.double(), leaf.grad, rtol=1e-5, atol=1e-5)


def test_other_strides() -> None:
    q, k, v = (x.float() for x in CALLS[4].inputs())
    q, k, v = q[:, :20], k[:1, :20], v[:1, :20]
    expected = kernel(q, k.repeat(2, 1, 1, 1), v.repeat(2, 1, 1, 1))
    # one key head for both rows; every second feature; heads before positions
    assert torch.equal(kernel(q, k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1)), expected)
    k, v = k.repeat(2, 1, 1, 1), v.repeat(2, 1, 1, 1)
    assert torch.equal(kernel(*(x.repeat_interleave(2, -1)[..., ::2] for x in (q, k, v))), expected)
    assert torch.equal(kernel(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))), expected)


def test_the_same_bits_every_time() -> None:
    call = CALLS[7]
    inputs, operation = [x.to(BF16) for x in call.inputs()], partial(kernel, **call.options())
    first, second = (values_and_grads(operation, inputs, None) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_operators_keep_their_promises() -> None:
    from megalite_kernels.gpu.attention import attention_backward, attention_forward, query_spans

    q, k, v = (x.float() for x in Call(20, 16, (2, 1)).inputs())
    low = torch.tensor([0] * 7 + [7] * 13, dtype=torch.int32).expand(2, -1).contiguous()
    high = torch.arange(1, 21, dtype=torch.int32).expand(2, -1).contiguous()
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(attention_forward, (*leaves, low, high, True, 0, 0.25))
    torch.library.opcheck(attention_forward, (*leaves, None, None, False, 3, 0.25))
    o, lse = attention_forward(q, k, v, low, high, True, 0, 0.25)
    spans = (low, high, *query_spans(low, high, 20))
    torch.library.opcheck(attention_backward, (q, lse, q, k, v, o, lse, *spans, True, 0, 0.25))


@pytest.mark.parametrize("causal", [True, False])
def test_compiled_whole(causal: bool) -> None:
    call = Call(20, 16, (2, 1), documents=(7, 13), causal=causal)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o, lse = kernel(q * 2, k, v, return_lse=True, **call.options())
        return o * 3 + lse.transpose(1, 2)[..., None]

    inputs = [x.float() for x in call.inputs()]
    whole = torch.compile(step, fullgraph=True, backend="aot_eager")
    grad = random(2, 20, 2, 16)
    for a, b in zip(values_and_grads(whole, inputs, grad), values_and_grads(step, inputs, grad), strict=True):
        torch.testing.assert_close(a, b)


def test_what_does_not_fit_is_refused() -> None:
    x = torch.zeros(1, 2, 1, 264)
    with pytest.raises(ValueError, match="head_dim is 264; the Triton attention takes up to 256"):
        kernel(x, x, x)
    x = torch.zeros(1, 2, 1, 64, dtype=torch.float64)
    with pytest.raises(ValueError, match="float64: kernels take bf16, fp16 and fp32"):
        kernel(x, x, x)
