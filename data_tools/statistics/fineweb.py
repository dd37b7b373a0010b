"""The statistics FineWeb added to Gopher's and C4's, of the text as C4's edits left it.

Source:  Penedo et al. 2024, section 3.5 and datatrove's code.

fineweb_terminal_lines         share of lines that end with terminal punctuation: Unicode's property
                               Sentence_Terminal. Quotation marks are none, as in datatrove today
fineweb_short_lines            share of lines of 30 characters or fewer
fineweb_duplicate_line_chars   characters in lines equal to an earlier one, as a share of those that are not
                               "\\n". The paper's threshold is 0.1, datatrove's 0.01
fineweb_newlines_per_word      "\\n" a word
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_tools.compiled import compiled
from data_tools.documents import texts, with_column
from data_tools.flow import Flow
from data_tools.statistics.hashing import readonly
from data_tools.statistics.lines import ENDS_A_SENTENCE, line_classes, split_lines
from data_tools.statistics.repeats import duplicates
from data_tools.statistics.settings import StatisticsSettings
from data_tools.statistics.words import count_words

SHORT_LINE_CHARS = 30
COLUMNS = (
    "fineweb_terminal_lines",
    "fineweb_short_lines",
    "fineweb_duplicate_line_chars",
    "fineweb_newlines_per_word",
)


class FineWebStatistics:
    """Adds the columns above, float32."""

    def __init__(self, settings: StatisticsSettings) -> None:
        self._unicode_words = settings.word_splitter == "unicode"

    def __call__(self, batch: pa.RecordBatch, flow: Flow) -> pa.RecordBatch:
        """Shapes:  columns [rows]"""
        data, offsets = texts(batch.column("text"))
        shares = np.zeros((batch.num_rows, len(COLUMNS)))
        _measure(readonly(data), offsets, line_classes(), self._unicode_words, shares)
        for number, name in enumerate(COLUMNS):
            batch = with_column(batch, name, shares[:, number].astype(np.float32))
        return batch


@compiled
def _measure(
    data: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    classes: NDArray[np.uint8],
    unicode_words: bool,
    shares: NDArray[np.float64],
) -> None:
    """Fill shares [rows, COLUMNS]."""
    for row in range(offsets.size - 1):
        start, stop = offsets[row], offsets[row + 1]
        num_words = count_words(data, start, stop, classes, unicode_words)
        lines = split_lines(data, start, stop, classes)
        terminal = short = 0
        for number in range(lines.hashes.size):
            terminal += lines.bits[number] & ENDS_A_SENTENCE != 0
            short += lines.chars[number] <= SHORT_LINE_CHARS
        _, chars = duplicates(lines.hashes, lines.chars)
        shares[row, 0] = terminal / max(1, lines.hashes.size)
        shares[row, 1] = short / max(1, lines.hashes.size)
        shares[row, 2] = chars / max(1, lines.text_chars - lines.newlines)
        shares[row, 3] = lines.newlines / max(1, num_words)
