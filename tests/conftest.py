"""What every test shares: one thread per process, and warm ranks that end with the session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests import early
from tests.ranks import close_pools

torch.set_num_threads(1)  # the cores are shared by all ranks


@pytest.fixture(scope="session", autouse=True)
def _warm_ranks() -> Iterator[None]:
    yield
    early.stop()
    close_pools()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin what modules want begun early."""
    if session.config.option.collectonly:
        return
    items = [item for item in session.items if isinstance(item, pytest.Function)]
    for module in dict.fromkeys(item.module for item in items):
        if hasattr(module, "begin_early"):
            module.begin_early([item for item in items if item.module is module])
