"""The order of samples is a permutation, near in chunks and mixed in windows, and frozen."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data.order import CountedChunks, EvenChunks, Order, order_key, permute


@settings(max_examples=150, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 100))
def test_permutation_is_a_bijection(n, seed, epoch):
    result = permute(np.arange(n), n, order_key(seed, epoch, "a"))
    assert np.array_equal(np.sort(result), np.arange(n))


def test_permutation_of_any_index_alone():
    key = order_key(7, 0, "a")
    whole = permute(np.arange(1000), 1000, key)
    assert [int(permute(i, 1000, key)) for i in range(0, 1000, 37)] == whole[::37].tolist()
    assert permute(np.arange(6).reshape(2, 3), 1000, key).tolist() == whole[:6].reshape(2, 3).tolist()
    assert permute(np.empty(0, dtype=np.int64), 5, key).size == 0


@pytest.mark.parametrize("n", [2**62, 2**53 + 1, 10**10 + 7])
def test_permutation_of_large_domains(n):
    index = np.concatenate([np.arange(2000), n - 1 - np.arange(2000)])
    result = permute(index, n, order_key(0, 0, "a"))
    assert len(set(result.tolist())) == 4000
    assert 0 <= result.min() <= result.max() < n
    assert abs(result.astype(float).mean() / n - 0.5) < 0.03


def test_permutation_depends_on_every_part_of_its_key():
    base = permute(np.arange(500), 500, order_key(1, 2, "a")).tolist()
    for other in ((2, 2, "a"), (1, 3, "a"), (1, 2, "b"), (1, 2, "a", "window")):
        moved = permute(np.arange(500), 500, order_key(*other)).tolist()
        assert sum(a == b for a, b in zip(base, moved, strict=True)) < 15


def test_permutation_looks_random():
    """Neighbours land far apart: successive differences are spread over the whole range."""
    n = 100_000
    result = permute(np.arange(n), n, order_key(5, 0, "a"))
    assert abs(np.corrcoef(np.arange(n), result)[0, 1]) < 0.02
    steps = np.histogram(np.diff(result) % n, bins=20, range=(0, n))[0]
    assert abs(steps / (n / 20) - 1).max() < 0.1


def test_order_is_frozen():
    """Changing the order would break every run that resumes; this is version 2 of it."""
    order = Order(EvenChunks(1000, 7, 3), 5, "a")
    assert order.sample(np.arange(995, 1003)).tolist() == FROZEN_EVEN
    order = Order(CountedChunks(np.array([5, 0, 3, 9, 2]), 2), 5, "a")
    assert order.sample(np.arange(8)).tolist() == FROZEN_COUNTED


def test_permutation_refuses():
    for index, n in ((5, 5), (-1, 5), (0, 0), (0, 2**62 + 1)):
        with pytest.raises(IndexError):
            permute(index, n, order_key(0, 0, "a"))


def layout(counts, size, window):
    """Chunks of the given counts, or as many even ones."""
    return CountedChunks(np.array(counts), window) if size is None else EvenChunks(sum(counts), size, window)


@settings(max_examples=150, deadline=None)
@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=20).filter(any),
    size=st.none() | st.integers(1, 40),
    window=st.integers(1, 8),
    seed=st.integers(0, 5),
)
def test_each_epoch_holds_every_sample_once(counts, size, window, seed):
    order = Order(layout(counts, size, window), seed, "a")
    n = sum(counts)
    found = order.sample(np.arange(3 * n))
    assert [sorted(epoch.tolist()) for epoch in found.reshape(3, n)] == [list(range(n))] * 3
    some = np.random.default_rng(seed).integers(0, 3 * n, 50)
    assert order.sample(some).tolist() == found[some].tolist()


@pytest.mark.parametrize("even", [True, False])
def test_samples_in_flight_come_from_a_window_of_chunks(even):
    """While one window is read, only its chunks are open; afterwards they are done with."""
    chunks, size, window = EvenChunks(10_000, 50, 8), 50, 8
    if not even:
        chunks = CountedChunks(np.full(200, size), window)
    order = Order(chunks, 3, "a")
    found = order.sample(np.arange(10_000)).reshape(-1, window * size)
    shift = int(order_key(3, 0, "a")[0] % np.uint64(10_000)) if even else 0
    opened = [set(((samples - shift) % 10_000 // size).tolist()) for samples in found]
    assert [len(chunk) for chunk in opened] == [window] * 25
    assert len(set.union(*opened)) == 200
    assert abs(np.corrcoef(np.arange(window * size), found[0])[0, 1]) < 0.2  # mixed within the window
    assert max(np.diff(sorted(opened[0]))) > 8  # from all over the source


def test_epochs_differ_and_names_matter():
    n = np.arange(1000)
    order = Order(EvenChunks(1000, 10, 5), 3, "a")
    epochs = [order.sample(n + 1000 * e).tolist() for e in range(3)]
    others = [
        Order(EvenChunks(1000, 10, 5), seed, name).sample(n).tolist() for seed, name in ((4, "a"), (3, "b"))
    ]
    assert len({tuple(each) for each in [*epochs, *others]}) == 5
    assert Order(EvenChunks(1000, 10, 5), 3, "a", shuffle=False).sample(n + 2000).tolist() == n.tolist()


def test_looking_up_among_ten_thousand_million_takes_neither_time_nor_memory():
    order = Order(EvenChunks(10**10, 64, 48), 0, "a")
    index = np.arange(1024) + 7 * 10**9
    order.sample(index)
    tracemalloc.start()
    began = time.process_time()
    for e in range(1, 11):
        order.sample(index + e * 10**10)
    seconds = (time.process_time() - began) / 10
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert seconds < 0.01  # a tenth of it on a quiet machine, without tracing


FROZEN_EVEN = [30, 33, 607, 601, 32, 877, 458, 461]
FROZEN_COUNTED = [18, 2, 1, 4, 3, 0, 17, 11]
