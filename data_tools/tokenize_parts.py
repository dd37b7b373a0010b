"""The last step: parts to token shards, a training and a held-out dataset for each group of documents.

data/GROUP/train, data/GROUP/valid    GROUP is a document's source, or source.bucket if there are buckets
tokenizer/                            what it was done with
pieces/                               what each task wrote, until it is joined

A document is held out if the hash of its names lies below `valid_fraction`. A group of documents of two or
more names holds out at least one and keeps at least one; a group of one name has no `valid`.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from data_tools.crew import Crew, Task
from data_tools.documents import read_part, text_bytes
from data_tools.encoding import REFERENCE, choose_engine
from data_tools.flow import Flow
from data_tools.hold_out import TRAIN, VALID, Split, exceptions, group_names, place, survey
from data_tools.pieces import PIECES, TOKENIZER, Job, join_group, part_columns, write_piece
from data_tools.step import Step, read_report, step_parts
from megalite.config.section import Section
from megalite.data.folder import disk_errors
from megalite.data.staging import commit_folder
from megalite.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, tokenizers_package, train_bpe

KIND = "tokenize"
VERSION = 3

# A task is a piece of every dataset it touches: large ones make large shards, many make work for all.
TASK_BYTES = 256 << 20
SMALL_TASK_BYTES = 8 << 20
MANY_TASKS = 64
# Reading more than this many times the text that a BPE is trained on does not make the sample better.
SCAN = 32


class TokenizeSettings(Section):
    """How text becomes tokens."""

    tokenizer: str = Field(
        "bpe",
        description="byte; bpe, trained on this corpus; or the path of a tokenizer.json, a folder that holds "
        "one, or a .tiktoken file",
    )
    pattern: str | None = Field(
        None, description="encoding whose expression cuts the text, for a .tiktoken file: cl100k_base …"
    )
    eos_token: str | None = Field(
        None, description="token that ends a document, if the tokenizer does not name it itself"
    )
    vocab_size: int = Field(32768, ge=257, description="tokens of a bpe that is trained")
    train_bytes: int = Field(
        32 << 20, gt=0, description="text that a bpe is trained on: a sample of what is not held out"
    )
    valid_fraction: float = Field(0.01, gt=0, lt=1, description="documents of every group that are held out")
    compression: Literal["lz4", "zstd", "zstd-shard"] | None = Field(
        None, description="of record batches (lz4, zstd) or of whole files for slow networks (zstd-shard)"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("pattern", "eos_token"):
            if self.tokenizer in ("byte", "bpe") and (value := getattr(self, name)) is not None:
                raise ValueError(
                    f"{name}={value!r} is of a tokenizer's file, not of tokenizer={self.tokenizer!r}"
                )
        return self


def run(settings: TokenizeSettings, source: Path, out: Path, crew: Crew, renew: bool = False) -> Flow:
    """Tokenize a finished step's documents; the report has the counts of every group and of the check.

    Ids are compared with the reference tokenizer's on a sample. If any differ, the whole corpus is encoded
    again by the reference, and this is told.

    Raises:  DataError if the tokenizer cannot be used, there are no documents, or more groups than folders
    """
    given = _given(settings)
    named = settings
    inputs: list[Path | str] = [source]
    if given is not None:  # by what it is, not by where it lies
        named = settings.model_copy(update={"tokenizer": given.kind, "pattern": None, "eos_token": None})
        inputs = [source, f"tokenizer {given.fingerprint}"]
    step = Step(out, KIND, VERSION, named, inputs, crew, renew=renew)
    if step.is_finished:
        return Flow.from_json(read_report(out))
    parts = step_parts(source)
    sizes = [text_bytes(path) for path in parts]
    surveyed = step.run(
        "survey",
        [
            Task(path.stem, partial(survey, path, settings.valid_fraction), size)
            for path, size in zip(parts, sizes, strict=True)
        ],
    )
    split = Split(settings.valid_fraction, exceptions(surveyed))
    made = step.once("tokenizer", partial(_make_tokenizer, settings, given, parts, sizes, split, out))
    job = Job(out, made["fingerprint"], made["vocab_size"], made["engine"], split, settings.compression)
    pieces = _plan(parts, sizes)
    written, check = _write_pieces(step, job, pieces)
    groups = _join(step, job, written, [name for name, _, _ in pieces])
    if crew.is_first:
        with disk_errors(out):
            shutil.rmtree(out / PIECES, ignore_errors=True)
    flows = [Flow.from_json(result["flow"]) for result in written]
    return step.finish(flows, tokenizer={**made, **check}, groups=groups)


def check(settings: TokenizeSettings) -> None:
    """Raises:  DataError if the tokenizer cannot be used, or none be trained"""
    if _given(settings) is None:
        tokenizers_package()


def _given(settings: TokenizeSettings) -> Tokenizer | None:
    """The tokenizer that the settings name, None if it is to be trained."""
    if settings.tokenizer == "bpe":
        return None
    if settings.tokenizer == "byte":
        return ByteTokenizer()
    return load_tokenizer(settings.tokenizer, settings.eos_token, settings.pattern)


def _make_tokenizer(
    settings: TokenizeSettings,
    given: Tokenizer | None,
    parts: Sequence[Path],
    sizes: Sequence[int],
    split: Split,
    out: Path,
) -> dict[str, Any]:
    """Save the tokenizer, trained if none is given; what it is, and the engine for it."""
    sample = _sample(parts, sizes, split, settings.train_bytes)
    tokenizer = given or train_bpe(sample, settings.vocab_size)
    folder, staging = out / TOKENIZER, out / f"{TOKENIZER}.tmp"
    with disk_errors(folder):
        for path in (folder, staging):
            shutil.rmtree(path, ignore_errors=True)
        staging.mkdir()
        tokenizer.save(staging)
        commit_folder(staging, folder)
    engine, reason = choose_engine(tokenizer)
    if reason:
        _tell(f"tokenizing by the reference tokenizer, which is slow: {reason}")
    return {
        "kind": tokenizer.kind,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "engine": engine,
        "reason": reason,
    }


def _sample(parts: Sequence[Path], sizes: Sequence[int], split: Split, wanted: int) -> Iterator[str]:
    """Texts to train on, about so many bytes of them: a choice by hash among documents not held out."""
    stride = max(1, sum(sizes) // (SCAN * wanted))
    share = wanted / max(1, sum(sizes[::stride]))
    spare: str | None = None
    for path in parts[::stride]:
        for batch in read_part(path, part_columns(path)):
            names, sources = batch.column("id").to_pylist(), batch.column("source").to_pylist()
            for row, (group, source, name) in enumerate(zip(group_names(batch), sources, names, strict=True)):
                if split.is_held_out(group, source, name):
                    continue
                if place(source, name, "sample") < share:
                    yield batch.column("text")[row].as_py()
                    spare = ""
                elif spare is None:
                    spare = batch.column("text")[row].as_py()
    if spare:  # the corpus is a few huge documents
        yield spare


def _plan(parts: Sequence[Path], sizes: Sequence[int]) -> list[tuple[str, list[Path], int]]:
    """Neighbouring parts as tasks of about equal bytes: name, parts, bytes. Depends on the corpus alone."""
    wanted = min(TASK_BYTES, max(SMALL_TASK_BYTES, sum(sizes) // MANY_TASKS))
    pieces: list[tuple[str, list[Path], int]] = []
    for path, size in zip(parts, sizes, strict=True):
        if not pieces or pieces[-1][2] + size > wanted:
            pieces.append((f"piece-{len(pieces):05d}", [], 0))
        name, mine, done = pieces[-1]
        pieces[-1] = (name, [*mine, path], done + size)
    return pieces


def _write_pieces(
    step: Step, job: Job, pieces: Sequence[tuple[str, list[Path], int]]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Results of all pieces, and what the check found, as keys of the report."""

    def write(phase: str, how: Job) -> list[dict[str, Any]]:
        return step.run(
            phase, [Task(name, partial(write_piece, how, name, paths), size) for name, paths, size in pieces]
        )

    written = write("pieces", job)
    checked = sum(result["checked"] for result in written)
    different = sum(result["different"] for result in written)
    check: dict[str, Any] = {"documents_checked": checked, "documents_different": different}
    if different:
        examples = [name for result in written for name in result["examples"]][:3]
        reason = f"the compiled encoder gave other ids for {different} of {checked} sampled documents"
        _tell(f"{reason} ({', '.join(examples)}); all is encoded again by the reference: please report this")
        check |= {"engine": REFERENCE, "reason": reason, "examples_different": examples}
        written = write("pieces again", job._replace(engine=REFERENCE))
    return written, check


def _join(
    step: Step, job: Job, written: Sequence[dict[str, Any]], names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Make the datasets; counts of every group, for the report."""
    total: dict[str, dict[str, Any]] = {}
    pieces: dict[str, dict[str, list[str]]] = {}
    for name, result in zip(names, written, strict=True):
        for group, kinds in result["groups"].items():
            for kind, counts in kinds.items():
                empty = {key: {"documents": 0, "tokens": 0, "bytes": 0} for key in (TRAIN, VALID)}
                mine = total.setdefault(group, empty)[kind]
                for key, number in counts.items():
                    mine[key] += number
                pieces.setdefault(group, {TRAIN: [], VALID: []})[kind].append(name)
    order = sorted(total)
    tasks = [
        Task(group, partial(join_group, job, group, pieces[group]), total[group][TRAIN]["bytes"])
        for group in order
    ]
    for group, joined in zip(order, step.run("join", tasks), strict=True):
        text_bytes, tokens = (sum(part[key] for part in total[group].values()) for key in ("bytes", "tokens"))
        total[group] = {**total[group], "bytes_per_token": text_bytes / tokens, **joined}
    return total


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
