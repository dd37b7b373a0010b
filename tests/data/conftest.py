"""What every test of this folder gets."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Copies of shards go to a folder of the test's own."""
    monkeypatch.setenv("MEGALITE_CACHE", str(tmp_path_factory.mktemp("cache")))
