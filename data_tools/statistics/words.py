"""A document's words as hashes and lengths."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.characters import (
    ALONE,
    LETTER,
    PUNCTUATION,
    SPACE,
    WORD,
    character_classes,
    code_point,
    lower_case,
)
from data_tools.compiled import compiled
from data_tools.statistics.hashing import START, extended, finished

_DOT, _HASH, _ELLIPSIS = 0x2E, 0x23, 0x2026


class Words(NamedTuple):
    """The words of a document.

    Shapes:  hashes uint64 [words]; ends int64 [words + 1] = characters in all words before each
    """

    hashes: NDArray[np.uint64]
    ends: NDArray[np.int64]
    with_letter: int  # words
    hash_signs: int  # "#" in the text
    ellipses: int  # "…" in the text, and "..." one after the other


@cache
def folding(ignore_case: bool) -> NDArray[np.uint32]:
    """What each code point counts as in a word's hash: itself, or its lower case; uint32 [0x110000]."""
    if ignore_case:
        return lower_case()
    table = np.arange(len(character_classes()), dtype=np.uint32)
    table.setflags(write=False)
    return table


@compiled
def split_words(
    data: NDArray[np.uint8],
    start: int,
    stop: int,
    classes: NDArray[np.uint8],
    folded: NDArray[np.uint32],
    unicode_words: bool,
) -> Words:
    """The words of `data[start:stop]`; `classes` are `character_classes()`, `folded` is of `folding`."""
    most = (stop - start) // 2 + 1  # a word takes two bytes with what divides it from the next
    hashes, ends = np.empty(most, np.uint64), np.empty(most + 1, np.int64)
    ends[0] = 0
    count = with_letter = hash_signs = ellipses = 0
    word, chars, bits, dots = START, 0, 0, 0
    asked, flipped, alone = (WORD, 0, ALONE) if unicode_words else (SPACE, SPACE, 0)
    at = start
    while at < stop:
        code, width = int(data[at]), 1
        if code >= 0x80:
            code, width = code_point(data, at)
        at += width
        kind = classes[code]
        is_word = (kind ^ flipped) & asked
        if chars and (not is_word or (kind | bits) & alone):
            hashes[count] = finished(word)
            ends[count + 1] = ends[count] + chars
            count += 1
            with_letter += bits & LETTER
            word, chars, bits = START, 0, 0
        if is_word:
            word = extended(word, np.uint64(folded[code]))
            chars += 1
            bits |= kind
        if kind & PUNCTUATION:
            dots = dots + 1 if code == _DOT else 0
            ellipses += code == _ELLIPSIS or (dots > 0 and dots % 3 == 0)
            hash_signs += code == _HASH
        elif dots:
            dots = 0
    if chars:
        hashes[count] = finished(word)
        ends[count + 1] = ends[count] + chars
        count += 1
        with_letter += bits & LETTER
    return Words(hashes[:count], ends[: count + 1], with_letter, hash_signs, ellipses)


@compiled
def count_words(
    data: NDArray[np.uint8], start: int, stop: int, classes: NDArray[np.uint8], unicode_words: bool
) -> int:
    """How many words `split_words` finds."""
    asked, flipped, alone = (WORD, 0, ALONE) if unicode_words else (SPACE, SPACE, 0)
    count = before = 0
    at = start
    while at < stop:
        code, width = int(data[at]), 1
        if code >= 0x80:
            code, width = code_point(data, at)
        at += width
        kind = classes[code]
        is_word = (kind ^ flipped) & asked
        count += is_word != 0 and (before == 0 or (kind | before) & alone != 0)
        before = int(is_word | (kind & alone))
    return count
