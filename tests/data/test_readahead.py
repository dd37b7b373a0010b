"""Reading ahead is bounded, ends when told, and brings errors in their place."""

from __future__ import annotations

import itertools
import threading
import time

import pytest

from megalite.data.readahead import ReadAhead


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_items_come_in_order(ahead):
    with ReadAhead(iter(range(5)), ahead) as items:
        assert list(items) == list(range(5))


def settle(value, expected):
    """A value that others change becomes what it should, and stays so."""
    deadline = time.monotonic() + 5
    while value() < expected and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert value() == expected


def test_reading_ahead_is_bounded_and_stops():
    before = threading.active_count()
    taken = []
    items = ReadAhead((taken.append(n) or n for n in itertools.count()), 3)
    settle(lambda: len(taken), 1)  # the first, and no more before it is asked for
    assert next(items) == 0
    settle(lambda: len(taken), 4)
    next(items)
    items.close()
    items.close()
    assert threading.active_count() == before
    assert len(taken) <= 5


@pytest.mark.parametrize("ahead", [0, 4])
def test_an_error_arrives_after_the_items_before_it(ahead):
    def breaks():
        yield from (1, 2)
        raise ValueError("block 7")

    with ReadAhead(breaks(), ahead) as items:
        assert [next(items), next(items)] == [1, 2]
        for _ in range(2):
            with pytest.raises(ValueError, match="block 7"):
                next(items)


def test_closing_wakes_a_waiting_consumer():
    release = threading.Event()
    items = ReadAhead((release.wait(10) for _ in range(3)), 1)
    ended = []
    consumer = threading.Thread(target=lambda: ended.append(next(items, "end")))
    consumer.start()
    closer = threading.Thread(target=items.close)
    closer.start()
    consumer.join(5)
    assert ended == ["end"]
    release.set()
    closer.join(5)
    assert not closer.is_alive()
