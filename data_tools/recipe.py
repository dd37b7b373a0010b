"""A recipe: one TOML file that says where a corpus comes from and what is done to it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import pyarrow as pa
from pydantic import Field, model_validator

from data_tools.clean import CleanSettings, added_columns
from data_tools.decontaminate import DecontaminateSettings
from data_tools.dedup import near
from data_tools.dedup.exact import ExactSettings
from data_tools.dedup.near import NearSettings
from data_tools.dedup.spans import SpanSettings
from data_tools.filter import FilterSettings, rules_of, stays
from data_tools.ingest import IngestSettings
from data_tools.ingest.plan import check_apart
from data_tools.mix import buckets
from data_tools.mix.buckets import BucketSettings
from data_tools.mix.groups import check_names
from data_tools.mix.mixture import MixSettings
from data_tools.mix.search import SearchSettings
from data_tools.tokenize_parts import TokenizeSettings
from megalite.config.section import Section
from megalite.config_file import load_toml
from megalite.errors import DataError


class Recipe(Section):
    """A corpus. A step whose table is missing is left out; an empty table takes the defaults."""

    out: str = Field(min_length=1, description="folder of the corpus and of every step's work")
    ingest: IngestSettings = Field(description="where text comes from")
    clean: CleanSettings | None = Field(None, description="mend and measure texts")
    filter: FilterSettings | None = Field(None, description="leave out documents by what was measured")
    exact: ExactSettings | None = Field(None, description="keep equal documents, paragraphs or lines once")
    near: NearSettings | None = Field(None, description="keep one of documents that are nearly equal")
    spans: SpanSettings | None = Field(None, description="cut out long spans that occurred before")
    decontaminate: DecontaminateSettings | None = Field(None, description="leave out what evaluations ask")
    buckets: BucketSettings | None = Field(None, description="sort documents for a curriculum")
    tokenize: TokenizeSettings | None = Field(None, description="make training and held-out shards")
    mix: MixSettings | None = Field(None, description="plan a run's mixture of sources")
    search: SearchSettings | None = Field(None, description="look for better weights with many tiny runs")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for later in ("mix", "search"):
            if getattr(self, later) is not None and self.tokenize is None:
                raise ValueError(f"{later}: there is nothing to mix without shards; add a [tokenize] table")
        if self.filter is not None and self.clean is None:
            raise ValueError("filter: nothing is measured to judge by; add a [clean] table")
        try:
            check_apart(self.ingest.sources, Path(self.out))
            self._check_columns()
            self._check_sources()
        except DataError as error:
            raise ValueError(str(error)) from None
        return self

    def _check_columns(self) -> None:
        """Raises:  DataError if a step looks at a column that no step before it adds"""
        where = "[clean]" if self.clean is not None else "a corpus without [clean]"
        columns = pa.schema([] if self.clean is None else added_columns(self.clean))
        if self.filter is not None:
            rules_of(self.filter, where, columns)
            columns = pa.schema(field for field in columns if stays(self.filter, field.name))
        if self.near is not None:
            near.check(self.near, columns, where)
        if self.buckets is not None:
            buckets.check(self.buckets, columns, where)

    def _check_sources(self) -> None:
        """Raises:  DataError if a mixture names a source that is not read, or orders buckets without any"""
        sources = [source.name for source in self.ingest.sources]
        if self.mix is not None:
            check_names(self.mix.weights, sources, "mix.weights")
            check_names(self.mix.source_epochs, sources, "mix.source_epochs")
            if self.mix.curriculum is not None and self.buckets is None:
                raise DataError("mix.curriculum orders buckets; add a [buckets] table")
        if self.search is not None:
            check_names(self.search.target, sources, "search.target")
            check_names(self.search.source_epochs, sources, "search.source_epochs")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe with `step.key=value` overrides.

    Raises:  ConfigError naming the file, line, key, value and remedy
    """
    return load_toml(Recipe, path, overrides)
