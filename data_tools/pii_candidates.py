"""Where personal data might stand: a compiled scan over the bytes, for `pii_kinds` to judge what it finds.

It stops at few bytes (digits, "@", and letters of keys' prefixes) and looks a bounded way around each, so its
time is linear in the text whatever the text. It finds more than is masked, and misses nothing that is.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.compiled import compiled

# What a candidate might be.
ADDRESS, NUMBER, HEXADECIMAL, TOKEN, VALUE = 0, 1, 2, 3, 4

DIGIT, WORD, LOCAL, DOMAIN, KEY, BETWEEN, COLON_HEX, TRIGGER = 1, 2, 4, 8, 16, 32, 64, 128

MAX_LOCAL, MAX_DOMAIN = 64, 253  # RFC 5321, section 4.5.3.1
MIN_TOKEN, MAX_TOKEN = 15, 4096
MIN_VALUE, MAX_VALUE = 20, 256
MAX_IBAN, MAX_HEXADECIMAL = 44, 46
MIN_NUMBER_DIGITS = 7
DASH, DOT, COLON, AT = 0x2D, 0x2E, 0x3A, 0x40


class Candidates(NamedTuple):
    """Spans to look at, in the order of what gave them away.

    Shapes:  row, start, end, what int64 [candidates]; start and end in the batch's bytes
    """

    row: NDArray[np.int64]
    start: NDArray[np.int64]
    end: NDArray[np.int64]
    what: NDArray[np.int64]


def candidates(data: NDArray[np.uint8], offsets: NDArray[np.int64]) -> Candidates:
    """Everything in a batch of texts that might be personal data."""
    size = 1024
    while True:
        found = np.empty((4, size), dtype=np.int64)
        count = _candidates(data, offsets, _characters(), found)
        if count <= size:
            return Candidates(*found[:, :count])
        size = count


@cache
def _characters() -> NDArray[np.uint8]:
    """The classes above of each byte, uint8 [256]."""
    table = np.zeros(256, dtype=np.uint8)
    digits, letters = b"0123456789", bytes([*range(0x41, 0x5B), *range(0x61, 0x7B)])
    for bit, members in (
        (DIGIT, digits),
        (WORD, digits + letters + b"_"),
        (LOCAL, digits + letters + b"._%+'-"),
        (DOMAIN, digits + letters + b".-"),
        (KEY, digits + letters + b"_.-/+="),
        (BETWEEN, b" .()/-+"),
        (COLON_HEX, digits + b"abcdefABCDEF:."),
        (TRIGGER, digits + b"@JKSz_-"),
    ):
        table[list(members)] |= bit
    return table


ANY = 0x3F


def _prefix_table() -> NDArray[np.int64]:
    """How keys begin: place of the sign, length, and bytes, int64 [prefixes, 2 + 11]; "?" is any byte."""
    signs = ((b"-", b"sk- xox?- glpat-"), (b"_", b"gh?_ npm_ ?k_ hf_ github_pat_"), (b"J", b"eyJ"))
    prefixes = [
        (some.split(), sign) for sign, some in (*signs, (b"K", b"AKIA"), (b"S", b"ASIA"), (b"z", b"AIza"))
    ]
    rows = [(one.index(sign), one) for some, sign in prefixes for one in some] + [(0, b"-----BEGIN ")]
    return np.array([[place, len(one), *one.ljust(11, b"\0")] for place, one in rows], dtype=np.int64)


_PREFIXES = _prefix_table()


@compiled
def _run(data: NDArray[np.uint8], at: int, end: int, chars: NDArray[np.uint8], bits: int) -> int:
    """Where the run of a class that goes on at a place ends."""
    while at < end and chars[data[at]] & bits:
        at += 1
    return at


@compiled
def _back(data: NDArray[np.uint8], at: int, start: int, chars: NDArray[np.uint8], bits: int) -> int:
    """Where the run of a class that ends before a place starts."""
    while at > start and chars[data[at - 1]] & bits:
        at -= 1
    return at


@compiled
def _token_start(data: NDArray[np.uint8], at: int, start: int, end: int) -> int:
    """Where the key begins whose prefix has this byte as its sign, −1 for none."""
    for number in range(_PREFIXES.shape[0]):
        prefix = _PREFIXES[number]
        first, size = at - prefix[0], prefix[1]
        if first >= start and first + size <= end and data[at] == prefix[2 + prefix[0]]:
            same = 0
            while same < size and (prefix[2 + same] == ANY or prefix[2 + same] == data[first + same]):
                same += 1
            if same == size:
                return int(first)
    return -1


@compiled
def _phrase(data: NDArray[np.uint8], at: int, end: int, chars: NDArray[np.uint8]) -> tuple[int, int, int]:
    """Digits with at most two separators between them: where they end, how many, and how many dots."""
    digits = dots = apart = 0
    last = at
    while at < end and apart <= 2:
        bits = chars[data[at]]
        if bits & DIGIT:
            digits += 1
            apart = 0
            last = at + 1
        elif bits & BETWEEN:
            apart += 1
            dots += data[at] == DOT
        else:
            break
        at += 1
    return last, digits, dots


@compiled
def _is_assigned(data: NDArray[np.uint8], at: int, start: int) -> bool:
    """Whether "=", ":" or "=>" stands before a place, perhaps with spaces and a quote between."""
    low = max(start, at - 5)
    while at > low and data[at - 1] in (0x20, 0x22, 0x27, 0x60):
        at -= 1
    return at > start and data[at - 1] in (COLON, 0x3D, 0x3E)


@compiled
def _at_digit(
    data: NDArray[np.uint8], at: int, start: int, end: int, chars: NDArray[np.uint8]
) -> tuple[int, int, int, int]:
    """What a run of digits is part of, −1 for nothing: what, its start and end, and where to go on."""
    first = _back(data, at, max(start, at - MAX_VALUE), chars, WORD)
    behind = _run(data, at, end, chars, DIGIT)
    if first == at and at + 4 < end and data[at + 4] == COLON and 0x32 <= data[at] <= 0x33:
        last = _run(data, at, min(end, at + MAX_HEXADECIMAL), chars, COLON_HEX)
        return HEXADECIMAL, first, last, last
    if first < at or (behind < end and chars[data[behind]] & WORD):
        behind = _run(data, at, end, chars, WORD)
        is_country = at - first == 2 and 0x41 <= data[first] <= 0x5A and 0x41 <= data[first + 1] <= 0x5A
        if is_country and at + 1 < end and chars[data[at + 1]] & DIGIT:
            return TOKEN, first, min(end, first + MAX_IBAN), behind
        last = _run(data, at, min(end, first + MAX_VALUE), chars, KEY)
        is_value = last - first >= MIN_VALUE and _is_assigned(data, first, start)
        return VALUE if is_value else -1, first, last, behind
    last, digits, dots = _phrase(data, at, end, chars)
    what = NUMBER if digits >= MIN_NUMBER_DIGITS or dots >= 3 else -1
    # Digits that go on as a word or an IPv6 address are looked at again as such.
    again = last
    if last < end and (chars[data[last]] & WORD or data[last] == COLON):
        again = _back(data, last, at, chars, DIGIT)
    return what, first, last, again if again > at else last


@compiled
def _candidates(
    data: NDArray[np.uint8], offsets: NDArray[np.int64], chars: NDArray[np.uint8], found: NDArray[np.int64]
) -> int:
    """Fill `found` as far as it goes; how many there are."""
    count = 0
    for row in range(offsets.size - 1):
        start, end = offsets[row], offsets[row + 1]
        at = start
        while at < end:
            if not chars[data[at]] & TRIGGER:
                at += 1
                continue
            what, first, last, after = -1, at, at, at + 1
            if chars[data[at]] & DIGIT:
                what, first, last, after = _at_digit(data, at, start, end, chars)
            elif data[at] == AT:
                first = _back(data, at, max(start, at - MAX_LOCAL - 1), chars, LOCAL)
                last = _run(data, at + 1, min(end, at + MAX_DOMAIN + 2), chars, DOMAIN)
                if 0 < at - first <= MAX_LOCAL and at + 4 < last <= at + MAX_DOMAIN + 1:
                    what = ADDRESS
            else:
                first = _token_start(data, at, start, end)
                if first >= 0 and (first == start or not chars[data[first - 1]] & WORD):
                    last = _run(data, at, min(end, first + MAX_TOKEN), chars, KEY)
                    if last - first >= MIN_TOKEN or data[first] == DASH:
                        what, after = TOKEN, max(last, at + 1)
            if what >= 0:
                if count < found.shape[1]:
                    found[0, count], found[1, count] = row, first
                    found[2, count], found[3, count] = last, what
                count += 1
            at = after
    return count
