"""The MLP in torch against its formulas: values, gradients, what is saved, what it costs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalite_kernels import activation_backward, gelu, linear_activation, mlp, swiglu
from megalite_kernels.mlp import (
    Activation,
    activation_backward_cost,
    activation_backward_reference,
    activation_cost,
    activation_reference,
    linear_activation_cost,
    linear_activation_reference,
)
from tests.kernels.helpers import assert_as_exact_as_torch, assert_same, peak_bytes, random

ACTIVATIONS: tuple[Activation, ...] = ("swiglu", "gelu", "gelu_tanh")


def tensors(activation: Activation, tokens: int, size: int, ffn: int) -> list[Tensor]:
    """x and both weights."""
    width = ffn * (2 if activation == "swiglu" else 1)
    return [
        random(tokens, size),
        random(width, size, seed=1) / size**0.5,
        random(ffn, size, seed=2) / ffn**0.5,
    ]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_values_and_gradients(activation: Activation, tokens: int) -> None:
    ours, formula = (partial(mlp, activation=activation, impl=impl) for impl in ("torch", "reference"))
    assert_same(ours, formula, tensors(activation, tokens, 12, 10))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bf16_is_as_exact_as_the_formula_in_bf16(activation: Activation) -> None:
    ours, formula = (partial(mlp, activation=activation, impl=impl) for impl in ("torch", "reference"))
    assert_as_exact_as_torch(ours, formula, tensors(activation, 64, 48, 40))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation: Activation) -> None:
    inputs = [x.requires_grad_() for x in tensors(activation, 3, 4, 6)]
    for impl in ("torch", "reference"):
        assert torch.autograd.gradcheck(partial(mlp, activation=activation, impl=impl), inputs)
    pre = inputs[1].detach().T.contiguous().requires_grad_()
    assert torch.autograd.gradcheck(partial(activation_reference, activation=activation), [pre])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward_of_the_formula_is_autograds(activation: Activation) -> None:
    x, up, down = tensors(activation, 5, 4, 6)
    dy = random(5, 4, seed=3)
    hidden, pre = linear_activation_reference(x, up, activation=activation)
    leaf = pre.detach().requires_grad_()
    (activation_reference(leaf, activation) @ down).backward(dy)
    found = activation_backward_reference(dy, down, pre, activation=activation)
    torch.testing.assert_close(found, (leaf.grad, hidden), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bias_and_strided_operands(activation: Activation) -> None:
    x, up, down = tensors(activation, 5, 4, 6)
    bias, dy = random(up.shape[0], seed=4), random(5, 4, seed=3)
    expected = linear_activation(x, up, bias, activation=activation, impl="reference")
    found = linear_activation(x.T.contiguous().T, up.T.contiguous().T, bias, activation=activation)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    pre = expected[1]
    wanted = activation_backward(dy, down, pre, activation=activation, impl="reference")
    strided = (t.T.contiguous().T for t in (dy, down, pre))
    torch.testing.assert_close(
        activation_backward(*strided, activation=activation), wanted, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_compiled_whole(activation: Activation) -> None:
    def step(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        y = mlp(2 * x, up, down, activation=activation, impl="torch")
        return swiglu(y, impl="torch").sum() + gelu(y, impl="torch").sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    inputs = [x.requires_grad_() for x in tensors(activation, 5, 4, 6)]
    found, expected = (torch.autograd.grad(f(*inputs), inputs) for f in (compiled, step))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_saves_its_input_and_the_pre_activation_alone(activation: Activation) -> None:
    x, up, down = (t.requires_grad_() for t in tensors(activation, 8, 4, 6))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mlp(x, up, down, activation=activation)
    assert sorted(t.numel() for t in saved) == sorted([x.numel(), 8 * up.shape[0], up.numel(), down.numel()])


def test_backward_needs_no_memory_but_its_results() -> None:
    x, up, down = (t.float() for t in tensors("swiglu", 64, 32, 96))
    _, pre = linear_activation(x, up, activation="swiglu")
    peak = peak_bytes(lambda: activation_backward(x, down, pre, activation="swiglu", impl="torch"))
    assert peak == (2 + 1) * 64 * 96 * 4


@pytest.mark.parametrize("tanh", [False, True])
def test_gelu_is_torchs(tanh: bool) -> None:
    x = 3 * random(4, 33)
    expected = F.gelu(x, approximate="tanh" if tanh else "none")
    for impl in ("torch", "reference"):
        torch.testing.assert_close(gelu(x, tanh=tanh, impl=impl), expected, rtol=1e-12, atol=1e-12)


def test_costs() -> None:
    bf16 = torch.bfloat16
    gemm = linear_activation_cost(10, 4, 6, bf16, activation="swiglu")
    assert gemm == (2 * 10 * 4 * 12, 2 * (10 * 4 + 12 * 4 + 10 * 18))
    back = activation_backward_cost(10, 4, 6, bf16, activation="swiglu")
    assert back == (2 * 10 * 4 * 6, 2 * (10 * 4 + 6 * 4 + 10 * (2 * 12 + 6)))
    assert activation_cost(10, 6, bf16, activation="swiglu").bytes == 2 * 3 * 60
    assert activation_cost(10, 6, bf16, activation="gelu", is_backward=True).bytes == 2 * 3 * 60
