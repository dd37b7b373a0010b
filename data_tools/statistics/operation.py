"""All statistics of a document as one operation of the step `clean`."""

from __future__ import annotations

import pyarrow as pa

from data_tools.flow import Flow
from data_tools.statistics import c4, fineweb, gopher
from data_tools.statistics.c4 import C4Edit
from data_tools.statistics.fineweb import FineWebStatistics
from data_tools.statistics.gopher import GopherStatistics
from data_tools.statistics.phrases import digest
from data_tools.statistics.settings import StatisticsSettings

PREFIXES = ("gopher_", "c4_", "fineweb_")  # of the columns


class Statistics:
    """Gopher's on the text as it comes, C4's edits, FineWeb's on the text they leave; those that are on."""

    def __init__(self, settings: StatisticsSettings) -> None:
        choice = (
            (settings.gopher, GopherStatistics),
            (settings.c4, C4Edit),
            (settings.fineweb, FineWebStatistics),
        )
        self._operations = [make(settings) for is_on, make in choice if is_on]

    def __call__(self, batch: pa.RecordBatch, flow: Flow) -> pa.RecordBatch:
        """The batch with columns of numbers; every row stays."""
        for operation in self._operations:
            batch = operation(batch, flow)
        return batch


def columns(settings: StatisticsSettings) -> list[str]:
    """The names of the columns that are added."""
    choice = (
        (settings.gopher, gopher.COLUMNS),
        (settings.c4, c4.COLUMNS),
        (settings.fineweb, fineweb.COLUMNS),
    )
    return [name for is_on, names in choice if is_on for name in names]


def fingerprints(settings: StatisticsSettings) -> list[str]:
    """What identifies the files the settings name, to be among a step's inputs.

    Raises:  DataError if one cannot be read
    """
    return [digest(settings.bad_words)] if settings.c4 and settings.bad_words is not None else []
