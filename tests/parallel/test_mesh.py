"""Which device a process takes, by what its launcher says, and which groups it joins."""

from __future__ import annotations

import pytest
import torch

from megalite.errors import ConfigError
from megalite.parallel.mesh import Mesh, MeshShape, build_mesh
from tests.ranks import run_ranks


@pytest.mark.parametrize(
    ("local_rank", "devices", "said"),
    [
        (None, 8, "WORLD_SIZE=2 but LOCAL_RANK unset"),
        ("1", 1, "LOCAL_RANK=1 but this process sees 1 CUDA devices.*CUDA_VISIBLE_DEVICES"),
    ],
)
def test_no_two_processes_take_one_device(
    local_rank: str | None, devices: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    launcher = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(ConfigError, match=said):
        build_mesh()


def shared_groups(_: Mesh, shape: MeshShape) -> list[str]:
    """The groups of a mesh, by the axes that have them."""
    mesh = build_mesh(shape=shape)
    found: dict[int, list[str]] = {}
    for name in ("dp", "shard", "replicas", "tp", "kv", "pp", "ends"):
        group = getattr(mesh, name).group
        if group is not None:
            found.setdefault(id(group), []).append(name)
    return [" ".join(names) for names in found.values()]


@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        (MeshShape(tp=2, kv_copies=2), ["dp shard", "tp kv"]),
        (MeshShape(pp=2), ["dp shard", "pp ends"]),
        (MeshShape(zero_shard_size=2), ["dp", "shard", "replicas"]),
    ],
)
def test_axes_of_the_same_ranks_share_a_group(shape: MeshShape, groups: list[str]) -> None:
    assert run_ranks(shared_groups, 4, shape) == [groups] * 4


def unused_groups(_: Mesh, shape: MeshShape) -> list[str]:
    """The axes of a new mesh whose group has not talked yet, as gloo numbers collectives."""
    mesh = build_mesh(shape=shape)
    axes = {name: getattr(mesh, name).group for name in ("dp", "shard", "replicas", "tp", "kv", "pp", "ends")}
    return [name for name, group in axes.items() if group and not group._get_sequence_number_for_group()]


def test_every_group_has_talked_before_the_device_is_full() -> None:
    for shape in (MeshShape(zero_shard_size=2), MeshShape(tp=2, pp=2)):
        assert run_ranks(unused_groups, 4, shape) == [[]] * 4
