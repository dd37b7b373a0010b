"""The kernels of RMSNorm and LayerNorm against their formulas."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite_kernels import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from megalite_kernels.gpu import norm as kernels
from tests.kernels.helpers import assert_as_exact_as_torch, random, values_and_grads

EPS = 1e-5
NORMS: dict[str, Callable[..., Any]] = {
    "rms_norm": lambda x, weight, impl: rms_norm(x, weight, EPS, impl=impl),
    "add_rms_norm": lambda x, branch, weight, impl: torch.stack(
        add_rms_norm(x, branch, weight, EPS, impl=impl)
    ),
    "layer_norm": lambda x, weight, bias, impl: layer_norm(x, weight, bias, EPS, impl=impl),
    "add_layer_norm": lambda x, branch, weight, bias, impl: torch.stack(
        add_layer_norm(x, branch, weight, bias, EPS, impl=impl)
    ),
}
# 9000 columns are more than backward holds, and 130 rows more than a pass over its programs.
SHAPES = [(1, 64), (5, 96), (3, 7, 128), (130, 1024), (2, 1), (3, 9000)]
CASES = [(shape, dtype) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16)]
CASES += [((5, 96), torch.float16)]


def inputs(name: str, *shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Rows that are not centred, the branch where there is one, and the parameters."""
    rows = [1 + random(*shape, seed=seed) for seed in range(1 + name.startswith("add"))]
    parameters = [1 + 0.1 * random(shape[-1], seed=5 + i) for i in range(1 + name.endswith("layer_norm"))]
    return [x.to(dtype) for x in (*rows, *parameters)]


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_values_and_gradients(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    found, formula = (partial(NORMS[name], impl=impl) for impl in ("triton", "reference"))
    assert_as_exact_as_torch(found, formula, inputs(name, *shape), dtype)


@pytest.mark.parametrize("dim", [96, 9000])
@pytest.mark.parametrize("name", NORMS)
def test_a_gradient_without_strides(name: str, dim: int) -> None:
    tensors = inputs(name, 5, dim, dtype=torch.float32)
    found, formula = (
        values_and_grads(partial(NORMS[name], impl=impl), tensors, None) for impl in ("triton", "reference")
    )
    torch.testing.assert_close(found, formula, rtol=1e-4, atol=1e-4)


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def _heads(x: Tensor) -> Tensor:
    """x as some heads of a tensor that holds more of them, as q and k lie in a packed projection."""
    return torch.cat((random(*x.shape), x, random(*x.shape)), dim=-2).to(x.dtype)[
        ..., x.shape[-2] : 2 * x.shape[-2], :
    ]


@pytest.mark.parametrize("arranged", [_transposed, _heads])
@pytest.mark.parametrize("name", NORMS)
def test_strided_rows(name: str, arranged: Callable[[Tensor], Tensor]) -> None:
    tensors = inputs(name, 2, 3, 4, 80, dtype=torch.float32)
    expected = values_and_grads(partial(NORMS[name], impl="reference"), tensors, None)
    tensors[0] = arranged(tensors[0])
    assert not tensors[0].is_contiguous()
    found = values_and_grads(partial(NORMS[name], impl="triton"), tensors, None)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_heads_of_a_packed_projection_are_read_where_they_lie() -> None:
    x = _heads(random(2, 3, 4, 80, dtype=torch.float32))
    assert kernels._rows_of(x)[0] is x
    assert kernels._rows_of(x[:, 0])[0].data_ptr() == x.data_ptr()
    assert kernels._rows_of(_transposed(x))[0].is_contiguous()


@pytest.mark.parametrize("name", NORMS)
def test_no_rows(name: str) -> None:
    found = values_and_grads(
        partial(NORMS[name], impl="triton"), inputs(name, 0, 64, dtype=torch.float32), None
    )
    assert not any(gradient.any() for gradient in found)


@pytest.mark.parametrize("name", NORMS)
def test_operators_keep_their_promises(name: str) -> None:
    tensors = [x.requires_grad_() for x in inputs(name, 2, 3, 96, dtype=torch.float32)]
    torch.library.opcheck(getattr(kernels, name), (*tensors, EPS))


@pytest.mark.parametrize("name", NORMS)
def test_compiled_whole(name: str) -> None:
    def step(x: Tensor, *rest: Tensor) -> Tensor:
        y: Tensor = NORMS[name](x * 2, *rest, impl="triton") * 3
        return y

    tensors = inputs(name, 6, 96, dtype=torch.float32)
    whole = torch.compile(step, fullgraph=True, backend="aot_eager")
    found, expected = (values_and_grads(f, tensors, None) for f in (whole, step))
    torch.testing.assert_close(found, expected)


def test_a_row_too_wide_is_refused() -> None:
    with pytest.raises(ValueError, match="a row of 20000 does not fit"):
        rms_norm(torch.ones(1, 20000), torch.ones(20000), EPS, impl="triton")
