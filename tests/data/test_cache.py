"""The shared cache: one process fills, nothing in use is removed, and no death leaves a broken file."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megalite.data.cache import POLL_S, CacheFullError, ShardCache
from megalite.errors import DataError

SIZE = 10_000


def filled(key: str, size: int = SIZE, calls: list[str] | None = None):
    """What fills the file `key`: its name over and over, in pieces."""

    def fill():
        if calls is not None:
            calls.append(key)
        data = (key.encode() * size)[:size]
        for start in range(0, size, 999):
            yield data[start : start + 999]

    return fill


def names(cache: ShardCache) -> list[str]:
    return sorted(name for name in os.listdir(cache.folder) if name != ".lock")


def test_a_file_is_filled_once(tmp_path):
    cache, calls = ShardCache(tmp_path / "c"), []
    for _ in range(3):
        mapped = cache.map("a", SIZE, filled("a", calls=calls))
        assert mapped[:] == b"a" * SIZE
    assert calls == ["a"]
    assert ShardCache(tmp_path / "c").map("a", SIZE, filled("a", calls=calls))[:3] == b"aaa"
    assert calls == ["a"]
    with pytest.raises(TypeError, match="readonly"):
        mapped[0] = 0
    cache.remove("a")
    cache.remove("a")
    assert mapped[:] == b"a" * SIZE
    assert names(cache) == []


def test_the_least_recently_used_goes_but_nothing_that_is_mapped(tmp_path):
    cache = ShardCache(tmp_path, max_bytes=3 * SIZE)
    held = cache.map("a", SIZE, filled("a"))
    for key in ("b", "c", "b", "d"):
        cache.map(key, SIZE, filled(key))
        time.sleep(0.01)
    assert names(cache) == ["a", "b", "d"]
    view = memoryview(held)
    del held
    cache.map("e", 2 * SIZE, filled("e", 2 * SIZE))
    assert names(cache) == ["a", "e"]
    assert view[:3] == b"aaa"
    with pytest.raises(
        CacheFullError, match="no room for 20001 bytes in the cache .*, limited to 30000 bytes"
    ):
        cache.map("f", 2 * SIZE + 1, filled("f"))
    view.release()
    del view
    assert len(cache.map("f", 2 * SIZE + 1, filled("f", 2 * SIZE + 1))) == 2 * SIZE + 1
    with pytest.raises(DataError, match="a shard of 30001 bytes does not fit into the cache"):
        cache.map("g", 3 * SIZE + 1, filled("g"))


@pytest.mark.parametrize("size", [SIZE - 1, SIZE + 1, 0])
def test_the_wrong_number_of_bytes_leaves_nothing(tmp_path, size):
    cache = ShardCache(tmp_path)
    with pytest.raises(DataError, match=f"a has .*bytes, not {SIZE}"):
        cache.map("a", SIZE, filled("a", size))
    assert names(cache) == []


def test_a_part_that_got_its_name_before_it_was_locked_is_left_alone(tmp_path, monkeypatch):
    """Else a finished file, which others may have mapped, would be filled again."""
    cache, flock, calls, others = ShardCache(tmp_path), fcntl.flock, [], [ShardCache(tmp_path)]

    def late(file: int, how: int) -> None:
        if how == fcntl.LOCK_EX | fcntl.LOCK_NB and others:
            others.pop().map("a", SIZE, filled("a", calls=calls))
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    assert cache.map("a", SIZE, filled("a", calls=calls))[:] == b"a" * SIZE
    assert calls == ["a"]
    assert names(cache) == ["a"]


def test_an_error_while_filling_leaves_nothing(tmp_path):
    def broken():
        yield b"a" * 100
        raise DataError("the line went dead")

    cache = ShardCache(tmp_path)
    with pytest.raises(DataError, match="the line went dead"):
        cache.map("a", SIZE, broken)
    assert names(cache) == []
    assert cache.map("a", SIZE, filled("a"))[:1] == b"a"


def test_a_finished_file_of_another_size_is_made_again(tmp_path):
    cache = ShardCache(tmp_path)
    (tmp_path / "a").write_bytes(b"short")
    assert cache.map("a", SIZE, filled("a"))[:] == b"a" * SIZE


def test_links_in_the_cache_are_not_followed(tmp_path):
    cache = ShardCache(tmp_path / "c")
    cache.map("b", SIZE, filled("b"))
    (tmp_path / "precious").write_bytes(bytes(SIZE))
    for name in ("a", "a.part"):
        (tmp_path / "c" / name).symlink_to(tmp_path / "precious")
        with pytest.raises(DataError, match=f"cannot .*{name}"):
            cache.map("a", SIZE, filled("a"))
        (tmp_path / "c" / name).unlink()
    assert (tmp_path / "precious").read_bytes() == bytes(SIZE)


def test_threads_that_ask_at_once_share_one_filling(tmp_path):
    cache, calls, seen = ShardCache(tmp_path), [], []

    def slow():
        calls.append(1)
        for _ in range(10):
            time.sleep(0.01)
            yield b"a" * (SIZE // 10)

    threads = [threading.Thread(target=lambda: seen.append(cache.map("a", SIZE, slow)[:])) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert calls == [1]
    assert seen == [b"a" * SIZE] * 5


FILL_SLOWLY = """
import sys, time
from megalite.data.cache import ShardCache
def fill():
    yield b"a" * 100
    print("filling", flush=True)
    time.sleep(60)
ShardCache(sys.argv[1]).map("a", 10_000, fill)
"""


@pytest.mark.parametrize("key", ["a", "b"])
def test_a_killed_filler_is_replaced(tmp_path, key):
    """By a process that waits for it, or for the bytes it had reserved, which are given back."""
    filler = subprocess.Popen(
        [sys.executable, "-c", FILL_SLOWLY, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert filler.stdout.readline() == "filling\n"
    cache, seen = ShardCache(tmp_path, max_bytes=SIZE), []
    waiting = threading.Thread(target=lambda: seen.append(cache.map(key, SIZE, filled(key))[:]))
    waiting.start()
    waiting.join(10 * POLL_S)
    assert not seen
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == SIZE
    filler.send_signal(signal.SIGKILL)
    filler.communicate()
    waiting.join(20)
    assert seen == [key.encode() * SIZE]
    del waiting
    assert cache.map("c", SIZE, filled("c"))[:1] == b"c"
    assert names(cache) == ["c"]


def test_room_is_waited_for_while_others_fill(tmp_path):
    """What they fill may go when it is finished; what is held may not, and that is an error at once."""
    cache, begun, go_on = ShardCache(tmp_path, max_bytes=2 * SIZE), threading.Event(), threading.Event()

    def slow():
        yield b"a" * (SIZE // 2)
        begun.set()
        assert go_on.wait(20)
        yield b"a" * (SIZE // 2)

    filling = threading.Thread(target=lambda: cache.map("a", SIZE, slow))
    filling.start()
    assert begun.wait(20)
    threading.Timer(5 * POLL_S, go_on.set).start()
    assert cache.map("b", 2 * SIZE, filled("b", 2 * SIZE))[:1] == b"b"
    filling.join(20)
    assert names(cache) == ["b"]
    held = cache.map("b", 2 * SIZE, filled("b", 2 * SIZE))
    with pytest.raises(CacheFullError, match="the rest is in use; raise MEGALITE_CACHE_GIB"):
        cache.map("a", SIZE, filled("a"))
    assert len(held) == 2 * SIZE


def test_its_size_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGALITE_CACHE_GIB", "0.5")
    assert ShardCache(tmp_path).max_bytes == 1 << 29
    assert ShardCache(tmp_path, max_bytes=7).max_bytes == 7
    for text in ("much", "0", "-1", "nan", "inf"):
        monkeypatch.setenv("MEGALITE_CACHE_GIB", text)
        with pytest.raises(DataError, match=f"MEGALITE_CACHE_GIB='{text}' is not a positive number of GiB"):
            ShardCache(tmp_path)


def visit(folder: str, seed: int, failures: multiprocessing.Queue[str]) -> None:
    """Map files in a random order out of a cache too small for all of them."""
    import random

    rng, cache = random.Random(seed), ShardCache(folder, max_bytes=9 * SIZE)
    held = []
    try:
        for _ in range(300):
            key = rng.choice("abcdefghijklmnop")
            mapped = cache.map(key, SIZE, filled(key))
            held = [*held[-1:], (key, mapped)]
            for name, data in held:
                if data[:] != name.encode() * SIZE:
                    failures.put(f"{name} is damaged")
    except BaseException as error:
        failures.put(repr(error))


def test_processes_share_a_cache_too_small_for_all(tmp_path):
    context = multiprocessing.get_context("fork")
    failures = context.Queue()
    processes = [context.Process(target=visit, args=(str(tmp_path), seed, failures)) for seed in range(3)]
    for process in processes:
        process.start()
    biggest = 0
    while any(process.is_alive() for process in processes):
        biggest = max(biggest, total_bytes(tmp_path))
        time.sleep(0.002)
    for process in processes:
        process.join()
    assert [failures.get() for _ in range(failures.qsize())] == []
    assert 4 * SIZE < biggest <= 9 * SIZE


def total_bytes(folder: Path) -> int:
    """What a cache holds while nobody makes room in it."""
    with open(folder / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        total = 0
        for path in folder.iterdir():
            try:
                total += path.stat().st_size
            except FileNotFoundError:  # its part has just got its name
                continue
        return total
