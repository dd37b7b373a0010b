"""Random cases that can be repeated: each is a function of a seed, which a failure prints."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


def seeds(count: int) -> Iterable[int]:
    """0 … count-1, or only the one in MEGALITE_FAULT_SEED."""
    only = os.environ.get("MEGALITE_FAULT_SEED")
    return [int(only)] if only else range(count)


@contextmanager
def replayable(seed: object) -> Iterator[None]:
    """Add to a failure the words that say how to repeat it alone."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"repeat this case alone with MEGALITE_FAULT_SEED={seed}")
        raise
