"""The compute weights: whole on every rank, or at ZeRO stage 3 gathered block by block as they are needed.

A gathered bucket is a flat tensor that the parameters are views of for good; between its uses its storage is
given back and the views are empty. Norms and biases stay whole: they are a thousandth of a model, and
gathering them would cost a message each.

    forward    gather root, block 0 | block 1 arrives while 0 computes | 0 given back | …
    backward   the last block is still there | block n-1 arrives while n computes | n given back | …

Source:  Rajbhandari et al. 2020 (ZeRO), section 5.3
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megalite.optim.buckets import ROOT, Bucket, FlatLayout, Slot
from megalite.parallel.collectives import Pending, start_all_gather
from megalite.parallel.uncompiled import uncompiled


class Weights:
    """Storage of a model's parameters in the compute dtype.

    `master` is this rank's fp32 shard. Where the compute dtype is fp32 as well and the shard serves as it is,
    no second copy is made. Where the shard is everything, `rounded` is it in the compute dtype, element for
    element: whoever writes both has nothing to `publish`. `is_master` says that the shard is the weights.
    """

    def __init__(
        self, model: nn.Module, layout: FlatLayout, master: Tensor, dtype: torch.dtype, gathers: bool
    ) -> None:
        """Make the parameters of a model on the meta device views of flat buffers, values unset."""
        self.layout, self.master = layout, master
        self._aliases_master = dtype == torch.float32
        self._whole: dict[int, Tensor] = {}
        self._parts: dict[int, Tensor] = {}  # this rank's part of each bucket that is gathered
        self._units: dict[str, list[Bucket]] = {}
        self._arriving: dict[int, Pending] = {}
        self._here: set[int] = set()
        self._in_backward = False
        self.is_master = self._aliases_master and layout.shard.size == 1
        kept = [bucket for bucket in layout.buckets if not (gathers and bucket.decays)]
        low = min((bucket.start for bucket in kept), default=layout.size)
        flat = master if self.is_master else torch.zeros(layout.size - low, dtype=dtype, device=master.device)
        self.rounded = flat if layout.shard.size == 1 and not self.is_master else None
        for bucket in layout.buckets:
            if bucket in kept:
                self._whole[bucket.index] = flat[bucket.start - low : bucket.stop - low]
                self._adopt(model, bucket)
                continue
            part = master[layout.shard_slice(bucket)]
            self._parts[bucket.index] = part if self._aliases_master else part.to(dtype)
            self._whole[bucket.index] = torch.empty(bucket.size, dtype=dtype, device=master.device)
            self._adopt(model, bucket)
            self._units.setdefault(bucket.unit, []).append(bucket)
            self.release(bucket)
        self._install_hooks(model)

    def _adopt(self, model: nn.Module, bucket: Bucket) -> None:
        for slot in bucket.slots:
            flat = self._whole[bucket.index][slot.start - bucket.start : slot.stop - bucket.start]
            parameter = nn.Parameter(flat.view(slot.spec.local_shape))
            # None lets a gradient keep the dtype its operation summed it in, so that fp32
            # sums (embedding, head, norms) reach the fp32 buffer without a rounding to bf16.
            parameter.grad_dtype = None
            owner, _, leaf = slot.name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, parameter)

    def kept(self) -> Iterator[tuple[Slot, Tensor]]:
        """The parameters that are whole on this rank all the time, flattened."""
        for bucket in self.layout.buckets:
            if bucket.index not in self._parts:
                whole = self._whole[bucket.index]
                for slot in bucket.slots:
                    yield slot, whole[slot.start - bucket.start : slot.stop - bucket.start]

    @torch.no_grad()
    def publish(self) -> None:
        """Round the master shard into the compute weights; what is not gathered on demand, gather now."""
        works = []
        for bucket in self.layout.buckets:
            mine = self.master[self.layout.shard_slice(bucket)]
            if bucket.index in self._parts:
                if not self._aliases_master:
                    self._parts[bucket.index].copy_(mine)
                continue
            whole = self._whole[bucket.index]
            if self.layout.shard.size == 1:
                if not self._aliases_master:
                    whole.copy_(mine)
                continue
            part = whole.chunk(self.layout.shard.size)[self.layout.shard.rank]
            part.copy_(mine)
            works.append(start_all_gather(whole, part, self.layout.shard))
        for work in works:
            work.wait()

    # --- stage 3 ----------------------------------------------------------------------------------

    @contextmanager
    def root(self, is_needed: bool = True) -> Iterator[None]:
        """Around a forward pass: the embedding and the head are here, if it needs them.

        Backward does without them: the loss forms its gradients in the forward pass, and the embedding's
        needs the tokens alone.
        """
        self._in_backward = False
        if is_needed:
            self._need(ROOT)
        try:
            yield
        finally:
            self._release_unit(ROOT)

    def release(self, bucket: Bucket) -> None:
        """Give a gathered bucket's storage back; in backward, once all of its gradients have arrived."""
        if bucket.index in self._parts:
            self._here.discard(bucket.index)
            self._whole[bucket.index].untyped_storage().resize_(0)

    @property
    def gathered_bytes(self) -> int:
        """Bytes of the gathered buckets that are here now, or arriving."""
        return sum(self._whole[index].untyped_storage().nbytes() for index in self._parts)

    def _release_unit(self, unit: str) -> None:
        for bucket in self._units.get(unit, []):
            self.release(bucket)

    def _start(self, unit: str) -> None:
        for bucket in self._units.get(unit, []):
            if bucket.index in self._here or bucket.index in self._arriving:
                continue
            whole, part = self._whole[bucket.index], self._parts[bucket.index]
            whole.untyped_storage().resize_(whole.numel() * whole.element_size())
            # Through `data`, which counts no versions: the values are those that autograd saved.
            self._arriving[bucket.index] = start_all_gather(whole.data, part, self.layout.shard)

    def _need(self, unit: str) -> None:
        self._start(unit)
        for bucket in self._units.get(unit, []):
            if bucket.index in self._arriving:
                self._arriving.pop(bucket.index).wait()
                self._here.add(bucket.index)

    def _install_hooks(self, model: nn.Module) -> None:
        names = [name for name, _ in model.named_modules() if name in self._units and name != ROOT]
        for place, name in enumerate(names):
            before = names[place - 1] if place > 0 else None
            after = names[place + 1] if place + 1 < len(names) else None
            hooks = _UnitHooks(self, name, before, after)
            module = model.get_submodule(name)
            module.register_forward_pre_hook(hooks.before_forward)
            module.register_forward_hook(hooks.after_forward)


class _UnitHooks:
    """What happens around a block: its weights arrive, its neighbour's are sent for, its own given back."""

    def __init__(self, weights: Weights, unit: str, before: str | None, after: str | None) -> None:
        self.weights, self.unit, self.before, self.after = weights, unit, before, after

    @uncompiled
    def before_forward(self, module: nn.Module, args: Any) -> None:
        weights = self.weights
        weights._need(self.unit)
        if self.after is not None and not weights._in_backward:
            weights._start(self.after)

    @uncompiled
    def after_forward(self, module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
        weights = self.weights
        if weights._in_backward:  # computed again: its backward follows at once
            return
        branch = output[1]  # its gradient is the first that a block's backward asks for
        if branch.requires_grad:
            branch.register_hook(self.before_backward)  # type: ignore[no-untyped-call]
            if self.after is None:  # the last block's backward comes next
                return
        weights._release_unit(self.unit)

    @uncompiled
    def before_backward(self, grad: Tensor) -> None:
        weights = self.weights
        weights._in_backward = True
        weights._need(self.unit)
        if self.before is not None:
            weights._start(self.before)
