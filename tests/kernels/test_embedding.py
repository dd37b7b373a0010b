"""Token embedding, its rows perhaps divided among ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megalite_kernels import embedding
from megalite_kernels.embedding import embedding_reference
from tests.kernels.helpers import assert_same, random


def test_embedding_and_its_gradient() -> None:
    weight = random(11, 6).requires_grad_()
    ids = torch.tensor([[3, 3, 0], [10, 3, 5]])
    grad = random(2, 3, 6, seed=1)
    embedding(ids, weight).backward(grad)
    expected = torch.zeros(11, 6, dtype=torch.float64).index_add_(0, ids.flatten(), grad.flatten(0, 1))
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, expected)
    assert torch.equal(embedding(ids, weight), weight[ids])


def test_embedding_gradient_of_bf16_is_summed_in_fp32() -> None:
    weight = torch.zeros(3, 2, dtype=torch.bfloat16).requires_grad_()
    weight.grad_dtype = None  # take the gradient in the dtype it arrives in
    embedding(torch.ones(1000, dtype=torch.long), weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert weight.grad.tolist() == [[0, 0], [1000, 1000], [0, 0]]
    naive = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(1000):
        naive += 1
    assert naive == 256  # what the sum would have been


@pytest.mark.parametrize("first_id", [None, 0, 4, -100])
def test_values_and_gradients(first_id: int | None) -> None:
    ids = torch.tensor([[3, 3, 0, 9], [10, 3, 5, 4]])

    def run(weight: torch.Tensor, impl: Any) -> torch.Tensor:
        return embedding(ids, weight, first_id, impl=impl)

    inputs = [random(11, 6)]
    assert_same(lambda w: run(w, "torch"), lambda w: run(w, "reference"), inputs)
    assert torch.autograd.gradcheck(lambda w: run(w, "torch"), inputs[0].requires_grad_())
    assert torch.autograd.gradcheck(lambda w: run(w, "reference"), inputs[0])


def test_a_divided_table_is_the_table() -> None:
    ids, weight = torch.randint(11, (3, 40)), random(11, 6).requires_grad_()
    parts = [weight.detach()[low:high].clone().requires_grad_() for low, high in ((0, 5), (5, 6), (6, 11))]
    shares = [embedding(ids, part, first) for part, first in zip(parts, (0, 5, 6), strict=True)]
    whole = embedding(ids, weight)
    assert torch.equal(sum(shares, torch.zeros(())), whole)
    grad = random(3, 40, 6, seed=1)
    whole.backward(grad)
    torch.autograd.backward(shares, [grad] * 3)
    assert weight.grad is not None
    assert torch.equal(torch.cat([part.grad for part in parts if part.grad is not None]), weight.grad)


def test_ids_outside_an_undivided_table_are_refused() -> None:
    for bad in (-1, 11):
        with pytest.raises(IndexError):
            embedding(torch.tensor([bad]), random(11, 6))


def test_the_reference_gives_zeros_for_other_ranks_rows() -> None:
    assert torch.equal(embedding_reference(torch.tensor([-1]), torch.ones(2, 3)), torch.zeros(1, 3))
