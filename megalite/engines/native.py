"""Our own engine: flat-buffer ZeRO around the model, communication hidden behind backward."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from megalite.checkpoint.format import TensorSlice
from megalite.checkpoint.store import Checkpoint
from megalite.config import Config
from megalite.data.loader import Batch
from megalite.engines.engine import StepSums
from megalite.errors import CheckpointError
from megalite.model.init import initial_values
from megalite.model.transformer import Losses, Transformer, dropout_keys
from megalite.optim.buckets import OwnedRange
from megalite.optim.zero import STATE_KINDS, ZeroOptimizer
from megalite.parallel.layers import TensorParallel
from megalite.parallel.mesh import Mesh
from megalite.parallel.sharding import shard_specs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class NativeEngine:
    """Implements `Engine` with explicit tensor and data parallelism, at ZeRO 0 to 3."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        tp = TensorParallel(mesh.tp, mesh.kv, config.mesh.sequence_parallel)
        with torch.device("meta"):
            self.model = Transformer(config.model, config.train.recompute, tp)
        self.num_parameters = sum(math.prod(spec.shape) for spec in shard_specs(self.model).values())
        self.optimizer = ZeroOptimizer(
            self.model,
            config.optim,
            mesh,
            config.mesh.zero_stage,
            int(config.mesh.bucket_mib * 2**20),
            DTYPES[config.train.precision],
        )
        if config.train.compile:
            for block in self.model.blocks:
                block.compile()

    @property
    def applied_steps(self) -> int:
        """See `Engine`."""
        return self.optimizer.applied_steps

    def forward_backward(self, micro_batches: Sequence[Batch]) -> StepSums:
        """See `Engine`."""
        sums = torch.zeros(3, dtype=torch.float64, device=self.mesh.device)
        gradients = self.optimizer.gradients
        gradients.begin_step()
        for index, batch in enumerate(micro_batches):
            losses = self._losses(batch)
            gradients.begin_micro_batch(is_last=index == len(micro_batches) - 1)
            # A constant divisor: how many labels of the global batch are valid is only known once
            # all ranks have reported, and the trainer corrects for it in `grad_scale`.
            torch.autograd.backward(losses.total / self.config.tokens_per_step)
            gradients.finish_micro_batch()
            sums += torch.stack([losses.total.detach(), losses.z_loss, losses.tokens]).double()
        total, z_loss, tokens = sums.tolist()
        norm_squared = float(self.optimizer.local_norm_squared())
        if self.mesh.tp.rank > 0:  # its peers have computed the same losses, and rank 0 reports them
            return StepSums(0.0, 0.0, 0.0, norm_squared)
        return StepSums(total - z_loss, z_loss, tokens, norm_squared)

    def optimizer_step(self, lr: float, grad_scale: float) -> None:
        """See `Engine`."""
        self.optimizer.step(lr, grad_scale)

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[Batch]) -> tuple[float, float]:
        """See `Engine`."""
        loss = tokens = 0.0
        for batch in micro_batches:
            losses = self._losses(batch, training=False)
            loss += float(losses.total)
            tokens += float(losses.tokens)
        return loss, tokens

    def initialize(self) -> None:
        """See `Engine`."""
        config = self.config

        def values(owned: OwnedRange) -> Tensor:
            return initial_values(config.model, config.seed, owned.name, owned.start, owned.stop)

        self.optimizer.fill("weight", values)
        self.optimizer.weights.publish()

    def state_slices(self) -> Iterator[TensorSlice]:
        """See `Engine`. Of ranks that hold the same state the first gives it."""
        if not self.optimizer.speaks:
            return
        owned_ranges = [owned for owned in self.optimizer.layout.owned_ranges() if owned.speaks]
        for kind in STATE_KINDS:
            shard = self.optimizer.state(kind)
            for owned in owned_ranges:
                yield TensorSlice(kind, owned.name, owned.shape, owned.start, owned.stop, shard[owned.shard])

    def load_state(self, checkpoint: Checkpoint) -> None:
        """See `Engine`.

        Raises:  CheckpointError if the checkpoint is of another model
        """
        expected = {
            slot.name: slot.spec.shape for bucket in self.optimizer.layout.buckets for slot in bucket.slots
        }
        found = {name: tuple(checkpoint.shape(name)) for name in checkpoint.names("weight")}
        if found != expected:
            name = next(n for n in {**expected, **found} if expected.get(n) != found.get(n))
            raise CheckpointError(
                f"{checkpoint.folder} holds {name} of shape {found.get(name)}, the config's model has "
                f"{expected.get(name)}; continue with the config it was trained with, or another run_dir"
            )
        for kind in STATE_KINDS:

            def values(owned: OwnedRange, kind: str = kind) -> Tensor:
                return checkpoint.read(kind, owned.name, owned.start, owned.stop)

            self.optimizer.fill(kind, values)
        self.optimizer.applied_steps = int(checkpoint.meta["applied_steps"])
        self.optimizer.weights.publish()

    def _losses(self, batch: Batch, training: bool = True) -> Losses:
        device = self.mesh.device

        def on_device(array: NDArray[Any]) -> Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        keys = None
        if training and self.config.model.dropout:
            keys = dropout_keys(self.config.seed, on_device(batch.sample_ids))
        doc_starts = None if batch.doc_starts is None else on_device(batch.doc_starts)
        with self.optimizer.weights.root():
            return self.model.loss(
                on_device(batch.tokens),
                on_device(batch.labels),
                on_device(batch.positions),
                doc_starts,
                dropout_keys=keys,
                z_loss=self.config.train.z_loss if training else 0.0,
                chunk_tokens=self.config.train.loss_chunk_tokens,
            )
