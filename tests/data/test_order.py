"""The order of samples is a permutation, the mixture is exact, and both are frozen."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data.mixture import Mixture, arrange, quantise
from megalite.data.order import order_key, permute
from megalite.errors import ConfigError


@settings(max_examples=150, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 100))
def test_permutation_is_a_bijection(n, seed, epoch):
    result = permute(np.arange(n), n, order_key(seed, epoch, 0))
    assert np.array_equal(np.sort(result), np.arange(n))


def test_permutation_of_any_index_alone():
    key = order_key(7, 0, 0)
    whole = permute(np.arange(1000), 1000, key)
    assert [int(permute(i, 1000, key)) for i in range(0, 1000, 37)] == whole[::37].tolist()
    assert permute(np.arange(6).reshape(2, 3), 1000, key).tolist() == whole[:6].reshape(2, 3).tolist()
    assert permute(np.empty(0, dtype=np.int64), 5, key).size == 0


@pytest.mark.parametrize("n", [2**62, 2**53 + 1, 10**10 + 7])
def test_permutation_of_large_domains(n):
    index = np.concatenate([np.arange(2000), n - 1 - np.arange(2000)])
    result = permute(index, n, order_key(0, 0, 0))
    assert len(set(result.tolist())) == 4000
    assert 0 <= result.min() <= result.max() < n
    assert abs(result.astype(float).mean() / n - 0.5) < 0.03


def test_permutation_depends_on_every_part_of_its_key():
    base = permute(np.arange(500), 500, order_key(1, 2, 3)).tolist()
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        moved = permute(np.arange(500), 500, order_key(*other)).tolist()
        assert sum(a == b for a, b in zip(base, moved, strict=True)) < 15


def test_permutation_looks_random():
    """Neighbours land far apart: successive differences are spread over the whole range."""
    n = 100_000
    result = permute(np.arange(n), n, order_key(5, 0, 0))
    assert abs(np.corrcoef(np.arange(n), result)[0, 1]) < 0.02
    steps = np.histogram(np.diff(result) % n, bins=20, range=(0, n))[0]
    assert abs(steps / (n / 20) - 1).max() < 0.1


def test_order_is_frozen():
    """Changing the order would break every run that resumes; this is version 1 of it."""
    assert permute(np.arange(8), 100, order_key(0, 0, 0)).tolist() == FROZEN_ORDER
    assert arrange(np.array([11, 6, 3])).tolist() == FROZEN_MIXTURE


def test_permutation_refuses():
    for index, n in ((5, 5), (-1, 5), (0, 0), (0, 2**62 + 1)):
        with pytest.raises(IndexError):
            permute(index, n, order_key(0, 0, 0))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=9))
def test_every_prefix_of_the_mixture_is_exact(counts):
    counts = np.array(counts)
    order = arrange(counts)
    drawn = np.cumsum(order[:, None] == np.arange(len(counts)), axis=0)
    due = np.arange(1, len(order) + 1)[:, None] * counts / counts.sum()
    assert np.abs(drawn - due).max() < 1
    assert drawn[-1].tolist() == counts.tolist()


@pytest.mark.parametrize("weights", [[0.55, 0.3, 0.15], [1], [1, 1, 1], [0.1] * 7, [3.5, 0.001, 1.2345]])
def test_decimal_weights_are_exact_over_a_million_draws(weights):
    mixture = Mixture(weights)
    source, nth = mixture.locate(np.arange(1_000_000))
    for s, weight in enumerate(weights):
        mine = source == s
        error = np.cumsum(mine) - np.arange(1, 1_000_001) * weight / sum(weights)
        assert np.abs(error).max() <= 1 + 1e-6
        assert np.array_equal(nth[mine], np.arange(mine.sum()))


def test_irrational_weights_stay_close():
    weights = [2**0.5, np.pi, 1.0]
    source, _ = Mixture(weights).locate(np.arange(1_000_000))
    error = np.bincount(source) - 1_000_000 * np.array(weights) / sum(weights)
    assert np.abs(error).max() < 1.5


def test_locate_is_a_function_of_the_index_alone():
    mixture = Mixture([0.7, 0.3])
    source, nth = mixture.locate(np.arange(500))
    again = mixture.locate(np.arange(499, -1, -1))
    assert source.tolist() == again[0][::-1].tolist()
    assert nth.tolist() == again[1][::-1].tolist()
    far = mixture.locate(np.array([10**12]))
    assert abs(int(far[1][0]) - 10**12 * [0.7, 0.3][int(far[0][0])]) < 1


def test_quantise():
    assert quantise([0.55, 0.3, 0.15]).tolist() == [11, 6, 3]
    assert quantise([2.0, 2.0]).tolist() == [1, 1]
    with pytest.raises(ConfigError, match=r"data\.sources is empty"):
        quantise([])
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"data\.sources\[1\]\.weight"):
            quantise([1.0, weight])
    with pytest.raises(ConfigError, match="too far apart"):
        quantise([1.0, 1e-9])


FROZEN_ORDER = [68, 32, 6, 29, 79, 70, 92, 17]
FROZEN_MIXTURE = [0, 1, 0, 2, 0, 1, 0, 0, 1, 0, 2, 0, 1, 0, 1, 0, 0, 2, 1, 0]
