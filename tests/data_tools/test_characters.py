"""Character classes against `unicodedata` and the decoder against Python's own."""

from __future__ import annotations

import unicodedata

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_tools import characters
from data_tools.characters import character_classes, code_point, lower_case
from data_tools.compiled import compiled


@compiled
def code_points(data: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Every code point of valid UTF-8."""
    out = np.zeros(data.size, dtype=np.int64)
    at = count = 0
    while at < data.size:
        point, width = code_point(data, at)
        out[count] = point
        count += 1
        at += width
    return out[:count]


@settings(deadline=None)  # the first call compiles
@given(st.text())
def test_utf8_is_decoded_as_python_does(text: str) -> None:
    data = np.frombuffer(text.encode(), dtype=np.uint8)
    assert code_points(data).tolist() == [ord(character) for character in text]


@settings(deadline=None)
@given(st.characters(codec="utf-8"))
def test_classes_are_those_of_unicodedata(character: str) -> None:
    bits = int(character_classes()[ord(character)])
    category = unicodedata.category(character)
    assert bool(bits & characters.LETTER) == (category[0] == "L")
    assert bool(bits & characters.NUMBER) == (category[0] == "N")
    assert bool(bits & characters.MARK) == (category[0] == "M")
    assert bool(bits & characters.PUNCTUATION) == (category[0] == "P")
    assert bool(bits & characters.SPACE) == character.isspace()
    assert bool(bits & characters.WORD) == (category[0] in "LNM" or character == "_")
    lower = character.lower()
    assert chr(lower_case()[ord(character)]) == (
        lower if len(lower) == 1 and category[0] == "L" else character
    )


def test_scripts_without_spaces_have_one_word_a_character() -> None:
    alone = {c for c in "漢かカไ한aя1" if character_classes()[ord(c)] & characters.ALONE}
    assert alone == set("漢かカไ")


def test_no_character_has_another_category_for_its_blocks_not_being_looked_up() -> None:
    every = range(0x110000)
    classes = np.frombuffer("".join(unicodedata.category(chr(code))[0] for code in every).encode(), np.uint8)
    for major, bit in (("L", characters.LETTER), ("N", characters.NUMBER), ("M", characters.MARK)):
        assert np.array_equal((character_classes() & bit) != 0, classes == ord(major))
    assert np.array_equal((character_classes() & characters.PUNCTUATION) != 0, classes == ord("P"))
