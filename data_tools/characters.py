"""What every Unicode character is, as one table for compiled loops over UTF-8.

Classes follow this Python's `unicodedata`, whose version is part of what a step remembers of its settings.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from functools import cache

import numpy as np
from numpy.typing import NDArray

from data_tools.compiled import inlined

UNICODE_VERSION = unicodedata.unidata_version

LETTER = 1  # category L*
NUMBER = 2  # category N*
MARK = 4  # category M*: accents that follow their letter
SPACE = 8  # what str.isspace says
WORD = 16  # what makes up words: letters, numbers, marks and "_"
ALONE = 32  # scripts written without spaces: each character is a word by itself
PUNCTUATION = 64  # category P*
UPPER = 128  # has another lower case

# Scripts whose words no space divides: Thai, Lao, Burmese, Khmer, kana, bopomofo, ideographs.
_UNSPACED = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x2E80, 0x2FDF),
    (0x3005, 0x3007),
    (0x3021, 0x3029),
    (0x3031, 0x312F),
    (0x31A0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xA9E0, 0xAA7F),
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9F),
    (0x1B000, 0x1B16F),
    (0x20000, 0x3FFFF),
)


_BLOCK = 1024
_ESCAPE = len(repr(chr(sys.maxunicode)).strip("'"))  # how Python writes a character that does not print


@cache
def character_classes() -> NDArray[np.uint8]:
    """The classes of every code point as a sum of the constants above, uint8 [0x110000]."""
    codes = np.arange(sys.maxunicode + 1, dtype="<u4")
    every = codes.tobytes().decode("utf-32-le", "surrogatepass")
    blocks = (every[at : at + _BLOCK] for at in range(0, len(every), _BLOCK))
    categories = np.frombuffer("".join(map(_categories, blocks)).encode(), dtype=np.uint8)
    bits = np.zeros(128, dtype=np.uint8)
    for major, is_of in (("L", LETTER | WORD), ("N", NUMBER | WORD), ("M", MARK | WORD), ("P", PUNCTUATION)):
        bits[ord(major)] = is_of
    table = bits[categories[::2]]
    table[[match.start() for match in re.finditer(r"\s", every)]] |= SPACE
    letters = np.flatnonzero(table & LETTER).tolist()
    table[[code for code in letters if every[code].lower() != every[code]]] |= UPPER
    table[ord("_")] |= WORD
    for first, last in _UNSPACED:
        here = table[first : last + 1]
        here[(here & (LETTER | NUMBER)) != 0] |= ALONE
    table.setflags(write=False)
    return table


def _categories(block: str) -> str:
    """The categories end to end. Five blocks in six have only what does not print, and are not looked up.

    None of it is a letter, number, mark or punctuation: it counts as unassigned.
    """
    if len(repr(block)) == len(block) * _ESCAPE + 2:
        return "Cn" * len(block)
    return "".join(map(unicodedata.category, block))


@cache
def lower_case() -> NDArray[np.uint32]:
    """The lower case of every code point where that is one character, else itself, uint32 [0x110000]."""
    table = np.arange(sys.maxunicode + 1, dtype=np.uint32)
    for code in np.flatnonzero(character_classes() & UPPER).tolist():
        lower = chr(code).lower()
        if len(lower) == 1:
            table[code] = ord(lower)
    table.setflags(write=False)
    return table


@inlined
def code_point(data: NDArray[np.uint8], at: int) -> tuple[int, int]:
    """For compiled loops: the code point at a byte of valid UTF-8, and how many bytes it takes."""
    first = int(data[at])
    if first < 0x80:
        return first, 1
    if first < 0xE0:
        return ((first & 0x1F) << 6) | (int(data[at + 1]) & 0x3F), 2
    if first < 0xF0:
        middle = (int(data[at + 1]) & 0x3F) << 6
        return ((first & 0x0F) << 12) | middle | (int(data[at + 2]) & 0x3F), 3
    high = ((first & 0x07) << 18) | ((int(data[at + 1]) & 0x3F) << 12)
    return high | ((int(data[at + 2]) & 0x3F) << 6) | (int(data[at + 3]) & 0x3F), 4
