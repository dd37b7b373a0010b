"""The kernels of the activations, alone and in the MLP's GEMMs, against their formulas."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from torch import Tensor

from megalite_kernels import activation_backward, linear_activation, mlp
from megalite_kernels.dispatch import Impl
from megalite_kernels.gpu import activation as elementwise
from megalite_kernels.gpu import mlp as gemms
from megalite_kernels.mlp import Activation, _elementwise
from tests.kernels.helpers import assert_as_exact_as_torch, random, values_and_grads

ACTIVATIONS: tuple[Activation, ...] = ("swiglu", "gelu", "gelu_tanh")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def alone(activation: Activation, impl: Impl) -> Callable[[Tensor], Tensor]:
    return lambda pre: _elementwise(pre, activation, impl)


def whole(activation: Activation, impl: Impl) -> Callable[..., Tensor]:
    return lambda x, up, down: mlp(x, up, down, activation=activation, impl=impl)


def weights(activation: Activation, size: int, ffn: int) -> list[Tensor]:
    parts = 2 if activation == "swiglu" else 1
    return [random(parts * ffn, size, seed=1) / size**0.5, random(ffn, size, seed=2) / ffn**0.5]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (3, 5, 64), (2, 4100)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_alone(activation: Activation, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    pre = [4 * random(*shape)]
    assert_as_exact_as_torch(alone(activation, "triton"), alone(activation, "reference"), pre, dtype)


# Ragged in every dimension with more than one tile each way; a single token.
@pytest.mark.parametrize(
    ("tokens", "size", "ffn", "dtype"),
    [
        (150, 72, 136, torch.bfloat16),
        (150, 72, 136, torch.float16),
        (70, 40, 136, torch.float32),
        (1, 16, 16, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_whole(activation: Activation, tokens: int, size: int, ffn: int, dtype: torch.dtype) -> None:
    inputs = [random(tokens, size), *weights(activation, size, ffn)]
    assert_as_exact_as_torch(whole(activation, "triton"), whole(activation, "reference"), inputs, dtype)


def test_tiles_of_a_group_that_is_not_full() -> None:
    inputs = [random(600, 16), *weights("swiglu", 16, 80)]
    assert_as_exact_as_torch(whole("swiglu", "triton"), whole("swiglu", "reference"), inputs, torch.float32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bias(activation: Activation) -> None:
    x, weight = random(20, 24, dtype=torch.float32), weights(activation, 24, 40)[0].float()
    bias = random(weight.shape[0], seed=3, dtype=torch.float32)
    found, formula = (
        linear_activation(x, weight, bias, activation=activation, impl=impl)
        for impl in ("triton", "reference")
    )
    torch.testing.assert_close(found, formula, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_hidden_is_the_same_when_formed_again(activation: Activation) -> None:
    x, dy = (random(20, 24, seed=seed).bfloat16() for seed in (0, 3))
    up, down = (w.bfloat16() for w in weights(activation, 24, 40))
    hidden, pre = linear_activation(x, up, activation=activation, impl="triton")
    again = activation_backward(dy, down, pre, activation=activation, impl="triton")[1]
    assert torch.equal(hidden, again)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_gemm_of_torch_can_have_the_elementwise_kernel(
    activation: Activation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        import_module("megalite_kernels.mlp"),
        "resolve",
        lambda impl, operation, x, variant: "triton" if operation == "activation" else "torch",
    )
    inputs = [random(20, 24), *weights(activation, 24, 40)]
    assert_as_exact_as_torch(whole(activation, "auto"), whole(activation, "reference"), inputs, torch.float32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_strided_inputs_and_a_gradient_without_strides(activation: Activation) -> None:
    inputs = [x.float() for x in (random(6, 24), *weights(activation, 24, 40))]
    expected = values_and_grads(whole(activation, "reference"), inputs, None)
    inputs = [x.T.contiguous().T for x in inputs]
    found = values_and_grads(whole(activation, "triton"), inputs, None)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found, expected = (values_and_grads(alone(activation, i), inputs[:1], None) for i in ("triton", "torch"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_tokens(activation: Activation) -> None:
    inputs = [torch.ones(0, 24), *(w.float() for w in weights(activation, 24, 40))]
    results = values_and_grads(whole(activation, "triton"), inputs, None)
    results += values_and_grads(alone(activation, "triton"), inputs[:1], None)
    assert not any(result.any() for result in results)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_operators_keep_their_promises(activation: Activation) -> None:
    x, dy = (random(6, 24, seed=seed, dtype=torch.float32) for seed in (0, 3))
    up, down = (w.float() for w in weights(activation, 24, 40))
    pre = x @ up.T
    torch.library.opcheck(elementwise.activation, (pre.requires_grad_(), activation))
    pre = pre.detach()
    torch.library.opcheck(elementwise.activation_backward_again, (dy @ down.T, pre, activation))
    torch.library.opcheck(gemms.linear_activation, (x, up, None, torch.empty(6, 40), activation))
    torch.library.opcheck(gemms.activation_backward, (dy, down, pre, activation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_compiled_whole(activation: Activation) -> None:
    def step(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        y = whole(activation, "triton")(x * 2, up, down)
        return alone(activation, "triton")(y) * 3

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    inputs = [x.float() for x in (random(6, 24), *weights(activation, 24, 40))]
    found, expected = (values_and_grads(f, inputs, None) for f in (compiled, step))
    torch.testing.assert_close(found, expected)
