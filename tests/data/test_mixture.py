"""The mixture is exact at every prefix, and what changes it in mid-run loses and repeats nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data.mixture import Mixture, arrange, quantise, temperature_weights
from megalite.data.schedule import Blend, Phase, SeqLens, Skips, first_sample
from megalite.errors import ConfigError, DataError


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


def test_of_changes_before_the_same_sample_the_last_is_in_force():
    blend = Blend(
        [Phase(0, (0.8, 0.2)), Phase(0, (0.5, 0.5)), Phase(40, (1.0, 0.0)), Phase(40, (0.0, 1.0))],
        [None, None],
    )
    assert blend.cursors(40) == [20, 20]
    assert blend.cursors(50) == [20, 30]


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


def test_the_mixture_is_frozen():
    """Changing it would break every run that resumes; this is version 2 of it."""
    assert arrange(np.array([11, 6, 3])).tolist() == FROZEN_MIXTURE


@settings(max_examples=80, deadline=None)
@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=6), draws=st.integers(0, 500))
def test_counts_and_places_of_draws(counts, draws):
    mixture = Mixture([float(count) for count in counts])
    source, nth = mixture.locate(np.arange(600))
    assert mixture.drawn(draws).tolist() == np.bincount(source[:draws], minlength=len(counts)).tolist()
    for place in range(0, 600, 97):
        assert mixture.place_of(int(source[place]), int(nth[place])) == place


def test_temperature():
    assert temperature_weights([100, 400], 1.0) == (0.25, 1.0)
    assert temperature_weights([100, 400], 2.0) == (0.5, 1.0)
    even = temperature_weights([100, 400], 1e9)
    assert abs(even[0] - 1) < 1e-6


shares = st.lists(st.integers(0, 9).map(float), min_size=3, max_size=3).filter(any).map(tuple)


@pytest.mark.slow
@settings(max_examples=120, deadline=None)
@given(
    weights=st.lists(shares, min_size=1, max_size=4),
    lengths=st.lists(st.integers(1, 150), min_size=4, max_size=4),
    limits=st.lists(st.none() | st.integers(1, 90), min_size=3, max_size=3),
)
def test_a_schedule_neither_loses_nor_repeats(weights, lengths, limits):
    starts = [0, *np.cumsum(lengths).tolist()]
    phases = [Phase(start, each) for start, each in zip(starts[: len(weights)], weights, strict=True)]
    blend = Blend(phases, limits)
    total = 600 if blend.end is None else min(blend.end, 600)
    source, nth = blend.locate(np.arange(total))
    for s in range(3):
        assert nth[source == s].tolist() == list(range((source == s).sum()))
        assert limits[s] is None or (source == s).sum() <= limits[s]
    for index in range(0, total + 1, 50):
        assert blend.cursors(index) == np.bincount(source[:index], minlength=3).tolist()
    # In each phase, while all its sources last, every prefix has its shares to within one sample.
    for n, phase in enumerate(phases):
        stop = min([total, *[p.start for p in phases[n + 1 :]]])
        share = np.array(phase.weights) / sum(phase.weights)
        before = blend.cursors(phase.start) if phase.start <= total else None
        for index in range(phase.start + 1, stop + 1):
            now = np.array(blend.cursors(index))
            if any(limit is not None and count >= limit for limit, count in zip(limits, now, strict=True)):
                break
            assert np.abs(now - before - (index - phase.start) * share).max() < 1


def test_a_used_up_source_leaves_its_share_to_the_others():
    blend = Blend([Phase(0, (0.5, 0.3, 0.2))], [10, None, None])
    source, _ = blend.locate(np.arange(1020))
    spent = int(np.flatnonzero(source == 0)[-1]) + 1
    assert (source == 0).sum() == 10
    assert 18 <= spent <= 21
    assert abs(np.bincount(source[spent : spent + 1000])[1:] - [600, 400]).max() < 1


def test_the_end_of_all_sources():
    blend = Blend([Phase(0, (1.0, 1.0)), Phase(8, (1.0, 0.0))], [6, 50])
    assert blend.end == 10  # four of each, then two of the first; the second has no share any more
    assert blend.locate(np.arange(10))[0].tolist()[8:] == [0, 0]
    with pytest.raises(DataError, match="sample 10 is past the data: by sample 10 .* max_epochs"):
        blend.locate(np.array([10]))
    blend.check(9)
    with pytest.raises(DataError, match="train fewer steps"):
        blend.check(10)
    with pytest.raises(ConfigError, match="every source has weight 0 from sample 0"):
        Blend([Phase(0, (0.0,))], [None])


def test_what_was_drawn_before_the_mixture_began_it_cannot_tell():
    blend = Blend([Phase(0, (1.0, 1.0))], [None, None], 10, [5, 5])
    assert blend.locate(np.array([10]))[1].tolist() == [5]
    with pytest.raises(DataError, match="sample 9 was drawn before sample 10"):
        blend.locate(np.array([12, 9]))


@settings(max_examples=60, deadline=None)
@given(before=shares, after=shares, at=st.integers(0, 300), limits=st.just([None, 70, None]))
def test_a_changed_mixture_continues_every_source(before, after, at, limits):
    first = Blend([Phase(0, before)], limits)
    at = at if first.end is None else min(at, first.end)
    second = Blend([Phase(0, after)], limits, at, first.cursors(at))
    total = 500 if second.end is None else min(500, second.end)
    old, new = first.locate(np.arange(at)), second.locate(np.arange(at, total))
    source, nth = (np.concatenate(pair) for pair in zip(old, new, strict=True))
    for s in range(3):
        assert nth[source == s].tolist() == list(range((source == s).sum()))


@settings(max_examples=120, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 80), st.integers(1, 15)), max_size=8))
def test_skipped_ranges(ranges):
    ranges = [(start, start + length) for start, length in ranges]
    left_out = {index for start, stop in ranges for index in range(start, stop)}
    expected = [index for index in range(300) if index not in left_out][:100]
    skips = Skips(ranges)
    assert skips.index(np.arange(100)).tolist() == expected
    assert [skips.index_at(position) for position in range(0, 100, 9)] == expected[::9]
    assert Skips(reversed(ranges)).ranges == skips.ranges


def test_skipped_ranges_that_make_no_sense():
    for bad in ((5, 5), (-1, 3), (6, 2)):
        with pytest.raises(ConfigError, match="cannot be left out"):
            Skips([bad])


def test_a_change_comes_with_the_first_sample_that_has_all_tokens_before_it():
    assert [first_sample(tokens, 16) for tokens in (0, 1, 16, 17)] == [0, 1, 1, 2]
    assert Skips([(0, 5), (5, 9)]).ranges == ((0, 9),)


def test_row_lengths():
    lens = SeqLens(64, [(0, 16), (10, 32), (12, 64)])
    assert lens.at(np.array([0, 9, 10, 11, 12, 99])).tolist() == [16, 16, 32, 32, 64, 64]
    assert SeqLens(64).at(np.array([0, 5])).tolist() == [64, 64]


FROZEN_MIXTURE = [0, 1, 0, 2, 0, 1, 0, 0, 1, 0, 2, 0, 1, 0, 1, 0, 0, 2, 1, 0]
