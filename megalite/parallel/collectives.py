"""Collectives over one axis of the mesh; each does nothing on an axis of size one.

Control messages travel as JSON bytes in integer tensors: torch's `*_object` collectives pickle, and
bytes from another host are not to be executed.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.parallel.mesh import Axis


def all_reduce(tensor: Tensor, axis: Axis) -> Tensor:
    """Sum `tensor` over the axis in place, and return it."""
    if axis.group is not None:
        dist.all_reduce(tensor, group=axis.group)
    return tensor


def barrier(axis: Axis, device: torch.device) -> None:
    """Return once every process of the axis has called this."""
    all_reduce(torch.zeros(1, device=device), axis)


def gather_json(value: Any, axis: Axis, device: torch.device) -> list[Any]:
    """Every process's JSON-able value, in rank order, on every process."""
    if axis.group is None:
        return [value]
    payload = json.dumps(value).encode()
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(axis.size)]
    dist.all_gather(sizes, torch.tensor([len(payload)], dtype=torch.int64, device=device), group=axis.group)
    lengths = [int(size) for size in sizes]
    sent = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
    sent[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(device)
    received = [torch.empty_like(sent) for _ in range(axis.size)]
    dist.all_gather(received, sent, group=axis.group)
    return [
        json.loads(part[:length].cpu().numpy().tobytes())
        for part, length in zip(received, lengths, strict=True)
    ]


def broadcast_json(value: Any, axis: Axis, device: torch.device) -> Any:
    """The axis's rank 0's JSON-able value, on every process."""
    return gather_json(value if axis.rank == 0 else None, axis, device)[0]
