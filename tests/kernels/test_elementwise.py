"""Norms, activations, RoPE and the choice of implementation."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalite_kernels import (
    add_layer_norm,
    add_rms_norm,
    gelu,
    layer_norm,
    rms_norm,
    rope,
    rope_qkv,
    swiglu,
)
from megalite_kernels.dispatch import resolve
from megalite_kernels.norm import norm_cost
from megalite_kernels.rope import rope_cost
from tests.kernels.helpers import assert_as_exact_as_torch, assert_same, random, values_and_grads

SHAPES = [(1, 1), (7, 6), (2, 5, 64), (2, 3, 4, 10)]


def _positions(*shape: int) -> tuple[Tensor, Tensor]:
    """RoPE's tables for random angles; shape [batch or 1, seq, head_dim/2]."""
    angles = 7 * random(*shape, seed=5)
    return angles.cos(), angles.sin()


def _cases(shape: tuple[int, ...]) -> dict[str, tuple[Any, list[Tensor]]]:
    """Operation (taking impl=) and inputs, by name."""
    x, weight = random(*shape), 1 + random(shape[-1], seed=1) / 4
    cases: dict[str, tuple[Any, list[Tensor]]] = {
        "rms_norm": (lambda x, w, impl: rms_norm(x, w, 1e-5, impl=impl), [x, weight]),
        "layer_norm": (
            lambda x, w, b, impl: layer_norm(x, w, b, 1e-5, impl=impl),
            [x + 2, weight, random(shape[-1], seed=3)],
        ),
        "add_rms_norm": (
            lambda x, y, w, impl: torch.stack(add_rms_norm(x, y, w, 1e-5, impl=impl)),
            [x, random(*shape, seed=4), weight],
        ),
        "add_layer_norm": (
            lambda x, y, w, b, impl: torch.stack(add_layer_norm(x, y, w, b, 1e-5, impl=impl)),
            [x, random(*shape, seed=4), weight, random(shape[-1], seed=3)],
        ),
        "gelu": (lambda x, impl: gelu(x, impl=impl), [3 * x]),
        "gelu_tanh": (lambda x, impl: gelu(x, tanh=True, impl=impl), [3 * x]),
        "swiglu": (lambda x, impl: swiglu(x, impl=impl), [torch.cat((x, 2 * random(*shape, seed=2)), -1)]),
    }
    if len(shape) == 4:
        tables = _positions(shape[0], shape[1], shape[3] // 2)
        shared = tuple(table[:1] for table in tables)
        cases["rope"] = (lambda x, impl: rope(x, *tables, impl=impl), [x])
        cases["rope_shared"] = (lambda x, impl: rope(x, *shared, impl=impl), [x])
        heads = shape[2] - 2
        cases["rope_qkv"] = (
            lambda x, impl: torch.cat(rope_qkv(x, *tables, heads, 1, impl=impl), 2),
            [x],
        )
    return cases


CASES = [(shape, name) for shape in SHAPES for name in _cases(shape)]


@pytest.mark.parametrize(("shape", "name"), CASES, ids=str)
def test_values_and_gradients(shape: tuple[int, ...], name: str) -> None:
    operation, inputs = _cases(shape)[name]
    assert_same(partial(operation, impl="torch"), partial(operation, impl="reference"), inputs)


@pytest.mark.parametrize(("shape", "name"), CASES, ids=str)
def test_bf16_is_as_exact_as_the_formula_in_bf16(shape: tuple[int, ...], name: str) -> None:
    operation, inputs = _cases(shape)[name]
    assert_as_exact_as_torch(partial(operation, impl="torch"), partial(operation, impl="reference"), inputs)


@pytest.mark.parametrize("name", _cases((2, 3, 2, 4)))
def test_gradcheck(name: str) -> None:
    operation, inputs = _cases((2, 3, 2, 4))[name]
    leaves = [x.requires_grad_() for x in inputs]
    for impl in ("torch", "reference"):
        assert torch.autograd.gradcheck(partial(operation, impl=impl), leaves)


@pytest.mark.parametrize("name", _cases((2, 3, 2, 4)))
def test_strided_inputs(name: str) -> None:
    operation, inputs = _cases((2, 3, 2, 4))[name]
    strided = [x.repeat_interleave(2, dim=-1)[..., ::2] for x in inputs]
    transposed = [x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 1 else x for x in inputs]
    expected = operation(*inputs, impl="reference")
    for case in (strided, transposed):
        assert not case[0].is_contiguous()
        torch.testing.assert_close(operation(*case, impl="torch"), expected, rtol=1e-12, atol=1e-12)


def test_rms_norm_is_torchs() -> None:
    x, weight = 50 * random(4, 32), random(32, seed=1)
    torch.testing.assert_close(rms_norm(x, weight, 1e-3), F.rms_norm(x, (32,), weight, 1e-3))
    assert rms_norm(torch.zeros(2, 32), torch.ones(32), 1e-6).isfinite().all()


def test_rms_norm_of_bf16_squares_in_fp32() -> None:
    x = torch.full((1, 1000), 3e19, dtype=torch.bfloat16)  # its square overflows, its scale does not
    small = torch.full((1, 1000), 1e-18, dtype=torch.bfloat16)
    assert torch.equal(rms_norm(x / 1e10, torch.ones(1000).bfloat16(), 1e-5), torch.ones_like(x))
    assert torch.equal(rms_norm(small, torch.ones(1000).bfloat16(), 1e-45), torch.ones_like(x))


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_parameter_gradients_of_bf16_are_summed_in_fp32(name: str) -> None:
    operation, inputs = _cases((4096, 24))[name]
    low = [x.bfloat16() for x in inputs]
    grad = 1 + random(4096, 24, seed=9).bfloat16()
    exact = values_and_grads(partial(operation, impl="reference"), [x.double() for x in low], grad.double())
    leaves = [x.requires_grad_() for x in low]
    for leaf in leaves:
        leaf.grad_dtype = None  # take the gradient in the dtype it arrives in
    operation(*leaves, impl="torch").backward(grad)
    for leaf, expected in zip(leaves[1:], exact[2:], strict=True):
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.float32
        assert (leaf.grad - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_layer_norm_is_torchs() -> None:
    x, weight, bias = random(4, 32) - 3, random(32, seed=1), random(32, seed=2)
    expected = F.layer_norm(x, (32,), weight, bias, 1e-3)
    torch.testing.assert_close(layer_norm(x, weight, bias, 1e-3), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_addition_is_an_addition_and_a_norm(dtype: torch.dtype) -> None:
    x, branch, weight, bias = (
        random(*shape, seed=i).to(dtype) for i, shape in enumerate([(5, 33)] * 2 + [(33,)] * 2)
    )
    y, stream = add_rms_norm(x, branch, weight, 1e-5)
    assert torch.equal(stream, x + branch)
    assert torch.equal(y, rms_norm(x + branch, weight, 1e-5))
    y, stream = add_layer_norm(x, branch, weight, bias, 1e-5)
    assert torch.equal(stream, x + branch)
    assert torch.equal(y, layer_norm(x + branch, weight, bias, 1e-5))


def test_a_packed_projection_of_other_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="qkv has 5 heads, not 4"):
        rope_qkv(random(1, 1, 5, 2), *_positions(1, 1, 1), 4, 1)


def test_costs() -> None:
    assert norm_cost(10, 8, torch.bfloat16).bytes == 2 * 80 * 2
    assert norm_cost(10, 8, torch.bfloat16, is_added=True).bytes == 4 * 80 * 2
    assert norm_cost(10, 8, torch.float32, is_backward=True).bytes == 3 * 80 * 4
    assert norm_cost(10, 8, torch.bfloat16, is_added=True, is_backward=True).bytes == 4 * 80 * 2
    assert rope_cost(10, 3, 8, torch.bfloat16) == (3 * 240, 2 * 240 * 2 + 4 * 80)


def test_rope_is_a_complex_rotation() -> None:
    x, angles = random(2, 5, 3, 8), random(2, 5, 4, seed=1)
    y = rope(x, angles.cos(), angles.sin())
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.exp(1j * angles)[:, :, None]
    torch.testing.assert_close(y, torch.cat((turned.real, turned.imag), -1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("operation", [partial(rms_norm, weight=torch.ones(8), eps=1e-5), swiglu, gelu])
def test_only_what_is_documented_is_saved(operation: Any) -> None:
    x = torch.randn(64, 8, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        operation(x)
    assert sum(t.numel() for t in saved) <= x.numel() + 8 + 64


def test_implementations_are_chosen_by_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGALITE_KERNELS", raising=False)
    assert resolve("auto", "norm", torch.empty(1)) == "torch"
    assert resolve("reference", "norm", torch.empty(1)) == "reference"
    monkeypatch.setenv("MEGALITE_KERNELS", "reference")
    assert resolve("auto", "norm", torch.empty(1)) == "reference"
    assert resolve("torch", "norm", torch.empty(1)) == "torch"
    monkeypatch.setenv("MEGALITE_KERNELS", "cuda")
    with pytest.raises(ValueError, match="MEGALITE_KERNELS='cuda' is no kernel implementation"):
        resolve("auto", "norm", torch.empty(1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("megalite_kernels.dispatch.has_triton", lambda: True)
    assert resolve("triton", "norm", torch.empty(1)) == "triton"
    with pytest.raises(ValueError, match=r"'triton' with torch\.float64: kernels take bf16, fp16 and fp32"):
        resolve("triton", "norm", torch.empty(1, dtype=torch.float64))
    with pytest.raises(ValueError, match="impl='fast'"):
        resolve("fast", "norm", torch.empty(1))  # type: ignore[arg-type]
