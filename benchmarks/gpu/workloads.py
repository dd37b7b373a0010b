"""An operation at one shape, with its reference, cost and peers; and which of them are checked and raced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megalite_kernels.cost import Cost

Function = Callable[..., Any]


@dataclass(frozen=True)
class Workload:
    """One operation at one shape.

    `run` takes `impl` and the inputs, `reference` the inputs, in float64 too; both return a tensor or
    several. `directions` are what is timed, each with its least work in `cost` of the inputs: forward and
    backward, "both" in one where the forward forms the gradients, or forward alone where there are none.
    Inputs in floating point get gradients but for the `constant` ones; the `overwritten` are written to;
    those at `rows` have a unit of independent work for each row of their first dimension. `peers` build
    other people's implementations.
    """

    name: str
    inputs: Callable[[], list[Tensor]]
    run: Function
    reference: Function
    cost: Callable[..., tuple[Cost, ...]]
    directions: tuple[str, ...] = ("forward", "backward")
    rows: tuple[int, ...] = (0,)
    overwritten: tuple[int, ...] = ()
    constant: tuple[int, ...] = ()
    peers: Mapping[str, Callable[[], Function]] = field(default_factory=dict)

    @property
    def has_backward(self) -> bool:
        """Whether there are gradients."""
        return self.directions != ("forward",)

    def implementation(self, impl: str) -> Function:
        """Ours, by the name that `impl` takes."""
        return partial(self.run, impl)

    def leaves(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Inputs for one call: fresh where it writes, leaves where it is differentiated."""
        ready = [x.clone() if i in self.overwritten else x.detach() for i, x in enumerate(inputs)]
        for index, x in enumerate(ready):
            x.requires_grad_(self.has_backward and x.is_floating_point() and index not in self.constant)
        return ready


def as_tuple(y: Any) -> tuple[Tensor, ...]:
    """What a function returned, as several."""
    return tuple(y) if isinstance(y, tuple | list) else (y,)


def upstream(outputs: Sequence[Tensor]) -> list[Tensor]:
    """A gradient for each output, the same numbers on every call and in every dtype."""
    generator = torch.Generator(outputs[0].device).manual_seed(7)
    draw = partial(torch.randn, dtype=torch.float32, device=outputs[0].device, generator=generator)
    return [draw(y.shape).bfloat16().to(y.dtype) for y in outputs]


def checked(device: torch.device) -> Iterator[Workload]:
    """Real shapes, as large as float64 references of them stay quick; off CUDA the small ones."""
    from benchmarks.gpu.operations import Maker

    if device.type != "cuda":
        yield from small(device)
        return
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        make = Maker(device, dtype)
        for dim in (64, 96, 128, 256):
            yield make.attention(1, 1500, 8, 2, dim)
        yield make.attention(2, 2048, 8, 1, 128, doc_tokens=300)
    make = Maker(device)
    yield make.attention(1, 2048, 8, 8, 128, causal=False)
    yield make.attention(1, 4096, 4, 1, 64, window=512)
    yield make.attention(1, 4096, 4, 2, 64, doc_tokens=700)
    for dim in (768, 2048, 4096, 8192):
        yield from make.norms(4097, dim)
    yield make.rope(2, 2048, 32, 8, 128)
    yield make.rope(2, 2047, 12, 12, 64)
    yield make.activation(4097, 8192, "swiglu")
    yield make.activation(4097, 3072, "gelu_tanh")
    yield from make.mlp(2048, 1024, 2816, "swiglu")
    yield from make.mlp(2048, 768, 3072, "gelu_tanh")
    yield make.cross_entropy(1024, 128256)
    yield make.linear_cross_entropy(2048, 1024, 50304)
    yield make.embedding(8192, 50304, 1024)
    yield make.dropout(4097, 3072)
    yield make.adamw(2**24 + 7)
    yield make.sum_of_squares(2**26 + 7)


def small(device: torch.device) -> Iterator[Workload]:
    """One of each operation, ragged: for what is about contracts and not about sizes."""
    from benchmarks.gpu.operations import Maker

    make = Maker(device) if device.type == "cuda" else Maker(device, torch.float32)
    yield make.attention(2, 40, 4, 2, 64)
    yield make.attention(2, 40, 4, 2, 64, doc_tokens=12)
    yield from make.norms(5, 96)
    yield make.rope(2, 20, 4, 2, 64)
    yield make.activation(7, 96, "swiglu")
    yield make.activation(7, 96, "gelu_tanh")
    for activation in ("swiglu", "gelu_tanh"):
        yield from make.mlp(40, 64, 96, activation)
    yield make.cross_entropy(5, 300)
    yield make.linear_cross_entropy(40, 64, 300)
    yield make.embedding(40, 50, 64)
    yield make.dropout(7, 96)
    yield make.adamw(1000)
    yield make.sum_of_squares(1000)


def far(device: torch.device) -> Iterator[Workload]:
    """More than 2³¹ elements in the largest tensor; off CUDA the small ones."""
    from benchmarks.gpu.operations import Maker

    if device.type != "cuda":
        yield from (workload for workload in small(device) if workload.rows)
        return
    make = Maker(device)
    yield make.attention(24, 6144, 128, 8, 128)
    yield from make.norms(2**20 + 4096, 2048)
    yield make.rope(24, 6144, 112, 8, 128)
    yield make.activation(2**17 + 64, 8192, "swiglu")
    yield make.activation(2**18 + 64, 8192, "gelu_tanh")
    yield make.cross_entropy(17000, 128256)
    yield make.embedding(2**20 + 64, 1000, 2048)
    yield make.dropout(2**20 + 64, 2048)


def races(device: torch.device) -> Iterator[Workload]:
    """The shapes of a 1B, 3B and 8B Llama at 16,384 tokens; off CUDA the small ones."""
    from benchmarks.gpu.operations import Maker

    if device.type != "cuda":
        yield from small(device)
        return
    make, tokens = Maker(device), 16384
    # Every operation at one size, then the other sizes: what a stage cut short lacks is the latter.
    yield make.attention(4, 4096, 32, 8, 64)
    yield make.attention(4, 4096, 24, 8, 128)
    yield make.attention(4, 4096, 32, 8, 64, doc_tokens=1000)
    yield make.linear_cross_entropy(tokens, 2048, 128256)
    yield from make.norms(tokens, 2048)
    yield make.rope(4, 4096, 32, 8, 64)
    yield make.activation(tokens, 8192, "swiglu")
    yield from make.mlp(tokens, 2048, 8192, "swiglu")
    yield make.cross_entropy(8192, 128256)
    yield make.embedding(tokens, 128256, 2048)
    yield make.adamw(2**28)
    yield make.sum_of_squares(2**29)
    yield make.dropout(tokens, 4096)

    yield make.attention(4, 4096, 32, 8, 128)
    yield make.attention(4, 4096, 24, 8, 128, doc_tokens=1000)
    for heads, dim in ((32, 64), (24, 128)):
        yield make.attention(1, 16384, heads, 8, dim)
    yield make.attention(4, 4096, 24, 24, 128, causal=False)
    yield make.attention(4, 4096, 24, 8, 128, window=1024)
    yield make.linear_cross_entropy(tokens, 4096, 128256)
    yield from make.norms(tokens, 4096)
    yield make.rope(4, 4096, 32, 8, 128)
    yield make.activation(tokens, 14336, "swiglu")
    yield from make.mlp(tokens, 4096, 14336, "swiglu")
    yield make.activation(tokens, 8192, "gelu_tanh")
    yield from make.mlp(tokens, 2048, 8192, "gelu_tanh")
