"""Paragraphs and lines of texts, and 128-bit hashes of what is in them.

Lines end at "\\n" alone. What is compared of a line or paragraph is without the spaces at its ends, such as a
"\\r"; what is cut is the whole line with its end, or the paragraph with the blank lines that follow.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.characters import SPACE, character_classes, code_point, lower_case
from data_tools.compiled import compiled
from data_tools.dedup.shingles import mixed
from data_tools.documents import Texts

_NEWLINE = 10
_SPACE_BEFORE = np.uint64(1 << 32)
_SEEDS = np.uint64(0x243F6A8885A308D3), np.uint64(0x13198A2E03707344)
_FACTORS = np.uint64(0xD6E8FEB86659FD93), np.uint64(0xA0761D6478BD642F)


class Units(NamedTuple):
    """Units of some rows: those of row i are [bounds[i], bounds[i + 1]).

    Of each a row of `spans`: its first byte and its end; the first byte, the end, and the characters of what
    is compared of it.

    Shapes:  spans int64 [units, 5]; bounds int64 [rows + 1]
    """

    spans: NDArray[np.int64]
    bounds: NDArray[np.int64]

    @property
    def chars(self) -> NDArray[np.int64]:
        """Characters of each unit that are compared, int64 [units]; not known of documents."""
        return self.spans[:, 4]


def document_units(text: Texts) -> Units:
    """Every row as one unit."""
    first, end = text.offsets[:-1], text.offsets[1:]
    return Units(np.stack([first, end, first, end, end - first], axis=1), np.arange(len(text.offsets)))


def split_units(text: Texts, *, paragraphs: bool) -> Units:
    """The lines that are not blank, or the paragraphs: such lines in a row."""
    rows = len(text.offsets) - 1
    used = text.data[text.offsets[0] : text.offsets[-1]]
    spans = np.empty((int(np.count_nonzero(used == _NEWLINE)) + rows, 5), dtype=np.int64)
    bounds = np.zeros(rows + 1, dtype=np.int64)
    total = _split(text.data, text.offsets, character_classes(), paragraphs, spans, bounds)
    return Units(spans[:total], bounds)


def hash_units(data: NDArray[np.uint8], units: Units, *, normalise: bool) -> NDArray[np.uint64]:
    """A 128-bit hash of each unit as two halves, uint64 [units, 2].

    With `normalise`, of its lower case with runs of spaces as one, and none at the ends.
    """
    out = np.empty((len(units.spans), 2), dtype=np.uint64)
    _hash(data, units.spans, normalise, character_classes(), lower_case(), out)
    return out


@compiled
def _split(
    data: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    classes: NDArray[np.uint8],
    paragraphs: bool,
    spans: NDArray[np.int64],
    bounds: NDArray[np.int64],
) -> int:
    """Fill the arrays; the number of units."""
    count = 0
    for row in range(len(offsets) - 1):
        at, end = offsets[row], offsets[row + 1]
        points = first_point = 0
        is_open = False
        while at < end:
            begin, first, last, last_point = at, -1, at, points
            while at < end:
                point, width = code_point(data, at)
                at += width
                points += 1
                if point == _NEWLINE:
                    break
                if not classes[point] & SPACE:
                    if first < 0:
                        first = at - width
                        if not is_open:
                            first_point = points - 1
                    last, last_point = at, points
            if first >= 0 and not is_open:
                spans[count, 0], spans[count, 2] = begin, first
                count += 1
            if first >= 0:
                spans[count - 1, 1], spans[count - 1, 3] = at, last
                spans[count - 1, 4] = last_point - first_point
                is_open = paragraphs
            elif paragraphs:
                if count > bounds[row]:
                    spans[count - 1, 1] = at
                is_open = False
        bounds[row + 1] = count
    return count


@compiled
def _hash(
    data: NDArray[np.uint8],
    spans: NDArray[np.int64],
    normalise: bool,
    classes: NDArray[np.uint8],
    lower: NDArray[np.uint32],
    out: NDArray[np.uint64],
) -> None:
    for unit in range(len(spans)):
        at, end = spans[unit, 2], spans[unit, 3]
        first, second = _SEEDS
        # It tells apart texts of which one only has zeros at its end, as the last eight bytes are filled up.
        length = 0 if normalise else end - at
        is_space = False
        while at < end:
            if normalise:
                point, width = code_point(data, at)
                at += width
                if classes[point] & SPACE:
                    is_space = length > 0
                    continue
                letters = np.uint64(lower[point]) | (_SPACE_BEFORE if is_space else np.uint64(0))
                is_space = False
                length += 1
            else:
                letters = np.uint64(0)
                if at + 8 <= end:
                    for byte in range(8):
                        letters |= np.uint64(data[at + byte]) << np.uint64(8 * byte)
                    at += 8
                else:
                    for byte in range(end - at):
                        letters |= np.uint64(data[at + byte]) << np.uint64(8 * byte)
                    at = end
            first = (first ^ letters) * _FACTORS[0]
            first ^= first >> np.uint64(32)
            second = (second ^ letters) * _FACTORS[1]
            second ^= second >> np.uint64(29)
        out[unit, 0] = mixed(first ^ np.uint64(length))
        out[unit, 1] = mixed(second + np.uint64(length))
