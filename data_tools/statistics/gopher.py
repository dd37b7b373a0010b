"""Gopher's quality and repetition statistics.

Source:  Rae et al. 2021, section A.1.1 and table A1. Where the paper leaves open what to count, datatrove's
         reading is taken, whose thresholds FineWeb uses; what differs is named here and in the package.

gopher_words                      words
gopher_mean_word_length           characters a word. Words of punctuation alone are words; datatrove, whose
                                  splitter makes one of every comma, leaves them out here and above
gopher_hash_signs_per_word        "#" a word
gopher_ellipses_per_word          "..." and "…" a word
gopher_bullet_lines               share of lines that start with • or -
gopher_ellipsis_lines             share of lines that end with ... or …
gopher_words_with_letter          share of words with a letter (category L)
gopher_stop_words                 how many different stop words occur: as listed, capitalised or in capitals.
                                  datatrove knows them as listed only
gopher_duplicate_lines            share of lines equal to an earlier one
gopher_duplicate_line_chars       their share of characters
gopher_duplicate_paragraphs       the same for paragraphs
gopher_duplicate_paragraph_chars
gopher_top_2gram_chars … 4gram    share of characters in the most frequent n-gram (`repeated_ngrams`). Its
                                  occurrences may overlap, so that it can exceed 1
gopher_duplicate_5gram_chars …    share of characters in n-grams that occurred before, each counted once.
 … 10gram                         datatrove also takes "ab c" and "a bc" for equal
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_tools.compiled import compiled
from data_tools.documents import texts, with_column
from data_tools.flow import Flow
from data_tools.statistics.hashing import readonly, slot_of, table_of
from data_tools.statistics.lines import ENDS_WITH_ELLIPSIS, STARTS_WITH_BULLET, line_classes, split_lines
from data_tools.statistics.repeats import DUPLICATE_NGRAMS, TOP_NGRAMS, duplicates, repeated_ngrams
from data_tools.statistics.settings import StatisticsSettings
from data_tools.statistics.words import folding, split_words
from megalite.errors import DataError

_SHARES = (
    "gopher_mean_word_length",
    "gopher_hash_signs_per_word",
    "gopher_ellipses_per_word",
    "gopher_bullet_lines",
    "gopher_ellipsis_lines",
    "gopher_words_with_letter",
    "gopher_duplicate_lines",
    "gopher_duplicate_line_chars",
    "gopher_duplicate_paragraphs",
    "gopher_duplicate_paragraph_chars",
    *(f"gopher_top_{n}gram_chars" for n in TOP_NGRAMS),
    *(f"gopher_duplicate_{n}gram_chars" for n in DUPLICATE_NGRAMS),
)
COLUMNS = ("gopher_words", "gopher_stop_words", *_SHARES)
_FIRST_NGRAM = _SHARES.index("gopher_top_2gram_chars")


class GopherStatistics:
    """Adds the columns above: float32, and int32 for gopher_words and gopher_stop_words.

    Raises:  DataError if a stop word is none by the word splitter
    """

    def __init__(self, settings: StatisticsSettings) -> None:
        self._unicode_words = settings.word_splitter == "unicode"
        words = sorted({word for listed in settings.stop_words.values() for word in listed})
        bits = {word: 1 << number for number, word in enumerate(words)}
        self._languages = {
            language: sum(bits[word] for word in set(listed))
            for language, listed in settings.stop_words.items()
        }
        forms = [(form, bits[word]) for word in words for form in (word, word.capitalize(), word.upper())]
        hashes = np.array([self._hash(form) for form, _ in forms], np.uint64)
        self._table = table_of(hashes, np.array([bit for _, bit in forms], np.uint64))

    def __call__(self, batch: pa.RecordBatch, flow: Flow) -> pa.RecordBatch:
        """Shapes:  columns [rows]"""
        data, offsets = texts(batch.column("text"))
        rows = batch.num_rows
        num_words, seen = np.zeros(rows, np.int32), np.zeros(rows, np.uint64)
        shares = np.zeros((rows, len(_SHARES)))
        tables = line_classes(), folding(False), *self._table
        _measure(readonly(data), offsets, *tables, self._unicode_words, num_words, seen, shares)
        batch = with_column(batch, "gopher_words", num_words)
        batch = with_column(batch, "gopher_stop_words", self._stop_words(batch, seen))
        for number, name in enumerate(_SHARES):
            batch = with_column(batch, name, shares[:, number].astype(np.float32))
        return batch

    def _hash(self, word: str) -> np.uint64:
        data = readonly(np.frombuffer(word.encode(), np.uint8))
        found = split_words(data, 0, data.size, line_classes(), folding(False), self._unicode_words).hashes
        if found.size != 1:
            raise DataError(f"statistics.stop_words: {word!r} is not one word, but {found.size}")
        return np.uint64(found[0])

    def _stop_words(self, batch: pa.RecordBatch, seen: NDArray[np.uint64]) -> pa.Array:
        """How many of its language's stop words each document has; null where none are listed."""
        if "language" not in batch.schema.names:
            return pa.array(np.bitwise_count(seen).astype(np.int32))
        languages = batch.column("language").to_pylist()
        wanted = np.array([self._languages.get(language, 0) for language in languages], np.uint64)
        unknown = np.array([language not in self._languages for language in languages], bool)
        return pa.array(np.bitwise_count(seen & wanted).astype(np.int32), mask=unknown)


@compiled
def _measure(
    data: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    classes: NDArray[np.uint8],
    folded: NDArray[np.uint32],
    stop_keys: NDArray[np.uint64],
    stop_bits: NDArray[np.uint64],
    unicode_words: bool,
    num_words: NDArray[np.int32],
    stop_words: NDArray[np.uint64],
    shares: NDArray[np.float64],
) -> None:
    """Fill num_words [rows], stop_words [rows] as bits, and shares [rows, _SHARES]."""
    for row in range(offsets.size - 1):
        start, stop = offsets[row], offsets[row + 1]
        words = split_words(data, start, stop, classes, folded, unicode_words)
        lines = split_lines(data, start, stop, classes)
        num_words[row] = words.hashes.size
        for word in words.hashes:
            stop_words[row] |= stop_bits[slot_of(stop_keys, word)]
        bullets = ellipses = 0
        for bits in lines.bits:
            bullets += bits & STARTS_WITH_BULLET != 0
            ellipses += bits & ENDS_WITH_ELLIPSIS != 0
        equal_lines, line_chars = duplicates(lines.hashes, lines.chars)
        equal_paragraphs, paragraph_chars = duplicates(lines.paragraphs, lines.paragraph_chars)
        of_words, of_lines = max(1, words.hashes.size), max(1, lines.hashes.size)
        of_paragraphs, of_chars = max(1, lines.paragraphs.size), max(1, lines.text_chars)
        out = shares[row]
        out[0] = words.ends[-1] / of_words
        out[1] = words.hash_signs / of_words
        out[2] = words.ellipses / of_words
        out[3] = bullets / of_lines
        out[4] = ellipses / of_lines
        out[5] = words.with_letter / of_words
        out[6] = equal_lines / of_lines
        out[7] = line_chars / of_chars
        out[8] = equal_paragraphs / of_paragraphs
        out[9] = paragraph_chars / of_chars
        repeated_ngrams(words.hashes, words.ends, out[_FIRST_NGRAM:])
        for number in range(_FIRST_NGRAM, out.size):
            out[number] /= of_chars
