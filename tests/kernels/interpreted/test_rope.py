"""RoPE's kernel against its formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megalite_kernels import rope, rope_qkv
from megalite_kernels.dispatch import Impl
from megalite_kernels.gpu import rope as kernels
from tests.kernels.helpers import assert_as_exact_as_torch, random, values_and_grads

HEADS, KV_HEADS = 6, 2
SHAPES = [(1, 1, 10, 64), (2, 5, 10, 96), (2, 70, 10, 32), (3, 4, 10, 2)]


def tables(batch: int, seq: int, half: int) -> tuple[Tensor, Tensor]:
    angles = 7 * random(batch, seq, half, seed=5)
    return angles.cos().float(), angles.sin().float()


def operation(impl: Impl, shape: tuple[int, ...], batch: int = 1, is_packed: bool = True) -> object:
    cos, sin = tables(batch, shape[1], shape[3] // 2)

    def apply(x: Tensor) -> Tensor:
        angles = (cos.double(), sin.double()) if x.dtype == torch.float64 else (cos, sin)
        if not is_packed:
            return rope(x, *angles, impl=impl)
        return torch.cat(rope_qkv(x, *angles, HEADS, KV_HEADS, impl=impl), 2)

    return apply


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: tuple[int, ...], is_packed: bool, dtype: torch.dtype) -> None:
    batch = shape[0] if is_packed else 1  # positions of each sample's own, or shared
    found, formula = (operation(impl, shape, batch, is_packed) for impl in ("triton", "reference"))
    assert_as_exact_as_torch(found, formula, [random(*shape)], dtype)


@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("arrangement", ["transposed", "every other", "part", "contiguous"])
def test_strided_inputs_and_a_gradient_without_strides(arrangement: str, is_packed: bool) -> None:
    shape = (2, 5, 10, 32)
    x = random(*shape, dtype=torch.float32)
    expected = values_and_grads(operation("reference", shape, 2, is_packed), [x], None)
    if arrangement == "transposed":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif arrangement == "every other":
        x = x.repeat_interleave(2, dim=-1)[..., ::2]
    elif arrangement == "part":
        x = torch.cat((x, x), 2)[:, :, :10]
    found = values_and_grads(operation("triton", shape, 2, is_packed), [x], None)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_no_tokens() -> None:
    for shape in ((0, 5, 10, 32), (2, 0, 10, 32)):
        for is_packed in (True, False):
            y, grad = values_and_grads(operation("triton", shape, 1, is_packed), [torch.ones(shape)], None)
            assert y.shape == grad.shape == shape


def test_operators_keep_their_promises() -> None:
    qkv = random(2, 5, 10, 32, dtype=torch.float32).requires_grad_()
    angles = tables(1, 5, 16)
    torch.library.opcheck(kernels.rope_qkv, (qkv, *angles, HEADS, KV_HEADS))
    torch.library.opcheck(kernels.rope, (qkv, *angles))


@pytest.mark.parametrize("is_packed", [True, False])
def test_compiled_whole(is_packed: bool) -> None:
    turn = operation("triton", (2, 5, 10, 32), 2, is_packed)

    def step(x: Tensor) -> Tensor:
        return turn(x * 2) * 3

    whole = torch.compile(step, fullgraph=True, backend="aot_eager")
    x = random(2, 5, 10, 32, dtype=torch.float32)
    torch.testing.assert_close(values_and_grads(whole, [x], None), values_and_grads(step, [x], None))
