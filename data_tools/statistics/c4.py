"""C4's edits of a document's lines, and what they found.

Source:  Raffel et al. 2020, section 2.2, and the code that made C4 (tensorflow_datasets, c4_utils), whose
         order is kept. FineWeb does the same without no_terminal.

Each line is stripped of white space; blank ones go. So do citations, which are [1], [], [edit] and [citation
needed], with the white space they leave at the line's ends. Then, in this order:

long_word      a word (between white space) of more than max_word_chars characters. C4 looks for it before
               citations go, datatrove for few_words too
no_terminal    the line ends with none of . ? ! " ' or with ...
few_words      fewer than min_line_words words. The paper says 3, the code had 5
javascript     the word, in any case of its ASCII letters, as the phrases below
policy         "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies",
               "use cookies"

c4_lines                    lines
c4_RULE_lines, c4_RULE_chars   lines the rule finds among those no rule before it has removed, and their
                            characters; also for rules that are not asked to remove them
c4_citations, c4_citation_chars
c4_removed_chars            share of the lines' characters that were removed
c4_lorem_ipsum_lines        lines with "lorem ipsum", of those few_words left
c4_curly_brackets           "{" in lines javascript left
c4_sentences                sentences in the lines that stay. One ends at terminal punctuation with closing
                            quotes and brackets behind it, then white space, the line's end, or for the
                            full-width 。．！？｡ anything. C4 and datatrove ask a model or a list of
                            abbreviations, and so count fewer
c4_long_lines               lines of 200 characters or more that stay (mC4 wants 3; Xue et al. 2021)
c4_bad_words                where a word or phrase of the given list begins; null without a list
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_tools.characters import SPACE, code_point
from data_tools.compiled import compiled, inlined
from data_tools.documents import text_column, texts, with_column
from data_tools.flow import EXAMPLES, Flow
from data_tools.statistics.hashing import readonly
from data_tools.statistics.lines import TERMINAL, line_classes, stripped
from data_tools.statistics.phrases import Phrases, WordList, phrases_in, phrases_of
from data_tools.statistics.settings import StatisticsSettings

LINE_RULES = ("long_word", "no_terminal", "few_words", "javascript", "policy")
LONG_LINE_CHARS = 200

_LONG_WORD, _NO_TERMINAL, _FEW_WORDS, _JAVASCRIPT, _POLICY = range(len(LINE_RULES))
_LOREM_IPSUM = len(LINE_RULES)  # a phrase, but no rule for lines
_PHRASES = {
    "javascript": 1 << _JAVASCRIPT,
    "terms of use": 1 << _POLICY,
    "privacy policy": 1 << _POLICY,
    "cookie policy": 1 << _POLICY,
    "uses cookies": 1 << _POLICY,
    "use of cookies": 1 << _POLICY,
    "use cookies": 1 << _POLICY,
    "lorem ipsum": 1 << _LOREM_IPSUM,
}

# What is counted of each document.
_COUNTS = (
    *(f"c4_{rule}_lines" for rule in LINE_RULES),
    *(f"c4_{rule}_chars" for rule in LINE_RULES),
    "c4_lines",
    "c4_citations",
    "c4_citation_chars",
    "c4_lorem_ipsum_lines",
    "c4_curly_brackets",
    "c4_sentences",
    "c4_long_lines",
)
COLUMNS = (*_COUNTS, "c4_removed_chars", "c4_bad_words")
_CHARS = len(LINE_RULES)  # from here by rule
_LINES, _CITATIONS, _CITATION_CHARS, _LOREM_LINES, _CURLY, _SENTENCES, _LONG_LINES = range(
    2 * len(LINE_RULES), len(_COUNTS)
)
_ALL_CHARS = len(_COUNTS)  # of all lines

_NEWLINE, _OPEN, _CLOSE, _CURLY_BRACKET = 0x0A, 0x5B, 0x5D, 0x7B
_EDIT, _NEEDED = (np.frombuffer(text, np.uint8) for text in (b"[edit]", b"[citation needed]"))
_DOT = 0x2E
_MARKS = (0x2E, 0x3F, 0x21, 0x22, 0x27)  # . ? ! " '
_CLOSERS = (0x22, 0x27, 0x29, 0x5D, 0xBB, 0x2019, 0x201D, 0x300D, 0x300F, 0xFF09)  # " ' ) ] » ’ ” 」 』 ）
_FULL_WIDTH = (0x3002, 0xFF01, 0xFF0E, 0xFF1F, 0xFF61)


class _Rules(NamedTuple):
    """The settings, for compiled loops. `remove` is uint8 [LINE_RULES]."""

    remove: NDArray[np.uint8]
    citations: bool
    paragraphs: bool
    min_words: int
    max_word_chars: int


class C4Edit:
    """Edits the text and adds the columns above: int32, and float32 for c4_removed_chars.

    What it removes it counts in the flow, with examples of the lines.

    Raises:  DataError if the list of bad words cannot be read
    """

    def __init__(self, settings: StatisticsSettings) -> None:
        self._rules = _Rules(
            np.array([rule in settings.remove_lines for rule in LINE_RULES], np.uint8),
            settings.remove_citations,
            settings.keep_paragraphs,
            settings.min_line_words,
            settings.max_word_chars,
        )
        self._phrases = phrases_of(_PHRASES)
        self._bad_words = None if settings.bad_words is None else WordList(settings.bad_words)

    def __call__(self, batch: pa.RecordBatch, flow: Flow) -> pa.RecordBatch:
        """Shapes:  columns [rows]"""
        data, offsets = texts(batch.column("text"))
        counts = np.zeros((batch.num_rows, _ALL_CHARS + 1), np.int64)
        edited = np.empty(int(offsets[-1] - offsets[0]), np.uint8)
        bounds = np.zeros_like(offsets)
        shown = np.full((len(LINE_RULES), EXAMPLES, 3), -1, np.int64)
        tables = line_classes(), self._phrases, self._rules
        _edit(readonly(data), offsets, *tables, edited, bounds, counts, shown)
        self._tell(batch, counts, shown, flow)
        edited = edited[: bounds[-1]]
        bad_words = None if self._bad_words is None else self._bad_words.count(edited, bounds)
        batch = with_column(batch, "text", text_column(edited, bounds))
        for number, name in enumerate(_COUNTS):
            batch = with_column(batch, name, counts[:, number].astype(np.int32))
        removed = counts[:, _CHARS:][:, np.flatnonzero(self._rules.remove)].sum(1)
        share = (removed + counts[:, _CITATION_CHARS]) / np.maximum(1, counts[:, _ALL_CHARS])
        batch = with_column(batch, "c4_removed_chars", share.astype(np.float32))
        nulls = pa.nulls(batch.num_rows, pa.int32())
        return with_column(batch, "c4_bad_words", nulls if bad_words is None else bad_words)

    def _tell(
        self, batch: pa.RecordBatch, counts: NDArray[np.int64], shown: NDArray[np.int64], flow: Flow
    ) -> None:
        totals = counts.sum(0)
        flow.count("c4: citations removed", totals[_CITATIONS])
        flow.count("c4: characters of citations removed", totals[_CITATION_CHARS])
        data, _ = texts(batch.column("text"))
        for number, rule in enumerate(LINE_RULES):
            if self._rules.remove[number]:
                flow.count(f"c4: lines removed, {rule}", totals[number])
                flow.count(f"c4: characters removed, {rule}", totals[_CHARS + number])
                for row, start, stop in shown[number].tolist():
                    if row >= 0:
                        line = data[start:stop].tobytes().decode()
                        source, doc_id = (batch.column(name)[row].as_py() for name in ("source", "id"))
                        flow.example(source, f"c4 line: {rule}", doc_id, line)


@compiled
def _edit(
    data: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    classes: NDArray[np.uint8],
    phrases: Phrases,
    rules: _Rules,
    edited: NDArray[np.uint8],
    bounds: NDArray[np.int64],
    counts: NDArray[np.int64],
    shown: NDArray[np.int64],
) -> None:
    """Fill edited with the texts that stay and bounds [rows + 1] with where; counts [rows, _ALL_CHARS + 1].

    shown [LINE_RULES, EXAMPLES, (row, start, stop)] gets the first lines each rule removed.
    """
    size = 0
    for row in range(offsets.size - 1):
        at, blank = offsets[row], False
        while at < offsets[row + 1]:
            end, may_cite = at, False
            while end < offsets[row + 1] and data[end] != _NEWLINE:
                may_cite |= data[end] == _OPEN
                end += 1
            start, stop = stripped(data, at, end, classes)
            at = end + 1
            if start == stop:
                blank = True
                continue
            gap = 0 if size == bounds[row] else 2 if blank and rules.paragraphs else 1
            counts[row, _LINES] += 1
            begin = size + gap
            if may_cite and rules.citations:
                after = _without_citations(data, start, stop, classes, edited, begin, counts[row])
            else:
                after = begin + stop - start
                for number in range(stop - start):  # as slices it compiles a second longer
                    edited[begin + number] = data[start + number]
            if begin == after:
                continue
            rule = _judge(edited, begin, after, classes, phrases, rules, counts[row])
            if rule < 0:
                for number in range(gap):
                    edited[size + number] = _NEWLINE
                size, blank = after, False
                continue
            example = 0
            while example < EXAMPLES and shown[rule, example, 0] >= 0:
                example += 1
            if example < EXAMPLES:
                shown[rule, example, 0], shown[rule, example, 1], shown[rule, example, 2] = row, start, stop
        bounds[row + 1] = size


@compiled
def _without_citations(
    data: NDArray[np.uint8],
    start: int,
    stop: int,
    classes: NDArray[np.uint8],
    edited: NDArray[np.uint8],
    begin: int,
    counts: NDArray[np.int64],
) -> int:
    """Copy a line to edited[begin:] without citations and white space at the ends; where it stops."""
    to = end = begin  # where the next character goes, and where the last that is no space ended
    while start < stop:
        code, width = code_point(data, start)
        if code == _OPEN:
            cited = _citation(data, start, stop)
            if cited:
                start += cited
                counts[_CITATIONS] += 1
                counts[_CITATION_CHARS] += cited
                counts[_ALL_CHARS] += cited
                continue
        is_space = classes[code] & SPACE != 0
        if not (is_space and to == begin):
            for number in range(width):
                edited[to + number] = data[start + number]
            to += width
            end = end if is_space else to
        start += width
    return end


@inlined
def _citation(data: NDArray[np.uint8], at: int, stop: int) -> int:
    """How many bytes a citation takes that starts at a "[", 0 if none does."""
    end = at + 1
    while end < stop and 0x30 <= data[end] <= 0x39:
        end += 1
    if end < stop and data[end] == _CLOSE:
        return end + 1 - at
    for text in (_EDIT, _NEEDED):
        matched = 0
        while matched < text.size and at + matched < stop and data[at + matched] == text[matched]:
            matched += 1
        if matched == text.size:
            return matched
    return 0


@compiled
def _judge(
    line: NDArray[np.uint8],
    start: int,
    stop: int,
    classes: NDArray[np.uint8],
    phrases: Phrases,
    rules: _Rules,
    counts: NDArray[np.int64],
) -> int:
    """Count what a line has; the rule that removes it, or -1."""
    found = phrases_in(line, start, stop, phrases)
    words = word = longest = chars = curly = sentences = code = 0
    is_open, ended, is_wide = False, False, False  # a sentence is; its end was seen; by a full-width mark
    at = start
    while at < stop:
        code, width = code_point(line, at)
        at += width
        chars += 1
        if classes[code] & SPACE:
            words += word > 0
            longest, word = max(longest, word), 0
            if ended:
                sentences += 1
                is_open, ended = False, False
            continue
        word += 1
        curly += code == _CURLY_BRACKET
        if classes[code] & TERMINAL:
            is_open, ended, is_wide = True, True, code in _FULL_WIDTH
        elif not ended:
            is_open = True
        elif code not in _CLOSERS:
            sentences += is_wide
            ended = False
    words += 1
    longest = max(longest, word)
    sentences += is_open
    dots = stop - start >= 3 and line[stop - 1] == _DOT and line[stop - 2] == _DOT and line[stop - 3] == _DOT
    found |= (longest > rules.max_word_chars) << _LONG_WORD
    found |= (code not in _MARKS or dots) << _NO_TERMINAL
    found |= (words < rules.min_words) << _FEW_WORDS
    counts[_ALL_CHARS] += chars
    for rule in range(len(LINE_RULES)):
        if found >> rule & 1:
            counts[rule] += 1
            counts[_CHARS + rule] += chars
            if rules.remove[rule]:
                return rule
        if rule == _FEW_WORDS:
            counts[_LOREM_LINES] += found >> _LOREM_IPSUM & 1
        if rule == _JAVASCRIPT:
            counts[_CURLY] += curly
    counts[_SENTENCES] += sentences
    counts[_LONG_LINES] += chars >= LONG_LINE_CHARS
    return -1
