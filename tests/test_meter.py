"""What a step is said to have been worth."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megalite import meter
from megalite.config_file import build_config
from megalite.engines.engine import StepSums
from megalite.meter import Meter, StepReport
from megalite.model.flops import token_flops
from megalite.parallel.mesh import Axis, Mesh

PEAK = 1e12


def _record(precision: str, monkeypatch: pytest.MonkeyPatch, is_applied: bool = True) -> dict[str, Any]:
    """Of a step of 4 × 16 tokens that took half a second, on four devices of a known peak."""
    monkeypatch.setattr(meter, "peak_flops", lambda _device: PEAK)
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "ffn_size": 32}
    train = {"steps": 1, "global_batch_size": 4, "micro_batch_size": 1, "precision": precision}
    config = build_config({"model": sizes, "data": {"seq_len": 16}, "optim": {"lr": 1e-3}, "train": train})
    mesh = Mesh(0, 4, Axis(), torch.device("cpu"))
    report = StepReport(
        2.0, 0.0, 1.0, 64, 1.0, False, False, StepSums(128.0, 0.0, 64.0, 1.0), is_applied, False, ""
    )
    record = Meter(config, mesh).record(report, 16, step_s=0.5, wait_s=0.1)
    flops = token_flops(config.model, 16)
    return record | {"expected": [128 * f / (4 * PEAK) for f in (flops.strict, flops.non_causal)]}


def test_mfu_is_of_the_peak_of_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    record = _record("bf16", monkeypatch)
    assert record["tokens_per_s"] == 128
    assert [record["mfu"], record["mfu_non_causal"]] == pytest.approx(record["expected"])
    assert record["goodput"] > 0


def test_fp32_has_no_share_of_a_peak_of_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    record = _record("fp32", monkeypatch, is_applied=False)
    assert record["mfu"] is record["mfu_non_causal"] is None
    assert record["goodput"] == 0
