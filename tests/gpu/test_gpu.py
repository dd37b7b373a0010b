"""The checks of launch/gpu_check that are right or wrong, under pytest where there is a GPU."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

pytest.importorskip("triton")

from tests.gpu import checks

ITEMS = dict(checks.items(torch.device("cuda")))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ITEMS)
def test_kernels(name: str) -> None:
    result = ITEMS[name]()
    if "left_out" in result:
        pytest.skip(result["left_out"])
    assert result["passed"], result
