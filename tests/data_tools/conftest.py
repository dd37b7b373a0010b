"""What many tests of the data tools share."""

from __future__ import annotations

import pytest


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for the disk, in tests of many tiny steps that no power cut is to hit."""
    monkeypatch.setattr("megalite.data.staging.fsync", lambda path: None)
