"""Which class of its expressions a tokenizer's engine puts each character in, asked of the engine itself.

Engines follow different versions of Unicode than Python and than each other, so no table of ours would do.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.bpe.pretokens import CASELESS, LETTER, LOWER, MARK, NUMBER, SPACE, SYMBOL, UPPER

_EXPRESSIONS = {
    UPPER: r"[\p{Lu}\p{Lt}]",
    LOWER: r"\p{Ll}",
    CASELESS: r"[\p{Lm}\p{Lo}]",
    MARK: r"\p{M}",
    NUMBER: r"\p{N}",
    SPACE: r"\s",
}
# The other planes have no assigned character, or private ones. Surrogates are no characters of a text.
_ASKED = (range(0xD800), range(0xE000, 0x40000), range(0xE0000, 0xF0000))


@cache
def engine_classes() -> NDArray[np.uint8]:
    """Classes of every code point by the engine of the `tokenizers` package, uint8 [0x110000].

    Takes half a second.
    """
    codes = np.concatenate([np.arange(part.start, part.stop) for part in _ASKED])
    everything = "".join(map(chr, codes.tolist()))
    # All characters in one go, cut where the class changes; then one of each piece, class by class.
    starts = [start for start, _ in _pieces("|".join(f"{e}+" for e in _EXPRESSIONS.values()), everything)]
    sample = "".join(everything[start] for start in starts)
    kinds = np.zeros(len(sample), dtype=np.uint8)
    for bit, expression in _EXPRESSIONS.items():
        is_inside = np.ones(len(sample), dtype=bool)
        for start, stop in _pieces(expression, sample, behavior="removed"):
            is_inside[start:stop] = False
        kinds[is_inside] |= bit
    kinds[(kinds & (LETTER | NUMBER | SPACE)) == 0] |= SYMBOL
    table = np.full(sys.maxunicode + 1, SYMBOL, dtype=np.uint8)
    table[codes] = np.repeat(kinds, np.diff([*starts, codes.size]))
    return table


def _pieces(expression: str, text: str, behavior: str = "isolated") -> list[tuple[int, int]]:
    from tokenizers import Regex, pre_tokenizers

    cut: Any = pre_tokenizers.Split(Regex(expression), behavior)
    return [bounds for _, bounds in cut.pre_tokenize_str(text)]
