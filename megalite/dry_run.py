"""What a run would be, without starting it: `megalite train --dry-run`."""

from __future__ import annotations

import torch

from megalite.config import Config
from megalite.config_file import to_toml
from megalite.model.flops import count_parameters, token_flops
from megalite.model.transformer import Part, Transformer
from megalite.parallel.layers import TensorParallel
from megalite.parallel.mesh import Axis, world_size


def describe(config: Config) -> str:
    """The resolved configuration, parameters, bytes a process and FLOPs, one a line.

    Raises:  ConfigError if the processes that WORLD_SIZE tells of do not make the layout
    """
    processes = world_size()
    dp = config.data_parallel_size(processes)
    accumulation = config.grad_accum_steps(dp)
    parameters = count_parameters(config.model)
    held = _largest_part(config)
    flops = token_flops(config.model, config.data.seq_len)
    tokens = config.tokens_per_step
    compute, stage = (4 if config.train.precision == "fp32" else 2), config.mesh.zero_stage
    shards = (config.mesh.zero_shard_size or dp) if stage else 1
    # In fp32 the master weights are the compute weights, or at stage 3 this rank's part of them.
    master = 0 if compute == 4 and (shards == 1 or stage == 3) else 4
    parts = {
        "weights": compute * held // (shards if stage == 3 else 1),
        "gradients": 4 * held // shards + (4 * held if stage == 1 and shards > 1 else 0),
        "optimizer": (8 + master) * held // shards,
    }
    gib = {name: f"{size / 2**30:,.2f} GiB" for name, size in parts.items()}
    lines = [
        to_toml(config),
        f"parameters       {parameters:,} ({parameters / 1e9:.2f} B)",
        f"processes        {processes} = dp {dp} × pp {config.mesh.pp} × tp {config.mesh.tp}; "
        f"each of the {dp} computes {accumulation} × {config.train.micro_batch_size} samples a step",
        f"bytes a process  {sum(parts.values()) / 2**30:,.2f} GiB without activations: "
        + ", ".join(f"{name} {size}" for name, size in gib.items())
        + _offloaded(config),
        f"tokens           {tokens:,} a step, {tokens * config.train.steps:,} in all",
        f"FLOPs a token    {flops.strict / 1e9:,.3f} G strict, {flops.non_causal / 1e9:,.3f} G non-causal",
        f"FLOPs in all     {flops.strict * tokens * config.train.steps:.3g} strict",
    ]
    return "\n".join(lines)


def _offloaded(config: Config) -> str:
    """Which of these bytes lie elsewhere than on the device."""
    place = {"none": "", "cpu": "in host memory", "nvme": "on disk"}[config.mesh.offload]
    what = "optimizer and weights" if config.mesh.zero_stage == 3 else "optimizer"
    return place and f" ({what} {place})"


def _largest_part(config: Config) -> int:
    """Parameters of the process that holds most of them."""
    pp, stages = config.mesh.pp, config.stage_layers
    counts = []
    for rank in range(pp):
        layers = [layer for stage in stages[rank::pp] for layer in stage]
        with torch.device("meta"):
            part = Part(layers, is_first=rank == 0, is_last=rank == pp - 1)
            model = Transformer(config.model, tp=TensorParallel(Axis(0, config.mesh.tp)), part=part)
        counts.append(sum(parameter.numel() for parameter in model.parameters()))
    return max(counts)
