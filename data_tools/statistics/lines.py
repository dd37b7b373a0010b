"""A document's lines and paragraphs as hashes and lengths."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.characters import SPACE, UPPER, character_classes, code_point
from data_tools.compiled import compiled
from data_tools.statistics.hashing import START, extended, finished, joined

TERMINAL = UPPER  # ends a sentence; in `line_classes`, where nothing asks for UPPER

# Bits of a line.
STARTS_WITH_BULLET = 1  # its first character that is no space is • or -
ENDS_WITH_ELLIPSIS = 2  # its last is …, or its last three are ...
ENDS_A_SENTENCE = 4  # its last is terminal punctuation

# Unicode's property Sentence_Terminal, in hexadecimal.
_SENTENCE_TERMINAL = """
21 2E 3F 589 61D-61F 6D4 700-702 7F9 837 839 83D-83E 964-965 104A-104B 1362 1367-1368 166E 1735-1736
17D4-17D5 1803 1809 1944-1945 1AA8-1AAB 1B4E-1B4F 1B5A-1B5B 1B5E-1B5F 1B7D-1B7F 1C3B-1C3C 1C7E-1C7F 2024
203C-203D 2047-2049 2CF9-2CFB 2E2E 2E3C 2E53-2E54 2E60-2E61 3002 A4FF A60E-A60F A6F3 A6F7 A876-A877
A8CE-A8CF A92F A9C8-A9C9 AA5D-AA5F AAF0-AAF1 ABEB FE12 FE15-FE16 FE52 FE56-FE57 FF01 FF0E FF1F FF61
10A56-10A57 10F55-10F59 10F86-10F89 11047-11048 110BE-110C1 11141-11143 111C5-111C6 111CD 111DE-111DF
11238-11239 1123B-1123C 112A9 113D4-113D5 1144B-1144C 115C2-115C3 115C9-115D7 11641-11642 1173C-1173E
11944 11946 11A42-11A43 11A9B-11A9C 11C41-11C42 11EF7-11EF8 11F43-11F44 16A6E-16A6F 16AF5 16B37-16B38
16B44 16D6E-16D6F 16E98 1BC9F 1DA88
"""

_NEWLINE, _DOT, _HYPHEN, _BULLET, _ELLIPSIS = 0x0A, 0x2E, 0x2D, 0x2022, 0x2026


class Lines(NamedTuple):
    """The lines of a document that are not blank, and its paragraphs.

    Shapes:  hashes uint64 [lines]; chars int64 [lines]; bits uint8 [lines];
             paragraphs uint64 [paragraphs]; paragraph_chars int64 [paragraphs]
    """

    hashes: NDArray[np.uint64]
    chars: NDArray[np.int64]
    bits: NDArray[np.uint8]
    paragraphs: NDArray[np.uint64]
    paragraph_chars: NDArray[np.int64]
    text_chars: int
    newlines: int


@cache
def line_classes() -> NDArray[np.uint8]:
    """`character_classes` with TERMINAL in place of UPPER, uint8 [0x110000]."""
    table = character_classes() & np.uint8(0xFF ^ UPPER)
    for item in _SENTENCE_TERMINAL.split():
        first, _, last = item.partition("-")
        table[int(first, 16) : int(last or first, 16) + 1] |= TERMINAL
    table.setflags(write=False)
    return table


@compiled
def last_code_point(data: NDArray[np.uint8], stop: int) -> tuple[int, int]:
    """The code point that ends before a byte, and how many bytes it takes."""
    at = stop - 1
    while data[at] & 0xC0 == 0x80:
        at -= 1
    return code_point(data, at)


@compiled
def stripped(data: NDArray[np.uint8], start: int, stop: int, classes: NDArray[np.uint8]) -> tuple[int, int]:
    """Where the text of `data[start:stop]` starts and stops, white space at its ends aside."""
    while start < stop:
        code, width = code_point(data, start)
        if not classes[code] & SPACE:
            break
        start += width
    while stop > start:
        code, width = last_code_point(data, stop)
        if not classes[code] & SPACE:
            break
        stop -= width
    return start, stop


@compiled
def split_lines(data: NDArray[np.uint8], start: int, stop: int, classes: NDArray[np.uint8]) -> Lines:
    """The lines and paragraphs of `data[start:stop]`; `classes` are `line_classes()`."""
    most = (stop - start) // 2 + 1  # a line takes two bytes with its end
    hashes, chars, bits = np.empty(most, np.uint64), np.empty(most, np.int64), np.empty(most, np.uint8)
    paragraphs, paragraph_chars = np.empty(most, np.uint64), np.empty(most, np.int64)
    num_lines = num_paragraphs = text_chars = newlines = 0
    paragraph, size = START, 0
    at = start
    while at < stop:
        begin, line, length = at, START, 0
        while at < stop and data[at] != _NEWLINE:
            line = extended(line, np.uint64(data[at]))
            length += data[at] & 0xC0 != 0x80
            at += 1
        text, end = stripped(data, begin, at, classes)
        if text < end:
            hashes[num_lines], chars[num_lines] = finished(line), length
            bits[num_lines] = _line_bits(data, text, end, classes)
            paragraph = joined(paragraph, hashes[num_lines])
            size += length + (1 if size else 0)
            num_lines += 1
        text_chars += length
        if at < stop:
            text_chars, newlines, at = text_chars + 1, newlines + 1, at + 1
        if size and (text == end or at == stop):
            paragraphs[num_paragraphs], paragraph_chars[num_paragraphs] = paragraph, size
            num_paragraphs += 1
            paragraph, size = START, 0
    return Lines(
        hashes[:num_lines],
        chars[:num_lines],
        bits[:num_lines],
        paragraphs[:num_paragraphs],
        paragraph_chars[:num_paragraphs],
        text_chars,
        newlines,
    )


@compiled
def _line_bits(data: NDArray[np.uint8], start: int, stop: int, classes: NDArray[np.uint8]) -> int:
    first, _ = code_point(data, start)
    last, _ = last_code_point(data, stop)
    dots = 0
    while dots < 3 and stop - dots > start and data[stop - dots - 1] == _DOT:
        dots += 1
    bits = STARTS_WITH_BULLET if first in (_HYPHEN, _BULLET) else 0
    bits |= ENDS_WITH_ELLIPSIS if last == _ELLIPSIS or dots == 3 else 0
    return bits | (ENDS_A_SENTENCE if classes[last] & TERMINAL else 0)
