"""Take out of a corpus what a model will be judged by: documents that hold evaluation text, or that text.

A document is hit where it has `ngram_words` words in a row in common with an evaluation item, in lower case
and without punctuation (GPT-3's rule, Brown et al. 2020, appendix C). A shorter item is hit as a whole, if it
has `min_words`; items shorter still are only counted.

Word n-grams are compared by two 64-bit hashes; for 10⁷ of the evaluation's and 10¹³ of the corpus, that a
hit is none has probability 10⁻¹⁸, but for words with equal 64-bit hashes. Memory of a worker: 50 bytes an
evaluation n-gram, and a row group with 24 bytes a word of it.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from data_tools.compiled import compiled
from data_tools.crew import Crew
from data_tools.dedup.cut import covered, cut_out, show_cuts, word_spans
from data_tools.dedup.shingles import BASES, SPLITTER, Words, mixed, split_rows, split_words, windows
from data_tools.dedup.shuffle import ShuffleWriter, read_rows, remove_shuffle
from data_tools.documents import read_part, text_column, texts, with_column
from data_tools.flow import KEPT, Flow
from data_tools.ingest.unpack import BrokenStreamError, open_bytes
from data_tools.step import Step, read_report, step_parts
from megalite.config.section import Section
from megalite.errors import DataError

KIND = "decontaminate"
VERSION = 2
CONTAMINATED, SHORT = "contaminated", "too few words left"
HITS = "hits"
FILTER_BITS = 16  # of the filter before the search, for each n-gram: 6 % of other windows pass it


class EvaluationFile(Section):
    """Texts that a model is judged by."""

    path: str = Field(
        description="a .jsonl file, or a text file, whose items blank lines divide; plain, .gz or .zst"
    )
    fields: tuple[str, ...] = Field(
        (), strict=False, description="of a .jsonl file: what makes up an item, strings or lists of them"
    )

    @property
    def name(self) -> str:
        """What reports call it."""
        return Path(self.path).name


class DecontaminateSettings(Section):
    """What counts as contaminated, and what becomes of it."""

    files: tuple[EvaluationFile, ...] = Field(
        min_length=1, strict=False, description="evaluation files: [{path, fields}]"
    )
    ngram_words: int = Field(13, ge=2, le=64, description="words in a row that make a hit")
    min_words: int = Field(8, ge=2, description="an item of fewer words than this hits nothing")
    max_overlap: float = Field(
        0.0, ge=0, lt=1, description="share of a document's words within hits that is let pass; 0: no hit is"
    )
    mode: Literal["drop", "cut"] = Field(
        "drop", description="drop contaminated documents, or cut the hits out of them"
    )
    min_words_left: int = Field(
        50, ge=1, description='with "cut", documents of which fewer words are left are dropped'
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        names = [file.name for file in self.files]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two evaluation files are named {twice[0]}; rename one, reports go by the name")
        if self.min_words > self.ngram_words:
            raise ValueError(f"min_words={self.min_words} is above ngram_words={self.ngram_words}")
        return self


class Item(NamedTuple):
    """A text of an evaluation file, and what reports call it, such as "line 7"."""

    name: str
    text: str


class Table(NamedTuple):
    """Evaluation n-grams of one length, sorted, and a filter of bits that nearly all others fail.

    Shapes:  grams uint64 [n-grams, 3]: two hashes and the item's number; bits uint8 [2^(64 - shift) / 8];
             ends int64 [n-grams]: where the n-grams equal to each end
    """

    size: int
    grams: NDArray[np.uint64]
    bits: NDArray[np.uint8]
    shift: np.uint64
    ends: NDArray[np.int64]


def run(settings: DecontaminateSettings, source: Path, out: Path, crew: Crew, renew: bool = False) -> Flow:
    """Write the source's parts without what evaluation files hold.

    Raises:  DataError naming an evaluation file, its line and what is wrong with it
    """
    items = {file.name: read_items(file) for file in settings.files}
    digests = [hashlib.sha256(json.dumps(some).encode()).hexdigest() for some in items.values()]
    # What is in the files counts, not where they lie.
    placeless = tuple(file.model_copy(update={"path": file.name}) for file in settings.files)
    known = settings.model_copy(update={"files": placeless})
    step = Step(out, KIND, VERSION, known, [source, *digests], crew, renew=renew)
    if step.is_finished:
        return Flow.from_json(read_report(out))
    index = out / "index" / "ngrams.bin"
    all_texts = [item.text for some in items.values() for item in some]
    found = step.once("index", partial(_write_index, settings, all_texts, index))
    names = [f"{name} {item.name}" for name, some in items.items() for item in some]
    flows = step.map_parts(step_parts(source), partial(_clean_part, settings, names, index))
    if crew.is_first:
        remove_shuffle(index.parent)
    total = Flow()
    for flow in flows:
        total.merge(flow)
    hits = total.histograms.pop(HITS, {})
    return step.finish([total], splitter=SPLITTER, evaluation=_tell(items, hits, set(found["too_short"])))


def check(settings: DecontaminateSettings) -> None:
    """Raises:  DataError naming an evaluation file that cannot be read, its line and what is wrong with it"""
    for file in settings.files:
        read_items(file)


def read_items(file: EvaluationFile) -> list[Item]:
    """The texts of an evaluation file.

    Raises:  DataError naming the file and the line if it cannot be read, holds nothing, or a field is missing
    or no text
    """
    if not (items := _read_items(file)):
        raise DataError(f"the evaluation file {file.path} has no text; name another, or leave it out")
    return items


def _read_items(file: EvaluationFile) -> list[Item]:
    path = Path(file.path)
    try:
        with open_bytes(path) as stream, io.TextIOWrapper(stream, encoding="utf-8") as unpacked:
            text = unpacked.read()
    except (BrokenStreamError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the evaluation file {path}: {error}") from None
    name = path.name.lower()
    if not name.removesuffix(".gz").removesuffix(".zst").endswith(".jsonl"):
        if file.fields:
            raise DataError(f"{path} is read as text and has no fields; leave them out, or name it .jsonl")
        paragraphs = [one for one in re.split(r"\n(?:[^\S\n]*\n)+", text) if one.strip()]
        return [Item(f"paragraph {number}", one) for number, one in enumerate(paragraphs, 1)]
    if not file.fields:
        raise DataError(f"{path} needs fields: which of each line make up an item")
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [
        Item(f"line {number}", _item_text(f"{path}:{number}", line, file.fields)) for number, line in lines
    ]


def _item_text(where: str, line: str, fields: tuple[str, ...]) -> str:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise DataError(f"{where} is {type(values).__name__}, not an object with fields")
    some: list[str] = []
    for field in fields:
        value = values.get(field)
        for one in value if isinstance(value, list) else [value]:
            if not isinstance(one, str):
                raise DataError(f"{where} has no text in {field}; its fields are {', '.join(values)}")
            some.append(one)
    return "\n".join(some)


def _write_index(settings: DecontaminateSettings, items: list[str], path: Path) -> dict[str, Any]:
    """Rows of (hash, hash, item) of every n-gram, to a bucket for each length."""
    encoded = [item.encode("utf-8", "replace") for item in items]  # JSON can spell half a surrogate pair
    ends = np.cumsum([len(item) for item in encoded], dtype=np.int64)
    data = np.frombuffer(b"".join(encoded) + b" ", dtype=np.uint8)
    words = split_words(data, np.concatenate([[0], ends[:-1]]), ends)
    counts = np.diff(words.bounds)
    with ShuffleWriter(path, settings.ngram_words + 1) as writer:
        for size in range(settings.min_words, settings.ngram_words + 1):
            halves = [windows(words.hashes, words.bounds, size, base)[0] for base in (0, 1)]
            bounds = windows(words.hashes, words.bounds, size)[1]
            owner = np.repeat(np.arange(len(items), dtype=np.uint64), np.diff(bounds))
            rows = np.stack([*halves, owner], axis=1)
            if size < settings.ngram_words:  # short items as a whole
                rows = rows[counts[owner.astype(np.int64)] == size]
            rows = rows[np.lexsort((rows[:, 2], rows[:, 1], rows[:, 0]))]
            writer.write(np.full(len(rows), size, dtype=np.int64), rows)
    return {"too_short": np.flatnonzero(counts < settings.min_words).tolist()}


def _load_tables(settings: DecontaminateSettings, path: Path) -> list[Table]:
    tables = []
    for size in range(settings.min_words, settings.ngram_words + 1):
        grams = read_rows([path], size, 3)
        if len(grams):
            width = max(10, (len(grams) * FILTER_BITS - 1).bit_length())
            flags = np.zeros(1 << width, dtype=np.bool_)
            flags[grams[:, 0] >> np.uint64(64 - width)] = True
            bits = np.packbits(flags, bitorder="little")
            is_last = np.append((grams[1:, :2] != grams[:-1, :2]).any(axis=1), True)
            last = np.flatnonzero(is_last)
            ends = 1 + last[np.cumsum(is_last) - is_last]
            tables.append(Table(size, grams, bits, np.uint64(64 - width), ends))
    return tables


def _clean_part(
    settings: DecontaminateSettings, names: list[str], index: Path, path: Path, flow: Flow
) -> Iterator[pa.RecordBatch]:
    """A step's transform: the part's documents without those that are hit, or without what hit them."""
    tables = _load_tables(settings, index)
    for batch in read_part(path):
        text = texts(batch.column("text"))
        words = split_rows(text, np.arange(batch.num_rows))
        is_hit, pairs = find_hits(words, tables)
        items, numbers = np.unique(pairs[:, 1], return_counts=True)
        flow.tally_counts(HITS, zip(map(str, items.tolist()), numbers.tolist(), strict=True))
        hit = np.concatenate([[0], np.cumsum(is_hit)])[words.bounds]
        hit, total = np.diff(hit), np.diff(words.bounds)
        is_bad = hit > settings.max_overlap * total
        verdicts = np.full(batch.num_rows, KEPT)
        changed = batch
        if settings.mode == "drop":
            verdicts[is_bad] = 0
        elif is_bad.any():
            verdicts[is_bad & (total - hit < settings.min_words_left)] = 1
            is_cut = is_hit & np.repeat(is_bad, total)
            rows, starts, ends = word_spans(words, is_cut, text.offsets[1:])
            changed = with_column(batch, "text", text_column(*cut_out(text, starts, ends)))
            show_cuts(flow, "evaluation text", batch, rows, starts, ends)
            flow.count("spans cut", len(starts))
            flow.count("documents cut", int((is_bad & (verdicts == KEPT)).sum()))
        flow.count("documents with hits that were let pass", int(((hit > 0) & ~is_bad).sum()))
        why = [""] * batch.num_rows
        for row, item in pairs[np.unique(pairs[:, 0], return_index=True)[1]].tolist():
            why[row] = f"{hit[row]} of {total[row]} words, first of {names[item]}"
        out = changed.filter(pa.array(verdicts == KEPT)) if (verdicts != KEPT).any() else changed
        flow.pass_batch(batch, verdicts, [CONTAMINATED, SHORT], out, why)
        yield out


def find_hits(words: Words, tables: list[Table]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which words lie within hits, bool [words]; and who hit which row, int64 [pairs, 2] of row and item."""
    is_hit = np.zeros(len(words.hashes), dtype=np.bool_)
    items: dict[int, list[NDArray[np.uint64]]] = {}  # by row, for what many items begin with hits for each
    for table in tables:
        hashes, bounds = windows(words.hashes, words.bounds, table.size)
        found = np.empty((len(hashes), 3), dtype=np.int64)
        known = table.grams, table.bits, table.shift, table.size
        found = found[: _find(words.hashes, words.bounds, hashes, bounds, *known, BASES[1], found)]
        is_hit |= covered(len(is_hit), found[:, 1], found[:, 1] + table.size)
        for row, first in np.unique(found[:, [0, 2]], axis=0).tolist():
            items.setdefault(row, []).append(table.grams[first : table.ends[first], 2])
    pairs = [np.zeros((0, 2), dtype=np.int64)]
    for row in sorted(items):
        each = np.unique(np.concatenate(items[row])).astype(np.int64)
        pairs.append(np.stack([np.full_like(each, row), each], axis=1))
    return is_hit, np.concatenate(pairs)


def _tell(items: dict[str, list[Item]], hits: dict[str, int], too_short: set[int]) -> dict[str, Any]:
    """For the report: of every evaluation file its items, those too short, and the documents each one hit."""
    told, number = {}, 0
    for name, some in items.items():
        documents = {item.name: hits.get(str(place)) for place, item in enumerate(some, number)}
        told[name] = {
            "items": len(some),
            "too_short": len(too_short & set(range(number, number + len(some)))),
            "items_that_hit": sum(count is not None for count in documents.values()),
            "documents_hit_by": {item: count for item, count in documents.items() if count is not None},
        }
        number += len(some)
    return told


@compiled
def _find(
    words: NDArray[np.uint64],
    bounds: NDArray[np.int64],
    hashes: NDArray[np.uint64],
    window_bounds: NDArray[np.int64],
    grams: NDArray[np.uint64],
    bits: NDArray[np.uint8],
    shift: np.uint64,
    size: int,
    base: np.uint64,
    found: NDArray[np.int64],
) -> int:
    """Fill (row, first word, first such n-gram of the table); how many."""
    count = 0
    for row in range(len(bounds) - 1):
        for window in range(window_bounds[row], window_bounds[row + 1]):
            place = hashes[window] >> shift
            if not bits[place >> np.uint64(3)] >> np.uint8(place & np.uint64(7)) & 1:
                continue
            word = bounds[row] + window - window_bounds[row]
            second = np.uint64(0)
            for next_word in range(word, word + size):
                second = second * base + words[next_word]
            second = mixed(second)
            low, high = 0, len(grams)
            while low < high:
                middle = (low + high) // 2
                first = grams[middle, 0]
                if first < hashes[window] or (first == hashes[window] and grams[middle, 1] < second):
                    low = middle + 1
                else:
                    high = middle
            if low < len(grams) and grams[low, 0] == hashes[window] and grams[low, 1] == second:
                found[count, 0], found[count, 1], found[count, 2] = row, word, low
                count += 1
    return count
