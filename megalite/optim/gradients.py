"""Gradients as they arrive in backward: collected in fp32, reduced bucket by bucket beside the computation.

At ZeRO stages 0 and 1 a rank keeps the gradients of a whole step and reduces them during the last
micro-batch. From stage 2 on it keeps its shard alone: each micro-batch's buckets are summed over the ranks
and added to the shard, and a bucket's buffer lives from its first gradient to the end of its collective.

Stage 0 is the case of one shard: nothing is scattered, and all data-parallel ranks are replicas.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalite.optim.buckets import Bucket, FlatLayout
from megalite.parallel.collectives import all_reduce, start_all_reduce, start_reduce_scatter
from megalite.parallel.mesh import Axis

_IN_FLIGHT = 2  # buckets being reduced at once where each holds a buffer of its own


class _Reduction(NamedTuple):
    bucket: Bucket
    work: dist.Work
    buffer: Tensor  # what the collective reads; to be kept until it is done
    received: Tensor | None  # to be added to the shard
    is_last: bool  # of its bucket in this step


class Gradients:
    """Collects every parameter's gradient; after a step `shard` holds the sums over all ranks.

    `shard_values` is this rank's shard, fp32 [layout.shard_size]. `on_complete` hears of each bucket whose
    gradients of a micro-batch have all arrived.
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
        self._works: list[dist.Work] = []
        self._fresh: set[str] = set()
        self._missing: list[int] = []
        self._launched = 0
        self._is_first = self._is_last = True

    def begin_step(self) -> None:
        """Forget the last step's gradients: the first of each parameter overwrites."""
        self._is_first = True
        self._fresh = set(self._place)

    def begin_micro_batch(self, is_last: bool) -> None:
        """From now on a bucket is reduced as soon as all its gradients have arrived, if it is time to."""
        self._is_last = is_last
        if not self.keeps_whole:
            self._fresh = set(self._place)
        self._missing = [len(bucket.slots) for bucket in self.layout.buckets]
        self._launched = 0

    def collect(self, parameter: nn.Parameter, name: str) -> None:
        """Take a parameter's gradient, which backward has just finished."""
        grad, parameter.grad = parameter.grad, None
        bucket, slot = self._place[name]
        if grad is None:
            return
        low = slot.start - bucket.start
        view = self._buffer(bucket)[low : low + slot.stop - slot.start].view(grad.shape)
        if name in self._fresh:
            self._fresh.discard(name)
            view.copy_(grad)
        else:
            view.add_(grad)
        self._missing[bucket.index] -= 1
        if self._missing[bucket.index] == 0:
            self.on_complete(bucket)
        if self._is_last or not self.keeps_whole:
            # In bucket order on every rank, or collectives would pair up wrongly.
            while self._launched < len(self._missing) and self._missing[self._launched] == 0:
                self._launch_next()

    def finish_micro_batch(self) -> None:
        """Reduce what is left; after the last micro-batch, wait until the shard holds the sums."""
        if self._is_last or not self.keeps_whole:
            for name in self._fresh:  # no gradient reached it
                bucket, slot = self._place[name]
                self._buffer(bucket)[slot.start - bucket.start : slot.stop - bucket.start].zero_()
            self._fresh.clear()
            while self._launched < len(self._missing):
                self._launch_next()
        self._is_first = False
        if self._is_last:
            while self._in_flight:
                self._settle()
            for work in self._works:
                work.wait()
            self._works.clear()

    def _buffer(self, bucket: Bucket) -> Tensor:
        if self._whole is not None:
            return self._whole[bucket.start : bucket.stop]
        if bucket.index not in self._buffers:
            buffer = torch.empty(bucket.size, device=self.device)
            buffer[bucket.slots[-1].stop - bucket.start :].zero_()
            self._buffers[bucket.index] = buffer
        return self._buffers[bucket.index]

    def _launch_next(self) -> None:
        bucket = self.layout.buckets[self._launched]
        self._launched += 1
        buffer = self._buffer(bucket)
        self._buffers.pop(bucket.index, None)
        for axis, start, stop in bucket.shares:
            all_reduce(buffer[start:stop], axis)
        if self.layout.shard.size == 1:
            if self.replicas.size > 1:
                self._works.append(start_all_reduce(buffer, self.replicas))
            return
        part = self.shard_values[self.layout.shard_slice(bucket)]
        received = part if self.keeps_whole or self._is_first else torch.empty_like(part)
        work = start_reduce_scatter(received, buffer, self.layout.shard)
        added = None if received is part else received
        self._in_flight.append(_Reduction(bucket, work, buffer, added, self._is_last))
        while not self.keeps_whole and len(self._in_flight) > _IN_FLIGHT:
            self._settle()

    def _settle(self) -> None:
        """Wait for the oldest reduction; the last of a bucket then goes to the replicas."""
        bucket, work, _, received, is_last = self._in_flight.popleft()
        work.wait()
        part = self.shard_values[self.layout.shard_slice(bucket)]
        if received is not None:
            part += received
        if is_last and self.replicas.size > 1:
            self._works.append(start_all_reduce(part, self.replicas))
