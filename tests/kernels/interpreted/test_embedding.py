"""The kernels of the embedding's gradient against the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megalite_kernels import embedding
from tests.kernels.helpers import assert_as_exact_as_torch, random

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _ids(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    few = torch.randint(7, (150,), generator=generator)
    return {
        "one": torch.tensor([4]),
        "a chunk": torch.randint(50, (32,), generator=generator),
        "all alike": torch.full((2, 129), 6),  # a run over many chunks
        "chunks alike": torch.arange(4).repeat_interleave(32),  # runs that end where chunks do
        "frequent": few,
        "many": torch.randint(50, (5, 27), generator=generator),
    }[name]


@pytest.mark.parametrize("first_id", [None, 3])
@pytest.mark.parametrize("name", ["one", "a chunk", "all alike", "chunks alike", "frequent", "many"])
def test_values_and_gradients(name: str, first_id: int | None) -> None:
    ids, dtype = _ids(name), DTYPES[len(name) % 3]

    def kernel(weight: Tensor) -> Tensor:
        return embedding(ids, weight, first_id, impl="triton")

    def formula(weight: Tensor) -> Tensor:
        return embedding(ids, weight, first_id, impl="reference")

    assert_as_exact_as_torch(kernel, formula, [random(50, 20)], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_rows(dtype: torch.dtype) -> None:
    ids = _ids("frequent")[:70]
    inputs = [random(8, 700)]
    assert_as_exact_as_torch(
        lambda w: embedding(ids, w, impl="triton"),
        lambda w: embedding(ids, w, impl="reference"),
        inputs,
        dtype,
    )


def test_a_sum_of_bf16_is_in_fp32_and_a_gradient_may_have_no_stride() -> None:
    weight = torch.zeros(3, 2, dtype=torch.bfloat16).requires_grad_()
    weight.grad_dtype = None  # take the gradient in the dtype it arrives in
    embedding(torch.ones(1000, dtype=torch.long), weight, impl="triton").sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert weight.grad.tolist() == [[0, 0], [1000, 1000], [0, 0]]


def test_no_tokens_and_none_of_this_rank() -> None:
    for ids, first_id in ((torch.zeros(0, dtype=torch.long), None), (torch.arange(40), 50)):
        weight = random(5, 4, dtype=torch.float32).requires_grad_()
        embedding(ids, weight, first_id, impl="triton").sum().backward()
        assert weight.grad is not None
        assert torch.equal(weight.grad, torch.zeros(5, 4))


def test_operators_keep_their_promises() -> None:
    from megalite_kernels.gpu.embedding import embedding_backward

    torch.library.opcheck(embedding_backward, (random(40, 6, dtype=torch.float32), torch.arange(40) % 7, 9))


def test_compiled_whole() -> None:
    ids, weight = torch.arange(40) % 7, random(9, 6, dtype=torch.float32).requires_grad_()

    def step(weight: Tensor) -> Tensor:
        return embedding(ids, weight * 2, impl="triton").square().sum()

    whole = torch.compile(step, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(whole(weight), weight)
    (expected,) = torch.autograd.grad(step(weight), weight)
    torch.testing.assert_close(found, expected)
