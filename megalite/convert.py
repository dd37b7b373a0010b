"""Between our model and Hugging Face's: Llama, Mistral, Qwen2, Qwen3 (dense) and GPT-2.

Configurations and names only; `hf_folder` reads and writes the files. Their query, key and value
matrices are one of ours, as are gate and up. Ours are [out, in] but for the projections back to the
residual stream, GPT-2's are all [in, out], the others' all [out, in]. What shapes training alone, dropout
and the scaling of initial residual outputs, is not carried over.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from megalite.checkpoint.format import explain
from megalite.config import ModelConfig
from megalite.errors import CheckpointError, ConfigError
from megalite.model.transformer import Transformer

# --- configurations -----------------------------------------------------------------------------

# What transformers' classes fill in where a config.json is silent.
_LLAMA_LIKE = {
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}
_QWEN = _LLAMA_LIKE | {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_LIKE | {"max_position_embeddings": 2048},
    "mistral": _LLAMA_LIKE
    | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
    "gpt2": {
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
    },
}
# Keys that change what a model computes in a way ours cannot: the one value each may have.
_ONLY: dict[str, Any] = {
    "quantization_config": None,
    "hidden_act": "silu",
    "partial_rotary_factor": 1.0,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
_GELUS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def config_from_hf(hf_config: dict[str, Any]) -> ModelConfig:
    """Our configuration of the model a `config.json` describes.

    Raises:  ConfigError naming the key if the architecture, or something it asks for, is not supported
    """
    kind = hf_config.get("model_type")
    if not isinstance(kind, str) or kind not in _DEFAULTS:
        raise ConfigError(
            f"model_type={kind!r} is not supported; dense models of these are: {', '.join(_DEFAULTS)}"
        )
    values = _DEFAULTS[kind] | hf_config
    for key, only in _ONLY.items():
        if values.get(key) not in (None, only):
            raise ConfigError(f"{kind} with {key}={values[key]!r:.60} is not supported, only {only!r}")
    try:
        ours = _from_gpt2(values) if kind == "gpt2" else _from_llama_like(kind, values)
        return ModelConfig.model_validate(ours)
    except KeyError as error:
        raise ConfigError(f"{error.args[0]} is missing, which every {kind} has") from None
    except ValidationError as error:
        raise ConfigError(f"{kind}: {explain(error)}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{kind}: a value is of the wrong type: {error}") from None


def _from_gpt2(values: dict[str, Any]) -> dict[str, Any]:
    activation = values["activation_function"]
    if activation not in _GELUS:
        raise ConfigError(
            f"gpt2 with activation_function={activation!r} is not supported; use {', '.join(_GELUS)}"
        )
    return {
        "vocab_size": values["vocab_size"],
        "hidden_size": values["n_embd"],
        "num_layers": values["n_layer"],
        "num_heads": values["n_head"],
        "ffn_size": values.get("n_inner") or 4 * values["n_embd"],
        "activation": _GELUS[activation],
        "norm": "layernorm",
        "norm_eps": values["layer_norm_epsilon"],
        "position": "learned",
        "max_seq_len": values["n_positions"],
        "qkv_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "tie_embeddings": values["tie_word_embeddings"],
        "init_std": values["initializer_range"],
    }


def _from_llama_like(kind: str, values: dict[str, Any]) -> dict[str, Any]:
    theta, scaling = _rope(kind, values)
    bias = kind in ("llama", "qwen3") and values.get("attention_bias", False)
    return {
        "vocab_size": values["vocab_size"],
        "hidden_size": values["hidden_size"],
        "num_layers": values["num_hidden_layers"],
        "num_heads": values["num_attention_heads"],
        "num_kv_heads": values.get("num_key_value_heads") or 0,
        "head_dim": values.get("head_dim") or 0,
        "ffn_size": values["intermediate_size"],
        "norm_eps": values["rms_norm_eps"],
        "max_seq_len": values["max_position_embeddings"],
        "rope_theta": theta,
        "rope_scaling": scaling,
        "qkv_bias": bias or kind == "qwen2",
        "attention_out_bias": bias,
        "mlp_bias": kind == "llama" and values.get("mlp_bias", False),
        "qk_norm": kind == "qwen3",
        "sliding_window": _sliding_window(kind, values),
        "tie_embeddings": values["tie_word_embeddings"],
        "init_std": values["initializer_range"],
    }


def _rope(kind: str, values: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """θ and the scaling, from `rope_parameters` (transformers 5) or `rope_scaling` (before)."""
    rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or values["rope_theta"]
    old_name = rope.pop("type", None)
    rope_type = rope.pop("rope_type", None) or old_name or "default"
    original = rope.pop("original_max_position_embeddings", None)
    if rope.pop("partial_rotary_factor", None) not in (None, 1.0):
        raise ConfigError(f"{kind} with a partial_rotary_factor is not supported, only 1.0")
    known = {
        "default": set(),
        "linear": {"factor"},
        "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    }
    if rope_type not in known:
        raise ConfigError(f"rope_type={rope_type!r} is not supported; these are: {', '.join(known)}")
    if extra := rope.keys() - known[rope_type]:
        raise ConfigError(
            f"rope_type={rope_type!r} with {min(extra)}={rope[min(extra)]!r:.60} is not supported"
        )
    if rope_type == "default":
        return theta, None
    scaling = {"type": rope_type} | {key: rope[key] for key in sorted(known[rope_type])}
    if rope_type == "llama3":
        if original is None:
            raise KeyError("rope_scaling.original_max_position_embeddings")
        scaling["original_seq_len"] = original
    return theta, scaling


def _sliding_window(kind: str, values: dict[str, Any]) -> int:
    window = values.get("sliding_window") or 0
    if kind == "llama" or not window or not values.get("use_sliding_window", True):
        return 0
    if kind == "mistral":
        return int(window)
    layers = range(values["num_hidden_layers"])
    kinds = values.get("layer_types") or [
        "sliding_attention" if layer >= values["max_window_layers"] else "full_attention" for layer in layers
    ]
    if len(set(kinds)) > 1:
        raise ConfigError(
            f"{kind} with a sliding window in some layers only is not supported (layer_types, or "
            f"max_window_layers={values['max_window_layers']} of {len(layers)}); it must be all or none"
        )
    return int(window) if kinds[0] == "sliding_attention" else 0


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The contents of `config.json` for the first architecture that expresses the model.

    Raises:  ConfigError if none does, naming the nearest and what keeps it from doing so
    """
    misfits = {
        kind: {key: value for key, value in needed.items() if getattr(config, key) != value}
        for kind, needed in _requirements(config).items()
    }
    kind = min(misfits, key=lambda kind: len(misfits[kind]))
    if misfits[kind]:
        wanted = ", ".join(
            f"model.{k}={v!r} (it is {getattr(config, k)!r})" for k, v in misfits[kind].items()
        )
        raise ConfigError(
            f"no Hugging Face architecture expresses this model; the nearest, {kind}, needs {wanted}"
        )
    common: dict[str, Any] = {
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "dtype": "float32",
        "torch_dtype": "float32",
    }
    return common | (_to_gpt2(config) if kind == "gpt2" else _to_llama_like(kind, config))


def _requirements(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """What each architecture, in order of preference, fixes; both sides of a tie are this config's."""
    plain = {"norm": "rmsnorm", "position": "rope", "activation": "swiglu", "qk_norm": False}
    no_bias = {"qkv_bias": False, "attention_out_bias": False, "mlp_bias": False}
    whole_heads = config.hidden_size % config.num_heads == 0  # transformers' Llama insists on it
    gelu = "gelu" if config.activation == "gelu" else "gelu_tanh"
    return {
        "llama": plain
        | {"attention_out_bias": config.qkv_bias, "sliding_window": 0}
        | ({} if whole_heads else {"hidden_size": config.num_heads * config.head_dim}),
        "mistral": plain | no_bias,
        "qwen2": plain | no_bias | {"qkv_bias": True},
        "qwen3": plain | {"qk_norm": True, "attention_out_bias": config.qkv_bias, "mlp_bias": False},
        "gpt2": dict.fromkeys(no_bias, True)
        | {"norm": "layernorm", "position": "learned", "activation": gelu, "qk_norm": False}
        | {"num_kv_heads": config.num_heads, "sliding_window": 0}
        | {"hidden_size": config.num_heads * config.head_dim},
    }


def _to_gpt2(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.ffn_size,
        "n_positions": config.max_seq_len,
        "activation_function": "gelu" if config.activation == "gelu" else "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        **dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.0),
    }


def _to_llama_like(kind: str, config: ModelConfig) -> dict[str, Any]:
    # rope_theta and rope_scaling are the older spelling, which every transformers reads.
    values: dict[str, Any] = {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_seq_len,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "attention_bias": config.attention_out_bias,
        "mlp_bias": config.mlp_bias,
        "sliding_window": config.sliding_window or None,
    }
    if (scaling := config.rope_scaling) is not None:
        values["rope_scaling"] = {"rope_type": scaling.type, "factor": scaling.factor}
        if scaling.type == "llama3":
            values["rope_scaling"] |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_seq_len,
            }
    if kind.startswith("qwen"):
        values |= {"use_sliding_window": config.sliding_window > 0, "max_window_layers": 0}
    return values


# --- weights --------------------------------------------------------------------------------------

_LLAMA_NAMES: dict[str, tuple[str, ...]] = {
    "embedding": ("model.embed_tokens",),
    "norm": ("model.norm",),
    "head": ("lm_head",),
    "attention_norm": ("input_layernorm",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.q_norm": ("self_attn.q_norm",),
    "attention.k_norm": ("self_attn.k_norm",),
    "attention.out": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    "mlp.up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}
_GPT2_NAMES: dict[str, tuple[str, ...]] = {
    "embedding": ("transformer.wte",),
    "positions": ("transformer.wpe",),
    "norm": ("transformer.ln_f",),
    "head": ("lm_head",),
    "attention_norm": ("ln_1",),
    "attention.qkv": ("attn.c_attn",),
    "attention.out": ("attn.c_proj",),
    "mlp_norm": ("ln_2",),
    "mlp.up": ("mlp.c_fc",),
    "mlp.down": ("mlp.c_proj",),
}
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every logical parameter of the model and its shape, in the model's order."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Transformer(config).named_parameters()}


def hf_names(config: ModelConfig) -> list[str]:
    """The names of the model's tensors in a Hugging Face state dict, in the model's order."""
    return [theirs for name in parameter_shapes(config) for theirs in _hf_names(name, config)[0]]


def weights_from_hf(get: Callable[[str], Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Each of our parameters, made of the tensors that `get` returns for Hugging Face's names.

    Shapes:  yields (name, tensor) in the model's order, each in our shape and the stored dtype
    Raises:  CheckpointError if a tensor has another shape than the config says, or is no float
    """
    for name, shape in parameter_shapes(config).items():
        names, is_transposed = _hf_names(name, config)
        parts = []
        for theirs, rows in zip(names, _rows(name, shape, config), strict=True):
            tensor = get(theirs)
            expected = (shape[1], rows) if is_transposed else (rows, *shape[1:])
            if tuple(tensor.shape) != expected or tensor.dtype not in _FLOATS:
                raise CheckpointError(
                    f"{theirs} is {list(tensor.shape)} of {tensor.dtype}; by the config it must be "
                    f"{list(expected)} of a float of 16 bits or more"
                )
            parts.append(tensor.t() if is_transposed else tensor)
        yield name, parts[0] if len(parts) == 1 else torch.cat(parts)


def weights_to_hf(get: Callable[[str], Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face state dict of the parameters that `get` returns for our names.

    Shapes:  get returns a parameter in its logical shape; yields (name, tensor), contiguous and
             sharing no memory with each other
    """
    for name, shape in parameter_shapes(config).items():
        names, is_transposed = _hf_names(name, config)
        parts = torch.split(get(name).view(shape), _rows(name, shape, config))
        for theirs, part in zip(names, parts, strict=True):
            yield theirs, part.t().contiguous() if is_transposed else part.clone()


def _hf_names(name: str, config: ModelConfig) -> tuple[tuple[str, ...], bool]:
    """Hugging Face's names for one of our parameters, and whether they store it transposed."""
    is_gpt2 = config.position == "learned"
    match = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+?)(\.weight|\.bias)?", name)
    if match is None:
        raise ValueError(f"{name!r} is no parameter's name")
    layer, module, leaf = match.groups()
    modules = (_GPT2_NAMES if is_gpt2 else _LLAMA_NAMES)[module]
    block = "" if layer is None else f"{'transformer.h' if is_gpt2 else 'model.layers'}.{layer}."
    is_matrix = "." in module and leaf == ".weight"
    is_transposed = is_matrix and is_gpt2 != (module in ("attention.out", "mlp.down"))
    return tuple(f"{block}{theirs}{leaf or '.weight'}" for theirs in modules), is_transposed


def _rows(name: str, shape: tuple[int, ...], config: ModelConfig) -> list[int]:
    """How many of our parameter's rows each of its Hugging Face tensors holds."""
    if config.position == "rope" and ".qkv." in name:
        kv = config.num_kv_heads * config.head_dim
        return [config.num_heads * config.head_dim, kv, kv]
    if config.position == "rope" and ".up." in name:
        return [config.ffn_size] * 2
    return [shape[0]]
