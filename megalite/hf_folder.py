"""Hugging Face folders: reading one, exporting a run to one, importing one as a run.

A folder is `config.json`, `model.safetensors` (or shards with `model.safetensors.index.json`) and
the tokenizer's files. Only safetensors are read: a pickle can run code.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megalite.checkpoint.commit import save
from megalite.checkpoint.format import TensorSlice, explain
from megalite.checkpoint.retention import Retention
from megalite.checkpoint.store import Checkpoint, open_checkpoint
from megalite.config import Config, ModelConfig
from megalite.config_file import to_toml
from megalite.convert import (
    config_from_hf,
    config_to_hf,
    hf_names,
    parameter_shapes,
    weights_from_hf,
    weights_to_hf,
)
from megalite.data.tokenizer import CONFIG_FILE, TOKENIZER_FILE, Tokenizer, load_tokenizer
from megalite.errors import CheckpointError, ConfigError, DataError
from megalite.parallel.mesh import Axis, Mesh

HF_CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 << 30
_MAX_JSON_BYTES = 64 << 20


def open_run(path: Path) -> tuple[ModelConfig, Checkpoint, Tokenizer]:
    """The newest checkpoint of a run folder (or of its checkpoints folder), or the one at `path`.

    The model's configuration is the one stored in the checkpoint; the tokenizer is the run's.

    Raises:  CheckpointError or DataError if one of them is missing, damaged or does not fit
    """
    checkpoint = open_checkpoint(path)
    try:
        config = ModelConfig.model_validate(checkpoint.meta["config"]["model"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint.folder} does not say which model it holds: {error}") from None
    except ValidationError as error:
        raise CheckpointError(f"{checkpoint.folder}: its model's {explain(error)}") from None
    stored = {name: checkpoint.shape(name) for name in checkpoint.names()}
    _check_layers(config, len(stored), checkpoint.folder)
    expected = parameter_shapes(config)
    if stored != expected:
        name = next(n for n in {**expected, **stored} if stored.get(n) != expected.get(n))
        raise CheckpointError(
            f"{checkpoint.folder} holds {name} with shape {stored.get(name)}; "
            f"its configuration says {expected.get(name)}"
        )
    run_dir = checkpoint.folder.resolve().parent.parent
    if not (run_dir / TOKENIZER_FILE).exists():
        raise DataError(f"no {TOKENIZER_FILE} in {run_dir}; a checkpoint lies in RUN/checkpoints, beside it")
    return config, checkpoint, load_tokenizer(run_dir)


def export(source: Path, to: Path) -> None:
    """Write a run's weights, fp32, as the Hugging Face folder `to`, whole or not at all.

    The weights go into one file, or into shards of about `SHARD_BYTES`; one of them is in memory.
    transformers reads the tokenizer too, unless it is our byte tokenizer; for a qwen2 by
    `PreTrainedTokenizerFast`, as its `AutoTokenizer` splits text for any qwen2 in Qwen's own way.

    Raises:  ConfigError if no architecture expresses the model or `to` exists; CheckpointError
    """
    config, checkpoint, tokenizer = open_run(source)
    hf_config = config_to_hf(config) | {"bos_token_id": None, "eos_token_id": tokenizer.eos_id}
    with _new_folder(to) as folder:
        _write_json(folder / HF_CONFIG, hf_config)
        _write_weights(folder, weights_to_hf(lambda name: checkpoint.read("weight", name), config))
        tokenizer.save(folder)
        if tokenizer.kind == "huggingface":  # else transformers would pick the architecture's usual one
            saved = _read_json(folder / CONFIG_FILE)
            _write_json(folder / CONFIG_FILE, saved | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _write_weights(folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = size = 0

    def write() -> None:
        shards.append(list(held))
        save_file(held, folder / f"{len(shards)}.tmp", metadata={"format": "pt"})
        held.clear()

    for name, tensor in tensors:
        if held and size + tensor.nbytes > SHARD_BYTES:
            write()
            size = 0
        held[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    write()
    if len(shards) == 1:
        (folder / "1.tmp").rename(folder / WEIGHTS)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.tmp").rename(folder / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def read_hf(folder: Path) -> tuple[ModelConfig, Iterator[tuple[str, Tensor]]]:
    """The model in a Hugging Face folder: its configuration, and its parameters under our names.

    Tensors are read as the iterator reaches them, one parameter in memory at a time. A tensor that
    the configuration does not account for is refused: the model would not be the one trained.

    Raises:  ConfigError if the configuration is not supported; CheckpointError if weights are
             missing, left over, in another format than safetensors, or of another shape
    """
    if not (folder / HF_CONFIG).exists():
        raise CheckpointError(
            f"no {HF_CONFIG} in {folder}; give a folder on this disk, such as "
            f"`hf download NAME --local-dir {folder}` or `megalite export` makes"
        )
    try:
        config = config_from_hf(_read_json(folder / HF_CONFIG))
    except ConfigError as error:
        raise ConfigError(f"{folder / HF_CONFIG}: {error}") from None
    places = _find_tensors(folder, "transformer." if config.position == "learned" else "model.")
    _check_layers(config, len(places), folder)
    wanted = set(hf_names(config))
    if missing := sorted(wanted - places.keys()):
        raise CheckpointError(
            f"{folder} has no tensor {missing[0]} (and {len(missing) - 1} more are missing)"
        )
    left_over = sorted(
        name
        for name in places.keys() - wanted
        if not name.endswith((".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias"))  # constants
        and not (name == "lm_head.weight" and config.tie_embeddings)
    )
    if left_over:
        raise CheckpointError(
            f"{folder} has a tensor {left_over[0]} (and {len(left_over) - 1} more) that {HF_CONFIG} "
            "does not account for; the two are not of one model"
        )

    def get(name: str) -> Tensor:
        path, stored = places[name]
        with _open_safetensors(path) as file:
            tensor: Tensor = file.get_tensor(stored)
            return tensor

    return config, weights_from_hf(get, config)


def _check_layers(config: ModelConfig, tensors: int, folder: Path) -> None:
    """What is stored must suffice for as many layers as a configuration claims, before they are built.

    Raises:  CheckpointError
    """
    if config.num_layers > tensors:
        raise CheckpointError(
            f"{folder} has {tensors} tensors, too few for the {config.num_layers} layers of its configuration"
        )


def _find_tensors(folder: Path, prefix: str) -> dict[str, tuple[Path, str]]:
    """File and stored name of every tensor; published base models leave out the names' prefix."""
    stored: dict[str, Path] = {}
    if (folder / WEIGHTS).exists():
        with _open_safetensors(folder / WEIGHTS) as file:
            stored = dict.fromkeys(file.keys(), folder / WEIGHTS)
    elif (folder / INDEX).exists():
        weight_map = _read_json(folder / INDEX).get("weight_map")
        for name, file_name in weight_map.items() if isinstance(weight_map, dict) else ():
            if not isinstance(file_name, str) or Path(file_name).name != file_name:
                raise CheckpointError(
                    f"{folder / INDEX}: {name} lies in {file_name!r}, no file of this folder"
                )
            stored[name] = folder / file_name
    else:
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        hint = f"; {pickles[0]} is a pickle, which can run code: convert it to safetensors" if pickles else ""
        raise CheckpointError(f"{folder} has no {WEIGHTS} and no {INDEX}{hint}")
    return {
        name if name.startswith((prefix, "lm_head.")) else prefix + name: (path, name)
        for name, path in stored.items()
    }


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None


def import_hf(folder: Path, to: Path) -> None:
    """Write a Hugging Face folder as a run at step 0, whole or not at all.

    `generate` and `export` read it, and `train` continues from it: its `config.toml` names the model
    and lacks only data, steps and a learning rate of the user's own.

    Raises:  ConfigError if the model is not supported or `to` exists; CheckpointError, DataError
    """
    model, weights = read_hf(folder)
    tokenizer = load_tokenizer(folder)
    config = Config.model_validate(
        {
            "run_dir": str(to),
            "model": model,
            "data": {"seq_len": min(model.max_seq_len, 2048)},
            "optim": {"lr": 1e-5},
            "train": {"steps": 1000, "global_batch_size": 8, "micro_batch_size": 1},
        }
    )
    meta = {
        "applied_steps": 0,
        "loss_scale": {},
        "tokens": 0,
        "tokenizer": tokenizer.fingerprint,
        "config": config.model_dump(mode="json"),
    }
    with _new_folder(to) as staging:
        (staging / "config.toml").write_text(to_toml(config), encoding="utf-8")
        tokenizer.save(staging)
        alone = Mesh(rank=0, size=1, dp=Axis(), device=torch.device("cpu"))
        save(staging / "checkpoints", 0, 0, lambda: _slices(weights), meta, alone, Retention())


def _slices(weights: Iterator[tuple[str, Tensor]]) -> Iterator[TensorSlice]:
    """A checkpoint's content: the weights in fp32, and moments of zero that take no memory."""
    for name, tensor in weights:
        size, shape = tensor.numel(), tuple(tensor.shape)
        yield TensorSlice("weight", name, shape, 0, size, tensor.float().reshape(-1))
        for kind in ("exp_avg", "exp_avg_sq"):
            yield TensorSlice(kind, name, shape, 0, size, torch.zeros(1).expand(size))


@contextmanager
def _new_folder(to: Path) -> Iterator[Path]:
    """A temporary folder beside `to` that becomes it at the end, or is gone.

    Raises:  ConfigError if `to` exists; CheckpointError if it cannot be written
    """
    if to.exists():
        raise ConfigError(f"--to {to} exists; name a new folder")
    staging = to.with_name(f".{to.name}.{os.getpid()}.tmp")
    try:
        staging.mkdir(parents=True)
        yield staging
        staging.rename(to)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {to}: {error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            raw = file.read(_MAX_JSON_BYTES + 1)
        if len(raw) > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is longer than {_MAX_JSON_BYTES:,} bytes")
        values = json.loads(raw)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return values


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
