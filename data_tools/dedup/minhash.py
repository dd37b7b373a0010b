"""MinHash signatures cut into bands: sets that are much alike have a band in common (Broder 1997).

Two sets of Jaccard similarity J agree in one hash with probability J, in a band of r rows with Jʳ, and in
at least one of b bands with 1 - (1 - Jʳ)ᵇ.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from data_tools.compiled import compiled
from data_tools.dedup.shingles import mixed

_HALF = np.uint64(32)
_LARGEST = np.uint32(0xFFFFFFFF)


def band_hashes(
    shingles: NDArray[np.uint64],
    begins: NDArray[np.int64],
    ends: NDArray[np.int64],
    bands: int,
    rows: int,
    seed: int,
) -> NDArray[np.uint64]:
    """The bands of each set [begins[i], ends[i]) of shingle hashes; repeats among them do not matter.

    Shapes:  shingles uint64 [shingles]; begins, ends int64 [sets]; returns uint64 [sets, bands]
    """
    out = np.empty((len(begins), bands), dtype=np.uint64)
    factors, terms = _permutations(bands * rows, seed)
    _sign(shingles, begins, ends, factors, terms, rows, out)
    return out


def chance_of_meeting(jaccard: float, bands: int, rows: int) -> float:
    """How likely two sets of this similarity share a band."""
    return float(1 - (1 - jaccard**rows) ** bands)


@cache
def _permutations(number: int, seed: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """x → factor · x + term mod 2³², a permutation as the factor is odd; uint32 [number] each."""
    draws = np.random.Generator(np.random.Philox(seed)).integers(0, 2**32, (2, number), dtype=np.uint32)
    return draws[0] | np.uint32(1), draws[1].copy()


@compiled
def _sign(
    shingles: NDArray[np.uint64],
    begins: NDArray[np.int64],
    ends: NDArray[np.int64],
    factors: NDArray[np.uint32],
    terms: NDArray[np.uint32],
    rows: int,
    out: NDArray[np.uint64],
) -> None:
    number = len(factors)
    least = np.empty(number, dtype=np.uint32)
    for document in range(len(begins)):
        for k in range(number):
            least[k] = _LARGEST
        at, stop = begins[document], ends[document]
        while at + 4 <= stop:  # four at a time, so that factors, terms and minima are loaded once for them
            a, b = np.uint32(shingles[at] >> _HALF), np.uint32(shingles[at + 1] >> _HALF)
            c, d = np.uint32(shingles[at + 2] >> _HALF), np.uint32(shingles[at + 3] >> _HALF)
            for k in range(number):
                factor, term = factors[k], terms[k]
                first = min(np.uint32(factor * a + term), np.uint32(factor * b + term))
                second = min(np.uint32(factor * c + term), np.uint32(factor * d + term))
                least[k] = min(least[k], min(first, second))
            at += 4
        while at < stop:
            a = np.uint32(shingles[at] >> _HALF)
            for k in range(number):
                least[k] = min(least[k], np.uint32(factors[k] * a + terms[k]))
            at += 1
        for band in range(out.shape[1]):
            value = np.uint64(band)
            for k in range(band * rows, (band + 1) * rows):
                value = mixed(value ^ np.uint64(least[k]))
            out[document, band] = value
