"""Which tiles attention's kernels visit: all that hold a pair that sees each other, and no other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from megalite_kernels.attention import _visible, attention, doc_starts_of
from megalite_kernels.gpu import attention_backward, attention_forward, attention_tiles
from tests.kernels.helpers import random, values_and_grads

# Products of a tile, and whether its rows are queries.
KERNELS = {"_attention_forward": (2, True), "_attention_dq": (3, True), "_attention_dkv": (4, False)}
TILES = {"BLOCK_M": 16, "BLOCK_N": 32}


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """How many tiles each kernel visits within it, by its matrix products; with small tiles."""
    products, tiles = 0, dict.fromkeys(KERNELS, 0)
    dot, launch = InterpreterBuilder.create_dot, attention_forward.launch

    def counting_dot(*args: Any, **options: Any) -> Any:
        nonlocal products
        products += 1
        return dot(*args, **options)

    def counting_launch(kernel: Any, *args: Any, **options: Any) -> None:
        before, name = products, kernel.fn.__name__
        launch(kernel, *args, **options)
        each = KERNELS[name][0]
        assert (products - before) % each == 0
        tiles[name] += (products - before) // each

    with (
        mock.patch.object(InterpreterBuilder, "create_dot", counting_dot),
        mock.patch.object(attention_forward, "launch", counting_launch),
        mock.patch.object(attention_backward, "launch", counting_launch),
        mock.patch.object(attention_tiles, "tile", return_value=TILES),
    ):
        yield tiles


def needed(visible: Tensor) -> int:
    """Tiles of [batch, 1, queries, keys] that hold at least one visible pair."""
    rows, columns = TILES["BLOCK_M"], TILES["BLOCK_N"]
    return sum(
        bool(visible[b, 0, i : i + rows, j : j + columns].any())
        for b in range(visible.shape[0])
        for i in range(0, visible.shape[2], rows)
        for j in range(0, visible.shape[3], columns)
    )


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[list[int]] | None, int, int, int, bool, int]:
    """Documents of two rows, queries, keys, window, causal, group."""
    keys = draw(st.integers(1, 80))
    queries = draw(st.one_of(st.just(keys), st.integers(1, keys)))
    lengths = st.one_of(st.integers(0, 3), st.sampled_from([15, 16, 17, 31, 32, 33]), st.integers(1, 80))
    documents = draw(st.none() | st.lists(st.lists(lengths, min_size=1, max_size=6), min_size=2, max_size=2))
    window = draw(st.sampled_from([0, 1, 2, 16, 17, 33, 200]))
    return documents, queries, keys, window, draw(st.booleans()), draw(st.sampled_from([1, 2]))


@given(calls())
@settings(max_examples=8, deadline=None, derandomize=True)
def test_no_tile_is_wasted_and_none_left_out(call: tuple[Any, ...]) -> None:
    documents, queries, keys, window, causal, group = call
    q = random(2, queries, group, 16, dtype=torch.float32)
    k, v = (random(2, keys, 1, 16, seed=seed, dtype=torch.float32) for seed in (1, 2))
    starts = None
    if documents is not None:
        ends = [torch.tensor([0, *lengths, 999]).cumsum(0) for lengths in documents]
        starts = torch.cat([doc_starts_of(end, keys) for end in ends])[:, -queries:]
    options: Any = {"doc_starts": starts, "window": window, "causal": causal}
    with counted() as tiles:
        found = values_and_grads(lambda *x: attention(*x, impl="triton", **options), (q, k, v), None)
    exact = [x.double() for x in (q, k, v)]
    expected = values_and_grads(lambda *x: attention(*x, impl="reference", **options), exact, None)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)
    count = needed(_visible(q, k, causal, starts, window).expand(2, -1, -1, -1)) * group
    assert tiles == dict.fromkeys(KERNELS, count)


def test_a_tile_beyond_what_32_bits_can_count() -> None:
    """Of the four gigabytes between its rows nothing is touched."""
    apart = 1 << 24
    k = torch.from_numpy(np.zeros(128 * apart + 64, np.float16)).as_strided((1, 129, 1, 64), (1, apart, 1, 1))
    q, v = (random(1, rows, 1, 64, seed=rows, dtype=torch.float16) for rows in (1, 129))
    k[0, -1, 0] = 2 * q[0, 0, 0]
    found, expected = (attention(q, k, v, impl=impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("together", [1, 2, 3, 100])
@pytest.mark.parametrize("last_first", [False, True])
def test_every_program_has_its_own_place(together: int, last_first: bool) -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def places(out, blocks, heads, together, LAST_FIRST: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
        block, head = attention_tiles.block_and_head(blocks, heads, together, LAST_FIRST)
        tl.store(out + tl.program_id(0) * 2, block)
        tl.store(out + tl.program_id(0) * 2 + 1, head)

    out = torch.full((5 * 7, 2), -1, dtype=torch.int32)
    places[(5 * 7,)](out, 5, 7, together, last_first)
    order = [(block, head) for block, head in out.tolist()]
    assert sorted(order) == [(block, head) for block in range(5) for head in range(7)]
    assert order[0] == (4 if last_first else 0, 0)
    width = min(together, 7)
    assert [head for _, head in order[: 5 * width]] == [*range(width)] * 5
