"""When each bucket is read: stages of a run in which a source's buckets shift, and its share does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from megalite.config.section import Section

Floats = NDArray[np.float64]


class Curriculum(Section):
    """The buckets of every source one after the other, softly."""

    order: Literal["ascending", "descending"] = Field(
        "ascending", description="from the lowest bucket (q0) to the highest, or the other way"
    )
    stages: int = Field(4, ge=2, le=64, description="equal parts of the run with shares of their own")
    softness: float = Field(
        0.3,
        ge=0,
        le=1,
        description="part of every bucket that is spread over the whole run: 0 strictly one after the other, "
        "1 no curriculum",
    )
    row_lens: tuple[int, ...] = Field(
        (),
        strict=False,
        description="tokens a row of each stage, e.g. growing with the documents; [] always seq_len",
    )


def couple(rows: Sequence[float] | Floats, columns: Sequence[float] | Floats, softness: float) -> Floats:
    """How much of each column falls into each row, such that both add up to what they should.

    A blend of the two extremes that do so: (1 − softness) · the monotone coupling, which fills the rows with
    the columns in order, and softness · the independent one, rows[i] · columns[j]. Neither blends into more
    or less of a column, so a cap on it holds whatever the softness.

    Shapes:  rows [r] and columns [c] each add up to 1; returns [r, c]
    """
    ends_r, ends_c = np.cumsum(rows), np.cumsum(columns)
    upper = np.minimum(ends_r[:, None], ends_c[None, :])
    lower = np.maximum((ends_r - rows)[:, None], (ends_c - columns)[None, :])
    monotone = np.maximum(upper - lower, 0.0)
    coupling: Floats = (1 - softness) * monotone + softness * np.outer(rows, columns)
    return coupling


def stage_parts(
    parts: Sequence[float] | Floats, stages: Sequence[int], order: str, softness: float, least: float
) -> Floats:
    """Samples of each bucket of one source in each stage.

    What would be less than `least` of a stage, which no mixture can express, goes to the source's largest
    bucket of that stage.

    Shapes:  parts [buckets], samples of each over the run; stages [stages], samples of all sources;
             returns [stages, buckets], rows in proportion to `stages`, columns adding up to `parts`
    """
    total, lengths = float(np.sum(parts)), np.array(stages, dtype=np.float64)
    if total == 0:
        return np.zeros((len(stages), len(parts)))
    columns = np.asarray(parts, dtype=np.float64) / total
    turn = 1 if order == "ascending" else -1
    found: Floats = total * couple(lengths / lengths.sum(), columns[::turn], softness)[:, ::turn]
    for row, length in zip(found, lengths, strict=True):
        slivers = row < least * length
        slivers[row.argmax()] = False
        row[row.argmax()] += row[slivers].sum()
        row[slivers] = 0
    return found
