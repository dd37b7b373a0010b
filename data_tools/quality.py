"""How good a document is, by a fastText classifier: the probability of the label that means good."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from pydantic import Field

from data_tools.documents import with_column
from data_tools.fasttext_model import FastTextModel
from data_tools.flow import Flow
from megalite.config.section import Section
from megalite.errors import DataError, nearest


class QualitySettings(Section):
    """A quality classifier."""

    model: str = Field(description="file of a supervised fastText model (.bin or .ftz)")
    label: str = Field(description="the label that means good, without its __label__")
    max_chars: int = Field(
        0, ge=0, description="look at no more than this from the start of a document; 0 for all of it"
    )


class Quality:
    """The operation: adds `quality` float32, from 0 to 1. Documents are seen as one line of words.

    Raises:  DataError if fastText is not installed, the model cannot be loaded, or has not the label
    """

    def __init__(self, settings: QualitySettings) -> None:
        self._model = FastTextModel(settings.model)
        self._label, self._max_chars = settings.label, settings.max_chars or None
        if settings.label not in self._model.labels:
            told = nearest(settings.label, self._model.labels)
            raise DataError(f"{settings.model} has no label {settings.label!r}; {told}")

    def __call__(self, batch: pa.RecordBatch, flow: Flow) -> pa.RecordBatch:
        scores = [
            self._model.probability(text[: self._max_chars], self._label)
            for text in batch.column("text").to_pylist()
        ]
        flow.tally("quality", (f"{np.floor(score * 10) / 10:.1f}" for score in scores))
        return with_column(batch, "quality", pa.array(scores, pa.float32()))
