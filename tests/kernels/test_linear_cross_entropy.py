"""The fused output projection and loss against the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megalite_kernels import linear_cross_entropy
from tests.kernels.helpers import assert_as_exact_as_torch, assert_same, peak_bytes, random

TOKENS, HIDDEN, VOCAB = 37, 12, 53


def _targets(ignored: str, tokens: int = TOKENS, vocab: int = VOCAB) -> Tensor:
    targets = torch.randint(vocab, (tokens,), generator=torch.Generator().manual_seed(1))
    if ignored == "all":
        targets[:] = -100
    elif ignored == "some":
        targets[::3] = -100
        targets[-5:] = -100
    return targets


def _pair(targets: Tensor, **options: Any) -> tuple[Any, Any]:
    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, targets, impl="torch", **options)[0]

    def formula(x: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, targets, impl="reference", **options)[0]

    return ours, formula


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 16, 37, 512])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_values_and_gradients(ignored: str, chunk_tokens: int, z_loss: float) -> None:
    inputs = [random(TOKENS, HIDDEN), random(VOCAB, HIDDEN, seed=1)]
    assert_same(*_pair(_targets(ignored), z_loss=z_loss, chunk_tokens=chunk_tokens), inputs)


def test_everything_ignored_is_zero() -> None:
    x = random(TOKENS, HIDDEN).requires_grad_()
    loss, z = linear_cross_entropy(x, random(VOCAB, HIDDEN), _targets("all"), z_loss=0.1)
    loss.backward()
    assert loss.item() == z.item() == 0
    assert x.grad is not None
    assert not x.grad.any()


@pytest.mark.parametrize("ignored", ["none", "some"])
def test_bf16_is_as_exact_as_the_formula_in_bf16(ignored: str) -> None:
    inputs = [random(300, 64), random(400, 64, seed=1)]
    assert_as_exact_as_torch(*_pair(_targets(ignored, 300, 400), z_loss=1e-4, chunk_tokens=128), inputs)


def test_weight_gradient_of_bf16_is_summed_in_fp32() -> None:
    x, weight = torch.ones(4096, 1).bfloat16(), torch.zeros(2, 1).bfloat16().requires_grad_()
    weight.grad_dtype = None  # take the gradient in the dtype it arrives in
    loss, _ = linear_cross_entropy(x, weight, torch.zeros(4096, dtype=torch.long), chunk_tokens=8)
    (loss / 3).backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    torch.testing.assert_close(weight.grad[:, 0], torch.tensor([-2048 / 3, 2048 / 3]))


def test_z_part_is_reported_and_carries_no_gradient() -> None:
    x, weight, targets = random(TOKENS, HIDDEN), random(VOCAB, HIDDEN, seed=1), _targets("some")
    x.requires_grad_()
    with_z, z = linear_cross_entropy(x, weight, targets, z_loss=0.2)
    without, none = linear_cross_entropy(x, weight, targets)
    lse = (x @ weight.t()).logsumexp(-1)[targets != -100]
    torch.testing.assert_close(z, 0.2 * lse.square().sum())
    torch.testing.assert_close(with_z - without, z)
    assert none.item() == 0
    assert not z.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits_stay_finite(dtype: torch.dtype) -> None:
    signs = random(VOCAB, 1, seed=3).sign()
    x = torch.full((TOKENS, 1), 100.0, dtype=dtype).requires_grad_()
    weight = (100 * signs).to(dtype).requires_grad_()
    loss, z = linear_cross_entropy(x, weight, _targets("none"), z_loss=1e-4, chunk_tokens=8)
    loss.backward()
    for tensor in (loss, z, x.grad, weight.grad):
        assert tensor is not None
        assert tensor.isfinite().all()
    expected = _pair(_targets("none"), z_loss=1e-4)[1](x.double(), weight.double())
    rounding = torch.finfo(dtype).eps  # of the logits, which leave their product in x's dtype
    torch.testing.assert_close(loss.double(), expected, rtol=max(rounding, 1e-5), atol=0)


def test_without_gradients_none_are_formed() -> None:
    x, weight, targets = random(TOKENS, HIDDEN), random(VOCAB, HIDDEN, seed=1), _targets("some")
    expected = linear_cross_entropy(x.clone().requires_grad_(), weight, targets)[0].detach()
    assert torch.equal(linear_cross_entropy(x, weight, targets)[0], expected)


def test_gradcheck() -> None:
    inputs = [random(5, 3).requires_grad_(), random(7, 3, seed=1).requires_grad_()]
    targets = torch.tensor([6, -100, 0, 3, 3])
    assert torch.autograd.gradcheck(_pair(targets, z_loss=0.1, chunk_tokens=2)[0], inputs)


def test_memory_is_one_chunk_of_logits() -> None:
    tokens, vocab, chunk = 2048, 4000, 64
    x = random(tokens, 8, dtype=torch.float32).requires_grad_()
    weight = random(vocab, 8, dtype=torch.float32).requires_grad_()
    targets = _targets("none", tokens, vocab)

    def run(impl: Any) -> None:
        linear_cross_entropy(x, weight, targets, chunk_tokens=chunk, impl=impl)[0].backward()

    logits = 4 * tokens * vocab
    assert peak_bytes(lambda: run("torch")) < logits / 6
    assert peak_bytes(lambda: run("reference")) > 2 * logits


@pytest.mark.parametrize("target", [-1, VOCAB])
def test_targets_outside_the_vocabulary_are_refused(target: int) -> None:
    targets = torch.tensor([0, target])
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        linear_cross_entropy(random(2, HIDDEN), random(VOCAB, HIDDEN), targets, impl="torch")
