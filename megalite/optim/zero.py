"""ZeRO stages 0 and 1 over flat buffers: where weights, gradients and optimizer state live.

All parameters of a compute dtype are views into one flat buffer, all gradients into one fp32
buffer, both cut into the same buckets. During the last micro-batch's backward pass each full bucket
is reduced while the rest is still being computed. Stage 0 sums a bucket on every rank; stage 1
scatters it, so that rank r keeps, updates and later gathers the r-th part of every bucket:

    bucket 0          bucket 1          …      flat buffer (weights, gradients)
    [r0|r1|r2|r3]     [r0|r1|r2|r3]
    rank 1: [bucket 0's r1 | bucket 1's r1 | …]     shard (master, exp_avg, exp_avg_sq, gradient)

With one rank, or at stage 0, the shard is the whole buffer and the two coincide. With tensor
parallelism all this happens to a rank's part of the model, among the data-parallel ranks that hold the
same part.

Source:  Rajbhandari et al. 2020 (ZeRO), section 5.1
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalite.config import OptimConfig
from megalite.parallel.collectives import (
    all_reduce,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from megalite.parallel.mesh import Axis, Mesh
from megalite.parallel.sharding import ShardSpec, shard_specs
from megalite_kernels import adamw_

_NORM_ROW = 4096  # elements summed in fp32 before float64 takes over
STATE_KINDS = ("weight", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Slot:
    """Where this rank's part of one parameter lies in the flat buffers."""

    name: str
    spec: ShardSpec
    start: int
    stop: int


@dataclass(frozen=True)
class Bucket:
    """Neighbouring parameters that are reduced in one collective; `stop - start` divides by dp.

    `shares` are the ranges of which each rank of a tensor-parallel axis computes a share only.
    """

    start: int
    stop: int
    slots: tuple[Slot, ...]

    @property
    def shares(self) -> list[tuple[Axis, int, int]]:
        """(axis, start, stop) in the flat buffer; the shares are to be added up over the axis."""
        found: dict[Axis, list[tuple[int, int]]] = {}
        for slot in self.slots:
            for part in slot.spec.ranges():
                if part.piece.is_partial:
                    low = slot.start + part.local
                    found.setdefault(part.piece.copies, []).append((low, low + part.stop - part.start))
        return [(axis, *run) for axis, runs in found.items() for run in _runs(runs)]


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


class ZeroOptimizer:
    """Flat buffers, gradient reduction and AdamW for this rank's part of one model.

    Memory a rank, bytes per parameter of its part, c the compute dtype's size: stage 0: c + 16, in fp32 16;
    stage 1: c + 4 + 16/dp.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimConfig,
        mesh: Mesh,
        stage: int,
        bucket_bytes: int,
        dtype: torch.dtype,
    ) -> None:
        """Take over a model on the meta device; its parameters become views, values unset."""
        self.config, self.axis = config, mesh.dp
        self.is_sharded = stage >= 1 and self.axis.size > 1
        self.applied_steps = 0
        specs = shard_specs(model)
        self.buckets, decayed = _layout(specs, bucket_bytes // 4, self.axis.size)
        self._shards = self.axis.size if self.is_sharded else 1
        size = self.buckets[-1].stop
        device = mesh.device
        self.weights = torch.zeros(size, dtype=dtype, device=device)
        self.grads = torch.zeros(size, device=device)
        shared = not self.is_sharded
        shard_size = size // self._shards
        self.grad_shard = self.grads if shared else torch.zeros(shard_size, device=device)
        self._aliases_weights = shared and dtype == torch.float32
        self.master = self.weights if self._aliases_weights else torch.zeros(shard_size, device=device)
        self.exp_avg = torch.zeros(shard_size, device=device)
        self.exp_avg_sq = torch.zeros(shard_size, device=device)
        self._decayed = decayed // self._shards
        self._adopt(model)
        owned = list(self.owned_ranges())
        self._counted = list(_runs((r.shard.start, r.shard.stop) for r in owned if r.speaks))
        self._copied = list(_runs((r.shard.start, r.shard.stop) for r in owned if not r.speaks))

    def _adopt(self, model: nn.Module) -> None:
        self._bucket_of: dict[str, int] = {}
        self._views: dict[str, Tensor] = {}
        for index, bucket in enumerate(self.buckets):
            for slot in bucket.slots:
                view = self.weights[slot.start : slot.stop].view(slot.spec.local_shape)
                parameter = nn.Parameter(view)
                # None lets a gradient keep the dtype its operation summed it in, so that fp32
                # sums (embedding, head, norms) reach the fp32 buffer without a rounding to bf16.
                parameter.grad_dtype = None
                self._bucket_of[slot.name] = index
                self._views[slot.name] = self.grads[slot.start : slot.stop].view(slot.spec.local_shape)
                parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    self._collector(slot.name)
                )
                owner, _, leaf = slot.name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, parameter)
        self._fresh: set[str] = set()
        self._missing: list[int] = []
        self._launched = 0
        self._works: list[dist.Work] = []
        self._reducing = False

    # --- gradients ------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Forget the last step's gradients; each parameter's first gradient overwrites."""
        self._fresh = set(self._views)
        self._reducing = False

    def begin_last_micro_batch(self) -> None:
        """From now on a bucket is reduced as soon as all its gradients have arrived."""
        self._missing = [len(bucket.slots) for bucket in self.buckets]
        self._launched = 0
        self._reducing = True

    def finish_reduction(self) -> None:
        """Wait until this rank's shard holds the gradient sums over all ranks."""
        for name in self._fresh:
            self._views[name].zero_()  # no gradient reached it
        while self._launched < len(self.buckets):
            self._launch_next()
        for work in self._works:
            work.wait()
        self._works.clear()

    def _collector(self, name: str) -> Callable[[Tensor], None]:
        def collect(parameter: Tensor) -> None:
            view, grad = self._views[name], parameter.grad
            parameter.grad = None
            if grad is None:
                return
            if name in self._fresh:
                self._fresh.discard(name)
                view.copy_(grad)
            else:
                view.add_(grad)
            if self._reducing:
                self._missing[self._bucket_of[name]] -= 1
                # In bucket order on every rank, or collectives would pair up wrongly.
                while self._launched < len(self.buckets) and self._missing[self._launched] == 0:
                    self._launch_next()

        return collect

    def _launch_next(self) -> None:
        bucket = self.buckets[self._launched]
        self._launched += 1
        for axis, start, stop in bucket.shares:
            all_reduce(self.grads[start:stop], axis)
        if self.axis.group is None:
            return
        grads = self.grads[bucket.start : bucket.stop]
        if self.is_sharded:
            target = self.grad_shard[self._shard_slice(bucket)]
            self._works.append(start_reduce_scatter(target, grads, self.axis))
        else:
            self._works.append(start_all_reduce(grads, self.axis))

    def local_norm_squared(self) -> Tensor:
        """This rank's part of the squared global gradient norm; 0-dim float64.

        What several ranks hold is counted by the one that speaks for it, but a copy that is not finite
        is told by whoever has it.
        """
        if not self.is_sharded and self.axis.rank > 0:
            return torch.zeros((), dtype=torch.float64, device=self.grads.device)
        counted, copied = self._norm_squared(self._counted), self._norm_squared(self._copied)
        return counted.where(copied.isfinite(), math.nan)

    def _norm_squared(self, runs: list[tuple[int, int]]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.grads.device)
        for start, stop in runs:
            whole = start + (stop - start) // _NORM_ROW * _NORM_ROW
            rows = torch.linalg.vector_norm(self.grad_shard[start:whole].view(-1, _NORM_ROW), dim=1)
            rest = torch.linalg.vector_norm(self.grad_shard[whole:stop])
            total += rows.double().square().sum() + rest.double().square()
        return total

    # --- weights --------------------------------------------------------------------------------

    def step(self, lr: float, grad_scale: float) -> None:
        """AdamW on this rank's shard with gradients times `grad_scale`, then publish the weights."""
        self.applied_steps += 1
        c = self.config
        split = self._decayed
        for part, decay in ((slice(0, split), c.weight_decay), (slice(split, None), 0.0)):
            if self.master[part].numel():
                adamw_(
                    self.master[part],
                    self.grad_shard[part],
                    self.exp_avg[part],
                    self.exp_avg_sq[part],
                    lr=lr,
                    beta1=c.beta1,
                    beta2=c.beta2,
                    eps=c.eps,
                    weight_decay=decay,
                    step=self.applied_steps,
                    grad_scale=grad_scale,
                )
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Round the master weights into the compute weights, and gather every rank's part."""
        if self._aliases_weights:
            return
        works = []
        for bucket in self.buckets:
            weights = self.weights[bucket.start : bucket.stop]
            if not self.is_sharded:
                weights.copy_(self.master[bucket.start : bucket.stop])
                continue
            part = weights.chunk(self._shards)[self.axis.rank]
            part.copy_(self.master[self._shard_slice(bucket)])
            works.append(start_all_gather(weights, part, self.axis))
        for work in works:
            work.wait()

    # --- state ----------------------------------------------------------------------------------

    def state(self, kind: str) -> Tensor:
        """This rank's shard of one kind of state; fp32 [shard]."""
        return {"weight": self.master, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}[kind]

    def owned_ranges(self) -> Iterator[OwnedRange]:
        """Which elements of which logical parameters this rank's shard holds, in shard order."""
        for bucket in self.buckets:
            width = (bucket.stop - bucket.start) // self._shards
            low = bucket.start + width * (self.axis.rank if self.is_sharded else 0)
            shard_low = self._shard_slice(bucket).start
            for slot in bucket.slots:
                start, stop = max(slot.start, low), min(slot.stop, low + width)
                for part in slot.spec.ranges(start - slot.start, stop - slot.start):
                    yield OwnedRange(
                        slot.name,
                        slot.spec.shape,
                        part.start,
                        part.stop,
                        shard_low + slot.start + part.local - low,
                        speaks=part.piece.copies.rank == 0,
                    )

    def fill(self, kind: str, values: Callable[[OwnedRange], Tensor]) -> None:
        """Set one kind of state from `values`, which gives each owned range's fp32 elements."""
        shard = self.state(kind)
        for owned in self.owned_ranges():
            shard[owned.shard] = values(owned)

    def _shard_slice(self, bucket: Bucket) -> slice:
        return slice(bucket.start // self._shards, bucket.stop // self._shards)


def _layout(specs: dict[str, ShardSpec], bucket_size: int, dp: int) -> tuple[list[Bucket], int]:
    """Buckets in the order in which backward completes them, and where weight decay ends.

    Matrices come first, last layer first; norms and biases, which are not decayed, follow.
    """
    buckets: list[Bucket] = []
    start = 0
    for decays in (True, False):
        group = [(n, s) for n, s in reversed(specs.items()) if (len(s.shape) > 1) == decays]
        slots: list[Slot] = []
        stop = start
        for position, (name, spec) in enumerate(group):
            slots.append(Slot(name, spec, stop, stop + math.prod(spec.local_shape)))
            stop = slots[-1].stop
            if stop - start >= bucket_size or position == len(group) - 1:
                stop = start + -(-(stop - start) // dp) * dp
                buckets.append(Bucket(start, stop, tuple(slots)))
                slots, start = [], stop
        if decays:
            decayed = start
    return buckets, decayed


def _runs(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
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
