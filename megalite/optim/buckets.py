"""Where everything lies in the flat buffers: buckets of whole parameters, cut into equal shards.

    bucket 0          bucket 1          …      flat buffer (weights, gradients)
    [r0|r1|r2|r3]     [r0|r1|r2|r3]
    rank 1: [bucket 0's r1 | bucket 1's r1 | …]     shard (master, exp_avg, exp_avg_sq, gradient)

Buckets come in the order in which backward completes them: matrices first, last layer first; then norms and
biases, which weight decay leaves alone. So a shard has one decayed part and one that is not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from megalite.parallel.mesh import ALONE, Axis
from megalite.parallel.sharding import ShardSpec

_UNIT = re.compile(r"blocks\.\d+(?=\.)")
ROOT = ""  # the unit of what belongs to no block


@dataclass(frozen=True)
class Slot:
    """Where this rank's part of one parameter lies in the flat buffers."""

    name: str
    spec: ShardSpec
    start: int
    stop: int


@dataclass(frozen=True)
class OwnedRange:
    """Elements [start, stop) of a logical parameter, and where this rank's shard holds them.

    `speaks` is false for all but one of the ranks that tensor parallelism gives the same elements.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    shard_start: int
    speaks: bool

    @property
    def shard(self) -> slice:
        """The place in the shard."""
        return slice(self.shard_start, self.shard_start + self.stop - self.start)


@dataclass(frozen=True)
class Bucket:
    """Neighbouring parameters that travel in one collective; its size divides by the number of shards.

    `unit` is the block all of them belong to (or `ROOT`), where buckets end with blocks.
    """

    index: int
    start: int
    stop: int
    slots: tuple[Slot, ...]
    decays: bool
    unit: str

    @property
    def size(self) -> int:
        """Elements, padding included."""
        return self.stop - self.start

    @cached_property
    def shares(self) -> list[tuple[Axis, int, int]]:
        """Ranges, counted from the bucket's start, of which each rank of a tensor-parallel axis computes a
        share only: (axis, start, stop), to be added up over the axis before anything else."""
        found: dict[Axis, list[tuple[int, int]]] = {}
        for slot in self.slots:
            for part in slot.spec.ranges():
                if part.piece.is_partial and not part.piece.sums_late:
                    low = slot.start - self.start + part.local
                    found.setdefault(part.piece.copies, []).append((low, low + part.stop - part.start))
        return [(axis, *run) for axis, ranges in found.items() for run in runs(ranges)]

    @property
    def stages(self) -> Axis:
        """The pipeline stages that hold this bucket too and compute a share of its gradient each.

        Such a parameter has a bucket to itself, so that all of them cut it into the same shards.
        """
        piece = self.slots[0].spec.pieces[0]
        return piece.copies if piece.sums_late else ALONE


@dataclass(frozen=True)
class FlatLayout:
    """The buckets of one rank's parameters and the shard of them that is this rank's."""

    buckets: tuple[Bucket, ...]
    shard: Axis

    @property
    def size(self) -> int:
        """Elements of a whole flat buffer; none on a pipeline stage that was given no layers."""
        return self.buckets[-1].stop if self.buckets else 0

    @property
    def shard_size(self) -> int:
        """Elements of a shard."""
        return self.size // self.shard.size

    @property
    def decayed(self) -> int:
        """How many elements of the shard, from its start, weight decay applies to."""
        return sum(bucket.size for bucket in self.buckets if bucket.decays) // self.shard.size

    def shard_slice(self, bucket: Bucket) -> slice:
        """Where the shard holds this rank's part of a bucket."""
        return slice(bucket.start // self.shard.size, bucket.stop // self.shard.size)

    def owned_ranges(self) -> Iterator[OwnedRange]:
        """Which elements of which logical parameters the shard holds, in shard order."""
        for bucket in self.buckets:
            place = self.shard_slice(bucket)
            low = bucket.start + (place.stop - place.start) * self.shard.rank
            high = low + place.stop - place.start
            for slot in bucket.slots:
                start, stop = max(slot.start, low), min(slot.stop, high)
                for part in slot.spec.ranges(start - slot.start, stop - slot.start):
                    yield OwnedRange(
                        slot.name,
                        slot.spec.shape,
                        part.start,
                        part.stop,
                        place.start + slot.start + part.local - low,
                        speaks=part.piece.copies.rank == 0,
                    )


def lay_out(specs: dict[str, ShardSpec], bucket_size: int, shard: Axis, by_unit: bool) -> FlatLayout:
    """Fill buckets of about `bucket_size` elements; with `by_unit` a bucket also ends where a block does."""
    buckets: list[Bucket] = []
    start = 0
    for decays in (True, False):
        group = [(name, spec) for name, spec in reversed(specs.items()) if (len(spec.shape) > 1) == decays]
        slots: list[Slot] = []
        stop = start
        for position, (name, spec) in enumerate(group):
            slots.append(Slot(name, spec, stop, stop + math.prod(spec.local_shape)))
            stop = slots[-1].stop
            is_last = position == len(group) - 1
            ends = is_last or stop - start >= bucket_size
            if not ends:
                after, following = group[position + 1]
                ends = by_unit and unit_of(after) != unit_of(name)
                ends = ends or _stands_alone(spec) or _stands_alone(following)
            if ends:
                stop = start + -(-(stop - start) // shard.size) * shard.size
                buckets.append(Bucket(len(buckets), start, stop, tuple(slots), decays, unit_of(name)))
                slots, start = [], stop
    return FlatLayout(tuple(buckets), shard)


def _stands_alone(spec: ShardSpec) -> bool:
    """Whether a parameter has a bucket to itself, so that it shifts no other's place.

    A tied embedding is cut into the same shards on both its stages. Where some tensor-parallel ranks hold a
    row more of the vocabulary, all else lies in the same buckets on each, by which they add up their shares.
    """
    return spec.pieces[0].sums_late or not spec.is_even


def unit_of(name: str) -> str:
    """The block a parameter belongs to, or `ROOT`."""
    match = _UNIT.match(name)
    return match[0] if match else ROOT


def runs(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Ranges in rising order, with those that touch made one."""
    run: tuple[int, int] | None = None
    for start, stop in ranges:
        if run is not None and run[1] == start:
            run = (run[0], stop)
            continue
        if run is not None:
            yield run
        run = (start, stop)
    if run is not None:
        yield run
