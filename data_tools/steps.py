"""A recipe's steps by name, each imported when it is asked for: all take several times as long as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_tools.flow import Flow
    from megalite.config.section import Section


def find_step(name: str) -> tuple[type[Section], Callable[..., Flow]]:
    """A step's settings and what runs it.

    Raises:  KeyError if there is no such step
    """
    return _STEPS[name]()


def _ingest() -> tuple[type[Section], Callable[..., Flow]]:
    from data_tools.ingest import IngestSettings
    from data_tools.ingest.step import run

    return IngestSettings, run


def _clean() -> tuple[type[Section], Callable[..., Flow]]:
    from data_tools.clean import CleanSettings, run

    return CleanSettings, run


def _filter() -> tuple[type[Section], Callable[..., Flow]]:
    from data_tools.filter import FilterSettings, run

    return FilterSettings, run


def _exact() -> tuple[type[Section], Callable[..., Flow]]:
    from data_tools.dedup.exact import ExactSettings, run

    return ExactSettings, run


def _near() -> tuple[type[Section], Callable[..., Flow]]:
    from data_tools.dedup.near import NearSettings, run

    return NearSettings, run


def _spans() -> tuple[type[Section], Callable[..., Flow]]:
    from data_tools.dedup.spans import SpanSettings, run

    return SpanSettings, run


def _decontaminate() -> tuple[type[Section], Callable[..., Flow]]:
    from data_tools.decontaminate import DecontaminateSettings, run

    return DecontaminateSettings, run


def _buckets() -> tuple[type[Section], Callable[..., Flow]]:
    from data_tools.mix.buckets import BucketSettings, run

    return BucketSettings, run


def _tokenize() -> tuple[type[Section], Callable[..., Flow]]:
    from data_tools.tokenize_parts import TokenizeSettings, run

    return TokenizeSettings, run


def _mix() -> tuple[type[Section], Callable[..., Flow]]:
    from data_tools.mix.mixture import MixSettings, run

    return MixSettings, run


def _search() -> tuple[type[Section], Callable[..., Flow]]:
    from data_tools.mix.search import SearchSettings, run

    return SearchSettings, run


_STEPS = {
    "ingest": _ingest,
    "clean": _clean,
    "filter": _filter,
    "exact": _exact,
    "near": _near,
    "spans": _spans,
    "decontaminate": _decontaminate,
    "buckets": _buckets,
    "tokenize": _tokenize,
    "mix": _mix,
    "search": _search,
}
