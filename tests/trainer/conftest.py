from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megalite.parallel.mesh import Axis, Mesh
from tests.trainer.runs import write_dataset


@pytest.fixture(scope="session")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("datasets")
    write_dataset(root / "train", seed=1)
    write_dataset(root / "valid", seed=2, documents=20)
    return root


@pytest.fixture
def root(datasets: Path, tmp_path: Path) -> Path:
    """A fresh folder that sees the shared datasets as train and valid."""
    for name in ("train", "valid"):
        (tmp_path / name).symlink_to(datasets / name)
    return tmp_path


@pytest.fixture
def alone() -> Mesh:
    return Mesh(rank=0, size=1, dp=Axis(), device=torch.device("cpu"))
