"""Text that was decoded with the wrong encoding, found by pairs of characters and repaired by ftfy.

ftfy repairs a line if a regular expression of its own calls it bad: about 30 sequences of two to five
characters. Each needs one of the pairs below side by side (or a C1 control), so a line without any is not
shown to ftfy, which would leave it as it is. A test holds the pairs against ftfy's expression.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megalite.errors import DataError

try:
    import ftfy
    from ftfy.badness import BADNESS_RE, MOJIBAKE_CATEGORIES
except ImportError:
    raise DataError("this needs ftfy; install it with: pip install 'megalite[data]'") from None

FTFY_VERSION = ftfy.__version__
SEGMENT_CHARS = 1_000_000  # a longer line is repaired in pieces, as ftfy itself does

# What the pairs were read from, in ftfy 6.3. With another expression ftfy sees every line not ASCII.
_KNOWN_EXPRESSIONS = {"9dcc0f2ac90d9ae3c85eb7b9b2c0b8a8e8126153847c2b30c91a0bb263f3b8c4"}

_ACCENTED = "{lower_accented}{upper_accented}"
_SYMBOLS = "{start_punctuation}{end_punctuation}{currency}{numeric}{law}"
# What may come first, what right after it: members of a regular expression's character class.
_PAIRS = (
    ("{bad}" + _ACCENTED + "{lower_common}{upper_common}{box}" + _SYMBOLS, "{bad}"),
    ("{bad}", _ACCENTED + "{box}" + _SYMBOLS),
    ("{lower_accented}{lower_common}{box}{end_punctuation}{currency}{numeric}", "{upper_accented}"),
    ("{box}{end_punctuation}{currency}{numeric}", "{lower_accented}"),
    (_ACCENTED + "{box}{end_punctuation}", "{currency}"),
    ("{upper_accented}{box}", "{numeric}{law}"),
    ("{start_punctuation}", "{numeric}"),
    ("{end_punctuation}{currency}{numeric}{box}", "{start_punctuation}"),
    (_ACCENTED, "{start_punctuation}{end_punctuation}"),
    ("{box}", "{kaomoji}{end_punctuation}"),
    (_ACCENTED + _SYMBOLS, "{box}"),
    ("Œœ", "^A-Za-z"),
    ("{upper_accented}", "°"),
    ("ÂÃÎÐ", " €œŠš¢£Ÿž\xa0\xad®©°·»{start_punctuation}{end_punctuation}–—´"),
    ("×", "²³"),
    ("ØÙ", "{common}{currency}{bad}{numeric}{start_punctuation}ŸŠ®°µ»"),
    ("à", "²µ¹¼½¾"),
    ("√", "±∂†≠®™´≤≥¥µø"),
    ("≈", "°¢"),
    ("‚", "Äâó"),
    ("вВ", "Ђ"),
    ("ВГРСΒΓΞΟ", "{bad}{start_punctuation}{end_punctuation}{currency}°µ"),
    ("βā", "€"),
)


class Signs(NamedTuple):
    """Which characters beside each other are a sign of mojibake.

    Shapes:  kind uint8 [0x110000], 0 for what is in no pair; pairs uint8 [kinds, kinds], first and second
    """

    kind: NDArray[np.uint8]
    pairs: NDArray[np.uint8]


@cache
def signs() -> Signs:
    """The pairs as tables for a compiled scan. C1 controls, a sign by themselves, are not in it."""
    if hashlib.sha256(BADNESS_RE.pattern.encode()).hexdigest() not in _KNOWN_EXPRESSIONS:
        kind = np.ones(0x110000, dtype=np.uint8)
        kind[:0x80] = 0
        return Signs(kind, np.array([[0, 0], [1, 1]], dtype=np.uint8))
    plane = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x10000)]))
    profile = np.zeros((2, len(plane)), dtype=np.int64)  # the pairs that each character is in, as bits
    for number, pair in enumerate(_PAIRS):
        for side, members in enumerate(pair):
            found = re.sub("[" + members.format(**MOJIBAKE_CATEGORIES) + "]", "\0", plane)
            profile[side] |= (_units(found) == 0).astype(np.int64) << number
    profile[:, 0] = 0
    keys, numbers = np.unique(profile[0] << len(_PAIRS) | profile[1], return_inverse=True)
    kind = np.zeros(0x110000, dtype=np.uint8)
    kind[_units(plane)] = numbers
    first, second = keys >> len(_PAIRS), keys & ((1 << len(_PAIRS)) - 1)
    return Signs(kind, ((first[:, None] & second[None, :]) != 0).astype(np.uint8))


def _units(text: str) -> NDArray[np.uint16]:
    """The code points of a text below U+10000, uint16 [characters]."""
    return np.frombuffer(text.encode("utf-16-le"), dtype=np.uint16)


def repair(line: str) -> str:
    """A line as `ftfy.fix_encoding` leaves it; nothing but the encoding is touched."""
    pieces = (line[at : at + SEGMENT_CHARS] for at in range(0, len(line), SEGMENT_CHARS))
    return "".join(map(ftfy.fix_encoding, pieces))
