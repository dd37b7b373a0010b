"""Recompute, compilation, dropout, initial values, and counts of parameters and FLOPs."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from megalite.config import ModelConfig
from megalite.model.attention import rotation
from megalite.model.flops import count_parameters, peak_flops, token_flops
from megalite.model.init import initial_values
from megalite.model.transformer import Block, DropoutRows, Recompute, Transformer, dropout_keys
from tests.kernels.helpers import held_bytes

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_size": 64,
    "max_seq_len": 128,
}
GPT2: dict[str, Any] = {
    "norm": "layernorm",
    "position": "learned",
    "activation": "gelu_tanh",
    "num_kv_heads": 4,
    "qkv_bias": True,
    "attention_out_bias": True,
    "mlp_bias": True,
    "tie_embeddings": True,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2-dropout": GPT2 | {"dropout": 0.2},
    "qwen3-window": {"qk_norm": True, "sliding_window": 20, "head_dim": 6},
}


def _config(**values: Any) -> ModelConfig:
    return ModelConfig.model_validate(SMALL | values)


def _model(config: ModelConfig, recompute: Recompute = "none") -> Transformer:
    model = Transformer(config, recompute)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(initial_values(config, 1, name, 0, p.numel()).view_as(p))
    return model


def _batch(rows: int = 2, seq: int = 70) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, labels, positions, doc_starts; two documents a row."""
    generator = torch.Generator().manual_seed(0)
    tokens, labels = (torch.randint(97, (rows, seq), generator=generator) for _ in range(2))
    doc_starts = torch.where(torch.arange(seq) >= 30, 30, 0).expand(rows, seq)
    return tokens, labels, torch.arange(seq) - doc_starts, doc_starts


# --- recompute --------------------------------------------------------------------------------------


def _loss(model: Transformer) -> Tensor:
    keys = dropout_keys(7, torch.arange(2))
    return model.loss(*_batch(), dropout_keys=keys, z_loss=1e-3, chunk_bytes=4 * 97 * 48).total


@pytest.mark.parametrize("name", KINDS)
def test_recompute_changes_no_bit(name: str) -> None:
    expected: dict[str, Tensor] = {}
    for recompute in get_args(Recompute):
        model = _model(_config(**KINDS[name]), recompute)
        loss = _loss(model)
        loss.backward()
        found = {"loss": loss} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        expected = expected or found
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)


class _Counter(TorchDispatchMode):
    """Counts the matrix products and attentions that run."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.attentions = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        self.attentions += func is torch.ops.megalite.attention_cpu.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", KINDS)
def test_recompute_trades_memory_for_work(name: str) -> None:
    held, products, attentions = {}, {}, {}
    for recompute in get_args(Recompute):
        model = _model(_config(**KINDS[name]), recompute)
        _loss(model).backward()  # gradients are allocated
        held[recompute] = held_bytes(lambda model=model: model(*_arguments()))
        with _Counter() as counter:
            _loss(model).backward()
        products[recompute], attentions[recompute] = counter.products, counter.attentions
    assert held["full"] < 0.5 * held["selective"]
    assert held["selective"] < 0.97 * held["none"], held
    assert products["none"] == products["selective"] < products["full"]
    assert attentions == {"none": 3, "selective": 3, "full": 6}


def _arguments() -> tuple[Tensor, Tensor, Tensor]:
    tokens, _, positions, doc_starts = _batch()
    return tokens, positions, doc_starts


# --- compilation ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2-dropout"])
def test_a_compiled_block_is_the_block(name: str) -> None:
    config = _config(**KINDS[name])
    model = _model(config)
    block = model.blocks["0"]
    assert isinstance(block, Block)
    compiled = torch.compile(block, fullgraph=True)
    _, _, positions, doc_starts = _batch()
    turn = rotation(positions, config) if config.position == "rope" else None
    keys = dropout_keys(7, torch.arange(2)).repeat_interleave(70)
    noise = DropoutRows(keys, torch.arange(70).repeat(2)) if config.dropout else None
    results = []
    for run in (block, compiled):
        block.zero_grad()
        x = torch.randn(140, 32, generator=torch.Generator().manual_seed(3)).requires_grad_()
        branch = torch.randn(140, 32, generator=torch.Generator().manual_seed(4)).requires_grad_()
        stream, y = run(x, branch, 2, turn, doc_starts, noise)
        (stream + y).square().sum().backward()
        results.append(
            [stream.detach(), y.detach(), x.grad, branch.grad, *(p.grad for p in block.parameters())]
        )
    for found, expected in zip(results[1], results[0], strict=True):
        assert found is not None
        assert expected is not None
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


# --- dropout ----------------------------------------------------------------------------------------


def test_dropout_depends_on_seed_and_sample_alone() -> None:
    model = _model(_config(**KINDS["gpt2-dropout"]))
    tokens = _batch(rows=3)[0]
    ids = torch.tensor([5, 9, 70])
    with torch.no_grad():
        together = model(tokens, dropout_keys=dropout_keys(1, ids))
        alone = [model(tokens[i : i + 1], dropout_keys=dropout_keys(1, ids[i : i + 1])) for i in range(3)]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
        other = model(tokens, dropout_keys=dropout_keys(2, ids))
        assert (other - together).abs().mean() > 0.01
        swapped = model(tokens, dropout_keys=dropout_keys(1, ids.flip(0)))
        assert (swapped - together)[0].abs().mean() > 0.01
        assert torch.equal(model(tokens), model(tokens))


def test_dropout_masks_differ_between_layers_and_branches() -> None:
    config = _config(num_layers=2, dropout=0.5)
    model = _model(config)
    noise = DropoutRows(dropout_keys(0, torch.arange(1)).expand(10), torch.arange(10))
    masks = [
        block._drop(torch.ones(10, 32), noise, branch)
        for block in model.blocks.values()
        for branch in (0, 1)
        if isinstance(block, Block)
    ]
    assert len(masks) == 4
    for i, mask in enumerate(masks):
        assert all(((mask == other).float().mean() - 0.5).abs() < 0.15 for other in masks[:i])


# --- initial values ---------------------------------------------------------------------------------


def test_initial_values_do_not_depend_on_how_they_are_cut() -> None:
    config, name = _config(), "blocks.1.attention.qkv.weight"
    size = 200_003  # beyond one chunk of the generator
    whole = initial_values(config, 3, name, 0, size)
    for cuts in ([1, 2, 65_535, 65_537, 131_072], [199_999], [70_001, 70_001]):
        bounds = [0, *cuts, size]
        parts = [initial_values(config, 3, name, *pair) for pair in zip(bounds, bounds[1:], strict=False)]
        assert torch.equal(torch.cat(parts), whole)


def test_initial_values_are_normal() -> None:
    values = initial_values(_config(init_std=0.5), 0, "embedding", 0, 400_000).double() / 0.5
    assert values.isfinite().all()
    assert abs(values.mean()) < 4 / 400_000**0.5
    assert abs(values.std() - 1) < 4 / 800_000**0.5
    assert abs(values.pow(3).mean()) < 0.02
    assert abs(values.pow(4).mean() - 3) < 0.06
    assert 4 < values.abs().max() < 7
    within = [(values.abs() < x).double().mean().item() for x in (1, 2, 3)]
    assert within == pytest.approx([0.682689, 0.954500, 0.997300], abs=0.003)


def test_initial_values_by_role() -> None:
    config = _config(num_layers=8, init_std=0.02, **{k: v for k, v in GPT2.items() if k != "num_kv_heads"})

    def std(name: str, **changes: Any) -> float:
        changed = config.model_copy(update=changes)
        return float(initial_values(changed, 0, name, 0, 50_000).std())

    for name in ("embedding", "positions", "blocks.3.attention.qkv.weight", "blocks.3.mlp.up.weight", "head"):
        assert std(name) == pytest.approx(0.02, rel=0.02)
    for name in ("blocks.3.attention.out.weight", "blocks.0.mlp.down.weight"):
        assert std(name) == pytest.approx(0.02 / 4, rel=0.02)  # sqrt(2 · 8)
        assert std(name, scale_residual_init=False) == pytest.approx(0.02, rel=0.02)
    for name, p in Transformer(_config(qk_norm=True, **GPT2 | {"position": "rope"})).named_parameters():
        values = initial_values(config, 0, name, 0, p.numel())
        if name.endswith(".bias"):
            assert not values.any(), name
        elif p.dim() == 1:
            assert (values == 1).all(), name
        else:
            assert values.std() > 0, name


def test_names_and_seeds_give_different_weights() -> None:
    config = _config(scale_residual_init=False)
    draws = [
        initial_values(config, seed, name, 0, 20_000)
        for seed in (0, 1)
        for name in ("embedding", "head", "blocks.0.mlp.down.weight", "blocks.1.mlp.down.weight")
    ]
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(8)
    assert correlation.abs().max() < 0.04


def test_first_weights_are_what_they_always_were() -> None:
    values = initial_values(_config(init_std=1.0), 0, "embedding", 0, 3)
    assert values.tolist() == pytest.approx([-1.2790478, -3.5379975, -0.7131143], abs=1e-6)


# --- counts -----------------------------------------------------------------------------------------

LLAMA3_8B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "num_layers": 32,
    "num_heads": 32,
    "num_kv_heads": 8,
    "ffn_size": 14336,
}
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Llama-3-8B": (LLAMA3_8B, 8_030_261_248),
    "Llama-2-7B": (LLAMA3_8B | {"vocab_size": 32000, "num_kv_heads": 32, "ffn_size": 11008}, 6_738_415_616),
    "Mistral-7B": (LLAMA3_8B | {"vocab_size": 32000}, 7_241_732_096),
    "GPT-2": (
        GPT2
        | {"vocab_size": 50257, "hidden_size": 768, "num_layers": 12, "num_heads": 12, "num_kv_heads": 12}
        | {"ffn_size": 3072, "max_seq_len": 1024},
        124_439_808,
    ),
    "Qwen2.5-0.5B": (
        {"vocab_size": 151936, "hidden_size": 896, "num_layers": 24, "num_heads": 14, "num_kv_heads": 2}
        | {"ffn_size": 4864, "qkv_bias": True, "tie_embeddings": True},
        494_032_768,
    ),
    "Qwen3-0.6B": (
        {"vocab_size": 151936, "hidden_size": 1024, "num_layers": 28, "num_heads": 16, "num_kv_heads": 8}
        | {"ffn_size": 3072, "head_dim": 128, "qk_norm": True, "tie_embeddings": True},
        596_049_920,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_published_models(name: str) -> None:
    values, expected = PUBLISHED[name]
    assert count_parameters(ModelConfig.model_validate(values)) == expected


def test_flops_of_llama3_8b_by_hand() -> None:
    # A layer: q and o 4096², k and v 4096·1024, three MLP matrices 4096·14336; and one head.
    products = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 4096 * 128256
    # Scores and values: 2·2·4096 FLOPs for each of 4096 keys, a layer, forward; backward twice that.
    square = 3 * 32 * 4 * 4096 * 4096
    flops = token_flops(ModelConfig.model_validate(LLAMA3_8B), 4096)
    assert flops.non_causal == 6 * products + square
    assert flops.strict == 6 * products + square / 2
    assert flops.non_causal == pytest.approx(51.5e9, rel=2e-3)
    assert flops.strict == pytest.approx(48.2e9, rel=2e-3)


@pytest.mark.parametrize("name", KINDS)
def test_non_causal_flops_are_those_that_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALITE_KERNELS", "reference")  # whole squares, as the formula counts
    config = _config(**KINDS[name])
    model = _model(config)
    tokens, labels, *_ = _batch()
    with FlopCounterMode(display=False) as counter:
        model.loss(tokens, labels).total.backward()
    expected = tokens.numel() * token_flops(config, tokens.shape[1]).non_causal
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-12)


def test_unknown_devices_have_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops(torch.device("cpu")) is None
    for name, peak in [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA L40", None),
        ("Tesla T4", None),
        ("NVIDIA H100 96GB HBM3", None),
    ]:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device, name=name: name)
        assert peak_flops(torch.device("cuda")) == peak, name


class _Crossings(TorchDispatchMode):
    """Copies to another device that the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        crosses = func is torch.ops.aten._to_copy.default and y.device != args[0].device
        if crosses and not (kwargs or {}).get("non_blocking"):
            self.found.append(f"{tuple(y.shape)} {y.dtype}")
        return y


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_in_a_pass_waits_for_the_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, where reading a value is an error: the host must run ahead of a GPU."""
    config = _config(**KINDS[kind])
    with torch.device("meta"):
        model = Transformer(config)
    tokens, labels, positions, doc_starts = (tensor.to("meta") for tensor in _batch())
    tensor = torch.tensor

    def made_here(*args: Any, device: Any = None, **options: Any) -> Tensor:
        assert device is None, "torch.tensor copies a value to the device, and waits"
        return tensor(*args, **options)

    monkeypatch.setattr(torch, "tensor", made_here)
    keys = dropout_keys(0, tokens[:, 0]) if config.dropout else None
    with _Crossings() as crossings:
        losses = model.loss(tokens, labels, positions, doc_starts, dropout_keys=keys, z_loss=1e-4)
        losses.total.backward()
    assert crossings.found == []
