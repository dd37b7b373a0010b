"""ZeRO stages 0 to 3 over flat buffers: who holds weights, gradients and optimizer state.

The data-parallel ranks form groups of `shard.size` that divide a model's state among them, and the
groups are replicas of each other. Stage 0 is a shard size of one; by default a group is all of them.

    stage   weights    gradients   optimizer state, fp32 master
    0       whole      whole       whole
    1       whole      whole       shard
    2       whole      shard       shard
    3       shard      shard       shard

With tensor parallelism all this happens to a rank's part of the model, among the data-parallel ranks
that hold the same part.

Source:  Rajbhandari et al. 2020 (ZeRO), section 5; Zhang et al. 2022 (MiCS) for groups and replicas
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from megalite.config import OptimConfig
from megalite.optim.buckets import OwnedRange, lay_out, runs
from megalite.optim.gradients import Gradients
from megalite.optim.weights import Weights
from megalite.parallel.mesh import ALONE, Mesh
from megalite.parallel.sharding import Replica, shard_specs
from megalite.parallel.sharding import replicas as replicas_of
from megalite_kernels import adamw_, sum_of_squares

STATE_KINDS = ("weight", "exp_avg", "exp_avg_sq")


class ZeroOptimizer:
    """AdamW on this rank's shard of its part of one model, and the flat buffers around it.

    Memory a rank, bytes per parameter of its part, c the compute dtype's size, s the shard size:
    stage 0: c + 16, in fp32 16; stage 1: c + 4 + 16/s; stage 2: c + 16/s; stage 3: (c + 16)/s, in fp32 16/s.
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
        self.config = config
        self.applied_steps = 0
        shard, replicas = (ALONE, mesh.dp) if stage == 0 else (mesh.shard, mesh.replicas)
        self.layout = lay_out(shard_specs(model), bucket_bytes // 4, shard, by_unit=stage == 3)
        self.master, self.exp_avg, self.exp_avg_sq = (
            torch.zeros(self.layout.shard_size, device=mesh.device) for _ in STATE_KINDS
        )
        self.weights = Weights(model, self.layout, self.master, dtype, gathers=stage == 3 and shard.size > 1)
        self.gradients = Gradients(
            self.layout,
            replicas,
            keeps_whole=stage <= 1,
            device=mesh.device,
            on_complete=self.weights.release,
        )
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                partial(self.gradients.collect, name=name)
            )
        self._dp, self._replicas = mesh.dp, replicas
        # Of replicas the first one speaks, of ranks that tensor parallelism gives the same elements too.
        self.speaks = replicas.rank == 0
        owned = list(self.layout.owned_ranges())
        self._counted = list(runs((r.shard.start, r.shard.stop) for r in owned if r.speaks))
        self._copied = list(runs((r.shard.start, r.shard.stop) for r in owned if not r.speaks))

    def local_norm_squared(self) -> Tensor:
        """This rank's part of the squared global gradient norm; 0-dim float64.

        What several ranks hold is counted by the one that speaks for it, but a copy that is not finite
        is told by whoever has it.
        """
        if not self.speaks:
            return torch.zeros((), dtype=torch.float64, device=self.master.device)
        counted, copied = self._norm_squared(self._counted), self._norm_squared(self._copied)
        return counted.where(copied.isfinite(), torch.nan)

    def _norm_squared(self, ranges: list[tuple[int, int]]) -> Tensor:
        gradients = self.gradients.shard_values
        total = torch.zeros((), dtype=torch.float64, device=gradients.device)
        for start, stop in ranges:
            total += sum_of_squares(gradients[start:stop])
        return total

    def step(self, lr: float, grad_scale: float) -> None:
        """AdamW on this rank's shard with gradients times `grad_scale`, then publish the weights."""
        self.applied_steps += 1
        c = self.config
        split = self.layout.decayed
        rounded = self.weights.rounded
        for part, decay in ((slice(0, split), c.weight_decay), (slice(split, None), 0.0)):
            if self.master[part].numel():
                adamw_(
                    self.master[part],
                    self.gradients.shard_values[part],
                    self.exp_avg[part],
                    self.exp_avg_sq[part],
                    lr=lr,
                    beta1=c.beta1,
                    beta2=c.beta2,
                    eps=c.eps,
                    weight_decay=decay,
                    step=self.applied_steps,
                    grad_scale=grad_scale,
                    rounded=None if rounded is None else rounded[part],
                )
        if rounded is None:
            self.weights.publish()

    # --- state ----------------------------------------------------------------------------------

    def state(self, kind: str) -> Tensor:
        """This rank's shard of one kind of state; fp32 [shard]."""
        return {"weight": self.master, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}[kind]

    def replicas(self) -> Iterator[Replica]:
        """Weights that others hold whole as well, and masters that are in other groups of shards too."""
        for slot, values in self.weights.kept():
            yield from replicas_of(slot.name, slot.spec, values, self._dp)
        if self._replicas.size > 1 and not self.weights.is_master:
            for owned in self.layout.owned_ranges():
                yield Replica(f"the master of {owned.name}", self.master[owned.shard], self._replicas)

    def fill(self, kind: str, values: Callable[[OwnedRange], Tensor]) -> None:
        """Set one kind of state from `values`, which gives each owned range's fp32 elements."""
        shard = self.state(kind)
        for owned in self.layout.owned_ranges():
            shard[owned.shard] = values(owned)
