"""Collectives over one axis of the mesh; each does nothing on an axis of size one.

All of our communication goes through here, and is noted in the flight log (what DeepSpeed does by itself:
`engines.deepspeed_comm`).

Control messages travel as JSON bytes in integer tensors: torch's `*_object` collectives pickle, and
bytes from another host are not to be executed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.parallel.flight import ALL_GATHER, ALL_REDUCE, RECEIVE, REDUCE_SCATTER, SEND, Place, flight_log
from megalite.parallel.mesh import Axis

_SWAPPED_BYTES = 4 << 20  # of what two ranks reduce by sending each other all of it; more takes memory
_EXCHANGE_TAG = 1 << 30  # of messages that make up a collective; a pipeline's count from 0


class PeerError(dist.DistError):
    """Another process is gone, or was silent for longer than the group's timeout."""


@contextmanager
def peer_errors() -> Iterator[None]:
    """Around communication under way: gloo reports a lost peer as a plain RuntimeError of many wordings.

    What this rank's own device reports is left as it is (of peers nccl tells by a `DistError`): whichever
    call comes next after a fault of the device raises it, often one in here.

    Raises:  PeerError
    """
    try:
        yield
    except (dist.DistError, torch.AcceleratorError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        raise PeerError(str(error)) from error


class Pending:
    """A communication that has been started, and its place in the flight log."""

    def __init__(self, works: Sequence[dist.Work], place: Place) -> None:
        self._works, self._place = works, place

    def wait(self) -> None:
        """Have what follows see its result: the host on CPU, the current stream on CUDA.

        Raises:  PeerError
        """
        waiting = flight_log.await_(self._place)
        with peer_errors():
            for work in self._works:
                work.wait()
        flight_log.end(self._place, waiting)


def _begin(op: int, axis: Axis, tensor: Tensor, peer: int = -1) -> Place:
    """Note a communication that is about to be started over an axis of at least two."""
    if axis.group is None:
        raise ValueError("an axis of size one has nobody to communicate with")
    return flight_log.begin(op, axis.name, axis.group, tensor, peer)


def all_reduce(tensor: Tensor, axis: Axis) -> Tensor:
    """Sum `tensor` over the axis in place, and return it.

    Raises:  PeerError
    """
    if axis.group is not None:
        start_all_reduce(tensor, axis).wait()
    return tensor


# torch renamed these two; both names do the same on every version we support.
_all_gather: Callable[..., dist.Work] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter: Callable[..., dist.Work] = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def start_all_reduce(tensor: Tensor, axis: Axis) -> Pending:
    """Begin to sum `tensor` over an axis of at least two, in place; done once waited for."""
    place = _begin(ALL_REDUCE, axis, tensor)
    if tensor.device.type == "cpu" and axis.size == 2 and tensor.nbytes <= _SWAPPED_BYTES:
        other = torch.empty_like(tensor)  # as many bytes as a ring sends between two, in one step
        return _Sum(tensor, [tensor, other], _exchange([tensor] * 2, [other] * 2, axis), place)
    return Pending([dist.all_reduce(tensor, group=axis.group, async_op=True)], place)


def start_reduce_scatter(output: Tensor, tensor: Tensor, axis: Axis) -> Pending:
    """Begin to sum `tensor` [axis.size · n] over the axis; rank r's part [n] lands in `output`."""
    place = _begin(REDUCE_SCATTER, axis, tensor)
    if tensor.device.type == "cpu":
        parts = list(tensor.view(axis.size, *output.shape))
        received = [part if rank == axis.rank else torch.empty_like(part) for rank, part in enumerate(parts)]
        return _Sum(output, received, _exchange(parts, received, axis), place)
    return Pending([_reduce_scatter(output, tensor, group=axis.group, async_op=True)], place)


def start_all_gather(output: Tensor, part: Tensor, axis: Axis) -> Pending:
    """Begin to collect every rank's `part` [n] in `output` [axis.size · n], in rank order.

    Moved as bytes, since not every backend moves every floating dtype.
    """
    place = _begin(ALL_GATHER, axis, output)
    whole, part = output.view(torch.uint8), part.view(torch.uint8)
    if part.device.type == "cpu":
        received = list(whole.view(axis.size, -1))
        if received[axis.rank].data_ptr() != part.data_ptr():
            received[axis.rank].copy_(part.view(-1))
        return Pending(_exchange([part] * axis.size, received, axis), place)
    return Pending([_all_gather(whole, part, group=axis.group, async_op=True)], place)


def _exchange(sent: Sequence[Tensor], received: Sequence[Tensor], axis: Axis) -> list[dist.Work]:
    """Begin to send each other rank its tensor, and to receive one of each.

    Instead of gloo's reduce-scatter, which sends as much as its all-reduce does, and of its all-gather and
    all-to-all, which copy a rank's own part and wait for a thread.
    """
    works = []
    with peer_errors():
        for rank in range(axis.size):
            if rank != axis.rank:
                to, of = sent[rank], received[rank]
                works.append(_posted(dist.irecv(of, group=axis.group, group_src=rank, tag=_EXCHANGE_TAG)))
                works.append(_posted(dist.isend(to, group=axis.group, group_dst=rank, tag=_EXCHANGE_TAG)))
    return works


class _Sum(Pending):
    """Parts on their way, to be summed in rank order."""

    def __init__(
        self, output: Tensor, parts: Sequence[Tensor], works: Sequence[dist.Work], place: Place
    ) -> None:
        super().__init__(works, place)
        self._output, self._parts = output, parts

    def wait(self) -> None:
        super().wait()
        first, second, *others = self._parts
        output = self._output.data  # counts no version, as no collective does
        torch.add(first, second, out=output)
        for part in others:
            output.add_(part)


def start_send(tensor: Tensor, receiver: int, axis: Axis, tag: int) -> Pending:
    """Begin to send to a rank of the axis; the tensor must stay as it is until waited for."""
    place = _begin(SEND, axis, tensor, receiver)
    with peer_errors():
        return Pending([_posted(dist.isend(tensor, group=axis.group, group_dst=receiver, tag=tag))], place)


def start_receive(buffer: Tensor, sender: int, axis: Axis, tag: int) -> Pending:
    """Begin to receive from a rank of the axis into `buffer`."""
    place = _begin(RECEIVE, axis, buffer, sender)
    with peer_errors():
        return Pending([_posted(dist.irecv(buffer, group=axis.group, group_src=sender, tag=tag))], place)


def _posted(work: dist.Work | None) -> dist.Work:
    """A transfer's handle, which c10d withholds from processes outside the group."""
    if work is None:
        raise ValueError("this process is not part of the axis's process group")
    return work


def gather_json(value: Any, axis: Axis, device: torch.device) -> list[Any]:
    """Every process's JSON-able value, in rank order, on every process."""
    if axis.group is None:
        return [value]
    payload = json.dumps(value).encode()
    sizes = torch.zeros(axis.size, dtype=torch.int64, device=device)
    start_all_gather(sizes, torch.tensor([len(payload)], dtype=torch.int64, device=device), axis).wait()
    lengths = sizes.tolist()
    sent = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
    sent[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(device)
    received = sent.new_empty(axis.size * len(sent))
    start_all_gather(received, sent, axis).wait()
    return [
        json.loads(part[:length].cpu().numpy().tobytes())
        for part, length in zip(received.chunk(axis.size), lengths, strict=True)
    ]
