"""The process mesh: who I am, who my peers are along each axis, and on which device I compute.

A `Mesh` is made once at start and handed down; no module keeps a process group of its own.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from megalite.errors import ConfigError
from megalite.parallel.flight import BACKGROUND, flight_log


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh as this process sees it.

    `group` is None exactly when `size` is 1: there is nobody to talk to. `name` is the group's in the
    flight log: the first of the axes that have these ranks, "world" for all processes.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    name: str = field(default="world", compare=False)


ALONE = Axis()


@dataclass(frozen=True)
class Mesh:
    """This process's place: its rank among all, its axes, its device.

    Ranks are counted with tp innermost, so that tensor-parallel peers, which talk most, are
    neighbours on one host, and dp outermost: rank = (dp.rank · pp.size + pp.rank) · tp.size + tp.rank.

    `kv` is the part of the tp axis whose ranks hold the same key and value heads, where tp has more
    ranks than the model has such heads. `ends` are the first and the last rank of the pp axis, which
    share a tied embedding; for others it is their own. The dp axis is divided into groups of
    neighbours, `shard`, that ZeRO divides a model's state among; ranks at the same place in different
    groups are `replicas` of each other. `saving` is all processes, over gloo on every device: a group of
    its own for the thread that writes checkpoints, since the collectives of two threads must not mix on one.
    """

    rank: int
    size: int
    dp: Axis
    device: torch.device
    shard: Axis = ALONE
    replicas: Axis = ALONE
    tp: Axis = ALONE
    kv: Axis = ALONE
    pp: Axis = ALONE
    ends: Axis = ALONE
    saving: Axis = ALONE

    @property
    def world(self) -> Axis:
        """All processes as one axis."""
        return Axis(self.rank, self.size, dist.group.WORLD if self.size > 1 else None)


@dataclass(frozen=True)
class MeshShape:
    """What divides the processes; the rest is data-parallel.

    `kv_copies`, the ranks that share a key head, divides `tp`; `zero_shard_size`, the ranks that share
    a model's state, divides the data-parallel size, which 0 stands for.
    """

    tp: int = 1
    pp: int = 1
    kv_copies: int = 1
    zero_shard_size: int = 0


def build_mesh(timeout_s: float = 600.0, shape: MeshShape | None = None) -> Mesh:
    """Join the process group that torchrun or the deepspeed launcher described, or stand alone.

    The launchers set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. With a CUDA device
    the backend is nccl, otherwise gloo. `shape` (all data-parallel by default) must fit the number of
    processes, see `Config.data_parallel_size`.

    Comm:    one number over each group
    Raises:  ConfigError if the launcher's variables are incomplete or a local rank has no device
    """
    size, rank = world_size(), int(os.environ.get("RANK", "0"))
    device = _local_device()
    if size == 1:
        return Mesh(rank=0, size=1, dp=ALONE, device=device)
    needed = ["RANK", "MASTER_ADDR", "MASTER_PORT"]
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        needed.append("LOCAL_RANK")  # or all of a host's processes would take its first device
    missing = [name for name in needed if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE={size} but {', '.join(missing)} unset; start with torchrun or the deepspeed launcher"
        )
    if not dist.is_initialized():
        if device.type == "cuda":
            # The last collectives of every rank, written out when one times out: who did not come to which.
            os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
            os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))

    made: list[tuple[list[list[int]], Axis]] = []

    def axis(name: str, groups: list[list[int]]) -> Axis:
        # One group for two axes of the same ranks: to nccl each is hundreds of MiB of the device's memory.
        for others, found in made:
            if others == groups:
                return found
        made.append((groups, _axis(name, groups, rank, timedelta(seconds=timeout_s))))
        return made[-1][1]

    shape = shape or MeshShape()
    model = shape.tp * shape.pp  # ranks that hold one whole model between them
    width = (shape.zero_shard_size or size // model) * model  # those of neighbouring groups of shards
    pipelines = [
        list(range(low + place, low + model, shape.tp))
        for low in range(0, size, model)
        for place in range(shape.tp)
    ]
    inner = [[stage] for pipeline in pipelines for stage in pipeline[1:-1]]
    mesh = Mesh(
        rank=rank,
        size=size,
        dp=axis("dp", [list(range(place, size, model)) for place in range(model)]),
        device=device,
        shard=axis(
            "shard",
            [
                list(range(low + place, low + width, model))
                for low in range(0, size, width)
                for place in range(model)
            ],
        ),
        replicas=axis("replicas", [list(range(place, size, width)) for place in range(width)]),
        tp=axis("tp", _blocks(size, shape.tp)),
        kv=axis("kv", _blocks(size, shape.kv_copies)),
        pp=axis("pp", pipelines),
        ends=axis("ends", [sorted({pipeline[0], pipeline[-1]}) for pipeline in pipelines] + inner),
        saving=Axis(
            rank, size, dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)), BACKGROUND
        ),
    )
    for _, found in made:  # in the same order on all ranks
        if found.size > 1:
            # Nccl connects a group at its first collective. Some have theirs late, to compare weights:
            # a network that is wrong must show now, and the device may be full then.
            dist.all_reduce(torch.zeros(1, device=device), group=found.group)
    return mesh


def world_size() -> int:
    """How many processes the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _blocks(size: int, width: int) -> list[list[int]]:
    return [list(range(low, low + width)) for low in range(0, size, width)]


def _axis(name: str, groups: list[list[int]], rank: int, timeout: timedelta) -> Axis:
    """My axis among `groups`, which part all ranks and which every rank gives in the same order."""
    if len(groups) == 1:
        return Axis(rank, len(groups[0]), dist.group.WORLD)
    mine = ALONE
    for group in groups:  # a new group is made by all ranks together, whoever belongs to it
        handle = dist.new_group(group, timeout=timeout) if len(group) > 1 else None
        if rank in group and handle is not None:
            mine = Axis(group.index(rank), len(group), handle, name)
    return mine


def close_mesh(mesh: Mesh) -> None:
    """Leave the process group; every process calls it at the end of a run."""
    if mesh.size > 1 and dist.is_initialized():
        flight_log.forget()
        dist.destroy_process_group()


def _local_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"LOCAL_RANK={local_rank} but this process sees {torch.cuda.device_count()} CUDA devices; "
            "start at most one process per device, and let each see all of its host's (CUDA_VISIBLE_DEVICES)"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
