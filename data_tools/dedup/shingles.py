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
_SEVEN, _BYTE, _SEVEN_BYTES, _WORD_BITS = np.uint64(7), np.uint64(8), np.uint64(56), np.uint64(64)
_LOW_BYTE, _LOW_BITS = np.uint64(0xFF), np.uint64(0x7F7F7F7F7F7F7F7F)
_TOP_BITS = np.uint64(0x8080808080808080)
_PLACES = np.uint64(0x0001020304050607)  # times 2⁸ⁿ its highest byte is n
_OTHER = np.uint64(1 << 63)  # of a letter hashed by itself: some ASCII letters together are as large a number
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

    Memory:  16 bytes a word, and the longest row's bytes once more
    """
    limit = int(((ends - begins + 1) // 2).sum()) + 1  # a word of one byte has a neighbour that is none
    hashes = np.empty(limit, dtype=np.uint64)
    starts = np.empty(limit, dtype=np.int64)
    bounds = np.zeros(len(begins) + 1, dtype=np.int64)
    letters = np.empty(int((ends - begins).max(initial=0)) + 8, dtype=np.uint8)
    eights = np.ndarray(len(letters) - 7, np.uint64, letters, strides=(1,))  # the eight bytes from each on
    tables = _ascii_letters(), character_classes(), lower_case()
    total = _split(data, begins, ends, *tables, letters, eights, hashes, starts, bounds)
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
    letters: NDArray[np.uint8],
    eights: NDArray[np.uint64],
    hashes: NDArray[np.uint64],
    starts: NDArray[np.int64],
    bounds: NDArray[np.int64],
) -> int:
    """Fill the arrays; the number of words. `letters` has room for a row and eight bytes more, and `eights`
    are the eight bytes from each of them on, looked at at once.

    ASCII letters are gathered up to seven, below a one that marks how many, and hashed together.
    """
    count = 0
    for row in range(len(begins)):
        begin, size = begins[row], ends[row] - begins[row]
        for place in range(size):
            letters[place] = ascii_letters[data[begin + place]]
        letters[size : size + 8] = _DIVIDES
        # Places are uint64, for of others numba would look at the sign.
        at = first = _ZERO
        value, is_open = _WORD_SEED, False
        while at < np.uint64(size) or is_open:
            if not is_open:
                first = at
            eight = eights[at]  # the first in the lowest byte
            # The top bits of those that are something, and of the first divider; less one it is all before.
            taken = (((eight & _LOW_BITS) + _LOW_BITS) | eight) & _TOP_BITS
            divider = (taken ^ _TOP_BITS) & (_ZERO - (taken ^ _TOP_BITS))
            if eight & (divider - _ONE) & _TOP_BITS:
                place = begin + np.int64(first)
                value, width, is_word = _any_word(data, place, ends[row], ascii_letters, classes, lower)
                if is_word:
                    starts[count], hashes[count] = place, mixed(value)
                    count += 1
                at, value, is_open = first + np.uint64(width), _WORD_SEED, False
                continue
            held = _ZERO  # the first in the highest byte
            for byte in range(8):
                shift = np.uint64(8 * byte)
                held |= ((eight >> shift) & _LOW_BYTE) << (_SEVEN_BYTES - shift)
            number = _bytes_below(divider)
            if divider == _ZERO or number == _SEVEN:
                value, is_open = _absorbed(value, (held >> _BYTE) | (_ONE << _SEVEN_BYTES)), True
                at += _SEVEN
                continue
            if number != _ZERO:
                bits = number * _BYTE
                value, is_open = _absorbed(value, (held >> (_WORD_BITS - bits)) | (_ONE << bits)), True
            if is_open:
                starts[count], hashes[count] = begin + np.int64(first), mixed(value)
                count += 1
                value, is_open = _WORD_SEED, False
            follows = taken & (_ZERO - divider)
            at += _bytes_below(follows & (_ZERO - follows)) if follows else _BYTE
        bounds[row + 1] = count
    return count


@inlined
def _bytes_below(top_bit: np.uint64) -> np.uint64:
    """How many bytes lie below the one of which this is the top bit."""
    return ((top_bit >> _SEVEN) * _PLACES) >> _SEVEN_BYTES


@compiled
def _any_word(
    data: NDArray[np.uint8],
    at: int,
    end: int,
    ascii_letters: NDArray[np.uint8],
    classes: NDArray[np.uint8],
    lower: NDArray[np.uint32],
) -> tuple[np.uint64, int, bool]:
    """A word of any letters: its hash, not mixed yet, and its bytes; or those of a character that is none."""
    first, follows = at, WORD
    value, held = _WORD_SEED, _ONE
    if ascii_letters[data[at]] == _NOT_ASCII:
        point, width = code_point(data, at)
        kind = classes[point]
        if not kind & WORD:
            return value, width, False
        if kind & ALONE:
            follows = MARK
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
        value = _absorbed(value, np.uint64(lower[point]) | _OTHER)
        at += width
    if held != _ONE:
        value = _absorbed(value, held)
    return value, at - first, True


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
