"""The operators in torch, compiled: gradients as without, and no trap of a torch that is not the one here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

from megalite_kernels import dropout, embedding, gelu, layer_norm, mlp, rms_norm, rope, swiglu

TOKENS, HIDDEN, FFN = 5, 4, 6


def draw(*shape: int) -> Tensor:
    """Numbers of the same seed each time; fp32, in which a cast to fp32 gives back what it was given."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


ANGLES = draw(1, TOKENS, HIDDEN // 2)
KEYS = torch.arange(TOKENS)
IDS = torch.tensor([0, 7, 3, 9, 2])
OPERATORS: dict[str, tuple[Callable[..., Tensor], Sequence[Tensor]]] = {
    "rms_norm": (lambda x, w: rms_norm(x, w, 1e-5, impl="torch"), [draw(TOKENS, HIDDEN), draw(HIDDEN)]),
    "layer_norm": (
        lambda x, w, b: layer_norm(x, w, b, 1e-5, impl="torch"),
        [draw(TOKENS, HIDDEN), draw(HIDDEN), draw(HIDDEN)],
    ),
    "rope": (lambda x: rope(x, ANGLES.cos(), ANGLES.sin(), impl="torch"), [draw(2, TOKENS, 3, HIDDEN)]),
    "dropout": (lambda x: dropout(x, 0.3, KEYS, impl="torch"), [draw(TOKENS, HIDDEN)]),
    "swiglu": (lambda x: swiglu(x, impl="torch"), [draw(TOKENS, 2 * FFN)]),
    "gelu": (lambda x: gelu(x, impl="torch"), [draw(TOKENS, FFN)]),
    "mlp": (
        lambda x, up, down: mlp(x, up, down, activation="swiglu", impl="torch"),
        [draw(TOKENS, HIDDEN), draw(2 * FFN, HIDDEN), draw(FFN, HIDDEN)],
    ),
    "embedding": (lambda w: embedding(IDS, w, 2, impl="torch"), [draw(6, HIDDEN)]),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_are_those_of_the_operator_as_it_is(name: str) -> None:
    operator, inputs = OPERATORS[name]
    inputs = [x.requires_grad_() for x in inputs]
    outputs: list[tuple[Any, list[Any]]] = []

    def backend(graph: torch.fx.GraphModule, examples: Sequence[Tensor]) -> Callable[..., Any]:
        for module in graph.children():
            if isinstance(module, torch.fx.GraphModule):
                *nodes, end = module.graph.nodes
                values = [node.meta.get("example_value") for node in nodes]
                results = end.args[0][0]
                if isinstance(results, tuple):  # a forward of an autograd.Function, with what it saves
                    outputs.append((results[0].meta["example_value"], values))
        return aot_eager(graph, examples)  # type: ignore[no-any-return]

    def loss(*inputs: Tensor) -> Tensor:
        return operator(*inputs).sin().sum()

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    found, expected = (torch.autograd.grad(f(*inputs), inputs) for f in (compiled, loss))
    torch.testing.assert_close(found, expected)
    # torch 2.11 has no gradient for an output that another operation returned before: one that was written to
    # in place, or that a cast or `contiguous` passed through.
    assert outputs
    for result, values in outputs:
        assert sum(value is result for value in values) == 1
