"""Words of a text as 64-bit hashes, and hashes of n words in a row, which all comparison here is made of.

The splitter is named "words": a word is a run of letters, numbers, marks and "_" in lower case; in scripts
written without spaces every character is a word, with the marks that follow it. All else only divides words.
Two different words have equal hashes with probability 2⁻⁶⁴, unless they were made to collide.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.characters import ALONE, MARK, WORD, character_classes, code_point, lower_case
from data_tools.compiled import compiled, inlined
from data_tools.documents import Texts

SPLITTER = "words"

_WORD_SEED = np.uint64(0x9E3779B97F4A7C15)
_WORD_FACTOR = np.uint64(0xD6E8FEB86659FD93)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_ZERO, _ONE = np.uint64(0), np.uint64(1)
_BYTE, _SEVEN_BYTES = np.uint64(8), np.uint64(56)
_DIVIDES, _NOT_ASCII = 0, 255  # of a byte in place of a letter
# Odd, and of both signs in their low bits, so that differences do not die out at the low end of a sum.
BASES = (np.uint64(0x8CB92BA72F3D8DD7), np.uint64(0xA24BAED4963EE407))


class Words(NamedTuple):
    """The words of some rows: those of row i are [bounds[i], bounds[i + 1]).

    Shapes:  hashes uint64 [words]; starts int64 [words], first bytes in the data; bounds int64 [rows + 1]
    """

    hashes: NDArray[np.uint64]
    starts: NDArray[np.int64]
    bounds: NDArray[np.int64]


def split_words(data: NDArray[np.uint8], begins: NDArray[np.int64], ends: NDArray[np.int64]) -> Words:
    """Split rows of valid UTF-8, the bytes [begins[i], ends[i]) of the data.

    Memory:  16 bytes a word
    """
    limit = int(((ends - begins + 1) // 2).sum()) + 1  # a word of one byte has a neighbour that is none
    hashes = np.empty(limit, dtype=np.uint64)
    starts = np.empty(limit, dtype=np.int64)
    bounds = np.zeros(len(begins) + 1, dtype=np.int64)
    tables = _ascii_letters(), character_classes(), lower_case()
    total = _split(data, begins, ends, *tables, hashes, starts, bounds)
    return Words(hashes[:total], starts[:total], bounds)


def split_rows(text: Texts, rows: NDArray[np.int64]) -> Words:
    """Split these rows of a column."""
    return split_words(text.data, text.offsets[rows], text.offsets[rows + 1])


def windows(
    words: NDArray[np.uint64], bounds: NDArray[np.int64], size: int, base: int = 0, *, short: bool = False
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Hashes of every `size` words in a row, and their bounds by row; `base` 0 or 1 names one of two hashes.

    With `short`, a row of fewer words (but one) has one window of them all; else it has none.
    """
    counts = np.diff(bounds)
    numbers = np.maximum(counts - size + 1, 0)
    if short:
        numbers[(counts > 0) & (counts < size)] = 1
    window_bounds = np.zeros(len(bounds), dtype=np.int64)
    np.cumsum(numbers, out=window_bounds[1:])
    out = np.empty(int(window_bounds[-1]), dtype=np.uint64)
    _roll(words, bounds, window_bounds, size, BASES[base], out)
    return out, window_bounds


@cache
def _ascii_letters() -> NDArray[np.uint8]:
    """For every byte the lower case of the ASCII letter of a word it is, or what else it is, uint8 [256]."""
    table = np.full(256, _NOT_ASCII, dtype=np.uint8)
    is_word = (character_classes()[:128] & WORD) != 0
    table[:128] = np.where(is_word, lower_case()[:128], _DIVIDES)
    table.setflags(write=False)
    return table


@inlined
def mixed(value: np.uint64) -> np.uint64:
    """For compiled loops: spread every bit over all bits (splitmix64's finalizer)."""
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    return value ^ (value >> np.uint64(31))


@compiled
def _split(
    data: NDArray[np.uint8],
    begins: NDArray[np.int64],
    ends: NDArray[np.int64],
    ascii_letters: NDArray[np.uint8],
    classes: NDArray[np.uint8],
    lower: NDArray[np.uint32],
    hashes: NDArray[np.uint64],
    starts: NDArray[np.int64],
    bounds: NDArray[np.int64],
) -> int:
    """Fill the arrays; the number of words.

    ASCII letters are gathered up to seven in `held`, below a one that marks how many, and hashed together.
    """
    count = 0
    for row in range(len(begins)):
        at, end = begins[row], ends[row]
        while at < end:
            letter = ascii_letters[data[at]]
            if letter == _DIVIDES:
                at += 1
                continue
            follows = WORD
            if letter == _NOT_ASCII:
                point, width = code_point(data, at)
                kind = classes[point]
                if not kind & WORD:
                    at += width
                    continue
                if kind & ALONE:
                    follows = MARK
            starts[count] = at
            value, held = _WORD_SEED, _ONE
            first = at
            while at < end:
                letter = ascii_letters[data[at]]
                if letter < _NOT_ASCII:
                    if letter == _DIVIDES or follows == MARK:
                        break
                    held = (held << _BYTE) | np.uint64(letter)
                    at += 1
                    if held >> _SEVEN_BYTES:
                        value, held = _absorbed(value, held), _ONE
                    continue
                point, width = code_point(data, at)
                kind = classes[point]
                if at > first and (not kind & follows or kind & ALONE):
                    break
                if held != _ONE:
                    value, held = _absorbed(value, held), _ONE
                value = _absorbed(value, np.uint64(lower[point]))
                at += width
            if held != _ONE:
                value = _absorbed(value, held)
            hashes[count] = mixed(value)
            count += 1
        bounds[row + 1] = count
    return count


@inlined
def _absorbed(value: np.uint64, letters: np.uint64) -> np.uint64:
    value = (value ^ letters) * _WORD_FACTOR
    return value ^ (value >> np.uint64(32))


@compiled
def _roll(
    words: NDArray[np.uint64],
    bounds: NDArray[np.int64],
    window_bounds: NDArray[np.int64],
    size: int,
    base: np.uint64,
    out: NDArray[np.uint64],
) -> None:
    """The hash of a window is Σ wordᵢ baseⁿ⁻¹⁻ⁱ mod 2⁶⁴, mixed."""
    power = _ONE
    for _ in range(size):
        power *= base
    for row in range(len(bounds) - 1):
        first, last = bounds[row], bounds[row + 1]
        at, stop = window_bounds[row], window_bounds[row + 1]
        if at == stop:
            continue
        value = _ZERO
        filled = min(first + size, last)
        for word in range(first, filled):
            value = value * base + words[word]
        out[at] = mixed(value)
        for word in range(filled, last):
            value = value * base + words[word] - words[word - size] * power
            at += 1
            out[at] = mixed(value)
