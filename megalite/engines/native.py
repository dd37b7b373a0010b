"""Our own engine: flat-buffer ZeRO around the model, communication hidden behind backward."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from megalite.checkpoint.format import TensorSlice
from megalite.checkpoint.snapshots import Snapshot, copy_to_host
from megalite.checkpoint.store import Checkpoint
from megalite.config import Config
from megalite.data.batch import Batch
from megalite.engines.engine import DTYPES, StepSums, to_device
from megalite.model.init import initial_values
from megalite.model.transformer import Part, Transformer
from megalite.optim.buckets import OwnedRange
from megalite.optim.loss_scale import LossScale
from megalite.optim.zero import STATE_KINDS, ZeroOptimizer
from megalite.parallel.layers import TensorParallel
from megalite.parallel.mesh import Mesh
from megalite.parallel.pipeline import Pipeline, Program, build_programs
from megalite.parallel.schedule import build_evaluation, build_schedule
from megalite.parallel.sharding import Replica, shard_specs
from megalite.parallel.uncompiled import prepare_to_compile


class NativeEngine:
    """Implements `Engine` with explicit tensor, pipeline and data parallelism, at ZeRO 0 to 3.

    One executor runs every step; without pipeline parallelism its schedule is a forward and a backward of
    each micro-batch.
    """

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        # Stage s of all lives on rank s % pp: see `schedule`.
        self.stage_layers = config.stage_layers
        mine = range(mesh.pp.rank, len(self.stage_layers), mesh.pp.size)
        part = Part(
            [layer for stage in mine for layer in self.stage_layers[stage]],
            is_first=mesh.pp.rank == 0,
            is_last=mesh.pp.rank == mesh.pp.size - 1,
            ends=mesh.ends,
        )
        tp = TensorParallel(mesh.tp, mesh.kv, config.mesh.sequence_parallel)
        with torch.device("meta"):
            self.model = Transformer(config.model, config.train.recompute, tp, part)
            specs = shard_specs(Transformer(config.model))
        self.shapes = {name: spec.shape for name, spec in specs.items()}
        self.num_parameters = sum(map(math.prod, self.shapes.values()))
        self.dtype = DTYPES[config.train.precision]
        self.loss_scale = LossScale(config.train)
        self.optimizer = ZeroOptimizer(
            self.model,
            config.optim,
            mesh,
            config.mesh.zero_stage,
            int(config.mesh.bucket_mib * 2**20),
            self.dtype,
        )
        if config.train.compile:
            prepare_to_compile()
            for block in self.model.blocks.values():
                block.compile()
        self._programs: dict[tuple[int, bool], Program] = {}

    @property
    def applied_steps(self) -> int:
        """See `Engine`."""
        return self.optimizer.applied_steps

    def forward_backward(self, micro_batches: Sequence[Batch]) -> StepSums:
        """See `Engine`."""
        self.optimizer.gradients.begin_step(len(micro_batches))
        total, z_loss, tokens = self._run(micro_batches, is_training=True)
        self.optimizer.gradients.finish_step()
        norm_squared = float(self.optimizer.local_norm_squared()) / self.loss_scale.value**2
        return StepSums(total - z_loss, z_loss, tokens, norm_squared)

    def optimizer_step(self, lr: float, grad_scale: float) -> None:
        """See `Engine`."""
        self.optimizer.step(lr, grad_scale / self.loss_scale.value)

    def evaluate(self, micro_batches: Iterable[Batch]) -> tuple[float, float]:
        """See `Engine`."""
        loss = tokens = 0.0
        by_shape = itertools.groupby(micro_batches, key=lambda batch: batch.tokens.shape)
        for _, batches in by_shape:  # one run each, for a pipeline's activations have one shape
            total, _, count = self._run(list(batches), is_training=False)
            loss, tokens = loss + total, tokens + count
        return loss, tokens

    def initialize(self) -> None:
        """See `Engine`."""
        config = self.config

        def values(owned: OwnedRange) -> Tensor:
            return initial_values(config.model, config.seed, owned.name, owned.start, owned.stop)

        self.optimizer.fill("weight", values)
        for kind in STATE_KINDS[1:]:
            self.optimizer.state(kind).zero_()
        self.optimizer.applied_steps = 0
        self.loss_scale.reset()
        self.optimizer.weights.publish()

    def state_slices(self) -> Iterator[TensorSlice]:
        """See `Engine`. Of ranks that hold the same state the first gives it."""
        return self._slices(self._shards())

    def replicas(self) -> Iterator[Replica]:
        """See `Engine`."""
        return self.optimizer.replicas()

    def load_state(self, checkpoint: Checkpoint) -> None:
        """See `Engine`.

        Raises:  CheckpointError if the checkpoint is of another model
        """
        checkpoint.check_model(self.shapes)
        for kind in STATE_KINDS:

            def values(owned: OwnedRange, kind: str = kind) -> Tensor:
                return checkpoint.read(kind, owned.name, owned.start, owned.stop)

            self.optimizer.fill(kind, values)
        self.optimizer.applied_steps = int(checkpoint.meta["applied_steps"])
        self.loss_scale.load(checkpoint.meta["loss_scale"])
        self.optimizer.weights.publish()

    def snapshot(self, reuse: Snapshot | None = None) -> Snapshot:
        """See `Engine`. Of what several ranks hold, each has its own copy to go back to."""
        shards = copy_to_host(self._shards().items(), reuse)
        return Snapshot(shards, tuple(self._slices(shards)), self.applied_steps, self.loss_scale.state())

    def load_snapshot(self, snapshot: Snapshot) -> None:
        """See `Engine`."""
        for kind, shard in self._shards().items():
            shard.copy_(snapshot.tensors[kind])
        self.optimizer.applied_steps = snapshot.applied_steps
        self.loss_scale.load(snapshot.loss_scale)
        self.optimizer.weights.publish()

    def _shards(self) -> dict[str, Tensor]:
        """This rank's shard of each kind of state; fp32 [shard]."""
        return {kind: self.optimizer.state(kind) for kind in STATE_KINDS}

    def _slices(self, shards: Mapping[str, Tensor]) -> Iterator[TensorSlice]:
        """What this rank contributes to a checkpoint, as views of `shards`."""
        if not self.optimizer.speaks:
            return
        owned_ranges = [owned for owned in self.optimizer.layout.owned_ranges() if owned.speaks]
        for kind, shard in shards.items():
            for owned in owned_ranges:
                yield TensorSlice(kind, owned.name, owned.shape, owned.start, owned.stop, shard[owned.shard])

    def _run(self, micro_batches: Sequence[Batch], is_training: bool) -> tuple[float, float, float]:
        """Sums of loss with z-loss, z-loss, and valid tokens; zeros on all but one rank of a model."""
        mesh, train = self.mesh, self.config.train
        last_stage = len(self.stage_layers) - 1
        sums = torch.zeros(3, dtype=torch.float64, device=mesh.device)

        def forward(stage: int, index: int, x: Tensor | None) -> Tensor:
            # Made here and not for all before: the angles alone take 4 · head_dim bytes a token.
            batch = to_device(micro_batches[index], self.config, mesh.device, is_training)
            shared = self.model.share(
                batch.tokens.shape, batch.positions, batch.doc_starts, batch.dropout_keys
            )
            with self.optimizer.weights.root(is_needed=stage in (0, last_stage)):
                if x is None:
                    x = self.model.embed(batch.tokens, batch.positions, shared)
                x = self.model.run_blocks(x, self.stage_layers[stage], shared)
                if stage != last_stage:
                    return x
                z_loss = train.z_loss if is_training else 0.0
                losses = self.model.stream_loss(x, batch.labels, z_loss, train.loss_chunk_bytes)
            if mesh.tp.rank == 0:  # its peers compute the same
                sums.add_(torch.stack([losses.total.detach(), losses.z_loss, losses.tokens]))
            # A constant divisor: how many labels of the global batch are valid is only known once
            # all ranks have reported, and the trainer corrects for it in `grad_scale`.
            return losses.total * (self.loss_scale.value / self.config.tokens_per_step)

        tokens = micro_batches[0].tokens.size
        rows = tokens // mesh.tp.size if self.model.tp.divides_tokens else tokens
        pipeline = Pipeline([forward] * self.config.mesh.pp_chunks, mesh.pp, mesh.device)
        program = self._program(len(micro_batches), is_training)
        pipeline.run(program, (rows, self.config.model.hidden_size), self.dtype)
        total, z_loss, count = sums.tolist()
        return total, z_loss, count

    def _program(self, micro_batches: int, is_training: bool) -> Program:
        key = (micro_batches, is_training)
        if key not in self._programs:
            pp, chunks = self.mesh.pp.size, self.config.mesh.pp_chunks
            if is_training:
                schedule = build_schedule(self.config.mesh.pp_schedule, pp, micro_batches, chunks)
            else:
                schedule = build_evaluation(pp, micro_batches, chunks)
            self._programs[key] = build_programs(schedule)[self.mesh.pp.rank]
        return self._programs[key]
