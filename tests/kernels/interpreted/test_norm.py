"""RMSNorm's kernels against the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megalite_kernels import rms_norm
from megalite_kernels.norm import rms_norm_reference
from tests.kernels.helpers import assert_as_exact_as_torch, random

SHAPES = [(1, 64), (5, 96), (3, 7, 128), (130, 1024), (2, 1)]


def kernel(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, 1e-5, impl="triton")


def formula(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm_reference(x, weight, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = [random(*shape), 1 + 0.1 * random(shape[-1], seed=1)]
    assert_as_exact_as_torch(kernel, formula, inputs, dtype)


def test_operators_keep_their_promises() -> None:
    from megalite_kernels.gpu.norm import rms_norm as operator

    x, weight = (
        t.requires_grad_() for t in (random(6, 96, dtype=torch.float32), random(96, dtype=torch.float32))
    )
    torch.library.opcheck(operator, (x, weight, 1e-5))


def test_compiled_whole() -> None:
    def step(x: Tensor, weight: Tensor) -> Tensor:
        return kernel(x * 2, weight) * 3

    inputs = [random(6, 96, dtype=torch.float32), random(96, dtype=torch.float32)]
    whole = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(*inputs), step(*inputs))
