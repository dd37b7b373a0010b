"""The configuration of a run, as frozen models that check themselves.

Keys follow Hugging Face's meaning where one exists. Keys that contradict each other are refused
with both values, and derived numbers are properties, so no value lives in two places.
`config_file.py` reads and writes it.
"""

from __future__ import annotations

import itertools
from typing import Self

from pydantic import Field, model_validator

from megalite.config.data import DataConfig, Source
from megalite.config.model import ModelConfig, RopeScaling
from megalite.config.run import (
    CheckpointConfig,
    LogConfig,
    MeshConfig,
    OptimConfig,
    ResilienceConfig,
    TrainConfig,
)
from megalite.config.section import Section, divisors
from megalite.errors import ConfigError

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "LogConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "ResilienceConfig",
    "RopeScaling",
    "Section",
    "Source",
    "TrainConfig",
]


class Config(Section):
    """A whole run."""

    run_dir: str = Field(
        "runs/default", min_length=1, description="where config, metrics, ledger and checkpoints go"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of weights, data order and dropout")
    model: ModelConfig
    mesh: MeshConfig = MeshConfig()
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    resilience: ResilienceConfig = ResilienceConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.data.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"data.seq_len={self.data.seq_len} exceeds model.max_seq_len={self.model.max_seq_len}; "
                "shorten one or raise the other"
            )
        if self.train.global_batch_size % self.train.micro_batch_size:
            raise ValueError(
                f"train.micro_batch_size={self.train.micro_batch_size} does not divide "
                f"train.global_batch_size={self.train.global_batch_size}; use one of "
                f"{divisors(self.train.global_batch_size)}"
            )
        ramp = self.optim.warmup_steps + self.optim.decay_steps
        if ramp > self.train.steps:
            raise ValueError(
                f"optim.warmup_steps + optim.decay_steps = {ramp} exceeds train.steps={self.train.steps}"
            )
        if self.train.eval_every_steps and not self.data.validation:
            raise ValueError(
                f"train.eval_every_steps={self.train.eval_every_steps} but data.validation is empty; "
                "name a validation dataset or set it to 0"
            )
        if self.checkpoint.keep_best and not self.train.eval_every_steps:
            raise ValueError(
                f"checkpoint.keep_best={self.checkpoint.keep_best} but train.eval_every_steps=0: nothing "
                "says which is best; validate, at steps that are saved, or set it to 0"
            )
        self._check_tp()
        self._check_pp()
        self._check_zero_engine()
        return self

    def _check_tp(self) -> None:
        """What tensor parallelism divides must divide.

        Raises:  ValueError
        """
        tp, model = self.mesh.tp, self.model
        divided = {"num_heads": model.num_heads, "ffn_size": model.ffn_size}
        if self.mesh.sequence_parallel:
            divided["data.seq_len"] = self.data.seq_len
        legal = [
            n
            for n in range(1, model.num_heads + 1)
            if not any(size % n for size in divided.values())
            and not (model.num_kv_heads % n and n % model.num_kv_heads)
            and n <= model.vocab_size
        ]
        if tp in legal:
            return
        names = [
            f"{key if '.' in key else f'model.{key}'}={size}" for key, size in divided.items() if size % tp
        ]
        if names:
            fault = f"does not divide {' and '.join(names)}"
        elif tp > model.vocab_size:
            fault = f"exceeds model.vocab_size={model.vocab_size}"
        else:
            fault = f"and model.num_kv_heads={model.num_kv_heads} must divide one the other"
        raise ValueError(f"mesh.tp={tp} {fault}; use mesh.tp from {legal}")

    def _check_pp(self) -> None:
        """A pipeline's stages need layers, and its schedule the right number of chunks.

        Raises:  ValueError
        """
        mesh, layers = self.mesh, self.model.num_layers
        stages = mesh.pp * mesh.pp_chunks
        if (mesh.pp_chunks > 1) != (mesh.pp_schedule == "interleaved"):
            raise ValueError(
                f'mesh.pp_chunks={mesh.pp_chunks} with mesh.pp_schedule="{mesh.pp_schedule}"; set '
                'pp_chunks > 1 with "interleaved" and 1 otherwise'
            )
        if mesh.pp == 1 and mesh.pp_chunks > 1:
            raise ValueError(
                f"mesh.pp_chunks={mesh.pp_chunks} with mesh.pp=1: one process has nobody to take turns with; "
                'set mesh.pp > 1, or pp_chunks=1 with pp_schedule="1f1b"'
            )
        if stages > layers:
            raise ValueError(
                f"mesh.pp={mesh.pp} × mesh.pp_chunks={mesh.pp_chunks} are more stages than "
                f"model.num_layers={layers}; use at most {layers}"
            )
        if mesh.pp_layers and (
            len(mesh.pp_layers) != stages or sum(mesh.pp_layers) != layers or min(mesh.pp_layers) < 0
        ):
            raise ValueError(
                f"mesh.pp_layers={list(mesh.pp_layers)}; give pp · pp_chunks = {stages} numbers that add up "
                f"to model.num_layers={layers}"
            )
        if mesh.pp_schedule == "zero_bubble" and self.train.compile:
            raise ValueError(
                'mesh.pp_schedule="zero_bubble" splits each backward, which train.compile=true does not '
                'let it; use "1f1b", or train.compile=false'
            )

    @property
    def stage_layers(self) -> list[range]:
        """The layers of each pipeline stage; where they do not divide, the first stages take one more."""
        stages = self.mesh.pp * self.mesh.pp_chunks
        least, more = divmod(self.model.num_layers, stages)
        counts = self.mesh.pp_layers or [least + (stage < more) for stage in range(stages)]
        ends = list(itertools.accumulate(counts))
        return [range(end - count, end) for count, end in zip(counts, ends, strict=True)]

    def _check_zero_engine(self) -> None:
        """What only one of the two ZeRO engines can do.

        Raises:  ValueError
        """
        mesh, train = self.mesh, self.train
        stage, offload = f"mesh.zero_stage={mesh.zero_stage}", f'mesh.offload="{mesh.offload}"'
        ours = 'with mesh.zero_engine="deepspeed"'
        if mesh.zero_engine == "native":
            faults = {
                f'{offload} needs mesh.zero_engine="deepspeed"; use it, or "none"': mesh.offload != "none",
                'mesh.nvme_path needs mesh.zero_engine="deepspeed"; leave it empty': bool(mesh.nvme_path),
            }
        else:
            on_disk, is_selective = mesh.offload == "nvme", train.recompute == "selective"
            faults = {
                f"{stage} {ours}: there is nothing to divide; use 1, 2 or 3": mesh.zero_stage == 0,
                f"mesh.zero_shard_size={mesh.zero_shard_size} {ours}: it divides over all data-parallel "
                "processes; use 0, or the native engine": mesh.zero_shard_size > 0,
                f"mesh.pp={mesh.pp} {ours}: its ZeRO refuses pipelines from stage 2 on; use mesh.pp=1 with a "
                "larger mesh.tp, or the native engine": mesh.pp > 1,
                f"train.compile=true {ours}: its hooks are not proven under the compiler; use false, or the "
                "native engine": train.compile,
                f'train.recompute="selective" with {stage} {ours}: it would have to repeat the gathers of '
                'weights; use "full" or "none", or the native engine': is_selective and mesh.zero_stage == 3,
                f"{stage} with {offload}: DeepSpeed moves state to disk at stage 3 only; use that, or "
                'mesh.offload="cpu"': on_disk and mesh.zero_stage < 3,
                f'mesh.nvme_path="{mesh.nvme_path}" with {offload}: set the path exactly with '
                'mesh.offload="nvme"': on_disk != bool(mesh.nvme_path),
            }
        for fault, is_there in faults.items():
            if is_there:
                raise ValueError(fault)

    def data_parallel_size(self, processes: int) -> int:
        """How many groups of processes each hold a whole model.

        Raises:  ConfigError if the processes do not make whole groups, or those not whole shard groups
        """
        tp, pp = self.mesh.tp, self.mesh.pp
        if processes % (tp * pp):
            raise ConfigError(
                f"mesh.tp={tp} × mesh.pp={pp} does not divide the number of processes, {processes}; start a "
                f"multiple of {tp * pp}, or use a tp · pp from {divisors(processes)}"
            )
        dp, size = processes // (tp * pp), self.mesh.zero_shard_size
        if size and dp % size:
            raise ConfigError(
                f"mesh.zero_shard_size={size} does not divide the data-parallel size {dp}; use 0 (all) or "
                f"one of {divisors(dp)}"
            )
        return dp

    @property
    def kv_copies(self) -> int:
        """Tensor-parallel processes that share a key head; 1 while there are heads enough for all."""
        return max(self.mesh.tp // self.model.num_kv_heads, 1)

    def grad_accum_steps(self, dp: int) -> int:
        """Micro-batches a process computes per optimizer step at data-parallel size `dp`.

        Raises:  ConfigError if global_batch_size is not a multiple of micro_batch_size · dp
        """
        train = self.train
        if train.global_batch_size % (train.micro_batch_size * dp):
            if train.global_batch_size % dp:
                remedy = f"make train.global_batch_size a multiple of {dp}"
            else:
                remedy = f"use a micro_batch_size out of {divisors(train.global_batch_size // dp)}"
            raise ConfigError(
                f"train.global_batch_size={train.global_batch_size} is not a multiple of "
                f"train.micro_batch_size={train.micro_batch_size} × {dp} data-parallel processes; {remedy}"
            )
        return train.global_batch_size // (train.micro_batch_size * dp)

    @property
    def tokens_per_step(self) -> int:
        """Tokens in a global batch, ignored labels included."""
        return self.train.global_batch_size * self.data.seq_len
