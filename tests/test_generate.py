"""Generation with a cache equals recomputation; sampling does what it says; the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megalite.cli import main
from megalite.config import ModelConfig
from megalite.data.tokenizer import ByteTokenizer
from megalite.errors import CheckpointError, ConfigError, MegaliteError
from megalite.generate import _pick, generate, load_model
from tests.tiny_runs import MODELS, SHAPE, bpe, same_weights, save_run, tiny_config, tiny_model


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save_run(tmp_path / "run", tiny_config("llama"), bpe())
    return tmp_path / "run"


# --- generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_cache_equals_recomputation(name: str) -> None:
    model = tiny_model(tiny_config(name))
    tokens = [5, 17, 250, 3, 3, 99]
    found = list(generate(model, tokens, max_new_tokens=40, temperature=0))
    logits = model.logits(model(torch.tensor([tokens + found])))[0]
    top = logits[len(tokens) - 1 : -1].topk(2).values
    assert (top[:, 0] - top[:, 1]).min() > 1e-4  # no near tie for rounding to decide
    assert found == logits[len(tokens) - 1 : -1].argmax(-1).tolist()
    assert len(set(found)) > 3


def test_one_token_prompt_and_the_last_position() -> None:
    model = tiny_model(tiny_config("gpt2"))
    assert len(list(generate(model, [1], max_new_tokens=95, temperature=0))) == 95


def test_top_k_one_and_tiny_temperature_are_greedy() -> None:
    model = tiny_model(tiny_config("llama"))
    greedy = list(generate(model, [7, 8], max_new_tokens=20, temperature=0))
    assert list(generate(model, [7, 8], max_new_tokens=20, temperature=1.5, top_k=1)) == greedy
    assert list(generate(model, [7, 8], max_new_tokens=20, temperature=5e-324)) == greedy
    assert list(generate(model, [7, 8], max_new_tokens=20, top_p=1e-9)) == greedy


def test_a_seed_is_a_text() -> None:
    model = tiny_model(tiny_config("llama"))

    def draw(seed: int) -> list[int]:
        return list(generate(model, [7, 8], max_new_tokens=30, temperature=2.0, seed=seed))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


@pytest.mark.slow
def test_sampled_frequencies_follow_the_filtered_distribution() -> None:
    p = torch.tensor([0.05, 0.4, 0.2, 0.3, 0.05])
    generator = torch.Generator().manual_seed(0)

    def frequencies(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
        drawn = [_pick(p.log(), temperature, top_k, top_p, generator) for _ in range(4000)]
        return torch.bincount(torch.tensor(drawn), minlength=5) / 4000

    def agree(found: torch.Tensor, weights: list[float]) -> bool:
        expected = torch.tensor(weights) / sum(weights)
        return bool(((found - expected).abs() < 0.03).all() and (found[expected == 0] == 0).all())

    assert agree(frequencies(), p.tolist())
    assert agree(frequencies(temperature=0.5), p.square().tolist())
    assert agree(frequencies(top_k=2), [0, 0.4, 0, 0.3, 0])
    assert agree(frequencies(top_p=0.69), [0, 0.4, 0, 0.3, 0])
    assert agree(frequencies(top_p=0.71), [0, 0.4, 0.2, 0.3, 0])
    assert agree(frequencies(top_k=3, top_p=0.7), [0, 0.4, 0, 0.3, 0])  # 0.4 + 0.3 of 0.9
    p = torch.full((4,), 0.25)
    found = torch.tensor([_pick(p.log(), 1.0, 0, 0.5, generator) for _ in range(200)])
    assert found.unique().tolist() == [0, 1]  # which together are 0.5 exactly


def test_eos_ends_the_text() -> None:
    model = tiny_model(tiny_config("llama"))
    greedy = list(generate(model, [7, 8], max_new_tokens=20, temperature=0))
    eos = greedy[4]
    stopped = list(generate(model, [7, 8], max_new_tokens=20, temperature=0, eos_id=eos))
    assert stopped == greedy[: greedy.index(eos) + 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 95}, "at most 94"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"seed": -1}, "seed=-1"),
        ({"tokens": []}, "prompt is empty"),
        ({"tokens": [300]}, "vocab_size=300"),
    ],
)
def test_bad_arguments_are_refused_at_the_call(arguments: dict[str, Any], message: str) -> None:
    model = tiny_model(tiny_config("llama"))
    with pytest.raises(ConfigError, match=message):
        generate(model, **({"tokens": [1, 2], "max_new_tokens": 5} | arguments))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_has_diverged_says_so(temperature: float) -> None:
    model = tiny_model(tiny_config("llama"))
    model.norm.weight.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="scores are not finite"):
        list(generate(model, [7, 8], max_new_tokens=2, temperature=temperature))


# --- loading and commands ------------------------------------------------------------------------


def test_load_model_takes_runs_and_checkpoints(tmp_path: Path) -> None:
    run = tmp_path / "run"
    early = save_run(run, tiny_config("qwen3"), bpe(), step=2)
    late = save_run(run, tiny_config("qwen3"), bpe(), step=5)
    for path, expected in [
        (run, late),
        (run / "checkpoints", late),
        (run / "checkpoints" / "step_00000002", early),
    ]:
        model, tokenizer = load_model(path, "cpu", torch.float32)
        assert same_weights(model, expected)
        assert tokenizer.fingerprint == bpe().fingerprint
    half, _ = load_model(run, "cpu", torch.bfloat16)
    assert half.embedding.dtype == torch.bfloat16


def test_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    config = ModelConfig.model_validate(SHAPE | {"vocab_size": 100})
    save_run(tmp_path / "run", config, ByteTokenizer())
    with pytest.raises(MegaliteError, match="257 ids, the model only vocab_size=100"):
        load_model(tmp_path / "run", "cpu", torch.float32)


def test_commands(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["generate", str(run), "--prompt", "the fox", "--max-new-tokens", "12", "--greedy"]) == 0
    model, tokenizer = load_model(run, "cpu", torch.float32)
    prompt = tokenizer.encode("the fox").tolist()
    new = generate(model, prompt, max_new_tokens=12, temperature=0, eos_id=tokenizer.eos_id)
    text = tokenizer.decode([t for t in [*prompt, *new] if t != tokenizer.eos_id])
    assert capsys.readouterr().out == text + "\n"
    assert main(["export", str(run), "--to", str(tmp_path / "out")]) == 0
    assert main(["generate", str(tmp_path / "out"), "--prompt", "a", "--max-new-tokens", "3"]) == 0
    capsys.readouterr()
    for arguments, message in [
        (["generate", str(run), "--prompt", "x " * 100], "max_seq_len=96; shorten the prompt\n"),
        (["generate", str(run), "--prompt", ""], "at least one character"),
        (["generate", str(run), "--prompt", "\udcff"], "'\\udcff' is not UTF-8"),
        (["generate", str(tmp_path / "none"), "--prompt", "a"], "no folder"),
        (["export", str(run), "--to", str(tmp_path / "out")], "exists"),
    ]:
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
