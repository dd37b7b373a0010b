"""The clean step: what each document is, and its text as training shall see it.

Operations, in this order and each on the text that the ones before left:

normalise   first, for all others read what it wrote
language    of the whole text, before masks in English are put into it
quality     of the text as its author wrote it, which is what classifiers were trained on
statistics  Gopher's, C4's and FineWeb's, with the lines and citations that C4 takes out; by language
pii         last, so that what the others measure does not depend on what is masked

An operation adds columns and may edit text, and never drops a document: the filter step does, by those
columns. What has no text is dropped here nonetheless: before it is measured, and after C4's edits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field

from data_tools.characters import UNICODE_VERSION
from data_tools.crew import Crew
from data_tools.documents import read_part, texts
from data_tools.fasttext_model import digest_of
from data_tools.flow import KEPT, Flow
from data_tools.language import Language, LanguageSettings, langid_version
from data_tools.mojibake import FTFY_VERSION
from data_tools.normalise import Normalise, NormaliseSettings
from data_tools.pii import Pii, PiiSettings
from data_tools.quality import Quality, QualitySettings
from data_tools.statistics.operation import Statistics, columns, fingerprints
from data_tools.statistics.settings import StatisticsSettings
from data_tools.step import Step, read_report, step_parts
from megalite.config.section import Section

KIND = "clean"
VERSION = 2
EMPTY, EMPTIED = "empty", "every line removed"

# What changes a batch: adds columns, edits text, counts into the flow. Built once a process.
Operation = Callable[[pa.RecordBatch, Flow], pa.RecordBatch]
OPERATIONS: dict[str, Callable[[Any], Operation]] = {
    "normalise": Normalise,
    "language": Language,
    "quality": Quality,
    "statistics": Statistics,
    "pii": Pii,
}

# `pii = false` turns an operation off, `pii = true` means its defaults, as an empty table does.
Switch = BeforeValidator(lambda value: ({} if value else None) if isinstance(value, bool) else value)


class CleanSettings(Section):
    """What is done to every document; each operation is a table, or true or false."""

    normalise: Annotated[NormaliseSettings | None, Switch] = Field(
        NormaliseSettings(), description="write text in one way"
    )
    language: Annotated[LanguageSettings | None, Switch] = Field(
        LanguageSettings(), description="find each document's language"
    )
    quality: Annotated[QualitySettings | None, Switch] = Field(
        None, description="score each document with a classifier"
    )
    statistics: Annotated[StatisticsSettings | None, Switch] = Field(
        StatisticsSettings(), description="measure each document for the filter, and edit lines as C4 does"
    )
    pii: Annotated[PiiSettings | None, Switch] = Field(
        PiiSettings(), description="mask personal data and keys"
    )


def run(settings: CleanSettings, source: Path, out: Path, crew: Crew, renew: bool = False) -> Flow:
    """Clean every part of a finished step into `out`.

    Raises:  DataError if a package or model that an operation needs is missing, before any work
    """
    made_with = [f"unicode {UNICODE_VERSION}"]
    if settings.normalise is not None:
        made_with.append(f"ftfy {FTFY_VERSION}")
    if settings.language is not None and settings.language.engine == "langid":
        made_with.append(f"py3langid {langid_version()}")
    if settings.statistics is not None:
        made_with += fingerprints(settings.statistics)
    step = Step(out, KIND, VERSION, _without_paths(settings), [source, *made_with], crew, renew=renew)
    if step.is_finished:
        return Flow.from_json(read_report(out))
    check(settings)
    parts = step_parts(source)
    if crew.workers > 1 and len(parts) > 1:
        _operations.cache_clear()  # this process has no use for the models
    return step.finish(step.map_parts(parts, partial(_clean, settings)))


def check(settings: CleanSettings) -> None:
    """Raises:  DataError if a package or model that an operation needs is missing"""
    _operations(settings.model_dump_json())


def added_columns(settings: CleanSettings) -> pa.Schema:
    """What documents have that went through, beside what they had; every statistic as float32."""
    numbers = [] if settings.statistics is None else columns(settings.statistics)
    for is_on, name in (
        (settings.language, "language_score"),
        (settings.quality, "quality"),
        (settings.pii, "pii_count"),
    ):
        numbers += [name] if is_on is not None else []
    language = [pa.field("language", pa.string())] if settings.language is not None else []
    return pa.schema([*language, *(pa.field(name, pa.float32()) for name in numbers)])


def _clean(settings: CleanSettings, path: Path, flow: Flow) -> Iterator[pa.RecordBatch]:
    operations = dict(_operations(settings.model_dump_json()))
    normalise = operations.pop("normalise", None)
    for batch in read_part(path):
        out = normalise(batch, flow) if normalise else batch
        verdicts = np.where(_is_empty(out), 0, KEPT)
        out = out.filter(pa.array(verdicts == KEPT))
        for operation in operations.values():
            out = operation(out, flow)
        is_emptied = _is_empty(out)
        verdicts[np.flatnonzero(verdicts == KEPT)[is_emptied]] = 1
        out = out.filter(pa.array(~is_emptied))
        flow.pass_batch(batch, verdicts, [EMPTY, EMPTIED], out)
        flow.tally_lengths(out)
        yield out


@cache
def _operations(settings_json: str) -> dict[str, Operation]:
    """Those that are on, in order, ready for work; once a process."""
    settings = CleanSettings.model_validate_json(settings_json)
    sections = {name: getattr(settings, name) for name in OPERATIONS}
    return {name: OPERATIONS[name](section) for name, section in sections.items() if section is not None}


def _is_empty(batch: pa.RecordBatch) -> NDArray[np.bool_]:
    """Which rows have nothing but white space, bool [rows]."""
    column = batch.column("text")
    is_blank: NDArray[np.bool_] = pc.utf8_is_space(column).to_numpy(zero_copy_only=False).copy()
    is_blank[texts(column).sizes == 0] = True
    return is_blank


def _without_paths(settings: CleanSettings) -> CleanSettings:
    """Models by what they are instead of where they lie, for the step to be the same on another machine."""
    changes = {}
    for name in OPERATIONS:
        section = getattr(settings, name)
        if path := getattr(section, "model", None):
            changes[name] = section.model_copy(update={"model": digest_of(path)})
    return settings.model_copy(update=changes)
