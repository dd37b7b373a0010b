"""Attention by query blocks against the formula: lengths, groups, documents, windows, strides."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from megalite_kernels import attention
from megalite_kernels.attention import _variant, attention_cost, doc_starts_of
from megalite_kernels.attention_cpu import _attention_cpu, _attention_cpu_backward, _keeps_probabilities
from tests.kernels.helpers import assert_as_exact_as_torch, assert_same, peak_bytes, random

# (batch, seq, heads, kv_heads, head_dim): one block of queries, its edges, several blocks
SHAPES = [
    (2, 1, 2, 1, 8),
    (1, 2, 1, 1, 16),
    (2, 63, 4, 2, 8),
    (2, 65, 6, 2, 16),
    (1, 127, 2, 2, 8),
    (1, 128, 2, 1, 8),
    (2, 129, 3, 1, 32),
    (1, 300, 2, 1, 4),
    (1, 515, 1, 1, 2),
]
DOCUMENTS = {  # lengths that are repeated to fill each row
    "whole": [[10**6]],
    "mixed": [[1, 1, 30, 64, 1, 50], [65, 2, 3]],
    "singles": [[1], [10**6]],
}


def test_gradients_of_a_key_that_many_blocks_see_are_summed_in_fp32() -> None:
    """All queries see the first key alone, whose value gets 1024 of the last block and 3 of each other."""
    q, k = torch.zeros(2, 1, 1024, 1, 8, dtype=torch.bfloat16)
    q[..., 0], k[:, 0, :, 0] = 1, 1000
    v = random(1, 1024, 1, 8, dtype=torch.bfloat16).requires_grad_()
    gradient = torch.full_like(v, 3 / 128)
    gradient[:, -128:] = 8
    attention(q, k, v, impl="torch").backward(gradient)
    assert v.grad is not None
    assert (v.grad[:, 0] == 1048).all()  # 1045, rounded once


def _inputs(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    batch, seq, heads, kv_heads, head_dim = shape
    return (
        random(batch, seq, heads, head_dim, seed=seed),
        random(batch, seq, kv_heads, head_dim, seed=seed + 1),
        random(batch, seq, kv_heads, head_dim, seed=seed + 2),
    )


def _doc_starts(documents: list[list[int]], batch: int, seq: int) -> Tensor:
    starts = torch.zeros(batch, seq, dtype=torch.int32)
    for row in range(batch):
        lengths, place, turn = documents[row % len(documents)], 0, 0
        while place < seq:
            length = lengths[turn % len(lengths)]
            starts[row, place : place + length] = place
            place, turn = place + length, turn + 1
    return starts


def _pair(**options: Any) -> tuple[Any, Any]:
    """The torch implementation and the formula, with these options."""
    return partial(attention, impl="torch", **options), partial(attention, impl="reference", **options)


def _by_hand(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, window: int, scale: float | None, causal: bool = True
) -> tuple[Tensor, Tensor]:
    """One query at a time, as the docstring of `attention` defines it."""
    output, lse = torch.empty_like(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1])
    past = k.shape[1] - q.shape[1]
    scale = scale if scale is not None else 1 / math.sqrt(q.shape[3])
    for b in range(q.shape[0]):
        # All positions' documents, of which the queries are the last.
        bounds = sorted({0, *starts[b].tolist(), k.shape[1]})
        for i in range(q.shape[1]):
            place = past + i
            low = int(starts[b, i])
            high = place + 1 if causal else next(bound for bound in bounds if bound > low)
            if window:
                low, high = max(low, place - window + 1), min(high, place + window)
            for h in range(q.shape[2]):
                of = h // (q.shape[2] // k.shape[2])
                scores = k[b, low:high, of] @ q[b, i, h] * scale
                output[b, i, h], lse[b, h, i] = scores.softmax(0) @ v[b, low:high, of], scores.logsumexp(0)
    return output, lse


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("queries", [70, 33])
def test_both_implementations_are_the_definition(
    window: int, scale: float | None, causal: bool, queries: int
) -> None:
    q, k, v = _inputs((2, 70, 4, 2, 8))
    starts = _doc_starts(DOCUMENTS["mixed"], 2, 70)[:, -queries:]
    q = q[:, -queries:]
    expected, expected_lse = _by_hand(q, k, v, starts, window, scale, causal)
    for operation in _pair(doc_starts=starts, window=window, scale=scale, causal=causal):
        torch.testing.assert_close(operation(q, k, v), expected, rtol=1e-12, atol=1e-12)
        o, lse = operation(q, k, v, return_lse=True)
        torch.testing.assert_close(o, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("documents", "window"), [("whole", 0), ("mixed", 0), ("whole", 9), ("mixed", 9)])
def test_full_attention(documents: str, window: int) -> None:
    starts = None if documents == "whole" else _doc_starts(DOCUMENTS[documents], 2, 65)
    pair = _pair(doc_starts=starts, window=window, causal=False)
    assert_same(*pair, _inputs((2, 65, 4, 2, 8)))
    assert_as_exact_as_torch(*pair, _inputs((2, 65, 4, 2, 8)))


def test_log_sum_exp_in_bf16_is_exact_and_has_a_gradient() -> None:
    inputs = [x.bfloat16() for x in _inputs((1, 40, 2, 1, 16))]
    exact = attention(*(x.double() for x in inputs), impl="reference", return_lse=True)[1]
    o, lse = attention(*inputs, return_lse=True)
    assert (o.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(lse.double(), exact, rtol=1e-5, atol=1e-5)
    leaves = [x.requires_grad_() for x in _inputs((1, 5, 2, 1, 4))]
    assert torch.autograd.gradcheck(lambda *x: attention(*x, return_lse=True), leaves)


@pytest.mark.parametrize("window", [0, 1, 9, 64, 100])
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: tuple[int, ...], documents: str, window: int) -> None:
    starts = None if documents == "whole" else _doc_starts(DOCUMENTS[documents], *shape[:2])
    assert_same(*_pair(doc_starts=starts, window=window), _inputs(shape))


def test_shapes_cover_kept_and_recomputed_probabilities() -> None:
    kept = {_keeps_probabilities(seq, d, heads, kv) for _, seq, heads, kv, d in SHAPES}
    assert kept == {True, False}


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bf16_is_as_exact_as_the_formula_in_bf16(shape: tuple[int, ...], documents: str) -> None:
    starts = None if documents == "whole" else _doc_starts(DOCUMENTS[documents], *shape[:2])
    assert_as_exact_as_torch(*_pair(doc_starts=starts), _inputs(shape))


@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck(causal: bool) -> None:
    inputs = [x.requires_grad_() for x in _inputs((1, 7, 2, 1, 4))]
    starts = _doc_starts([[3, 1, 3]], 1, 7)
    for operation in _pair(doc_starts=starts, window=2, causal=causal):
        assert torch.autograd.gradcheck(operation, inputs)
    reference = partial(_pair(doc_starts=starts, causal=causal)[1], return_lse=True)
    assert torch.autograd.gradcheck(reference, inputs)


def test_strided_inputs() -> None:
    shape = (2, 70, 4, 2, 8)
    fused = torch.cat(_inputs(shape), dim=2)

    def split(x: Tensor, impl: str) -> Tensor:
        q, k, v = x.split((4, 2, 2), dim=2)
        return attention(q, k, v, impl=impl)  # type: ignore[arg-type]

    assert_same(lambda x: split(x, "torch"), lambda x: split(x, "reference"), [fused])
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in _inputs(shape)]
    every_other = [x.repeat_interleave(2, dim=-1)[..., ::2] for x in _inputs(shape)]
    expected = _pair()[1](*_inputs(shape))
    for inputs in (heads_first, every_other):
        assert not inputs[0].is_contiguous()
        torch.testing.assert_close(_pair()[0](*inputs), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("queries", [1, 2, 40, 69])
@pytest.mark.parametrize("window", [0, 6])
def test_queries_are_the_last_of_the_keys(queries: int, window: int) -> None:
    q, k, v = _inputs((2, 70, 4, 2, 8))
    starts = _doc_starts(DOCUMENTS["mixed"], 2, 70)
    whole = attention(q, k, v, doc_starts=starts, window=window)[:, -queries:]
    last = {"doc_starts": starts[:, -queries:], "window": window}
    for operation in _pair(**last):
        torch.testing.assert_close(operation(q[:, -queries:], k, v), whole, rtol=1e-12, atol=1e-12)
    assert_same(*_pair(**last), [q[:, -queries:], k, v])


def test_without_gradients_nothing_is_kept_and_the_values_are_the_same() -> None:
    q, k, v = (x.float() for x in _inputs((1, 130, 3, 1, 64)))
    with_grad = attention(q.clone().requires_grad_(), k, v).detach()
    assert torch.equal(attention(q, k, v), with_grad)
    arguments = (q, k, v, None, 0, 0.125)
    assert _attention_cpu(*arguments, True)[1].numel() > 0
    assert _attention_cpu(*arguments, False)[1].numel() == 0


def test_only_one_input_needs_a_gradient() -> None:
    inputs = _inputs((1, 65, 2, 1, 8))
    expected = [x.clone().requires_grad_() for x in inputs]
    _pair()[1](*expected).square().sum().backward()
    for index in range(3):
        ours = [x.clone().requires_grad_(i == index) for i, x in enumerate(inputs)]
        _pair()[0](*ours).square().sum().backward()
        grad = expected[index].grad
        assert grad is not None
        torch.testing.assert_close(ours[index].grad, grad, rtol=1e-12, atol=1e-12)


def test_memory_does_not_hold_the_square() -> None:
    q, k, v = (x.float().requires_grad_() for x in _inputs((1, 1024, 2, 1, 8)))
    square = 4 * 2 * 1024 * 1024
    assert peak_bytes(lambda: attention(q, k, v).sum().backward()) < square
    assert peak_bytes(lambda: attention(q, k, v, impl="reference").sum().backward()) > 2 * square


def test_bad_shapes_are_refused() -> None:
    q, k, v = _inputs((1, 4, 3, 2, 8))
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2"):
        attention(q, k, v)
    q, k, v = _inputs((1, 4, 2, 2, 8))
    with pytest.raises(ValueError, match="4 queries but only 3 keys"):
        attention(q, k[:, :3], v[:, :3])
    q, k, v = _inputs((1, 4, 2, 2, 8))
    for k_bad, options, message in [
        (k[..., :4], {}, "k and v must be alike"),
        (k, {"doc_starts": torch.zeros(1, 3)}, "doc_starts is \\(1, 3\\); one for each of \\(1, 4\\)"),
        (k, {"scale": 0.0}, "scale=0.0; it must be positive"),
        (k, {"window": -1}, "window=-1; use 0 for none"),
    ]:
        with pytest.raises(ValueError, match=message):
            attention(q, k_bad, v, **options)


def test_documents_from_their_bounds() -> None:
    bounds = torch.tensor([0, 2, 2, 5, 6], dtype=torch.int32)  # the second one is empty, one follows
    assert doc_starts_of(bounds, 8).tolist() == [[0, 0, 2, 2, 2, 5, 6, 6]]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "d64/causal"),
        ({"causal": False}, "d64/full"),
        ({"window": 2}, "d64/window"),
        ({"window": 2, "doc_starts": torch.zeros(1, 4)}, "d64/doc"),
    ],
)
def test_names_in_the_table_of_choices(options: dict[str, Any], name: str) -> None:
    q, k, _ = _inputs((1, 4, 2, 2, 8))
    given = {"causal": True, "doc_starts": None, "window": 0, **options}
    assert _variant(q, k, **given) == name
    assert _variant(*_inputs((1, 4, 2, 2, 96))[:2], **given) == name.replace("d64", "d128")
    assert _variant(q[:, :3], k, **given) == "d64/cache"


@pytest.mark.parametrize("causal", [True, False])
def test_cost_counts_pairs_and_bytes(causal: bool) -> None:
    q, k = torch.zeros(2, 3, 4, 8).bfloat16(), torch.zeros(2, 5, 2, 8).bfloat16()
    pairs = 2 * (3 + 4 + 5 if causal else 15)
    lse = 4 * 2 * 4 * 3
    forward, backward = attention_cost(q, k, causal=causal)
    assert forward == (4 * pairs * 4 * 8, 2 * (2 * 2 * 3 * 4 * 8 + 2 * 2 * 5 * 2 * 8) + lse)
    assert backward == (10 * pairs * 4 * 8, 2 * (4 * 2 * 3 * 4 * 8 + 4 * 2 * 5 * 2 * 8) + lse)
    assert attention_cost(q, k, visible=7)[0].flops == 4 * 7 * 4 * 8


def test_sdpa_with_its_order_of_backends_compiles_whole() -> None:
    q, k, v = (x.float() for x in _inputs((1, 6, 2, 1, 8)))
    whole = torch.compile(partial(attention, causal=False), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(q, k, v), attention(q, k, v, causal=False))


@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize("seq", [20, 140])
def test_custom_operators_are_registered_soundly(seq: int, has_documents: bool) -> None:
    shape = (2, seq, 4, 2, 8)
    starts = _doc_starts(DOCUMENTS["mixed"], 2, seq) if has_documents else None
    q, k, v = (x.float().requires_grad_() for x in _inputs(shape))
    torch.library.opcheck(_attention_cpu, (q, k, v, starts, 7, 0.3, True))
    plain = [x.detach() for x in (q, k, v)]
    kept = _attention_cpu(*plain, starts, 7, 0.3, True)[1]
    grad = random(2, seq, 4, 8, dtype=torch.float32)
    torch.library.opcheck(_attention_cpu_backward, (grad, *plain, kept, starts, 7, 0.3))


@pytest.mark.parametrize("window", [0, 3])
def test_sdpa_is_asked_for_cudnn_first(monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    """With a mask too: of the fused backends it alone takes one together with grouped heads."""
    orders = []

    def spy(*args: Any, **options: Any) -> Tensor:
        orders.append(torch._C._get_sdp_priority_order())
        return sdpa(*args, **options)

    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    q, k = torch.randn(1, 4, 4, 8), torch.randn(1, 6, 2, 8)
    ours = attention(q, k, k, window=window, impl="torch")
    torch.testing.assert_close(ours, attention(q, k, k, window=window, impl="reference"))
    assert [order[0] for order in orders] == [SDPBackend.CUDNN_ATTENTION.value]
