"""Which candidates are near duplicates: sets that share a band are compared, and those alike joined."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.compiled import compiled, inlined
from data_tools.dedup.union_find import root_of, settle


class Sets(NamedTuple):
    """Sets of hashes: set i is members[begins[i] : ends[i]], in ascending order.

    Shapes:  members uint64 [members]; begins, ends int64 [sets]
    """

    members: NDArray[np.uint64]
    begins: NDArray[np.int64]
    ends: NDArray[np.int64]


class Clusters(NamedTuple):
    """`roots` int64 [sets] names the first set of each one's cluster.

    Counts of pairs: `compared`, `alike` of them, and `left_out`, at most so many that the limit kept from
    being looked at.
    """

    roots: NDArray[np.int64]
    compared: int
    alike: int
    left_out: int


def cluster(sets: Sets, bands: NDArray[np.uint64], threshold: float, max_comparisons: int) -> Clusters:
    """Join sets of which a pair shares a band and has a Jaccard similarity ≥ threshold (single linkage).

    A pair already in one cluster is not compared. Each set is held against at most `max_comparisons` earlier
    ones that share a certain band: those of the cluster joined last first, the latest of a cluster first.

    Shapes:  bands uint64 [sets, bands]
    """
    flat = bands.ravel()
    order = np.argsort(flat, kind="stable")  # equal bands together, their sets in order
    parents = np.arange(len(bands))
    chains = np.empty((4, len(bands)), dtype=np.int64)
    counts = np.zeros(3, dtype=np.int64)
    owners = order // bands.shape[1]
    _cluster(*sets, bands, flat[order], owners, parents, chains, threshold, max_comparisons, counts)
    settle(parents)
    return Clusters(parents, *counts.tolist())


def similarities(sets: Sets, firsts: NDArray[np.int64], seconds: NDArray[np.int64]) -> NDArray[np.float64]:
    """The Jaccard similarity of each pair of sets, float64 [pairs]."""
    out = np.empty(len(firsts), dtype=np.float64)
    _similarities(*sets, firsts, seconds, out)
    return out


@compiled
def _jaccard(
    members: NDArray[np.uint64],
    begins: NDArray[np.int64],
    ends: NDArray[np.int64],
    first: int,
    second: int,
    threshold: float,
) -> float:
    """|A ∩ B| / |A ∪ B|, or -1 as soon as it is sure to be below the threshold."""
    a, a_end, b, b_end = begins[first], ends[first], begins[second], ends[second]
    total = (a_end - a) + (b_end - b)
    # J ≥ t means |A ∩ B| ≥ total · t / (1 + t): only so many members may be without a twin.
    spare = total * (1.0 - threshold) / (1.0 + threshold) + 1e-6
    if abs((a_end - a) - (b_end - b)) > spare:
        return -1.0
    common = lone = 0
    while a < a_end and b < b_end:
        one, other = members[a], members[b]
        common += one == other
        lone += one != other
        if lone > spare:
            return -1.0
        a += one <= other
        b += other <= one
    return float(common / (total - common))


@compiled
def _similarities(
    members: NDArray[np.uint64],
    begins: NDArray[np.int64],
    ends: NDArray[np.int64],
    firsts: NDArray[np.int64],
    seconds: NDArray[np.int64],
    out: NDArray[np.float64],
) -> None:
    for pair in range(len(firsts)):
        out[pair] = _jaccard(members, begins, ends, firsts[pair], seconds[pair], 0.0)


@inlined
def _share_earlier(bands: NDArray[np.uint64], first: int, second: int, here: np.uint64) -> bool:
    """Whether two sets that share the band `here` also share one before it, where they met already."""
    for band in range(bands.shape[1]):
        if bands[first, band] == bands[second, band]:
            return bool(bands[first, band] != here)
    return False


@compiled
def _cluster(
    members: NDArray[np.uint64],
    begins: NDArray[np.int64],
    ends: NDArray[np.int64],
    bands: NDArray[np.uint64],
    hashes: NDArray[np.uint64],
    owners: NDArray[np.int64],
    parents: NDArray[np.int64],
    chains: NDArray[np.int64],
    threshold: float,
    max_comparisons: int,
    counts: NDArray[np.int64],
) -> None:
    """Go through the groups of equal band hashes; `hashes` are sorted, `owners` are the sets that have them.

    The sets of a group met so far are in chains, one a cluster: `latest[chain]`, and `before` it others to
    `oldest[chain]`. The chain joined last is the last.
    """
    latest, oldest, sizes, before = chains[0], chains[1], chains[2], chains[3]
    start = 0
    while start < len(hashes):
        stop = start + 1
        while stop < len(hashes) and hashes[stop] == hashes[start]:
            stop += 1
        number = 0  # of chains
        for place in range(start, stop):
            item = owners[place]
            last, size, seen = item, 1, 0  # the item's own chain, to which others are appended
            budget = max_comparisons
            chain = number
            while chain > 0 and budget > 0:
                chain -= 1
                other, is_joined = latest[chain], root_of(parents, latest[chain]) == root_of(parents, item)
                unseen = sizes[chain]
                while not is_joined and unseen > 0 and budget > 0:
                    budget -= 1
                    unseen -= 1
                    if not _share_earlier(bands, item, other, hashes[start]):
                        counts[0] += 1
                        if _jaccard(members, begins, ends, other, item, threshold) >= threshold:
                            counts[1] += 1
                            one, two = root_of(parents, item), root_of(parents, other)
                            parents[max(one, two)] = min(one, two)
                            is_joined = True
                    other = before[other]
                seen += sizes[chain]
                if is_joined:
                    before[last], last = latest[chain], oldest[chain]
                    size += sizes[chain]
                    sizes[chain] = 0
                else:
                    counts[2] += unseen
            counts[2] += place - start - seen
            kept = chain  # close the gaps that joined chains left
            for chain in range(kept, number):
                if sizes[chain] > 0:
                    latest[kept], oldest[kept], sizes[kept] = latest[chain], oldest[chain], sizes[chain]
                    kept += 1
            latest[kept], oldest[kept], sizes[kept] = item, last, size
            number = kept + 1
        start = stop
