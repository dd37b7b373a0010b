"""All statistics of a document as one operation of the step `clean`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyarrow as pa

from data_tools.flow import Flow
from data_tools.statistics import c4, fineweb, gopher
from data_tools.statistics.c4 import C4Edit
from data_tools.statistics.fineweb import FineWebStatistics
from data_tools.statistics.gopher import GopherStatistics
from data_tools.statistics.phrases import digest
from data_tools.statistics.settings import StatisticsSettings

Operation = Callable[[pa.RecordBatch, Flow], pa.RecordBatch]

# What measures, and the columns it adds; each is on or off by a setting of its name, in this order.
_MEASURES: dict[str, tuple[Callable[[StatisticsSettings], Operation], Sequence[str]]] = {
    "gopher": (GopherStatistics, gopher.COLUMNS),
    "c4": (C4Edit, c4.COLUMNS),
    "fineweb": (FineWebStatistics, fineweb.COLUMNS),
}


class Statistics:
    """Gopher's on the text as it comes, C4's edits, FineWeb's on the text they leave; those that are on."""

    def __init__(self, settings: StatisticsSettings) -> None:
        self._operations = [
            make(settings) for name, (make, _) in _MEASURES.items() if getattr(settings, name)
        ]

    def __call__(self, batch: pa.RecordBatch, flow: Flow) -> pa.RecordBatch:
        """The batch with columns of numbers; every row stays."""
        for operation in self._operations:
            batch = operation(batch, flow)
        return batch


def columns(settings: StatisticsSettings) -> list[str]:
    """The names of the columns that are added."""
    return [name for on, (_, names) in _MEASURES.items() if getattr(settings, on) for name in names]


def fingerprints(settings: StatisticsSettings) -> list[str]:
    """What identifies the files the settings name, to be among a step's inputs.

    Raises:  DataError if one cannot be read
    """
    return [digest(settings.bad_words)] if settings.c4 and settings.bad_words is not None else []
