"""Gradients as they arrive in backward: collected in fp32, reduced bucket by bucket beside the computation.

At ZeRO stages 0 and 1 a rank keeps the gradients of a whole step, and reduces each bucket once its last
ones have arrived. From stage 2 on it keeps its shard alone: a bucket is summed over the ranks and added to
the shard whenever all its parameters have got something, and its buffer lives from its first gradient to the
end of that collective.

Stage 0 is the case of one shard: nothing is scattered, and all data-parallel ranks are replicas.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megalite.optim.buckets import Bucket, FlatLayout
from megalite.parallel.collectives import Pending, all_reduce, start_all_reduce, start_reduce_scatter
from megalite.parallel.mesh import Axis

_IN_FLIGHT = 2  # buckets being reduced at once where each holds a buffer of its own


class _Reduction(NamedTuple):
    bucket: Bucket
    work: Pending
    buffer: Tensor  # what the collective reads; to be kept until it is done
    received: Tensor | None  # to be added to the shard


class Gradients:
    """Collects every parameter's gradient; after a step `shard_values` holds the sums over all ranks.

    `shard_values` is fp32 [layout.shard_size]. `on_complete` hears of each bucket all of whose
    parameters have got a gradient from one more micro-batch.
    """

    def __init__(
        self,
        layout: FlatLayout,
        replicas: Axis,
        keeps_whole: bool,
        device: torch.device,
        on_complete: Callable[[Bucket], None] = lambda bucket: None,
    ) -> None:
        self.layout, self.replicas, self.device = layout, replicas, device
        self.on_complete = on_complete
        self.keeps_whole = keeps_whole or layout.shard.size == 1
        self._whole = torch.zeros(layout.size, device=device) if self.keeps_whole else None
        if layout.shard.size == 1 and self._whole is not None:
            self.shard_values = self._whole
        else:
            self.shard_values = torch.zeros(layout.shard_size, device=device)
        self._place = {slot.name: (bucket, slot) for bucket in layout.buckets for slot in bucket.slots}
        self._buffers: dict[int, Tensor] = {}
        self._in_flight: deque[_Reduction] = deque()
        self._works: list[Pending] = []
        self.begin_step(1)

    def begin_step(self, micro_batches: int) -> None:
        """Forget the last step's gradients. Each parameter will get one of every micro-batch."""
        self._awaited = dict.fromkeys(self._place, micro_batches)
        # Of each bucket: parameters that have nothing in its buffer yet.
        self._empty = [{slot.name for slot in bucket.slots} for bucket in self.layout.buckets]
        self._unfinished = [len(bucket.slots) for bucket in self.layout.buckets]
        self._launched = 0  # buckets reduced, where each is once
        self._stored = [False] * len(self.layout.buckets)  # whether the shard holds some of the bucket

    def collect(self, parameter: nn.Parameter, name: str) -> None:
        """Take a parameter's gradient, which backward has just finished."""
        grad, parameter.grad = parameter.grad, None
        if grad is None:
            return
        bucket, slot = self._place[name]
        low = slot.start - bucket.start
        view = self._buffer(bucket)[low : low + slot.stop - slot.start].view(grad.shape)
        empty = self._empty[bucket.index]
        if name in empty:
            empty.discard(name)
            view.copy_(grad)
        else:
            view.add_(grad)
        self._awaited[name] -= 1
        if not self.keeps_whole:
            if not empty:
                self.on_complete(bucket)
                self._reduce(bucket)
            return
        if self._awaited[name] == 0:
            self._unfinished[bucket.index] -= 1
            # In bucket order on every rank, or collectives would pair up wrongly.
            while self._launched < len(self._unfinished) and self._unfinished[self._launched] == 0:
                self._reduce_next()

    def finish_step(self) -> None:
        """Reduce what is left, and wait until the shard holds the sums over all ranks."""
        if self.keeps_whole:
            while self._launched < len(self._unfinished):
                self._reduce_next()
        else:
            for bucket in self.layout.buckets:
                # Begun but not complete, since chunks of a pipeline took turns; or a parameter went unused.
                if len(self._empty[bucket.index]) < len(bucket.slots) or not self._stored[bucket.index]:
                    self._reduce(bucket)
        while self._in_flight:
            self._settle()
        if self.replicas.size > 1 and not self.keeps_whole:
            self._works.append(start_all_reduce(self.shard_values, self.replicas))
        for work in self._works:
            work.wait()
        self._works.clear()
        for bucket in self.layout.buckets:
            all_reduce(self.shard_values[self.layout.shard_slice(bucket)], bucket.stages)

    def _buffer(self, bucket: Bucket) -> Tensor:
        if self._whole is not None:
            return self._whole[bucket.start : bucket.stop]
        if bucket.index not in self._buffers:
            buffer = torch.empty(bucket.size, device=self.device)
            buffer[bucket.slots[-1].stop - bucket.start :].zero_()
            self._buffers[bucket.index] = buffer
        return self._buffers[bucket.index]

    def _reduce_next(self) -> None:
        self._launched += 1
        self._reduce(self.layout.buckets[self._launched - 1])

    def _reduce(self, bucket: Bucket) -> None:
        """Start to sum a bucket over the ranks; parameters that have got nothing count as zero."""
        buffer = self._buffer(bucket)
        for slot in bucket.slots:
            if slot.name in self._empty[bucket.index]:
                buffer[slot.start - bucket.start : slot.stop - bucket.start].zero_()
        for axis, start, stop in bucket.shares:
            all_reduce(buffer[start:stop], axis)
        if self.layout.shard.size == 1:
            if self.replicas.size > 1:
                self._works.append(start_all_reduce(buffer, self.replicas))
            return
        part = self.shard_values[self.layout.shard_slice(bucket)]
        received = torch.empty_like(part) if self._stored[bucket.index] else part
        work = start_reduce_scatter(received, buffer, self.layout.shard)
        self._in_flight.append(_Reduction(bucket, work, buffer, None if received is part else received))
        self._stored[bucket.index] = True
        if not self.keeps_whole:
            del self._buffers[bucket.index]
            self._empty[bucket.index] = {slot.name for slot in bucket.slots}
            while len(self._in_flight) > _IN_FLIGHT:
                self._settle()

    def _settle(self) -> None:
        """Wait for the oldest reduction; where there will be no other of its bucket, replicas come next."""
        bucket, work, _, received = self._in_flight.popleft()
        work.wait()
        part = self.shard_values[self.layout.shard_slice(bucket)]
        if received is not None:
            part += received
        if self.keeps_whole and self.replicas.size > 1:
            self._works.append(start_all_reduce(part, self.replicas))
