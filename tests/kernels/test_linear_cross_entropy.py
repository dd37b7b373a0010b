"""The fused output projection and loss against the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megalite_kernels import VocabShard, linear_cross_entropy
from megalite_kernels.linear_cross_entropy import _chunk_rows
from tests.kernels.helpers import assert_as_exact_as_torch, assert_same, on_ranks, peak_bytes, random

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
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("chunk_tokens", [0, 5, 37, 512])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_values_and_gradients(ignored: str, chunk_tokens: int, label_smoothing: float, z_loss: float) -> None:
    inputs = [random(TOKENS, HIDDEN), random(VOCAB, HIDDEN, seed=1)]
    options = {"z_loss": z_loss, "label_smoothing": label_smoothing}
    assert_same(*_pair(_targets(ignored), chunk_bytes=8 * VOCAB * chunk_tokens, **options), inputs)


def test_chunks_are_whole_tiles_of_rows_within_the_budget() -> None:
    sizes = (0, 1999, 6000, 511_999, 512_000, 1_023_999, 1 << 30)
    assert [_chunk_rows(2000, size) for size in sizes] == [1, 1, 3, 255, 256, 256, 2**30 // 512_000 * 256]


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
    assert_as_exact_as_torch(
        *_pair(_targets(ignored, 300, 400), z_loss=1e-4, chunk_bytes=2 * 400 * 128), inputs
    )


def test_weight_gradient_of_bf16_is_summed_in_fp32() -> None:
    x, weight = torch.ones(4096, 1).bfloat16(), torch.zeros(2, 1).bfloat16().requires_grad_()
    weight.grad_dtype = None  # take the gradient in the dtype it arrives in
    loss, _ = linear_cross_entropy(x, weight, torch.zeros(4096, dtype=torch.long), chunk_bytes=32)
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
    loss, z = linear_cross_entropy(x, weight, _targets("none"), z_loss=1e-4, chunk_bytes=1600)
    loss.backward()
    for tensor in (loss, z, x.grad, weight.grad):
        assert tensor is not None
        assert tensor.isfinite().all()
    expected = _pair(_targets("none"), z_loss=1e-4)[1](x.double(), weight.double())
    rounding = torch.finfo(dtype).eps  # of the logits, which leave their product in x's dtype
    torch.testing.assert_close(loss.double(), expected, rtol=max(rounding, 1e-5), atol=0)


def test_without_gradients_none_are_formed() -> None:
    x, weight, targets = random(TOKENS, 512), random(VOCAB, 512, seed=1).requires_grad_(), _targets("some")

    def run() -> Tensor:
        return linear_cross_entropy(x, weight, targets, chunk_bytes=8 * VOCAB)[0]

    expected = run().detach()
    assert peak_bytes(run) > weight.nbytes
    with torch.no_grad():
        assert torch.equal(run(), expected)
        assert peak_bytes(run) < weight.nbytes / 8


def test_a_frozen_weight_gets_no_gradient() -> None:
    x, weight, targets = random(TOKENS, 512), random(VOCAB, 512, seed=1), _targets("some")
    x.requires_grad_()

    def run() -> None:
        linear_cross_entropy(x, weight, targets, chunk_bytes=8 * VOCAB)[0].backward()

    assert peak_bytes(run) < x.nbytes + weight.nbytes / 2
    found, x.grad = x.grad, None
    weight.requires_grad_()
    run()
    assert found is not None
    assert x.grad is not None
    torch.testing.assert_close(found, x.grad)


def test_gradcheck() -> None:
    inputs = [random(5, 3).requires_grad_(), random(7, 3, seed=1).requires_grad_()]
    targets = torch.tensor([6, -100, 0, 3, 3])
    options = {"z_loss": 0.1, "label_smoothing": 0.3, "chunk_bytes": 2 * 7 * 8}
    for operation in _pair(targets, **options):
        assert torch.autograd.gradcheck(operation, inputs)


def test_memory_is_one_chunk_of_logits() -> None:
    tokens, vocab, chunk = 2048, 4000, 64
    x = random(tokens, 8, dtype=torch.float32).requires_grad_()
    weight = random(vocab, 8, dtype=torch.float32).requires_grad_()
    targets = _targets("none", tokens, vocab)

    def run(impl: Any) -> None:
        linear_cross_entropy(x, weight, targets, chunk_bytes=4 * vocab * chunk, impl=impl)[0].backward()

    logits = 4 * tokens * vocab
    assert peak_bytes(lambda: run("torch")) < logits / 6
    assert peak_bytes(lambda: run("reference")) > 2 * logits


@pytest.mark.parametrize("target", [-1, VOCAB])
def test_targets_outside_the_vocabulary_are_refused(target: int) -> None:
    targets = torch.tensor([0, target])
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        linear_cross_entropy(random(2, HIDDEN), random(VOCAB, HIDDEN), targets, impl="torch")


def test_gradients_are_scaled_in_place_but_not_where_they_are_kept() -> None:
    targets = _targets("some")
    x, weight = random(TOKENS, 4).requires_grad_(), random(VOCAB, 4, seed=1).requires_grad_()

    def loss() -> Tensor:
        return linear_cross_entropy(x, weight, targets, impl="torch")[0]

    (once,) = torch.autograd.grad(loss(), weight)
    kept = loss()
    for factor in (3.0, 5.0, 7.0):  # each pass starts from what was saved
        found = torch.autograd.grad(factor * kept, (x, weight), retain_graph=factor < 7)
        torch.testing.assert_close(found[1], factor * once)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(kept, weight)
    last = loss()
    assert peak_bytes(lambda: torch.autograd.grad(2 * last, (x, weight))) < weight.nbytes / 2


def test_a_second_derivative_is_refused() -> None:
    x = random(TOKENS, HIDDEN).requires_grad_()
    loss = linear_cross_entropy(x, random(VOCAB, HIDDEN), _targets("none"), impl="torch")[0]
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        first.sum().backward()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_a_divided_vocabulary_is_the_vocabulary(label_smoothing: float) -> None:
    x, weight, targets = random(TOKENS, HIDDEN), random(VOCAB, HIDDEN, seed=1), _targets("some")
    options: dict[str, Any] = {"z_loss": 0.1, "label_smoothing": label_smoothing, "impl": "torch"}
    bounds = [0, 20, 21, VOCAB]

    def run(rank: int, gather: Any) -> tuple[Tensor, ...]:
        leaves = x.clone().requires_grad_(), weight[bounds[rank] : bounds[rank + 1]].clone().requires_grad_()
        shard = VocabShard(bounds[rank], VOCAB, gather)
        loss, z = linear_cross_entropy(
            *leaves, targets, vocab_shard=shard, chunk_bytes=8 * 20 * 16, **options
        )
        return loss.detach(), z, *torch.autograd.grad(loss, leaves)

    found = on_ranks(3, run)
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, z = linear_cross_entropy(*leaves, targets, **options)
    dx, dw = torch.autograd.grad(loss, leaves)
    for rank in found:
        torch.testing.assert_close(rank[:2], (loss.detach(), z))
    torch.testing.assert_close(sum(rank[2] for rank in found), dx)
    torch.testing.assert_close(torch.cat([rank[3] for rank in found]), dw)


def test_no_tokens_have_a_gradient_of_zeros() -> None:
    x, weight = torch.ones(0, 4, requires_grad=True), torch.ones(3, 4, requires_grad=True)
    torch.use_deterministic_algorithms(True)  # then fresh memory is NaN
    try:
        loss, _ = linear_cross_entropy(x, weight, torch.zeros(0, dtype=torch.int64))
        loss.backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert loss == 0
    assert weight.grad is not None
    assert (weight.grad == 0).all()
