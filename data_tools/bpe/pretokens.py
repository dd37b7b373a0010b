"""Cut text into pre-tokens as the regular expressions of byte-level BPE tokenizers do, in one pass.

A tokenizer's expression is matched again and again from where the last match ended. The expressions
known are those of GPT-2, cl100k (Llama 3 has the same) and o200k; each is written out as a function that
gives the end of the match. Every character is matched by one of the alternatives, so nothing is left over.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_tools.characters import code_point
from data_tools.compiled import compiled
from megalite.data.byte_level import CL100K, GPT2, O200K

PATTERNS = (GPT2, CL100K, O200K)  # `split` takes the place in here

UPPER = 1  # Lu, Lt
LOWER = 2  # Ll
CASELESS = 4  # Lm, Lo
MARK = 8  # M; also a symbol
NUMBER = 16  # N
SPACE = 32  # \s
SYMBOL = 64  # [^\s\p{L}\p{N}]
LETTER = UPPER | LOWER | CASELESS
_HEAD = UPPER | CASELESS | MARK  # what an o200k word begins with
_TAIL = LOWER | CASELESS | MARK  # and what it ends with

_RETURN, _NEWLINE, _BLANK, _APOSTROPHE, _SLASH = (ord(character) for character in "\r\n '/")
_S, _T, _M, _D, _L, _R, _V, _E = (ord(letter) for letter in "stmdlrve")
_LONG_S = (0xC5, 0xBF)  # U+017F, which is an s but for its case


@compiled
def split(
    pattern: int,
    data: NDArray[np.uint8],
    bounds: NDArray[np.int64],
    classes: NDArray[np.uint8],
    ends: NDArray[np.int32],
    counts: NDArray[np.int64],
    widest: NDArray[np.int64],
) -> None:
    """Write where each pre-token ends, by the expression at a place in PATTERNS.

    Shapes:  data [bytes], valid UTF-8; bounds [documents + 1]: document i is data[bounds[i] : bounds[i + 1]];
             classes [0x110000], sums of the constants above; ends [≥ bytes];
             counts [documents]: pre-tokens in and before each; widest [documents]: its longest one's bytes
    """
    count = 0
    for number in range(bounds.size - 1):
        at = bounds[number]
        stop = bounds[number + 1]
        longest = 0
        while at < stop:
            if pattern == 0:
                end = _gpt2(data, at, stop, classes)
            elif pattern == 1:
                end = _cl100k(data, at, stop, classes)
            else:
                end = _o200k(data, at, stop, classes)
            longest = max(longest, end - at)
            ends[count] = end
            count += 1
            at = end
        counts[number] = count
        widest[number] = longest


@compiled
def _look(data: NDArray[np.uint8], at: int, classes: NDArray[np.uint8]) -> tuple[int, int]:
    """The class of the character at a place, and its bytes."""
    code, size = code_point(data, at)
    return int(classes[code]), size


@compiled
def _run(data: NDArray[np.uint8], at: int, stop: int, classes: NDArray[np.uint8], mask: int) -> int:
    """Where the characters of these classes end."""
    while at < stop:
        kind, size = _look(data, at, classes)
        if not kind & mask:
            break
        at += size
    return at


@compiled
def _gpt2(data: NDArray[np.uint8], at: int, stop: int, classes: NDArray[np.uint8]) -> int:
    if data[at] == _APOSTROPHE:
        end = _contraction(data, at, stop, False)
        if end:
            return end
    start = at + 1 if data[at] == _BLANK and at + 1 < stop else at
    kind, _ = _look(data, start, classes)
    if kind & LETTER:
        return _run(data, start, stop, classes, LETTER)
    if kind & NUMBER:
        return _run(data, start, stop, classes, NUMBER)
    if kind & SYMBOL:
        return _run(data, start, stop, classes, SYMBOL)
    return _spaces(data, at, stop, classes, False)


@compiled
def _cl100k(data: NDArray[np.uint8], at: int, stop: int, classes: NDArray[np.uint8]) -> int:
    if data[at] == _APOSTROPHE:
        end = _contraction(data, at, stop, True)
        if end:
            return end
    kind, size = _look(data, at, classes)
    if kind & LETTER:
        return _run(data, at, stop, classes, LETTER)
    if kind & NUMBER:
        return _digits(data, at, stop, classes)
    after = _look(data, at + size, classes)[0] if at + size < stop else 0
    if after & LETTER and not _is_newline(data[at]):
        return _run(data, at + size, stop, classes, LETTER)
    return _symbols_or_spaces(data, at, stop, classes, kind, after, False)


@compiled
def _o200k(data: NDArray[np.uint8], at: int, stop: int, classes: NDArray[np.uint8]) -> int:
    kind, size = _look(data, at, classes)
    if kind & NUMBER:
        return _digits(data, at, stop, classes)
    after = 0
    word = 0
    if kind & LETTER:
        word = _cased(data, at, stop, classes)
        if not word:
            word = _run(data, at, stop, classes, _HEAD)
    else:
        # One character may precede the word; a mark may also begin one.
        after = _look(data, at + size, classes)[0] if at + size < stop else 0
        has_word_after = after & (LETTER | MARK) != 0 and not _is_newline(data[at])
        if has_word_after:
            word = _cased(data, at + size, stop, classes)
        if not word and kind & MARK:
            word = _cased(data, at, stop, classes)
        if not word and has_word_after:
            word = _run(data, at + size, stop, classes, _HEAD)
    if word:
        if word < stop and data[word] == _APOSTROPHE:
            end = _contraction(data, word, stop, True)
            if end:
                return end
        return word
    return _symbols_or_spaces(data, at, stop, classes, kind, after, True)


@compiled
def _cased(data: NDArray[np.uint8], at: int, stop: int, classes: NDArray[np.uint8]) -> int:
    """`[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+`, 0 without a match."""
    # The first class takes what it can. If nothing is left for the second, it gives back up to the last
    # character that both have.
    shared = 0
    while at < stop:
        kind, size = _look(data, at, classes)
        if not kind & _HEAD:
            break
        at += size
        if kind & _TAIL:
            shared = at
    end = _run(data, at, stop, classes, _TAIL)
    return end if end > at else shared


@compiled
def _digits(data: NDArray[np.uint8], at: int, stop: int, classes: NDArray[np.uint8]) -> int:
    """`\\p{N}{1,3}`"""
    for _ in range(3):
        if at >= stop:
            break
        kind, size = _look(data, at, classes)
        if not kind & NUMBER:
            break
        at += size
    return at


@compiled
def _symbols_or_spaces(
    data: NDArray[np.uint8],
    at: int,
    stop: int,
    classes: NDArray[np.uint8],
    kind: int,
    after: int,
    with_slash: bool,
) -> int:
    """What cl100k and o200k do where no word or number begins; kinds of this and the next character."""
    if not kind & SYMBOL and not (data[at] == _BLANK and after & SYMBOL):
        return _spaces(data, at, stop, classes, True)
    end = _run(data, at if kind & SYMBOL else at + 1, stop, classes, SYMBOL)
    while end < stop and (_is_newline(data[end]) or (with_slash and data[end] == _SLASH)):
        end += 1
    return end


@compiled
def _spaces(data: NDArray[np.uint8], at: int, stop: int, classes: NDArray[np.uint8], by_line: bool) -> int:
    """`\\s+(?!\\S)|\\s+`: all but the last before something else; by line, `\\s*[\\r\\n]+` goes first."""
    end = at
    last = at
    line_end = 0
    while end < stop:
        kind, size = _look(data, end, classes)
        if not kind & SPACE:
            break
        if _is_newline(data[end]):
            line_end = end + size
        last = end
        end += size
    if by_line and line_end:
        return line_end
    return last if end < stop and last > at else end


@compiled
def _is_newline(byte: int) -> bool:
    return byte in (_NEWLINE, _RETURN)


@compiled
def _contraction(data: NDArray[np.uint8], at: int, stop: int, any_case: bool) -> int:
    """`'s|'t|'re|'ve|'m|'ll|'d`, 0 without a match. An apostrophe is at `at`."""
    case = 0x20 if any_case else 0
    if at + 1 >= stop:
        return 0
    first = data[at + 1] | case
    if first in (_S, _T, _M, _D):
        return at + 2
    if at + 2 >= stop:
        return 0
    if any_case and data[at + 1] == _LONG_S[0] and data[at + 2] == _LONG_S[1]:
        return at + 3
    second = data[at + 2] | case
    if second == _E and first in (_R, _V):
        return at + 3
    return at + 3 if first == _L and second == _L else 0
