"""What a sample is made of, for a person who asks: which documents, from where."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megalite.data.loader import DataLoader


class Passage(NamedTuple):
    """A document's tokens in a sample, uint16|uint32 [n], and where the document comes from."""

    dataset: str
    source: str
    doc_id: str
    tokens: NDArray[Any]


def passages(loader: DataLoader, sample_id: int) -> list[Passage]:
    """The documents of a global sample, in their order.

    Raises:  DataError if it cannot be read
    """
    sources, samples = loader.locate(np.array([sample_id]))
    source, found = int(sources[0]), []
    dataset = loader.datasets[source]
    for number, start, stop in loader.packings[source].pieces(int(samples[0])):
        block = dataset.block(number)
        names, origins = block.doc_ids, block.sources
        first, last = (int(n) for n in np.searchsorted(block.offsets, [start + 1, stop]))
        for d in range(first - 1, last):
            low, high = max(start, int(block.offsets[d])), min(stop, int(block.offsets[d + 1]))
            found.append(Passage(str(dataset.path), origins[d], names[d], block.tokens[low:high]))
    return found
