"""Deferred weight gradients: the same numbers as at once, later, and one accumulation for each weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from megalite.parallel.deferred import WeightGradients, current_gradients, deferring, linear


def parameters(out: int = 3, features: int = 4) -> tuple[nn.Parameter, nn.Parameter]:
    """A weight [out, features] and a bias [out], float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((out, features), (out,))
    weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return nn.Parameter(weight), nn.Parameter(bias)


@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 5, 4), (0, 4)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_same_gradients_later(shape: tuple[int, ...], has_bias: bool) -> None:
    weight, bias = parameters()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    arguments = (x, weight, bias) if has_bias else (x, weight)
    nn.functional.linear(*arguments).cos().sum().backward()
    expected = [tensor.grad for tensor in arguments]
    for tensor in arguments:
        tensor.grad = None

    gradients = WeightGradients()
    with deferring(gradients):
        y = linear(*arguments)
    y.cos().sum().backward()
    torch.testing.assert_close(x.grad, expected[0], rtol=1e-14, atol=1e-14)
    assert weight.grad is None
    assert len(gradients) == 1 + has_bias
    gradients.run()
    assert len(gradients) == 0
    for tensor, grad in zip(arguments, expected, strict=True):
        torch.testing.assert_close(tensor.grad, grad, rtol=1e-14, atol=1e-14)
    gradients.run()  # nothing is left to do
    torch.testing.assert_close(weight.grad, expected[1], rtol=1e-14, atol=1e-14)


def test_each_micro_batch_runs_its_own() -> None:
    weight, _ = parameters()
    first, second = WeightGradients(), WeightGradients()
    for gradients, scale in ((first, 1.0), (second, 10.0)):
        with deferring(gradients):
            linear(torch.full((1, 4), scale, dtype=torch.float64), weight).sum().backward()
    second.run()
    torch.testing.assert_close(weight.grad, torch.full_like(weight, 10.0))
    first.run()
    torch.testing.assert_close(weight.grad, torch.full_like(weight, 11.0))


def test_hooks_fire_once_and_only_in_run() -> None:
    """Also for a weight that two layers share: as one backward pass accumulates once."""
    weight, _ = parameters(4, 4)
    seen: list[Tensor | None] = []
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    gradients = WeightGradients()
    x = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
    with deferring(gradients):
        y = linear(linear(x, weight), weight)
    y.sum().backward()
    assert not seen
    gradients.run()
    expected = torch.autograd.grad((x @ weight.t() @ weight.t()).sum(), weight)[0]
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], expected)


def test_a_wider_gradient_reaches_the_hook_unrounded() -> None:
    """A layer may sum its weight gradient in fp32 for a bf16 weight that allows it."""
    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    weight.grad_dtype = None
    seen: list[Tensor | None] = []
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    gradients = WeightGradients()
    gradients.defer(weight, lambda: torch.full((2,), 1 / 3))
    gradients.run()
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], torch.full((2,), 1 / 3), rtol=0, atol=0)


def test_frozen_weights_and_evaluation_defer_nothing() -> None:
    weight, bias = parameters()
    gradients = WeightGradients()
    x = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
    with deferring(gradients), torch.no_grad():
        assert not linear(x, weight, bias).requires_grad
    weight.requires_grad_(False)
    with deferring(gradients):
        linear(x, weight, bias).sum().backward()
    assert len(gradients) == 0
    assert bias.grad is not None


def test_current_only_inside() -> None:
    outer, inner = WeightGradients(), WeightGradients()
    with pytest.raises(RuntimeError, match="stop"), deferring(outer):
        with deferring(inner):
            assert current_gradients() is inner
        assert current_gradients() is outer
        raise RuntimeError("stop")
    assert current_gradients() is None
