"""What there is to mix: the datasets of a tokenization, one for each source or each bucket of one.

data/<group>/train and data/<group>/valid lie in the step's folder; a group is `source` or `source.q3`,
written as in addresses where a folder's name cannot be so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

from data_tools.hold_out import DATA, TRAIN, VALID
from megalite.data.folder import LocalFolder
from megalite.data.manifest import MANIFEST_FILE, load_manifest
from megalite.errors import DataError, nearest

_BUCKETED = re.compile(r"(.+)\.q(\d+)")


@dataclass(frozen=True)
class Group:
    """One dataset: a source, or its bucket of that number. Without held-out documents `valid` is None.

    `name` is its folder's, `source` what the recipe calls it.
    """

    name: str
    source: str
    bucket: int | None
    train: Path
    valid: Path | None
    tokens: int
    documents: int
    valid_tokens: int
    vocab_size: int

    def samples(self, seq_len: int) -> int:
        """Whole samples that documents end to end make."""
        return (self.tokens - 1) // seq_len

    def has_valid(self, seq_len: int) -> bool:
        """Whether its held-out documents make a sample."""
        return self.valid is not None and self.valid_tokens > seq_len


def read_groups(tokenized: Path) -> list[Group]:
    """The groups of a tokenization by source and bucket, from their manifests alone.

    Raises:  DataError if there are none, a manifest is damaged, or a source lies both whole and in buckets
    """
    folders = sorted(path.parent.parent for path in tokenized.glob(f"{DATA}/*/{TRAIN}/{MANIFEST_FILE}"))
    groups = sorted(map(_read, folders), key=lambda group: (group.source, group.bucket or 0))
    if not groups:
        raise DataError(f"{tokenized / DATA} has no GROUP/train datasets; tokenize the corpus first")
    for before, after in pairwise(groups):
        if before.source == after.source and before.bucket is None:
            raise DataError(
                f"{tokenized / DATA} holds both {before.name} and {after.name}; rename one source"
            )
    return groups


def sources_of(groups: Iterable[Group]) -> dict[str, list[Group]]:
    """Groups by source, in order."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(group.source, []).append(group)
    return found


def check_names(given: Iterable[str], sources: Sequence[str], key: str) -> None:
    """Raises:  DataError naming a source that is not there, and the nearest that is"""
    for name in given:
        if name not in sources:
            raise DataError(f"{key} names {name!r}, which is no source; {nearest(name, sources)}")


def _read(folder: Path) -> Group:
    match = _BUCKETED.fullmatch(folder.name)
    train = load_manifest(LocalFolder(folder / TRAIN))
    has_valid = (folder / VALID / MANIFEST_FILE).exists()
    return Group(
        name=folder.name,
        source=unquote(match[1] if match else folder.name),
        bucket=int(match[2]) if match else None,
        train=folder / TRAIN,
        valid=folder / VALID if has_valid else None,
        tokens=train.tokens,
        documents=train.documents,
        valid_tokens=load_manifest(LocalFolder(folder / VALID)).tokens if has_valid else 0,
        vocab_size=train.tokenizer.vocab_size,
    )
