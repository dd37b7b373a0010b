"""Collectives over one axis of the mesh; each does nothing on an axis of size one.

Control messages travel as JSON bytes in integer tensors: torch's `*_object` collectives pickle, and
bytes from another host are not to be executed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
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


# torch renamed these two; both names do the same on every version we support.
_all_gather: Callable[..., dist.Work] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter: Callable[..., dist.Work] = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def start_all_reduce(tensor: Tensor, axis: Axis) -> dist.Work:
    """Begin to sum `tensor` over an axis of at least two, in place; done once waited for."""
    work: dist.Work = dist.all_reduce(tensor, group=axis.group, async_op=True)
    return work


def start_reduce_scatter(output: Tensor, tensor: Tensor, axis: Axis) -> dist.Work:
    """Begin to sum `tensor` [axis.size · n] over the axis; rank r's part [n] lands in `output`."""
    return _reduce_scatter(output, tensor, group=axis.group, async_op=True)


def start_all_gather(output: Tensor, part: Tensor, axis: Axis) -> dist.Work:
    """Begin to collect every rank's `part` [n] in `output` [axis.size · n], in rank order.

    Moved as bytes, since not every backend moves every floating dtype.
    """
    whole, part = output.view(torch.uint8), part.view(torch.uint8)
    return _all_gather(whole, part, group=axis.group, async_op=True)


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
