"""Which device a process takes, by what its launcher says."""

from __future__ import annotations

import pytest
import torch

from megalite.errors import ConfigError
from megalite.parallel.mesh import build_mesh


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
