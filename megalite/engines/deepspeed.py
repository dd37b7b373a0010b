"""DeepSpeed's ZeRO as an engine: its partitioning, reduction and offload around our tensor-parallel model.

What DeepSpeed decides by itself is switched off: it neither clips nor scales nor schedules. It averages
gradients over the data-parallel ranks where we sum, so the loss is multiplied by their number first. It
reduces in `backward` and steps in `step`, and between the two the trainer decides.

Source:  Rajbhandari et al. 2020 (ZeRO); Ren et al. 2021 (ZeRO-Offload); the `deepspeed` package
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalite.checkpoint.format import TensorSlice
from megalite.checkpoint.snapshots import Snapshot, copy_to_host
from megalite.checkpoint.store import Checkpoint
from megalite.config import Config
from megalite.data.batch import Batch
from megalite.engines.deepspeed_comm import note_collectives
from megalite.engines.deepspeed_state import DeepSpeedState, Partition, open_state
from megalite.engines.engine import DTYPES, StepSums, to_device
from megalite.errors import ConfigError
from megalite.model.init import initial_values
from megalite.model.transformer import Transformer
from megalite.optim.loss_scale import LossScale
from megalite.optim.zero import STATE_KINDS
from megalite.parallel.collectives import all_reduce
from megalite.parallel.layers import TensorParallel
from megalite.parallel.mesh import Mesh
from megalite.parallel.sharding import FlatRange, Replica, ShardSpec, replicas, shard_specs


def load(device: torch.device, precision: str = "fp32") -> Any:
    """The deepspeed package, told which accelerator to use and to print warnings only.

    Raises:  ConfigError if it is not installed, or does not compute in this precision on the device
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise
        raise ConfigError(
            'mesh.zero_engine="deepspeed" but the package is not installed; '
            'pip install "megalite[deepspeed]", or use mesh.zero_engine="native"'
        ) from None
    accelerator = deepspeed.accelerator.get_accelerator()
    if precision == "fp16" and not accelerator.is_fp16_supported():
        raise ConfigError(
            'train.precision="fp16" with mesh.zero_engine="deepspeed" is not supported by deepspeed on this '
            'processor; use "bf16" or "fp32", or mesh.zero_engine="native"'
        )
    _import_muon()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Its calls of functions that torch has renamed, which a user of ours can do nothing about.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if device.type == "cpu":
        # Its collectives over shared memory: minutes of compiling at start, for what gloo does as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _import_muon() -> None:
    """Import what every deepspeed engine will, and we do not use, without letting it compile its kernels."""
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        with contextlib.suppress(ImportError):  # not every version has it
            importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        del os.environ["TORCHDYNAMO_DISABLE"]
        if before is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = before


@dataclass(frozen=True)
class ParallelUnit:
    """Our mesh under the names by which DeepSpeed asks for it (Megatron's `mpu`)."""

    mesh: Mesh
    model: dist.ProcessGroup
    data: dist.ProcessGroup

    def get_model_parallel_rank(self) -> int:
        """This rank's place among its tensor-parallel peers."""
        return self.mesh.tp.rank

    def get_model_parallel_world_size(self) -> int:
        """Tensor-parallel peers, this rank included."""
        return self.mesh.tp.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """The group of the tensor-parallel peers."""
        return self.model

    def get_data_parallel_rank(self) -> int:
        """This rank's place among its data-parallel peers."""
        return self.mesh.dp.rank

    def get_data_parallel_world_size(self) -> int:
        """Data-parallel peers, this rank included."""
        return self.mesh.dp.size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """The group of the data-parallel peers."""
        return self.data


class LossModule(nn.Module):
    """`Transformer.loss` as a forward pass, which is what DeepSpeed hangs its hooks on."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments of `Transformer.loss`; returns its `Losses` as (total, z_loss, tokens)."""
        losses = self.model.loss(*args, **options)
        return losses.total, losses.z_loss, losses.tokens


class DeepSpeedEngine:
    """Implements `Engine` with `deepspeed.initialize`, at ZeRO 1 to 3, with offload."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.applied_steps = 0
        self.loss_scale = LossScale(config.train)
        self.library = load(mesh.device)
        unit = _parallel_unit(mesh)
        tp = TensorParallel(mesh.tp, mesh.kv, config.mesh.sequence_parallel)
        with torch.device("meta"):
            model = Transformer(config.model, config.train.recompute, tp)
        self.specs = shard_specs(model)
        self.num_parameters = sum(math.prod(spec.shape) for spec in self.specs.values())
        settings = deepspeed_settings(config, mesh.dp.size, self.specs)
        if config.mesh.zero_stage == 3:
            with self.library.zero.Init(
                data_parallel_group=unit.data, config_dict_or_path=settings, mpu=unit
            ):
                model = Transformer(config.model, config.train.recompute, tp)
        else:
            model = model.to(DTYPES[config.train.precision]).to_empty(device=mesh.device)
        self.model = model
        module = LossModule(model)
        if config.mesh.zero_stage == 3:  # the loss reads the head outside the forward pass that owns it
            self.library.zero.register_external_parameter(module, model.output_weight)
        for name, parameter in model.named_parameters():
            parts = list(self.specs[name].ranges())
            # DeepSpeed forms a norm of its own, for which it skips what tp peers hold too. We do not use it,
            # but where a rank is left with nothing it raises.
            parameter.model_parallel = any(part.piece.copies.size == 1 for part in parts)  # type: ignore[attr-defined]
            if any(part.piece.is_partial for part in parts):
                parameter.register_hook(_ShareSum(self.specs[name]))  # type: ignore[no-untyped-call]
        self.engine = self.library.initialize(
            model=module,
            optimizer=self._build_optimizer(),
            config=settings,
            mpu=unit,
            dist_init_required=False,
        )[0]
        note_collectives(self.library)
        self.state: DeepSpeedState = open_state(self.engine, dict(model.named_parameters()))

    def forward_backward(self, micro_batches: Sequence[Batch]) -> StepSums:
        """See `Engine`."""
        sums = torch.zeros(3, dtype=torch.float64, device=self.mesh.device)
        self.state.forget_gradients()  # of a step that was not applied
        scale = self.loss_scale.value * self.mesh.dp.size / self.config.tokens_per_step
        for index, batch in enumerate(micro_batches):
            self.engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            total, z_loss, tokens = self._losses(self.engine, batch, training=True)
            self.engine.backward(total * scale, scale_wrt_gas=False)
            sums += torch.stack([total.detach(), z_loss, tokens]).double()
        total_sum, z_sum, token_sum = sums.tolist()
        norm_squared = float(self._local_norm_squared()) / self.loss_scale.value**2
        if self.mesh.tp.rank > 0:  # its peers have computed the same losses, and rank 0 reports them
            return StepSums(0.0, 0.0, 0.0, norm_squared)
        return StepSums(total_sum - z_sum, z_sum, token_sum, norm_squared)

    def optimizer_step(self, lr: float, grad_scale: float) -> None:
        """See `Engine`."""
        self.state.arm(lr, grad_scale / self.loss_scale.value)
        self.engine.step()
        if not self.engine.was_step_applied():
            raise RuntimeError("deepspeed left out a step whose gradient norm is finite")
        self.applied_steps += 1

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[Batch]) -> tuple[float, float]:
        """See `Engine`. At stage 3 every rank must bring as many micro-batches: each gathers weights."""
        loss = tokens = 0.0
        for batch in micro_batches:
            total, _, count = self._losses(self.engine.module, batch, training=False)
            if self.mesh.tp.rank == 0:  # its peers compute the same
                loss, tokens = loss + float(total), tokens + float(count)
        return loss, tokens

    def initialize(self) -> None:
        """See `Engine`."""
        config = self.config
        self._fill(
            "weight", lambda name, start, stop: initial_values(config.model, config.seed, name, start, stop)
        )
        for kind in STATE_KINDS[1:]:
            self._fill(kind, lambda name, start, stop: torch.zeros(stop - start))
        self.applied_steps = 0
        self.loss_scale.reset()
        self.state.set_step_count(0)
        self.state.publish()

    def state_slices(self) -> Iterator[TensorSlice]:
        """See `Engine`. Of ranks that hold the same state the first gives it; nothing is communicated."""
        for kind, partition in self._kept():
            yield from self._slices(kind, partition, self.state.read(kind, partition))

    def replicas(self) -> Iterator[Replica]:
        """See `Engine`. At stage 3 the shards of what tensor parallelism gives several ranks."""
        if self.config.mesh.zero_stage < 3:
            for name, parameter in self.model.named_parameters():
                yield from replicas(name, self.specs[name], parameter.detach().view(-1), self.mesh.dp)
            return
        for partition in self.state.partitions:
            for part in self.specs[partition.name].ranges(partition.start, partition.stop):
                if part.piece.copies.size > 1:
                    values = self.state.read("weight", partition)[_place(partition, part)]
                    yield Replica(partition.name, values, part.piece.copies)

    def load_state(self, checkpoint: Checkpoint) -> None:
        """See `Engine`.

        Raises:  CheckpointError if the checkpoint is of another model
        """
        checkpoint.check_model({name: spec.shape for name, spec in self.specs.items()})
        for kind in STATE_KINDS:
            self._fill(kind, partial(checkpoint.read, kind))
        self.applied_steps = int(checkpoint.meta["applied_steps"])
        self.loss_scale.load(checkpoint.meta["loss_scale"])
        self.state.set_step_count(self.applied_steps)
        self.state.publish()

    def snapshot(self, reuse: Snapshot | None = None) -> Snapshot:
        """See `Engine`. State that lies on disk is read from there."""
        state = ((_key(kind, part), self.state.read(kind, part)) for kind, part in self._kept())
        copies = copy_to_host(state, reuse)
        slices = itertools.chain.from_iterable(
            self._slices(kind, part, copies[_key(kind, part)]) for kind, part in self._kept()
        )
        return Snapshot(copies, tuple(slices), self.applied_steps, self.loss_scale.state())

    def load_snapshot(self, snapshot: Snapshot) -> None:
        """See `Engine`."""
        for kind, partition in self._kept():
            self.state.write(kind, partition, snapshot.tensors[_key(kind, partition)])
        self.applied_steps = snapshot.applied_steps
        self.loss_scale.load(snapshot.loss_scale)
        self.state.set_step_count(self.applied_steps)
        self.state.publish()

    def _kept(self) -> Iterator[tuple[str, Partition]]:
        """Every kind of state of every partition this rank keeps."""
        return itertools.product(STATE_KINDS, self.state.partitions)

    def _slices(self, kind: str, partition: Partition, values: Tensor) -> Iterator[TensorSlice]:
        """What a partition, of which these are the values, contributes to a checkpoint."""
        spec = self.specs[partition.name]
        for part in spec.ranges(partition.start, partition.stop):
            if part.piece.copies.rank == 0:
                mine = values[_place(partition, part)]
                yield TensorSlice(kind, partition.name, spec.shape, part.start, part.stop, mine)

    def _fill(self, kind: str, values: Callable[[str, int, int], Tensor]) -> None:
        """Set one kind of state from `values`, which gives elements [start, stop) of a parameter."""
        for partition in self.state.partitions:
            filled = torch.empty(partition.stop - partition.start)
            for part in self.specs[partition.name].ranges(partition.start, partition.stop):
                filled[_place(partition, part)] = values(partition.name, part.start, part.stop)
            self.state.write(kind, partition, filled)

    def _local_norm_squared(self) -> Tensor:
        """This rank's part of the squared gradient norm; 0-dim float64. Elements that several ranks hold
        are counted by the first, but a copy that is not finite is told by whoever has it."""
        counted, copied = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        for partition in self.state.partitions:
            gradient = self.state.gradient(partition)
            for part in self.specs[partition.name].ranges(partition.start, partition.stop):
                norm = torch.linalg.vector_norm(gradient[_place(partition, part)], dtype=torch.float64)
                total = counted if part.piece.copies.rank == 0 else copied
                total += norm.square()
        norm_squared: Tensor = counted.where(copied.isfinite(), torch.nan)
        return norm_squared

    def _build_optimizer(self) -> torch.optim.AdamW:
        """AdamW with our two groups: matrices decay, norms and biases do not."""
        config = self.config.optim
        groups = []
        for decays in (True, False):
            chosen = [p for n, p in self.model.named_parameters() if (len(self.specs[n].shape) > 1) == decays]
            groups.append({"params": chosen, "weight_decay": config.weight_decay if decays else 0.0})
        betas = (config.beta1, config.beta2)
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)

    def _losses(self, module: Any, batch: Batch, training: bool) -> tuple[Tensor, Tensor, Tensor]:
        inputs = to_device(batch, self.config, self.mesh.device, training)
        losses: tuple[Tensor, Tensor, Tensor] = module(
            *inputs[:4],
            dropout_keys=inputs.dropout_keys,
            z_loss=self.config.train.z_loss if training else 0.0,
            chunk_bytes=self.config.train.loss_chunk_bytes,
        )
        return losses


class _ShareSum:
    """A gradient hook: adds up, over the ranks that hold them, the ranges of which each computes a share."""

    def __init__(self, spec: ShardSpec) -> None:
        self.partial = [part for part in spec.ranges() if part.piece.is_partial]

    def __call__(self, grad: Tensor) -> Tensor:
        whole = grad.clone(memory_format=torch.contiguous_format)
        flat = whole.view(-1)
        for part in self.partial:
            all_reduce(flat[part.local : part.local + part.stop - part.start], part.piece.copies)
        return whole


def deepspeed_settings(config: Config, dp: int, specs: dict[str, ShardSpec]) -> dict[str, Any]:
    """The configuration DeepSpeed is given: ours in its words, and what it does by itself switched off.

    At stage 3 parameters up to the longest vector stay whole, as in our engine: gathering norms and biases
    would cost a message each.
    """
    mesh = config.mesh
    bucket = max(int(mesh.bucket_mib * 2**20) // 4, 1)
    vectors = [math.prod(spec.local_shape) for spec in specs.values() if len(spec.shape) == 1]
    zero: dict[str, Any] = {
        "stage": mesh.zero_stage,
        "reduce_bucket_size": bucket,
        "stage3_param_persistence_threshold": max(vectors),
    }
    if mesh.offload != "none":
        place: dict[str, Any] = {"device": mesh.offload, "pin_memory": torch.cuda.is_available()}
        if mesh.offload == "nvme":
            place["nvme_path"] = mesh.nvme_path
        zero["offload_optimizer"] = place
        if mesh.zero_stage == 3:
            zero["offload_param"] = place
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.grad_accum_steps(dp),
        "steps_per_print": None,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW runs on CPU state too, with the same arithmetic
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    if config.train.precision == "bf16":
        settings["bf16"] = {"enabled": True}
    if config.train.precision == "fp16":
        settings["fp16"] = {"enabled": True, "loss_scale": 1.0}  # fixed, for the scale is ours
    return settings


def _parallel_unit(mesh: Mesh) -> ParallelUnit:
    """Groups for both axes, where ours has none of its own: DeepSpeed talks to a rank alone too."""
    if not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")
        backend = "nccl" if mesh.device.type == "cuda" else "gloo"
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    world = dist.group.WORLD
    model = mesh.tp.group or _alone(world)
    return ParallelUnit(mesh, model, mesh.dp.group or _alone(world))


@cache
def _alone(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of this rank only; made once in a process, by all ranks of `world` together."""
    if world.size() == 1:
        return world
    groups: list[dist.ProcessGroup] = [dist.new_group([rank]) for rank in range(world.size())]
    return groups[world.rank()]


def _key(kind: str, partition: Partition) -> str:
    """A partition's name in a snapshot."""
    return f"{kind} {partition.name}"


def _place(partition: Partition, part: FlatRange) -> slice:
    """Where a partition's values hold a logical range."""
    start = part.local - partition.start
    return slice(start, start + part.stop - part.start)
