"""What one optimizer step leaves in the compute weights, on one process."""

from __future__ import annotations

import pytest
import torch

from megalite.config import ModelConfig, OptimConfig
from megalite.model.transformer import Transformer
from megalite.optim.zero import ZeroOptimizer
from megalite.parallel.mesh import build_mesh

MODEL = {"vocab_size": 31, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "ffn_size": 24}


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_publishes_the_rounded_master(dtype: torch.dtype, stage: int) -> None:
    with torch.device("meta"):
        model = Transformer(ModelConfig.model_validate(MODEL))
    config = OptimConfig.model_validate({"lr": 1e-2})
    optimizer = ZeroOptimizer(model, config, build_mesh(), stage, bucket_bytes=4096, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for tensor in (optimizer.master, optimizer.gradients.shard_values):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    before = optimizer.master.clone()
    optimizer.step(lr=1e-2, grad_scale=0.5)
    assert optimizer.master.ne(before).all()
    for owned in optimizer.layout.owned_ranges():
        values = model.get_parameter(owned.name).detach().flatten()[owned.start : owned.stop]
        assert values.dtype == dtype
        assert torch.equal(values, optimizer.master[owned.shard].to(dtype))
    counted = optimizer.gradients.shard_values[: optimizer.layout.shard_size].double().square().sum()
    torch.testing.assert_close(optimizer.local_norm_squared(), counted, rtol=1e-6, atol=0)


def test_gradients_that_are_summed_in_fp32_are_not_rounded_on_their_way() -> None:
    """Of norms and of the vocabulary, where a row's sum has more terms than bf16 has digits."""
    with torch.device("meta"):
        model = Transformer(ModelConfig.model_validate(MODEL))
    config = OptimConfig.model_validate({"lr": 1e-2})
    optimizer = ZeroOptimizer(model, config, build_mesh(), 0, bucket_bytes=4096, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    optimizer.master.copy_(torch.randn(optimizer.master.shape, generator=generator))
    optimizer.weights.publish()
    tokens = torch.randint(31, (2, 12), generator=generator)
    model.loss(tokens, tokens.roll(-1, 1), chunk_bytes=1).total.backward()
    optimizer.gradients.finish_step()
    for owned in optimizer.layout.owned_ranges():
        values = optimizer.gradients.shard_values[owned.shard]
        is_summed = owned.name in ("embedding", "head") or "norm" in owned.name
        assert torch.equal(values.bfloat16().float(), values) != is_summed, owned.name
