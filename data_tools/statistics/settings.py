"""What is measured of each document, and which lines C4's rules take out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from megalite.config.section import Section

MAX_STOP_WORDS = 64  # one bit each

LineRule = Literal["long_word", "no_terminal", "few_words", "javascript", "policy"]

# Rae et al. 2021, section A.1.1: at least two of these.
_STOP_WORDS: dict[str, tuple[str, ...]] = {"en": ("the", "be", "to", "of", "and", "that", "have", "with")}


class StatisticsSettings(Section):
    """Section `statistics`: columns of numbers for `filter` to judge by, and C4's edits of the text."""

    word_splitter: Literal["whitespace", "unicode"] = Field(
        "whitespace", description="what a word is: between white space, or runs of letters and numbers"
    )
    gopher: bool = Field(True, description="measure Gopher's quality and repetition, before C4's edits")
    c4: bool = Field(True, description="take out lines and citations as C4 does, and measure what it does")
    fineweb: bool = Field(True, description="measure what FineWeb added, after C4's edits")
    stop_words: dict[str, Annotated[tuple[str, ...], Field(strict=False)]] = Field(
        _STOP_WORDS,
        description="by language; a document in one that is not here has no such number, and passes. "
        "Without a column `language` all words count for every document",
    )
    remove_lines: tuple[LineRule, ...] = Field(
        ("long_word", "few_words", "javascript", "policy"),
        strict=False,
        description="C4's rules that remove lines; no_terminal is off as in FineWeb. What each finds is "
        "counted either way",
    )
    remove_citations: bool = Field(
        True, description="remove [1], [], [edit], [citation needed]; mind that a[1] in code is one too"
    )
    keep_paragraphs: bool = Field(
        False, description="keep a blank line where there were any; C4's rules remove them all"
    )
    min_line_words: int = Field(3, ge=1, description="few_words: lines of fewer words go")
    max_word_chars: int = Field(1000, ge=1, description="long_word: lines with a longer word go")
    bad_words: Path | None = Field(
        None, strict=False, description="a file of words or phrases, one a line, to count in each document"
    )

    @field_validator("stop_words")
    @classmethod
    def _few_enough(cls, value: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        number = len({word for words in value.values() for word in words})
        if number > MAX_STOP_WORDS:
            raise ValueError(f"{number} different stop words, at most {MAX_STOP_WORDS} can be told apart")
        return value
