"""The kernel of dropout: the same bits as torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megalite_kernels import dropout
from megalite_kernels.counter import derive_key
from tests.kernels.helpers import random

KEYS = torch.tensor([derive_key("a", 0), derive_key("b"), 0, -1, 2**62, 5])
PLACES = torch.tensor([0, 1, 2**40, 7, 4095, 3])


@pytest.mark.parametrize("p", [0.0, 0.1, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_same_bits_as_torch(dtype: torch.dtype, p: float) -> None:
    for shape in ((6, 1), (6, 1300), (6, 5, 7)):
        for places in (None, PLACES):
            given = random(*shape, dtype=dtype)
            leaves = [given.clone().requires_grad_() for _ in range(2)]
            grad = random(*shape, seed=1, dtype=dtype)
            found, wanted = (
                dropout(x, p, KEYS, places, impl=i) for x, i in zip(leaves, ("triton", "torch"), strict=True)
            )
            assert torch.equal(found, wanted)
            found.backward(grad)
            wanted.backward(grad)
            assert leaves[0].grad is not None
            assert leaves[1].grad is not None
            assert torch.equal(leaves[0].grad, leaves[1].grad)


def test_strides_and_nothing() -> None:
    x = random(40, 6, dtype=torch.float32).t().requires_grad_()
    y = dropout(x, 0.4, KEYS, impl="triton")
    assert torch.equal(y, dropout(x, 0.4, KEYS, impl="torch"))
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, dropout(torch.ones(6, 40), 0.4, KEYS, impl="torch"))
    for impl in ("triton", "torch", "reference"):
        assert dropout(x[:0], 0.4, KEYS[:0], impl=impl).shape == (0, 40)


def test_operators_keep_their_promises() -> None:
    from megalite_kernels.gpu.dropout import dropout as operator

    torch.library.opcheck(operator, (random(6, 30, dtype=torch.float32), 0.3, KEYS, PLACES))
    torch.library.opcheck(operator, (random(6, 30, dtype=torch.float32), 0.3, KEYS, None))


def test_compiled_whole() -> None:
    x = random(6, 40, dtype=torch.float32).requires_grad_()

    def step(x: Tensor) -> Tensor:
        return dropout(x * 2, 0.3, KEYS, PLACES, impl="triton").square()

    whole = torch.compile(step, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(f(x).sum(), x)[0] for f in (whole, step))
    assert torch.equal(whole(x), step(x))
    assert torch.equal(found, expected)
