"""Words, shingles and MinHash against plain Python, and recall against the theory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_tools.dedup.minhash import _permutations, band_hashes, chance_of_meeting
from data_tools.dedup.shingles import split_words, windows
from tests.data_tools.plain_words import words_of

NASTY = st.text(st.sampled_from("aB1_é İß  \t\r\n\0\u2028\u0301\u0e01\u0e48漢字カ😀.-'Ωабв"), max_size=40)


def split(rows: list[str]) -> tuple[list[list[int]], list[list[int]]]:
    """Word hashes and first bytes of each row."""
    encoded = [row.encode() for row in rows]
    ends = np.cumsum([len(row) for row in encoded])
    data = np.frombuffer(b"".join(encoded) + b" ", dtype=np.uint8)
    words = split_words(data, np.concatenate([[0], ends[:-1]]), ends)
    bounds = list(zip(words.bounds, words.bounds[1:], strict=False))
    return (
        [words.hashes[first:last].tolist() for first, last in bounds],
        [words.starts[first:last].tolist() for first, last in bounds],
    )


@settings(deadline=None)
@given(st.lists(NASTY | st.text(max_size=30), min_size=1, max_size=4))
@example(["", " ", "漢字かな\u0301x", "abcdefgh abcdefg ABCDEFGH", "e\u0301te ETE\u0301", "naïve", "a" * 70])
@example(["a š", "ča čš 1 ı", "10 \U00013130"])  # where a letter's number is that of ASCII ones below a one
def test_words_are_those_of_plain_python(rows: list[str]) -> None:
    hashes, starts = split(rows)
    names: dict[int, str] = {}
    base = 0
    for row, found, at in zip(rows, hashes, starts, strict=True):
        expected = words_of(row)
        assert at == [base + len(row[:index].encode()) for _, index in expected]
        for value, (word, _) in zip(found, expected, strict=True):
            assert names.setdefault(value, word) == word  # one hash, one word
        base += len(row.encode())
    assert len(names) == len({word for row in rows for word, _ in words_of(row)})  # and the other way


def plain_hash(word: str) -> int:
    """ASCII letters up to seven at a time below a one, every other character alone with the highest bit."""
    pieces: list[int] = []
    held = 1
    for letter in [*word.lower(), ""]:
        if letter.isascii() and letter:
            held = held << 8 | ord(letter)
        if held > 1 and (not letter or not letter.isascii() or held >> 56):
            pieces.append(held)
            held = 1
        if not letter.isascii():
            pieces.append(ord(letter) | 1 << 63)
    value = 0x9E3779B97F4A7C15
    for piece in pieces:
        value = (value ^ piece) * 0xD6E8FEB86659FD93 % 2**64
        value ^= value >> 32
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)


def test_hashes_are_the_same_wherever_a_word_lies_among_the_eight_bytes_looked_at() -> None:
    letters = "Abc_9xyZ01mnopqRstuvwK7"
    ascii_words = [letters[:length] for length in range(1, len(letters) + 1)]
    words = ascii_words + [word[:at] + "é" + word[at:] for word in ascii_words for at in range(len(word) + 1)]
    for before in range(9):
        for divider in (" ", "\n\n", " — ", ".", "\0" * 9):
            row = " " * before + divider.join(words)
            hashes, starts = split([row, "next", row.replace(divider, divider * 3), ""])
            assert hashes == [[plain_hash(word) for word in words], [plain_hash("next")], hashes[0], []]
            assert starts[0][0] == before
    assert split(words)[0] == [[plain_hash(word)] for word in words]  # none goes on in the next row


@pytest.mark.parametrize("short", [True, False])
def test_windows_of_equal_words_have_equal_hashes_and_no_others(short: bool) -> None:
    draw = np.random.default_rng(1)
    words = draw.integers(0, 3, 400).astype(np.uint64) + np.uint64(7)
    bounds = np.array([0, 0, 3, 4, 9, 200, 400])
    for size, base in ((1, 0), (5, 0), (5, 1), (50, 0)):
        hashes, found = windows(words, bounds, size, base, short=short)
        names: dict[int, tuple[int, ...]] = {}
        for row in range(len(bounds) - 1):
            some = words[bounds[row] : bounds[row + 1]].tolist()
            expected = [tuple(some[at : at + size]) for at in range(len(some) - size + 1)]
            if short and some and not expected:
                expected = [tuple(some)]
            mine = hashes[found[row] : found[row + 1]].tolist()
            for value, window in zip(mine, expected, strict=True):
                assert names.setdefault(value, window) == window
        assert len(set(names.values())) == len(names)


def test_the_two_bases_give_different_hashes() -> None:
    words = np.arange(9, dtype=np.uint64)
    bounds = np.array([0, 9])
    assert not set(windows(words, bounds, 4, 0)[0].tolist()) & set(windows(words, bounds, 4, 1)[0].tolist())


def test_bands_are_equal_where_the_least_of_every_hash_is() -> None:
    factors, terms = _permutations(6, 3)
    draw = np.random.default_rng(2)
    sets = [draw.integers(0, 2**64, size, dtype=np.uint64) for size in (1, 2, 3, 4, 5, 9, 30)]
    sets += [np.concatenate([some, some[::-1]]) for some in sets]  # order and repeats do not matter
    ends = np.cumsum([len(some) for some in sets])
    bands = band_hashes(np.concatenate(sets), ends - [len(some) for some in sets], ends, 3, 2, 3)
    least = [
        [
            min((int(factor) * (int(value) >> 32) + int(term)) % 2**32 for value in some)
            for factor, term in zip(factors, terms, strict=True)
        ]
        for some in sets
    ]
    for one in range(len(sets)):
        for other in range(len(sets)):
            for band in range(3):
                same = least[one][2 * band : 2 * band + 2] == least[other][2 * band : 2 * band + 2]
                assert (bands[one, band] == bands[other, band]) == same
    assert not set(bands[:, 0].tolist()) & set(bands[:, 1].tolist())  # a band of one number is no other's


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.8, 0.9])
def test_pairs_meet_as_often_as_the_theory_says(similarity: float) -> None:
    draw = np.random.default_rng(5)
    pairs, size = 3000, 120
    common = round(2 * size * similarity / (1 + similarity))
    one, other = draw.integers(0, 2**64, (2, pairs, size), dtype=np.uint64)
    other[:, :common] = one[:, :common]
    begins = np.arange(0, pairs * size, size)
    first = band_hashes(one.ravel(), begins, begins + size, 14, 8, 0)
    second = band_hashes(other.ravel(), begins, begins + size, 14, 8, 0)
    found = float((first == second).any(axis=1).mean())
    expected = chance_of_meeting(common / (2 * size - common), 14, 8)
    assert abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / pairs) + 0.003
