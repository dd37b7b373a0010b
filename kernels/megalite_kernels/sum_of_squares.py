"""The squared norm of a flat buffer, for the global gradient norm."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite_kernels.cost import Cost
from megalite_kernels.dispatch import Impl, resolve

_ROW = 4096  # elements summed in fp32 before float64 takes over


def sum_of_squares(x: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Σ x², in fp32 over short runs and in float64 over those: as exact for billions of elements as for few.

    Its order of summation is fixed, so equal buffers give equal bits.

    Shapes:  x [n], contiguous; returns 0-dim float64
    """
    chosen = resolve(impl, "sum_of_squares", x)
    if chosen == "reference":
        return sum_of_squares_reference(x)
    if chosen == "triton":
        from megalite_kernels.gpu.sum_of_squares import partial_sums

        sums: Tensor = partial_sums(x)
        return sums.sum(dtype=torch.float64)
    whole, wide = x.numel() // _ROW * _ROW, torch.promote_types(x.dtype, torch.float32)
    rows = torch.linalg.vector_norm(x[:whole].view(-1, _ROW), dim=1, dtype=wide)
    rest = torch.linalg.vector_norm(x[whole:], dtype=wide)
    total: Tensor = rows.double().square().sum() + rest.double().square()
    return total


def sum_of_squares_reference(x: Tensor) -> Tensor:
    """`sum_of_squares` as its formula reads."""
    return x.double().square().sum()


def cost(size: int, element_bytes: int = 4) -> Cost:
    """A product and a sum an element, read once."""
    return Cost(2 * size, size * element_bytes)
