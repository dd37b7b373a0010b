"""Models leave to and come from Hugging Face whole, or are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalite import hf_folder
from megalite.checkpoint.store import open_checkpoint
from megalite.cli import main
from megalite.config import ModelConfig
from megalite.config_file import load_config
from megalite.convert import config_from_hf, config_to_hf
from megalite.data.tokenizer import ByteTokenizer
from megalite.engines.native import NativeEngine
from megalite.errors import CheckpointError, ConfigError, MegaliteError
from megalite.generate import load_model
from megalite.hf_folder import export, import_hf, read_hf
from tests.tiny_runs import ALONE, BIASES, GPT2, MODELS, SHAPE, TEXT, bpe, same_weights, save_run, tiny_config


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save_run(tmp_path / "run", tiny_config("llama"), bpe())
    return tmp_path / "run"


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_an_export(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    if name in ("qwen2", "gpt2"):
        monkeypatch.setattr(hf_folder, "SHARD_BYTES", 20_000)
    ours = save_run(tmp_path / "run", tiny_config(name), bpe())
    export(tmp_path / "run", tmp_path / "out")
    is_sharded = (tmp_path / "out" / hf_folder.INDEX).exists()
    assert is_sharded == (name in ("qwen2", "gpt2"))
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values())
    assert theirs.config.model_type == name
    tokens = torch.randint(300, (2, 40))
    expected = theirs.eval()(tokens).logits
    found = ours.logits(ours(tokens))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    # transformers 5 gives every qwen2 Qwen's own splitting, whatever its tokenizer.json says.
    loader = transformers.PreTrainedTokenizerFast if name == "qwen2" else transformers.AutoTokenizer
    tokenizer = loader.from_pretrained(tmp_path / "out")
    assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == bpe().encode(TEXT).tolist()
    assert tokenizer.eos_token_id == theirs.config.eos_token_id == bpe().eos_id
    model, again = load_model(tmp_path / "out", "cpu", torch.float32)
    assert same_weights(model, ours)
    assert again.fingerprint == bpe().fingerprint
    assert model.config.model_dump(exclude={"init_std"}) == ours.config.model_dump(exclude={"init_std"})


def test_an_import_can_be_generated_from_exported_and_trained(tmp_path: Path, run: Path) -> None:
    export(run, tmp_path / "out")
    import_hf(tmp_path / "out", tmp_path / "again")
    model, _ = load_model(run, "cpu", torch.float32)
    imported, _ = load_model(tmp_path / "again", "cpu", torch.float32)
    assert same_weights(model, imported)
    export(tmp_path / "again", tmp_path / "out2")
    first, second = (load_file(tmp_path / name / hf_folder.WEIGHTS) for name in ("out", "out2"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)

    config = load_config(tmp_path / "again" / "config.toml", ["train.precision=fp32"])
    assert config.run_dir == str(tmp_path / "again")
    engine = NativeEngine(config, ALONE)
    engine.load_state(open_checkpoint(tmp_path / "again"))
    assert same_weights(engine.model, model)
    assert engine.applied_steps == 0


def test_training_continues_from_an_import(tmp_path: Path, run: Path) -> None:
    export(run, tmp_path / "out")
    assert main(["import", str(tmp_path / "out"), "--to", str(tmp_path / "tuned")]) == 0
    (tmp_path / "text").mkdir()
    for number, piece in enumerate(TEXT.split(";")):
        (tmp_path / "text" / f"{number}.txt").write_text(piece * 3)
    tokenizer = tmp_path / "tuned" / "tokenizer.json"
    data = ["data", "tokenize", "--text", str(tmp_path / "text"), "--to", str(tmp_path / "data")]
    assert main([*data, "--tokenizer", str(tokenizer)]) == 0
    overrides = [
        f'data.sources=[{{path="{tmp_path}/data/train"}}]',
        "data.seq_len=16",
        "train.steps=2",
        "train.global_batch_size=2",
        "train.precision=fp32",
        "log.every_steps=1",
    ]
    assert main(["train", str(tmp_path / "tuned" / "config.toml"), *overrides]) == 0
    trained = open_checkpoint(tmp_path / "tuned")
    assert trained.step == 2
    moved = trained.read("weight", "embedding") - open_checkpoint(run).read("weight", "embedding")
    assert 0 < moved.abs().max() <= 4e-5  # two steps of lr 1e-5


def test_an_export_is_whole_or_not_there(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_folder, "save_file", full)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="No space left"):
        export(run, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_byte_tokenizer_runs_export(tmp_path: Path) -> None:
    ours = save_run(tmp_path / "run", tiny_config("gpt2"), ByteTokenizer())
    export(tmp_path / "run", tmp_path / "out")
    model, tokenizer = load_model(tmp_path / "out", "cpu", torch.float32)
    assert same_weights(model, ours)
    assert tokenizer.kind == "byte"


# --- refusals -------------------------------------------------------------------------------------


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / hf_folder.WEIGHTS)


def _spoil(folder: Path, fault: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    tensors = _weights(folder)
    q = "model.layers.0.self_attn.q_proj.weight"
    if fault == "missing":
        del tensors["model.layers.1.mlp.gate_proj.weight"]
    elif fault == "left over":
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    elif fault == "shape":
        tensors[q] = tensors[q][:30].clone()
    elif fault == "integers":
        tensors[q] = tensors[q].to(torch.int8)
    elif fault == "type":
        config["model_type"] = "mixtral"
    elif fault == "layers":
        config["num_hidden_layers"] = 60_000  # seconds and hundreds of MiB, were they built
    elif fault == "json":
        (folder / "config.json").write_text("{")
        return
    elif fault == "truncated":
        raw = (folder / hf_folder.WEIGHTS).read_bytes()
        (folder / hf_folder.WEIGHTS).write_bytes(raw[:-100])
        return
    elif fault == "pickle":
        (folder / hf_folder.WEIGHTS).rename(folder / "pytorch_model.bin")
        return
    elif fault == "outside":
        (folder / hf_folder.WEIGHTS).unlink()
        index = {"weight_map": {q: "../elsewhere.safetensors"}}
        (folder / hf_folder.INDEX).write_text(json.dumps(index))
        return
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / hf_folder.WEIGHTS)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", "no tensor model.layers.1.mlp.gate_proj.weight"),
        ("left over", "q_proj.bias .* does not account"),
        ("shape", r"q_proj.weight is \[30, 32\].*\[32, 32\]"),
        ("integers", "int8"),
        ("type", "config.json: model_type='mixtral' is not supported"),
        ("layers", r"out has \d+ tensors, too few for the 60000 layers"),
        ("json", "config.json is not valid JSON"),
        ("truncated", "cannot read .*model.safetensors"),
        ("pickle", "pytorch_model.bin is a pickle"),
        ("outside", "'../elsewhere.safetensors', no file of this folder"),
    ],
)
def test_damaged_folders_are_refused_by_name(fault: str, message: str, run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out")
    _spoil(tmp_path / "out", fault)
    with pytest.raises(MegaliteError, match=message):
        list(read_hf(tmp_path / "out")[1])


def test_names_without_the_models_prefix_and_constants_are_read(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out")
    tensors = {name.removeprefix("model."): t for name, t in _weights(tmp_path / "out").items()}
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "out" / hf_folder.WEIGHTS)
    model, _ = load_model(tmp_path / "out", "cpu", torch.float32)
    assert same_weights(model, load_model(run, "cpu", torch.float32)[0])


LLAMA = config_to_hf(ModelConfig.model_validate(SHAPE))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen3_moe"}, "model_type='qwen3_moe' is not supported"),
        ({"model_type": None}, "model_type=None"),
        ({"model_type": ["llama"]}, r"model_type=\['llama'\]"),
        ({"vocab_size": 10**18}, "vocab_size=1000000000000000000"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
        ({"rope_scaling": {"type": "llama3", "factor": 4.0}}, "low_freq_factor is missing|high_freq"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, "mrope_section"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": "32"}, "hidden_size='32'"),
        ({"rope_scaling": 5}, "wrong type"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "some layers only",
        ),
    ],
)
def test_unsupported_configurations_are_refused_by_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_hf(LLAMA | changes)


def test_every_missing_key_is_named() -> None:
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        with pytest.raises(ConfigError, match=f"{key} is missing"):
            config_from_hf({k: v for k, v in LLAMA.items() if k != key})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"norm": "layernorm"}, "nearest, llama, needs model.norm='rmsnorm'"),
        ({"sliding_window": 8} | BIASES, "sliding_window=0"),
        (GPT2 | {"num_kv_heads": 2}, "nearest, gpt2, needs model.num_kv_heads=4"),
    ],
)
def test_models_no_architecture_expresses_are_refused(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_to_hf(ModelConfig.model_validate(SHAPE | model))
