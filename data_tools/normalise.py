"""One way of writing the same text: Unicode form, line ends, what cannot be seen, spaces, mojibake.

A compiled scan looks at every byte and finds the documents that any rule might change; the others, nearly
all of a clean corpus, are not touched. Rules are applied until a document stays as it is, so that doing it
twice is the same as doing it once.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field

from data_tools.characters import code_point
from data_tools.compiled import compiled
from data_tools.documents import text_column, texts, with_column
from data_tools.flow import Flow
from data_tools.mojibake import repair, signs
from megalite.config.section import Section

# What an edit does with a character, and the bit that says it was done.
KEEP, BREAK, CONTROL, INVISIBLE, SPACE, WHITE, WORD_BREAK = 0, 1, 2, 4, 8, 16, 32
TRAILING, BLANK, MOJIBAKE, UNICODE = 64, 128, 256, 512
EDITS = BREAK | CONTROL | INVISIBLE | SPACE | TRAILING | BLANK
RULES = {
    BREAK: "line ends",
    CONTROL: "controls",
    INVISIBLE: "invisible",
    SPACE: "spaces",
    TRAILING: "trailing spaces",
    BLANK: "blank lines",
    MOJIBAKE: "mojibake",
    UNICODE: "unicode form",
}

LF, CR, ESCAPE, BRACKET = 0x0A, 0x0D, 0x1B, 0x5B


class NormaliseSettings(Section):
    """How text is written."""

    form: Literal["NFC", "NFKC", "none"] = Field(
        "NFC",
        description="Unicode normalisation form; NFKC also folds ligatures, widths, superscripts",
    )
    mojibake: bool = Field(
        True, description="repair text that was decoded with the wrong encoding (ftfy's fix_encoding)"
    )
    invisible: bool = Field(
        True,
        description="remove byte order marks, soft hyphens, word joiners, noncharacters, and zero-width "
        "spaces outside of Thai, Lao, Khmer, Burmese; joiners and direction marks stay",
    )
    plain_spaces: bool = Field(
        True, description="non-breaking, thin and other such spaces become plain; the ideographic stays"
    )
    trailing_spaces: bool = Field(True, description="remove white space at the end of lines and of the text")
    max_blank_lines: int = Field(2, ge=0, le=100, description="blank lines in a row beyond this are left out")


class Normalise:
    """The operation: edits `text`, counts the documents that each rule changed."""

    def __init__(self, settings: NormaliseSettings) -> None:
        self._settings = settings
        self._actions = _actions(settings.invisible, settings.plain_spaces)
        # Below this nothing combines or decomposes.
        self._first_unstable = {"NFC": 0x300, "NFKC": 0x80, "none": 0x110000}[settings.form]
        pairs = signs()
        self._kind = pairs.kind
        self._pairs = pairs.pairs if settings.mojibake else np.zeros_like(pairs.pairs)

    def __call__(self, batch: pa.RecordBatch, flow: Flow) -> pa.RecordBatch:
        column = batch.column("text")
        done = np.zeros(batch.num_rows, dtype=np.uint16)
        # Each pass works on what the last one changed. It ends: a repair leaves fewer non-ASCII characters.
        rows, part = np.arange(batch.num_rows), column
        while rows.size:
            part, bits = self._once(part)
            changed = bits != 0
            rows, part = rows[changed], part.filter(pa.array(changed))
            done[rows] |= bits[changed]
            column = _put(column, rows, part)
        for bit, name in RULES.items():
            if count := int(np.count_nonzero(done & bit)):
                flow.count(f"normalise: {name}", count)
        return with_column(batch, "text", column) if done.any() else batch

    def _once(self, column: pa.Array) -> tuple[pa.Array, NDArray[np.uint16]]:
        """Every rule once, and what it did with each row."""
        found = self._scan(column)
        done = np.zeros(len(column), dtype=np.uint16)
        if (suspects := np.flatnonzero(found & MOJIBAKE)).size:
            column = _rewrite(column, suspects, self._repair, done, MOJIBAKE)
            found = self._scan(column) if done.any() else found
        if (found & EDITS).any():
            data, offsets = texts(column)
            out, bounds, edits = _edit(
                data,
                offsets,
                (found & EDITS).astype(np.uint16),
                self._actions,
                self._settings.trailing_spaces,
                self._settings.max_blank_lines,
            )
            column = text_column(out[: bounds[-1]].copy(), bounds)
            done |= edits
        if (suspects := np.flatnonzero(found & UNICODE)).size:
            form = self._settings.form
            column = _rewrite(column, suspects, lambda text: _in_form(form, text), done, UNICODE)
        return column, done

    def _repair(self, text: str) -> str:
        """Repair the lines with a sign of mojibake, whatever system's line ends they have and keep."""
        pieces = re.split("(\r\n|\r|\n)", text)
        lines = pieces[::2]
        for row in np.flatnonzero(self._scan(pa.array(lines, pa.string())) & MOJIBAKE).tolist():
            lines[row] = repair(lines[row])
        pieces[::2] = lines
        return "".join(pieces)

    def _scan(self, column: pa.Array) -> NDArray[np.uint16]:
        data, offsets = texts(column)
        settings = self._settings
        return _scan(
            data,
            offsets,
            self._actions,
            self._kind,
            self._pairs,
            self._first_unstable,
            MOJIBAKE if settings.mojibake else 0,
            settings.trailing_spaces,
            settings.max_blank_lines,
        )


def _in_form(form: Any, text: str) -> str:
    if unicodedata.is_normalized(form, text):
        return text
    # unicodedata orders marks in time that grows with the square of how many follow each other.
    text = _many_marks().sub(lambda run: "".join(sorted(run[0], key=unicodedata.combining)), text)
    return unicodedata.normalize(form, text)


@cache
def _many_marks() -> re.Pattern[str]:
    """More marks in a row than any language has; each has a class, by which normalisation orders them."""
    marks = filter(unicodedata.combining, map(chr, range(0x300, 0x20000)))
    return re.compile(f"[{''.join(marks)}]{{100,}}")


def _rewrite(
    column: pa.Array,
    rows: NDArray[np.int64],
    change: Callable[[str], str],
    done: NDArray[np.uint16],
    bit: int,
) -> pa.Array:
    """Some rows through a function of Python; those it changes get the bit."""
    old = [column[row].as_py() for row in rows.tolist()]
    new = [change(text) for text in old]
    changed = np.array([text != other for text, other in zip(new, old, strict=True)])
    done[rows[changed]] |= bit
    return _put(column, rows[changed], pa.array(new, pa.string()).filter(pa.array(changed)))


def _put(column: pa.Array, rows: NDArray[np.int64], values: pa.Array) -> pa.Array:
    """The column with other values in some rows, which ascend."""
    if not rows.size:
        return column
    mask = np.zeros(len(column), dtype=bool)
    mask[rows] = True
    return pc.replace_with_mask(column, pa.array(mask), values)


@cache
def _actions(invisible: bool, plain_spaces: bool) -> NDArray[np.uint8]:
    """What is done with each character, uint8 [0x110000]."""
    table = np.zeros(0x110000, dtype=np.uint8)
    table[:0x20] = table[0x7F:0xA0] = CONTROL
    # Line ends of other systems, and the controls that part lines and pages.
    table[[0x0A, 0x0B, 0x0C, 0x0D, 0x85, 0x2028, 0x2029]] = BREAK
    table[[0x09, 0x20, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000]] = WHITE
    if plain_spaces:
        table[[0xA0, *range(0x2000, 0x200B), 0x202F, 0x205F]] = SPACE
    if invisible:
        table[0x200B] = WORD_BREAK
        table[[0xAD, 0x2060, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)]] = INVISIBLE
        table[0xFDD0:0xFDF0] = table[0xFFFE::0x10000] = table[0xFFFF::0x10000] = INVISIBLE
    return table


@compiled
def _is_unspaced(point: int) -> bool:
    """Whether it is of a script of South-East Asia, where a zero-width space divides words."""
    return (
        0x0E00 <= point <= 0x0EFF
        or 0x1000 <= point <= 0x109F
        or 0x1780 <= point <= 0x17FF
        or 0x1950 <= point <= 0x1AAF
        or 0xA9E0 <= point <= 0xA9FF
        or 0xAA60 <= point <= 0xAADF
    )


@compiled
def _sequence(data: NDArray[np.uint8], at: int, end: int) -> int:
    """Bytes of a terminal's escape sequence, such as a colour; 1 if the escape begins none."""
    if at + 1 >= end or data[at + 1] != BRACKET:
        return 1
    last = at + 2
    while last < end and 0x20 <= data[last] < 0x40:
        last += 1
    return last - at + 1 if last < end and 0x40 <= data[last] < 0x7F else 1


@compiled
def _scan(
    data: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    actions: NDArray[np.uint8],
    kind: NDArray[np.uint8],
    pairs: NDArray[np.uint8],
    first_unstable: int,
    mojibake: int,
    trim: bool,
    max_blank: int,
) -> NDArray[np.uint16]:
    """What might have to be done with each row: bits, uint16 [rows]."""
    found = np.zeros(offsets.size - 1, dtype=np.uint16)
    for row in range(offsets.size - 1):
        at, end = offsets[row], offsets[row + 1]
        bits = breaks = last = 0  # newlines in a row; kind of the character before
        white = False  # whether that was white space
        while at < end:
            byte = data[at]
            if byte < 0x80:
                action = actions[byte]
                if action == KEEP:
                    breaks = last = 0
                    white = False
                elif action == WHITE:
                    breaks = last = 0
                    white = True
                else:
                    last = 0
                    if byte != LF:
                        bits |= action
                    elif white and trim:
                        bits |= TRAILING
                    white = False
                    breaks += 1
                    if breaks > max_blank + 1:
                        bits |= BLANK
                at += 1
                continue
            point, width = code_point(data, at)
            at += width
            breaks = 0
            action = actions[point]
            white = action in (WHITE, SPACE)
            if action != WHITE:
                bits |= action
            if point >= first_unstable:
                bits |= UNICODE
            this = kind[point]
            follows = at < end and data[at] < 0x80 and pairs[this, kind[data[at]]]
            if pairs[last, this] or follows or point < 0xA0:
                bits |= mojibake
            last = this
        if white and trim:
            bits |= TRAILING
        if bits & WORD_BREAK:
            bits |= INVISIBLE
        found[row] = bits
    return found


@compiled
def _edit(
    data: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    found: NDArray[np.uint16],
    actions: NDArray[np.uint8],
    trim: bool,
    max_blank: int,
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.uint16]]:
    """Rows with something found, edited; the bytes, the bounds and what was done with each row."""
    out = np.empty(offsets[-1] - offsets[0], dtype=np.uint8)
    bounds = np.zeros(offsets.size, dtype=np.int64)
    done = np.zeros(found.size, dtype=np.uint16)
    to = 0  # where the next byte goes
    for row in range(found.size):
        at, end = offsets[row], offsets[row + 1]
        if not found[row]:
            for byte in range(at, end):
                out[to] = data[byte]
                to += 1
            bounds[row + 1] = to
            continue
        bits = breaks = before = 0
        solid = to  # behind the last character of this line that is not white
        while at < end:
            point, width = code_point(data, at)
            action = actions[point]
            if action == WORD_BREAK:
                action = KEEP if _is_unspaced(before) else INVISIBLE
            if action == BREAK:
                if point == CR and at + 1 < end and data[at + 1] == LF:
                    bits |= BREAK  # the newline after it is the one
                else:
                    bits |= BREAK if point != LF else 0
                    if trim and to > solid:
                        bits |= TRAILING
                        to = solid
                    if breaks <= max_blank:
                        out[to] = LF
                        to += 1
                        breaks += 1
                    else:
                        bits |= BLANK
                    solid = to
                    before = LF
            elif action in (CONTROL, INVISIBLE):
                bits |= action
                if point == ESCAPE:
                    width = _sequence(data, at, end)
            else:
                if action == SPACE:
                    out[to] = 0x20
                    to += 1
                    bits |= SPACE
                else:
                    for byte in range(width):
                        out[to + byte] = data[at + byte]
                    to += width
                if action == KEEP or not trim:
                    solid = to
                    breaks = 0
                before = point
            at += width
        if trim and to > solid:
            bits |= TRAILING
            to = solid
        done[row] = bits
        bounds[row + 1] = to
    return out, bounds, done
