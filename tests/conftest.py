"""What every test shares: one thread per process, and warm ranks that end with the session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.ranks import close_pools

torch.set_num_threads(1)  # the cores are shared by all ranks


@pytest.fixture(scope="session", autouse=True)
def _warm_ranks() -> Iterator[None]:
    yield
    close_pools()
