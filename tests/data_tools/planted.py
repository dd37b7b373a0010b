"""Duplicates of known similarity planted in a corpus, to measure what a dedup finds of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from tests.data_tools.plain_words import jaccard, shingles_of

# How a copy differs: not at all, in case and spaces, or in this share of its words.
KINDS: dict[str, float] = {"exact": 0.0, "spacing": 0.0, "1 %": 0.01, "2 %": 0.02, "4 %": 0.04, "8 %": 0.08}


class Copy(NamedTuple):
    """A text planted: of which text, how it differs, and the Jaccard similarity of the two."""

    text: str
    of: int
    kind: str
    jaccard: float


def plant(texts: Sequence[str], number: int, seed: int = 0, size: int = 5) -> list[Copy]:
    """Copies of as many texts as said or there are, chosen at random, of each kind in turn.

    Texts of fewer than 50 words divided by spaces are not copied. `size` is the shingles' number of words.
    """
    draw = random.Random(seed)
    fit = [index for index, text in enumerate(texts) if len(text.split()) >= 50]
    copies = []
    for place, index in enumerate(draw.sample(fit, min(number, len(fit)))):
        kind = list(KINDS)[place % len(KINDS)]
        text = edited(texts[index], kind, draw)
        copies.append(
            Copy(text, index, kind, jaccard(shingles_of(texts[index], size), shingles_of(text, size)))
        )
    return copies


def edited(text: str, kind: str, draw: random.Random) -> str:
    """A copy of a text that differs as the kind says."""
    if kind == "exact":
        return text
    words = text.split(" ")
    if kind == "spacing":
        return "  ".join(word.upper() if draw.random() < 0.3 else word for word in words)
    for _ in range(max(1, round(KINDS[kind] * len(words)))):
        at = draw.randrange(len(words))
        new = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=7))
        edit = draw.choice(("replace", "insert", "delete"))
        words[at : at + (edit != "insert")] = [] if edit == "delete" and len(words) > 1 else [new]
    return " ".join(words)
