"""Cross-entropy in place of its logits, in torch, against the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megalite_kernels import VocabShard, cross_entropy_
from megalite_kernels.cross_entropy import Terms, cross_entropy_reference
from tests.kernels.helpers import assert_as_exact_as_torch, assert_same, on_ranks, random

TARGETS = torch.tensor([6, -100, 0, 3, 3])


def _pair(targets: Tensor, z_loss: float, label_smoothing: float) -> tuple[Any, Any]:
    def ours(logits: Tensor) -> Tensor:
        # A copy of them, since the test goes on to use its own.
        options: dict[str, Any] = {"z_loss": z_loss, "label_smoothing": label_smoothing}
        return cross_entropy_(logits.clone(), targets, impl="torch", **options)[0]

    def formula(logits: Tensor) -> Tensor:
        return cross_entropy_reference(logits, targets, Terms(z_loss, label_smoothing))[0]

    return ours, formula


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3, 1.0])
def test_values_and_gradients(label_smoothing: float, z_loss: float) -> None:
    assert_same(*_pair(TARGETS, z_loss, label_smoothing), [3 * random(5, 7)])
    targets = (torch.arange(100) % 33).masked_fill(torch.arange(100) % 7 == 0, -100)
    assert_as_exact_as_torch(*_pair(targets, z_loss, label_smoothing), [3 * random(100, 33)])


def test_gradcheck() -> None:
    logits = random(5, 7).requires_grad_()
    for operation in _pair(TARGETS, 0.1, 0.3):
        assert torch.autograd.gradcheck(operation, logits)


def test_the_logits_become_their_gradient() -> None:
    logits = random(5, 7, dtype=torch.float32)
    leaf = logits.clone().requires_grad_()
    cross_entropy_reference(leaf, TARGETS, Terms())[0].backward()
    given = logits.clone().requires_grad_()
    with torch.no_grad():
        cross_entropy_(given, TARGETS, impl="torch")
        assert torch.equal(given, logits)
    loss, _ = cross_entropy_(given, TARGETS, impl="torch")
    torch.testing.assert_close(given.detach(), leaf.grad)
    loss.backward()
    assert given.grad is not None
    assert given.grad.data_ptr() == given.data_ptr()
    assert not given[1].any()  # an ignored row has none


def test_a_layout_that_cannot_be_overwritten_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(7, 5\) and strides \(1, 7\); must be \[rows, vocab\]"):
        cross_entropy_(random(5, 7).t(), TARGETS)


def test_an_unknown_target_of_a_divided_vocabulary_is_no_number() -> None:
    def run(rank: int, gather: Any) -> list[float]:
        shard = VocabShard(4 * rank, 7, gather)
        logits = random(1, 4 - rank, seed=rank)
        return [
            cross_entropy_(logits, torch.tensor([t]), vocab_shard=shard)[0].item() for t in (7, -1, -100, 6)
        ]

    for losses in on_ranks(2, run):
        assert [loss == loss for loss in losses] == [False, False, True, True]
        assert losses[2] == 0
