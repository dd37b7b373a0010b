"""Weights that several ranks hold must be the same to the bit; whoever differs is named.

BLOOM trained for more than 17,000 steps with layer-norm weights that had drifted apart between its
tensor-parallel ranks. Here each rank sums the bits of every such tensor, and one small gather for each
axis compares the sums. A single flipped bit always changes a sum; other damage is missed once in 2⁶⁴.

Source:  BigScience, chronicles of BLOOM-176B, 2022
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.errors import ReplicaError
from megalite.parallel.collectives import all_reduce, gather_json, start_all_gather
from megalite.parallel.mesh import Axis, Mesh
from megalite.parallel.sharding import Replica

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NAMED = 3  # tensors that an error names; the rest are counted


def digest(values: Tensor) -> Tensor:
    """The sum of a tensor's bytes [n], taken as 64-bit integers; 0-dim int64, modulo 2⁶⁴."""
    values = values.detach()
    if values.data_ptr() % 8:  # a part of a buffer, which another rank may hold at another place
        values = values.clone()
    whole = values.numel() - values.numel() % (8 // values.element_size())
    rest = values[whole:].view(_INTEGERS[values.element_size()])
    # Sums of smaller integers take 25 times as long.
    return values[:whole].view(torch.int64).sum() + rest.sum(dtype=torch.int64)


def check_replicas(replicas: Iterable[Replica], mesh: Mesh) -> None:
    """Compare what this rank holds with the other ranks that hold the same.

    Comm:    an all-gather of eight bytes a tensor over each axis, and one number over the world
    Raises:  ReplicaError, on every rank, naming the tensors and the ranks that differ
    """
    by_axis: dict[Axis, list[Replica]] = {}
    for replica in replicas:
        by_axis.setdefault(replica.axis, []).append(replica)
    found = [finding for axis, held in by_axis.items() for finding in _compare(axis, held, mesh.device)]
    count = torch.tensor(float(len(found)), device=mesh.device)
    if not all_reduce(count, mesh.world):
        return
    everything = [finding for part in gather_json(found, mesh.world, mesh.device) for finding in part]
    error = ReplicaError(_describe(everything))
    error.is_shared = True
    raise error


def _compare(axis: Axis, held: list[Replica], device: torch.device) -> list[dict[str, Any]]:
    """Which of the tensors differ, told by the first rank of the axis."""
    mine = torch.stack([digest(replica.values) for replica in held]).to(device)
    gathered = mine.new_empty(axis.size * len(held))
    start_all_gather(gathered, mine, axis).wait()
    table = gathered.view(axis.size, -1)
    if axis.rank > 0:
        return []
    ranks = dist.get_process_group_ranks(axis.group)
    return [
        {
            "tensor": held[column].name,
            "group": axis.name,
            "ranks": _by_value(ranks, table[:, column].tolist()),
        }
        for column in (table != table[0]).any(0).nonzero().flatten().tolist()
    ]


def _by_value(ranks: list[int], values: list[int]) -> list[list[int]]:
    """The ranks that agree among themselves, the largest such set first."""
    return [
        [rank for rank, other in zip(ranks, values, strict=True) if other == value]
        for value, _ in Counter(values).most_common()
    ]


def _describe(findings: list[dict[str, Any]]) -> str:
    lines = []
    for finding in findings[:_NAMED]:
        most, *others = finding["ranks"]
        odd = sorted(rank for part in others for rank in part)
        if len(most) > len(odd):  # a majority, which is believed
            who = f"on {_name(odd)} it is not what {_name(most)} hold"
        else:
            who = "it differs between " + " and ".join(_name(part) for part in finding["ranks"])
        lines.append(f"{finding['tensor']} (group {finding['group']}): {who}")
    more = f"; and {len(findings) - _NAMED} more tensors" if len(findings) > _NAMED else ""
    return (
        f"weights that must be the same are not: {'; '.join(lines)}{more}. Nothing was saved since they "
        "agreed: start the same command again, and look at the device of a rank that is named twice"
    )


def _name(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
