"""A recipe's steps in their order, each imported when it is asked for: all take several times as long as one.

After ingest each reads the one before it, but for mix and search, which both read the shards.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_tools.flow import Flow
    from megalite.config.section import Section

# The module that has the step's settings, and runs it by its `run`.
_PLACES = {
    "ingest": ("ingest.step", "IngestSettings"),
    "clean": ("clean", "CleanSettings"),
    "filter": ("filter", "FilterSettings"),
    "exact": ("dedup.exact", "ExactSettings"),
    "near": ("dedup.near", "NearSettings"),
    "spans": ("dedup.spans", "SpanSettings"),
    "decontaminate": ("decontaminate", "DecontaminateSettings"),
    "buckets": ("mix.buckets", "BucketSettings"),
    "tokenize": ("tokenize_parts", "TokenizeSettings"),
    "mix": ("mix.mixture", "MixSettings"),
    "search": ("mix.search", "SearchSettings"),
}

STEPS = tuple(_PLACES)


def find_step(name: str) -> tuple[type[Section], Callable[..., Flow]]:
    """A step's settings and what runs it.

    Raises:  KeyError if there is no such step
    """
    path, settings = _PLACES[name]
    module = import_module(f"data_tools.{path}")
    return getattr(module, settings), module.run
