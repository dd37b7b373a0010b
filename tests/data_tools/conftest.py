"""What many tests of the data tools share."""

from __future__ import annotations

import pytest


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for the disk, in tests of many tiny steps that no power cut is to hit."""
    for module in ("crew", "documents", "dedup.shuffle"):
        monkeypatch.setattr(f"data_tools.{module}.fsync", lambda path: None)
