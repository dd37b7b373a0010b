"""The kernels of cross-entropy, alone and in chunks after the projection, against the formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite_kernels import VocabShard, cross_entropy_, linear_cross_entropy
from megalite_kernels.cross_entropy import Terms, cross_entropy_reference
from tests.kernels.helpers import assert_as_exact_as_torch, on_ranks, random

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (3, 50), (5, 8192), (4, 8193), (2, 20011)]  # blocks are of 4096 or 8192


def _targets(rows: int, vocab: int) -> Tensor:
    targets = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(1))
    targets[-1:] = vocab - 1
    targets[1:2] = -100
    return targets


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: tuple[int, int], dtype: torch.dtype, label_smoothing: float) -> None:
    targets, terms = _targets(*shape), Terms(1e-2, label_smoothing)

    def kernel(logits: Tensor) -> Tensor:
        return cross_entropy_(logits.clone(), targets, **terms._asdict(), impl="triton")[0]

    def formula(logits: Tensor) -> Tensor:
        return cross_entropy_reference(logits, targets, terms)[0]

    assert_as_exact_as_torch(kernel, formula, [4 * random(*shape)], dtype)


def test_rows_with_a_stride_are_overwritten_alone() -> None:
    wide = random(4, 100, dtype=torch.float32)
    before, targets = wide.clone(), _targets(4, 60)
    leaf = before[:, 20:80].contiguous().requires_grad_()
    cross_entropy_reference(leaf, targets, Terms())[0].backward()
    logits = wide[:, 20:80].requires_grad_()
    _, z = cross_entropy_(logits, targets, impl="triton")
    torch.testing.assert_close(wide[:, 20:80].detach(), leaf.grad)
    assert torch.equal(wide[:, :20], before[:, :20])
    assert torch.equal(wide[:, 80:], before[:, 80:])
    assert z == 0


def test_rows_beyond_two_billion_elements(tmp_path: Path) -> None:
    # A sparse file: rows lie 2³⁰ elements apart, so that the offset of the last does not fit 32 bits.
    size = 3 * 2**30 + 60
    file = torch.from_file(str(tmp_path / "logits"), shared=True, size=size, dtype=torch.bfloat16)
    logits, targets = file.as_strided((4, 60), (2**30, 1)), _targets(4, 60)
    logits.copy_(random(4, 60))
    leaf = logits.float().requires_grad_()
    cross_entropy_reference(leaf, targets, Terms())[0].backward()
    cross_entropy_(logits.requires_grad_(), targets, impl="triton")
    torch.testing.assert_close(logits.detach(), leaf.grad, check_dtype=False, rtol=1e-2, atol=1e-4)


def test_without_gradient_logits_stay_and_no_rows_are_no_loss() -> None:
    logits, targets = random(3, 40, dtype=torch.float32), _targets(3, 40)
    before = logits.clone()
    expected = cross_entropy_reference(logits, targets, Terms(0.1))
    torch.testing.assert_close(cross_entropy_(logits, targets, z_loss=0.1, impl="triton"), expected)
    assert torch.equal(logits, before)
    assert cross_entropy_(logits[:0], targets[:0], impl="triton")[0] == 0


def test_minus_infinity_is_no_number_less() -> None:
    logits = random(2, 9000, dtype=torch.float32)
    logits[:, :8500] = -torch.inf
    logits.requires_grad_()
    targets = torch.tensor([8600, 8999])
    loss, _ = cross_entropy_(logits, targets, impl="triton")
    assert loss.isfinite()
    assert not logits[:, :8500].any()
    torch.testing.assert_close(logits.detach().sum(1), torch.zeros(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("target", [-1, 40])
def test_an_unknown_target_gives_no_number(target: int) -> None:
    loss, _ = cross_entropy_(random(1, 40).float(), torch.tensor([target]), impl="triton")
    assert loss.isnan()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_a_divided_vocabulary_is_the_vocabulary(label_smoothing: float) -> None:
    logits, targets, bounds = 3 * random(5, 9000, dtype=torch.float32), _targets(5, 9000), [0, 4000, 9000]
    terms = Terms(1e-2, label_smoothing)

    def run(rank: int, gather: Any) -> tuple[Tensor, Tensor, Tensor]:
        mine = logits[:, bounds[rank] : bounds[rank + 1]].contiguous().requires_grad_()
        shard = VocabShard(bounds[rank], 9000, gather)
        loss, z = cross_entropy_(mine, targets, **terms._asdict(), vocab_shard=shard, impl="triton")
        return loss.detach(), z, mine.detach()

    leaf = logits.double().requires_grad_()
    loss, z = cross_entropy_reference(leaf, targets, terms)
    loss.backward()
    found = on_ranks(2, run)
    for rank in found:
        torch.testing.assert_close(rank[:2], (loss.detach(), z), check_dtype=False)
    gradient = torch.cat([rank[2] for rank in found], 1)
    torch.testing.assert_close(gradient, leaf.grad, check_dtype=False, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_cross_entropy(dtype: torch.dtype) -> None:
    targets = _targets(37, 300)

    def run(x: Tensor, weight: Tensor, impl: Any) -> Tensor:
        budget = 16 * 300 * x.element_size()
        return linear_cross_entropy(x, weight, targets, z_loss=1e-3, chunk_bytes=budget, impl=impl)[0]

    inputs = [random(37, 24), random(300, 24, seed=1)]
    assert_as_exact_as_torch(
        lambda x, w: run(x, w, "triton"), lambda x, w: run(x, w, "reference"), inputs, dtype
    )


def test_operators_keep_their_promises() -> None:
    from megalite_kernels.gpu import cross_entropy as gpu

    logits, targets = random(4, 40, dtype=torch.float32), _targets(4, 40)
    torch.library.opcheck(gpu.loss, (logits, targets, None, 0, 40, 0.1, 0.1, True))
    torch.library.opcheck(gpu.statistics, (logits, targets, 0, True))


def test_compiled_whole() -> None:
    targets = _targets(8, 40)

    def step(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        loss, z = linear_cross_entropy(x, weight, targets, z_loss=0.1, chunk_bytes=160 * 3, impl="triton")
        return loss * 2, cross_entropy_(x @ weight.t(), targets, impl="triton")[0] + z

    def gradients(step: Any) -> list[Tensor]:
        inputs = [t.requires_grad_() for t in (random(8, 16).float(), random(40, 16, seed=1).float())]
        one, other = step(*inputs)
        return [one.detach(), other.detach(), *torch.autograd.grad(one + other, inputs)]

    whole = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(whole), gradients(step))
