"""The dedup's ideas in plain Python, to compare the compiled ones with."""

from __future__ import annotations

from collections.abc import Iterable

from data_tools.characters import ALONE, MARK, WORD, character_classes, lower_case


def words_of(text: str) -> list[tuple[str, int]]:
    """The words of a text in lower case, and the index of the first character of each."""
    classes, lower = character_classes(), lower_case()
    found: list[tuple[str, int]] = []
    before = 0  # the class that the word's next character needs; 0 between words
    for index, character in enumerate(text):
        kind = int(classes[ord(character)])
        small = chr(lower[ord(character)])
        if before and kind & before and not kind & ALONE:
            found[-1] = (found[-1][0] + small, found[-1][1])
        elif kind & WORD:
            found.append((small, index))
            before = MARK if kind & ALONE else WORD
        else:
            before = 0
    return found


def shingles_of(text: str, size: int = 5) -> frozenset[tuple[str, ...]]:
    """The set of every `size` words in a row, or of all words if they are fewer."""
    words = [word for word, _ in words_of(text)]
    if not words:
        return frozenset()
    return frozenset(tuple(words[at : at + size]) for at in range(max(1, len(words) - size + 1)))


def jaccard(one: frozenset[tuple[str, ...]], other: frozenset[tuple[str, ...]]) -> float:
    """|A ∩ B| / |A ∪ B| of sets that are not both empty."""
    return len(one & other) / len(one | other)


def joined(number: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """The smallest number of each one's cluster, where pairs belong together."""
    roots = list(range(number))
    for one, other in pairs:
        low, high = sorted((roots[one], roots[other]))
        roots = [low if root == high else root for root in roots]
    return roots
