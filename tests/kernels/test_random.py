"""Counter-based random numbers, and dropout that stands on them."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from megalite_kernels import dropout
from megalite_kernels.counter import derive_key, fold, uniform
from tests.kernels.helpers import assert_same, random

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _splitmix64(z: int) -> int:
    """The published finaliser (Steele et al. 2014), in Python's own integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def test_uniform_is_splitmix64() -> None:
    keys = [0, 1, 2**62, derive_key("init", 0, "embedding")]
    index = [0, 1, 2, 12345, 2**40]
    found = uniform(torch.tensor(keys)[:, None], torch.tensor(index))
    for row, key in enumerate(keys):
        for column, i in enumerate(index):
            bits = _splitmix64((key + i * _GOLDEN) & _MASK)
            assert found[row, column].item() == ((bits >> 12) + 0.5) * 2.0**-52


def test_known_values() -> None:
    # The first outputs of SplitMix64 seeded with 0, as published with xoshiro: index counts from 1.
    bits = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    expected = [((b >> 12) + 0.5) * 2.0**-52 for b in bits]
    assert uniform(torch.tensor(0), torch.arange(1, 4)).tolist() == expected
    assert derive_key("dropout", 0) == 6269898577389694246  # part of every run: must never change


def test_uniform_fills_the_open_interval_evenly() -> None:
    u = uniform(torch.tensor(derive_key("even", 3)), torch.arange(200_000))
    assert u.min() > 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 4 / (12 * len(u)) ** 0.5
    assert abs(u.var() - 1 / 12) < 0.001
    counts = torch.bincount((u * 100).long(), minlength=100)
    chi_square = ((counts - 2000.0).square() / 2000).sum()
    assert 99 - 5 * 14.1 < chi_square < 99 + 5 * 14.1  # 99 degrees of freedom, deviation sqrt(198)
    neighbours = torch.corrcoef(torch.stack((u[:-1], u[1:])))[0, 1]
    assert abs(neighbours) < 0.01


def test_keys_and_salts_give_unrelated_streams() -> None:
    index = torch.arange(50_000)
    keys = [derive_key("a", 0), derive_key("a", 1), derive_key("b", 0)]
    folded = fold(torch.tensor(keys[0]), torch.arange(3)).tolist()
    streams = torch.stack([uniform(torch.tensor(key), index) for key in (*keys, *folded)])
    correlation = torch.corrcoef(streams) - torch.eye(6)
    assert correlation.abs().max() < 0.02
    assert len({*keys, *folded, derive_key("a", "0"), derive_key("a0")}) == 8


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean(p: float) -> None:
    y = dropout(torch.ones(4, 50_000), p, torch.arange(4))
    assert y.unique().tolist() == [0.0, pytest.approx(1 / (1 - p))]
    dropped = (y == 0).float().mean(-1)
    assert (dropped - p).abs().max() < 5 * (p * (1 - p) / 50_000) ** 0.5
    assert (y.mean(-1) - 1).abs().max() < 5 * (p / (1 - p) / 50_000) ** 0.5


def test_dropout_is_a_function_of_key_and_place() -> None:
    x, keys = random(6, 5, 7, dtype=torch.float32), torch.tensor([3, 9, 3, 2**62, 0, 5])
    whole = dropout(x, 0.4, keys)
    assert torch.equal(whole, dropout(x, 0.4, keys))
    assert torch.equal(whole, torch.cat([dropout(x[i : i + 1], 0.4, keys[i : i + 1]) for i in range(6)]))
    assert torch.equal(whole[0] == 0, whole[2] == 0)  # the same key
    assert not torch.equal(whole[0] == 0, whole[1] == 0)
    half = dropout(x.bfloat16(), 0.4, keys)
    assert torch.equal(half == 0, whole == 0)


def test_dropout_gradient_has_the_same_mask() -> None:
    keys = torch.arange(3)
    mask = dropout(torch.ones(3, 4, 5, dtype=torch.float64), 0.3, keys)
    assert_same(lambda x: dropout(x, 0.3, keys), lambda x: x * mask, [random(3, 4, 5)])


def test_dropout_keeps_no_mask_for_backward() -> None:
    x = torch.randn(8, 1000, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dropout(x, 0.3, torch.arange(8))
    assert sum(t.numel() for t in saved) == 8


def test_dropout_is_its_formula() -> None:
    keys, places = torch.arange(3), torch.tensor([5, 0, 2])
    ours, formula = (
        partial(dropout, p=0.3, keys=keys, places=places, impl=i) for i in ("torch", "reference")
    )
    assert_same(ours, formula, [random(3, 4, 5)], tol=0)
    assert torch.autograd.gradcheck(formula, random(3, 4, 5).requires_grad_())
