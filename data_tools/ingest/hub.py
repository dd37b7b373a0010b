"""Hugging Face datasets by name, through the optional `datasets` package, as the Arrow files they are."""

from __future__ import annotations

import re
from pathlib import Path

from data_tools.ingest.settings import SourceSettings
from megalite.errors import DataError

PREFIX = "hf:"
_SPLIT = re.compile(r"\w+(\.\w+)*")


def hub_files(source: SourceSettings) -> tuple[list[tuple[Path, str]], str]:
    """The files of `hf:NAME[:CONFIG][:SPLIT]` with their names, downloaded if they are not here yet; and the
    dataset's revision, after which the package names the folder that they are kept in.

    CONFIG may be empty, and is the dataset's default then; SPLIT is train if not given.

    Raises:  DataError if the package is missing, or with what it says if it cannot load the dataset
    """
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"source {source.name!r} is a Hugging Face dataset; install what reads it with: "
            "pip install 'megalite[hub]'"
        ) from None
    name, config, split, *more = [*source.path.removeprefix(PREFIX).split(":"), "", ""]
    split = split or "train"
    if len(more) > 2 or not name or not _SPLIT.fullmatch(split):
        raise DataError(
            f"source {source.name!r}: {source.path!r} is not hf:NAME[:CONFIG][:SPLIT] with a plain SPLIT"
        )
    try:
        dataset = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:
        # Whatever the network, the hub and forty file formats can raise; all of it before work starts.
        raise DataError(
            f"source {source.name!r}: cannot load {source.path}: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:500]}"
        ) from None
    paths = [Path(file["filename"]) for file in dataset.cache_files]
    revisions = sorted({path.parent.name for path in paths})
    return [(path, f"{split}-{number:05d}") for number, path in enumerate(paths)], ", ".join(revisions)
