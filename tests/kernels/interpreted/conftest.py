"""Kernels as numpy programs. A process of its own, started by test_interpreted.py, or by hand:

TRITON_INTERPRET=1 pytest tests/kernels/interpreted
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megalite_kernels.dispatch import is_interpreted

if is_interpreted():
    from tests.kernels.interpreted import bf16

    bf16.install()
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fresh memory is NaN, so that whatever a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
