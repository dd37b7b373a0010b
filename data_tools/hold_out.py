"""Which documents are held out: a function of their names alone, so a corpus that grows keeps its split.

Documents that repeat each other by their making, a module and its docstrings, are one family: all or none.

`hold_out` does it for a stream. For parts, which many processes read, the groups of documents are counted
first: `survey` one part, `exceptions` of all, and then each document is decided by itself.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_tools.documents import BUCKET, read_part, read_schema
from data_tools.ingest import TextDocument
from data_tools.ingest.stdlib import family_of
from megalite.errors import DataError

DATA, TRAIN, VALID = "data", "train", "valid"  # a tokenization's datasets are data/GROUP/train and …/valid
MAX_GROUPS = 512  # each has open files in every task
MAX_GROUP_BYTES = 200  # it names a folder


def place(source: str, name: str, purpose: str = "held out") -> float:
    """A number in [0, 1) that depends on these words only. Held out are documents below a fraction."""
    words = f"{purpose}\0{source}\0{name}".encode()
    return int.from_bytes(hashlib.blake2b(words, digest_size=7).digest(), "big") / 2**56


def hold_out(documents: Iterable[TextDocument], fraction: float) -> Iterator[tuple[TextDocument, bool]]:
    """Each document with whether it is held out: about `fraction` of them, at least one.

    A document is held out if the hash of its family falls below `fraction`. Documents are kept back until
    the first such one; a corpus too small to have one holds out the family nearest to it, or one document
    where all are of one family.

    Raises:  DataError if the fraction is not between 0 and 1 or there is only one document
    """
    if not 0 < fraction < 1:
        raise DataError(f"valid fraction {fraction}: should lie between 0 and 1, e.g. 0.02")
    stream = iter(documents)
    head: list[TextDocument] = []
    nearest = 1.0
    for document in stream:
        head.append(document)
        nearest = min(nearest, _place_of(document))
        if nearest < fraction and len(head) > 1:
            break
    if len(head) == 1:
        raise DataError("one document cannot be split into training and held-out text; give at least two")
    has_others = any(_place_of(document) > nearest for document in head)
    for document in chain(head, stream):
        where = _place_of(document)
        is_nearest = where == nearest if has_others else document is head[0]
        yield document, where < fraction or is_nearest


def _place_of(document: TextDocument) -> float:
    return place(document.source, family_of(document.doc_id))


def group_names(batch: pa.RecordBatch) -> list[str]:
    """The group of each document as a folder's name: its source, or `source.bucket` if there are buckets.

    What a folder's name cannot hold, or what would be taken for a bucket, is written as in addresses (`%2F`).
    """
    names = [_folder_name(source) for source in batch.column("source").to_pylist()]
    if BUCKET not in batch.schema.names:
        return names
    buckets = batch.column(BUCKET).to_pylist()
    return [f"{name}.{bucket}" for name, bucket in zip(names, buckets, strict=True)]


class Split(NamedTuple):
    """The rule for every document of a corpus in parts: below `fraction`, but for the exceptions."""

    fraction: float
    exceptions: dict[str, dict[str, bool]]

    def is_held_out(self, group: str, source: str, doc_id: str) -> bool:
        """Whether a document is held out."""
        family = family_of(doc_id)
        special = self.exceptions[group].get(family)
        return place(source, family) < self.fraction if special is None else special


def survey(path: Path, fraction: float) -> dict[str, Any]:
    """Of every group in a part: documents, those held out, and the families nearest and farthest from it."""
    columns = ["id", "source", *([BUCKET] if BUCKET in read_schema(path).names else [])]
    found: dict[str, dict[str, Any]] = {}
    for batch in read_part(path, columns):
        rows = zip(
            group_names(batch),
            batch.column("source").to_pylist(),
            batch.column("id").to_pylist(),
            strict=True,
        )
        for group, source, doc_id in rows:
            family = family_of(doc_id)
            where = (place(source, family), family)
            empty = {"source": source, "documents": 0, "held": 0}
            mine = found.setdefault(group, {**empty, "nearest": list(where), "farthest": list(where)})
            mine["documents"] += 1
            mine["held"] += where[0] < fraction
            mine["nearest"] = min(mine["nearest"], list(where))
            mine["farthest"] = max(mine["farthest"], list(where))
    return found


def exceptions(surveys: Iterable[dict[str, Any]]) -> dict[str, dict[str, bool]]:
    """By group and family, documents that are held out though far, or not though near.

    Of one source they are the same in all buckets, but where one would be left with nothing on a side.

    Raises:  DataError if there are more groups than MAX_GROUPS, or no documents at all
    """
    total: dict[str, dict[str, Any]] = {}
    for found in surveys:
        for group, part in found.items():
            mine = total.setdefault(group, dict(part, documents=0, held=0))
            mine["documents"] += part["documents"]
            mine["held"] += part["held"]
            mine["nearest"] = min(mine["nearest"], part["nearest"])
            mine["farthest"] = max(mine["farthest"], part["farthest"])
    if not total:
        raise DataError(
            "no documents came in; nothing is left to tokenize, see the reports of the steps before"
        )
    if len(total) > MAX_GROUPS:
        some = ", ".join(sorted(total)[:3])
        raise DataError(
            f"{len(total)} sources or buckets ({some} …), each to become a dataset; at most {MAX_GROUPS} "
            "can: give fewer names to sources"
        )
    special: dict[str, dict[str, bool]] = {group: {} for group in sorted(total)}
    for group, mine in total.items():
        if mine["held"] == mine["documents"]:
            special[group] = {mine["farthest"][1]: False}
        elif mine["held"] == 0 and mine["nearest"] != mine["farthest"]:
            special[group] = {mine["nearest"][1]: True}
    of_source: dict[str, dict[str, bool]] = {}
    for group, mine in total.items():
        of_source.setdefault(mine["source"], {}).update(special[group])
    for group, mine in total.items():
        for family, is_held in of_source[mine["source"]].items():
            if family != mine["farthest" if is_held else "nearest"][1]:
                special[group].setdefault(family, is_held)
    return special


@lru_cache(maxsize=MAX_GROUPS)
def _folder_name(name: str) -> str:
    safe = quote(name, safe=" ")
    if not safe.strip(". ") or safe.startswith("."):
        safe = safe.replace(".", "%2E") or "%00"
    # So are named what kills leave, which is removed, and the buckets of a source.
    safe = re.sub(r"\.(tmp|q\d+)$", r"%2E\1", safe)
    if len(safe) > MAX_GROUP_BYTES:
        raise DataError(
            f"source {name[:60]!r} … makes a folder's name of {len(safe)} bytes; at most {MAX_GROUP_BYTES}"
        )
    return safe


def unigram_entropy(train: NDArray[np.int64], valid: NDArray[np.int64]) -> float:
    """Mean of −log p over the held-out tokens, in nats, with p the training tokens' add-one frequencies.

    The loss of a model that knows how often tokens occur and no more. Both are counts [vocab_size].
    """
    smoothed = train + 1
    nats = np.log(smoothed.sum()) - np.log(smoothed)
    return float((valid * nats).sum() / valid.sum())
