"""Which part of a logical parameter a rank holds, and who speaks for a part that several hold.

A parameter that tensor parallelism divides is always divided along its first dimension: what a
column-parallel layer splits is its output features, and a row-parallel layer's weight is stored
[in, out] to make its input features come first too. So a rank's part is a few runs of whole rows, each a
flat range of the logical tensor; initial values, ZeRO's shards and checkpoints need nothing more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megalite.parallel.mesh import ALONE, Axis


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of a logical parameter.

    `copies` is the axis whose ranks all hold them; its rank 0 speaks for them in norms and
    checkpoints. `is_partial` says that each of these ranks computes only a share of the gradient, so
    that the shares must be added up over `copies`; else every rank computes all of it. `sums_late`
    says that this has to wait for the end of the step: the ranks are stages of a pipeline, where each may
    have to go on for the other to reach the same point.
    """

    start: int
    stop: int
    copies: Axis = ALONE
    is_partial: bool = False
    sums_late: bool = False


class FlatRange(NamedTuple):
    """Elements [start, stop) of the logical tensor, which lie at `local` in the rank's part of it."""

    start: int
    stop: int
    local: int
    piece: Piece


@dataclass(frozen=True)
class ShardSpec:
    """A logical parameter and this rank's rows of it, in the order in which it stores them.

    `is_even` says that all ranks it is divided among hold as many.
    """

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    is_even: bool = True

    @property
    def row_size(self) -> int:
        """Elements of a row."""
        return math.prod(self.shape[1:])

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of this rank's part."""
        return (sum(piece.stop - piece.start for piece in self.pieces), *self.shape[1:])

    def ranges(self, start: int = 0, stop: int | None = None) -> Iterator[FlatRange]:
        """The logical ranges that elements [start, stop) of the rank's flattened part are."""
        stop = math.prod(self.local_shape) if stop is None else stop
        local = 0
        for piece in self.pieces:
            size = (piece.stop - piece.start) * self.row_size
            low, high = max(start, local), min(stop, local + size)
            if low < high:
                shift = piece.start * self.row_size - local
                yield FlatRange(low + shift, high + shift, low, piece)
            local += size


class Replica(NamedTuple):
    """Values [n] that every rank of `axis` holds, the same to the bit; `name` says of what."""

    name: str
    values: Tensor
    axis: Axis


def replicas(name: str, spec: ShardSpec, values: Tensor, dp: Axis) -> Iterator[Replica]:
    """Who else holds a rank's part of a parameter, `values` [n]: the ranks of `dp` all of it, others some."""
    if dp.size > 1:
        yield Replica(name, values, dp)
    for part in spec.ranges():
        if part.piece.copies.size > 1:
            yield Replica(name, values[part.local : part.local + part.stop - part.start], part.piece.copies)


def whole(shape: Sequence[int], copies: Axis = ALONE, is_partial: bool = False) -> ShardSpec:
    """All of a parameter on every rank of `copies`."""
    return ShardSpec(tuple(shape), (Piece(0, shape[0], copies, is_partial),))


def split(shape: Sequence[int], axis: Axis, parts: int = 1) -> ShardSpec:
    """This rank's rows of each of `parts` equal matrices that lie one below the other in one parameter.

    Where the rows do not divide evenly, the first ranks take one more.
    """
    height = shape[0] // parts
    pieces = []
    for part in range(parts):
        start, stop = split_range(height, axis)
        pieces.append(Piece(part * height + start, part * height + stop))
    return ShardSpec(tuple(shape), tuple(pieces), is_even=height % axis.size == 0)


def split_range(size: int, axis: Axis) -> tuple[int, int]:
    """This rank's [start, stop) of `size` things; where they do not divide, the first ranks take one more."""
    least, more = divmod(size, axis.size)
    start = axis.rank * least + min(axis.rank, more)
    return start, start + least + (axis.rank < more)


def across_stages(spec: ShardSpec, ends: Axis) -> ShardSpec:
    """The same rows on both ranks of `ends`, each of which computes a share of their gradient."""
    if ends.size == 1:
        return spec
    pieces = (replace(piece, copies=ends, is_partial=True, sums_late=True) for piece in spec.pieces)
    return replace(spec, pieces=tuple(pieces))


class ShardedModule(nn.Module):
    """A module that declares each parameter by the part of it this rank holds."""

    def __init__(self) -> None:
        super().__init__()
        self.specs: dict[str, ShardSpec] = {}

    def declare(self, name: str, spec: ShardSpec) -> nn.Parameter:
        """Register an uninitialised parameter of the spec's local shape."""
        self.specs[name] = spec
        parameter = nn.Parameter(torch.empty(spec.local_shape))
        self.register_parameter(name, parameter)
        return parameter


def shard_specs(model: nn.Module) -> dict[str, ShardSpec]:
    """The spec of every parameter of a model made of `ShardedModule`s, in the order of its parameters."""
    found = {}
    for name, _ in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if not isinstance(module, ShardedModule):
            raise TypeError(f"{name} belongs to a {type(module).__name__}, which declares no ShardSpec")
        found[name] = module.specs[leaf]
    return found
