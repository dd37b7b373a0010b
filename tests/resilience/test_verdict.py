"""Who is behind, from flight logs alone."""

from __future__ import annotations

from typing import Any

import pytest

from megalite.parallel.flight import AWAITED, UNDER_WAY, Entry
from megalite.resilience.verdict import RankState, judge

WORLD = (0, 1, 2)
DONE = 1.0


def entry(number: int, ended: float = DONE, ranks: tuple[int, ...] = WORLD, **fields: Any) -> Entry:
    """An all-reduce of 40 bytes, or what the fields say."""
    values = {"op": "all_reduce", "group": "world", "bytes": 40, "dtype": "float64", "shape": (5,), **fields}
    return Entry(number=number, ranks=ranks, begun=float(number), ended=ended, **values)


def state(rank: int, *entries: Entry, **fields: Any) -> RankState:
    """A rank in step 7."""
    values = {"host": "a", "step": 7, "stacks": {"MainThread": [f"f.py:{rank} in g"]}, **fields}
    return RankState(rank=rank, entries=entries, **values)


def test_who_has_begun_fewer_is_behind() -> None:
    verdict = judge([state(0, entry(4), entry(5, AWAITED)), state(1, entry(4)), state(2, entry(5, AWAITED))])
    assert verdict.culprits == (1,)
    assert verdict.text == (
        "rank 1 on a is behind, in step 7 at f.py:1 in g; ranks 0, 2 wait in all_reduce number 5 of group "
        "world (40 bytes, float64 [5])"
    )


def test_who_is_behind_because_it_waits_for_another_is_not_blamed() -> None:
    # 0 waits for 1 on one group, 1 for 2 on another; 2 has begun something that nobody else has, but waits
    # for nothing.
    verdict = judge(
        [
            state(0, entry(5, AWAITED, (0, 1), group="tp")),
            state(1, entry(4, DONE, (0, 1), group="tp"), entry(9, AWAITED, (1, 2), group="dp")),
            state(2, entry(8, DONE, (1, 2), group="dp"), entry(3, UNDER_WAY, (0, 2), group="pp")),
        ]
    )
    assert verdict.culprits == (2,)
    assert "rank 1 waits in all_reduce number 9 of group dp" in verdict.text


def test_a_message_that_was_not_sent() -> None:
    message: dict[str, Any] = {"ranks": (0, 1), "group": "pp"}
    verdict = judge(
        [state(0, entry(3, **message, op="send")), state(1, entry(4, AWAITED, **message, op="receive"))]
    )
    assert verdict.culprits == (0,)
    assert "rank 1 waits in receive number 4 of group pp (rank 0 → 1, 40 bytes" in verdict.text


def test_ranks_that_wait_for_one_another() -> None:
    crossed = [(entry(2, AWAITED, (0, 1), group="a"),), (entry(2, AWAITED, (1, 0), group="b"),)]
    verdict = judge([state(rank, *entries) for rank, entries in enumerate(crossed)])
    assert verdict.culprits == ()
    assert "no rank is behind: they wait for one another, or for the network; rank 0 waits in" in verdict.text


def test_a_rank_alone_is_where_its_threads_are() -> None:
    stacks = {
        "MainThread": ["/lib/threading.py:1 in wait", "loader.py:2 in _take"],
        "data": ["shards.py:3 in read"],
        "idle": ["/lib/threading.py:1 in wait"],
    }
    verdict = judge([state(0, stacks=stacks)])
    assert (
        verdict.text == "rank 0 on a is behind, in step 7 at loader.py:2 in _take and at shards.py:3 in read"
    )


@pytest.mark.parametrize("odd", [0, 1])
def test_of_two_that_differ_the_one_that_breaks_with_custom_is_named(odd: int) -> None:
    kinds = [40, 8, 16, 24] * 4  # bytes of four collectives, step after step
    usual = [entry(number, bytes=size, ranks=(0, 1)) for number, size in enumerate(kinds, 1)]
    states = [
        state(rank, *usual, entry(17, AWAITED, bytes=8 if rank == odd else 40, ranks=(0, 1)))
        for rank in (0, 1)
    ]
    verdict = judge(states)
    assert verdict.culprits == (odd,)
    assert f"rank {odd} began all_reduce of 8 bytes" in verdict.text


def test_on_cuda_what_was_begun_last_counts_as_awaited() -> None:
    verdict = judge(
        [state(0, entry(4), entry(5), is_host_bound=False), state(1, entry(4), is_host_bound=False)]
    )
    assert verdict.culprits == (1,)
    assert "rank 0 waits in all_reduce number 5" in verdict.text


def test_an_error_counts_before_silence_and_silence_before_place() -> None:
    silent, left = state(1, entry(5), silence="is gone"), state(2, error="DataError: x")
    assert judge([state(0, entry(5, AWAITED)), silent, left]).culprits == (2,)
    verdict = judge([state(0, entry(5, AWAITED)), silent, state(2, entry(4))])
    assert verdict.culprits == (1,)
    assert "rank 1 on a is gone (its last: all_reduce number 5 of group world" in verdict.text


def test_two_groups_of_the_same_ranks_are_counted_apart() -> None:
    pair: dict[str, Any] = {"ranks": (0, 1)}
    states = [
        state(0, entry(7, **pair, group="dp"), entry(2, AWAITED, **pair, group="shard", bytes=8)),
        state(1, entry(7, **pair, group="dp"), entry(1, **pair, group="shard", bytes=16)),
    ]
    verdict = judge(states)
    assert verdict.culprits == (1,)
    assert "rank 0 waits in all_reduce number 2 of group shard" in verdict.text
