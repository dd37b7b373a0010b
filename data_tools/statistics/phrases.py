"""Find phrases: the few that C4 names, in a line's bytes, and a user's list, in a document's words."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.characters import character_classes
from data_tools.compiled import compiled, inlined
from data_tools.statistics.hashing import joined, readonly, slot_of, table_of
from data_tools.statistics.words import folding, split_words
from megalite.errors import DataError

_PREFIX = 4  # bytes of a phrase looked at first; none is shorter
_MARKS = 1 << 12
_MASK, _SPREAD, _SHIFT = (1 << 8 * _PREFIX) - 1, 0x9E3779B1, 20


class Phrases(NamedTuple):
    """Phrases in small ASCII letters, and what each stands for.

    Shapes:  data uint8; offsets int64 [phrases + 1]; bits int64 [phrases]; marks uint8: where the hash of a
             phrase's first bytes points is 1; lowered uint8 [256]
    """

    data: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    bits: NDArray[np.int64]
    marks: NDArray[np.uint8]
    lowered: NDArray[np.uint8]


def phrases_of(bits: dict[str, int]) -> Phrases:
    """A table of phrases by what each stands for, to find without regard to the case of ASCII letters."""
    encoded = [phrase.encode() for phrase in bits]
    marks = np.zeros(_MARKS, np.uint8)
    for phrase in encoded:
        marks[_mark(int.from_bytes(phrase[:_PREFIX], "big"))] = 1
    return Phrases(
        data=np.frombuffer(b"".join(encoded), np.uint8).copy(),
        offsets=np.cumsum([0, *map(len, encoded)]).astype(np.int64),
        bits=np.array(list(bits.values()), np.int64),
        marks=marks,
        lowered=np.frombuffer(bytes(range(256)).lower(), np.uint8).copy(),
    )


def _mark(prefix: int) -> int:
    return (prefix * _SPREAD >> _SHIFT) % _MARKS


@compiled
def phrases_in(data: NDArray[np.uint8], start: int, stop: int, phrases: Phrases) -> int:
    """The bits of all phrases in `data[start:stop]`."""
    found = prefix = 0
    for at in range(start, stop):
        prefix = (prefix << 8 | phrases.lowered[data[at]]) & _MASK
        if phrases.marks[(prefix * _SPREAD >> _SHIFT) % _MARKS]:
            for number in range(phrases.bits.size):
                if _is_at(data, at - _PREFIX + 1, start, stop, phrases, number):
                    found |= phrases.bits[number]
    return found


@inlined
def _is_at(data: NDArray[np.uint8], at: int, start: int, stop: int, phrases: Phrases, number: int) -> bool:
    first, last = phrases.offsets[number], phrases.offsets[number + 1]
    if at < start or at + last - first > stop:
        return False
    matched = 0
    while matched < last - first and phrases.lowered[data[at + matched]] == phrases.data[first + matched]:
        matched += 1
    return bool(matched == last - first)


class WordList:
    """A file of words and phrases, one a line, matched without regard to case.

    A phrase is a run of words as the splitter `unicode` makes them, whatever stands between: "foo-bar" is
    also found as "foo bar", and in scripts without spaces an entry is found within other characters.

    Raises:  DataError if the file cannot be read, or a line of it has no word
    """

    def __init__(self, path: Path) -> None:
        hashes = []
        self._longest = 1
        for number, line in enumerate(_read(path).decode().split("\n"), 1):
            if line.strip():
                data = readonly(np.frombuffer(line.encode(), np.uint8))
                words = split_words(data, 0, data.size, character_classes(), folding(True), True).hashes
                if not words.size:
                    raise DataError(f"{path}:{number}: {line[:80]!r} has no letter or digit; remove the line")
                hashes.append(sequence_hash(words))
                self._longest = max(self._longest, words.size)
        if not hashes:
            raise DataError(f"{path} has no words; give a file with one word or phrase a line")
        self._keys, _ = table_of(np.array(hashes, np.uint64), np.zeros(len(hashes), np.uint64))

    def count(self, data: NDArray[np.uint8], offsets: NDArray[np.int64]) -> NDArray[np.int32]:
        """At how many words of each document an entry begins, int32 [rows]."""
        counts = np.zeros(offsets.size - 1, np.int32)
        _count(readonly(data), offsets, character_classes(), folding(True), self._keys, self._longest, counts)
        return counts


def digest(path: Path) -> str:
    """What identifies a word list's content.

    Raises:  DataError if it cannot be read
    """
    return hashlib.sha256(_read(path)).hexdigest()[:32]


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"statistics.bad_words: cannot read {path} as UTF-8 text: {error}") from None
    return data


@compiled
def sequence_hash(words: NDArray[np.uint64]) -> np.uint64:
    """The hash of a phrase from those of its words."""
    value: np.uint64 = words[0]
    for number in range(1, words.size):
        value = joined(value, words[number])
    return value


@compiled
def _count(
    data: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    classes: NDArray[np.uint8],
    folded: NDArray[np.uint32],
    keys: NDArray[np.uint64],
    longest: int,
    counts: NDArray[np.int32],
) -> None:
    for row in range(offsets.size - 1):
        words = split_words(data, offsets[row], offsets[row + 1], classes, folded, True).hashes
        for first in range(words.size):
            value, number = words[first], 1
            while not keys[slot_of(keys, value)] and number < longest and first + number < words.size:
                value = joined(value, words[first + number])
                number += 1
            counts[row] += keys[slot_of(keys, value)] != 0
