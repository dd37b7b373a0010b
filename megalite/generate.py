"""Text from a trained model, and the commands `generate`, `export` and `import`.

torch is imported by the functions that need it, so that `megalite --help` does not wait for it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalite.errors import CheckpointError, ConfigError, DataError, is_unicode

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megalite.data.tokenizer import Tokenizer
    from megalite.model.transformer import Transformer


def load_model(path: Path, device: torch.device | str, dtype: torch.dtype) -> tuple[Transformer, Tokenizer]:
    """The model at `path` for inference: a run folder, its checkpoints folder, a checkpoint, or a
    Hugging Face folder.

    Raises:  CheckpointError, DataError or ConfigError if it is missing, damaged or not supported
    """
    import torch

    from megalite.data.tokenizer import load_tokenizer
    from megalite.hf_folder import HF_CONFIG, open_run, read_hf
    from megalite.model.transformer import Transformer

    weights: Iterator[tuple[str, Tensor]]
    if not path.is_dir():
        raise CheckpointError(f"no folder {path}; give a run, a checkpoint or an exported model")
    if (path / HF_CONFIG).exists():
        config, weights = read_hf(path)
        tokenizer = load_tokenizer(path)
    else:
        config, checkpoint, tokenizer = open_run(path)
        weights = ((name, checkpoint.read("weight", name)) for name in checkpoint.names())
    if tokenizer.vocab_size > config.vocab_size:
        raise DataError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} ids, the model only vocab_size="
            f"{config.vocab_size}; they do not belong together"
        )
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    parameters = dict(model.named_parameters())
    for name, values in weights:
        parameters[name].copy_(values.view_as(parameters[name]))
    return model, tokenizer


def generate(
    model: Transformer,
    tokens: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int | None = None,
) -> Iterator[int]:
    """New tokens after a prompt, each as soon as it is known; ends after `eos_id`, which is yielded.

    At temperature 0 the likeliest token is taken. Else tokens are drawn from softmax(logits /
    temperature), of which `top_k` > 0 keeps the k likeliest and `top_p` < 1 the fewest that together
    reach p. The same seed gives the same tokens.

    Raises:  ConfigError, before anything is computed, if an argument is out of range or prompt and
             new tokens exceed the model's max_seq_len; CheckpointError when scores are not finite
    Source:  Holtzman et al. 2020, section 3.1 (top-p)
    """
    limits = {
        "max_new_tokens": (max_new_tokens, max_new_tokens >= 1, "at least 1"),
        "temperature": (temperature, math.isfinite(temperature) and temperature >= 0, "0 (greedy) or more"),
        "top_k": (top_k, top_k >= 0, "0 (off) or more"),
        "top_p": (top_p, 0 < top_p <= 1, "over 0 and at most 1 (off)"),
        "seed": (seed, 0 <= seed < 2**63, "from 0 to 2^63 - 1"),
    }
    for name, (value, is_legal, legal) in limits.items():
        if not is_legal:
            raise ConfigError(f"{name}={value}; it must be {legal}")
    config = model.config
    if not tokens:
        raise ConfigError("the prompt is empty; give at least one token")
    if not 0 <= min(tokens) <= max(tokens) < config.vocab_size:
        raise ConfigError(
            f"the prompt has ids {min(tokens)} to {max(tokens)}; vocab_size={config.vocab_size}"
        )
    room = config.max_seq_len - len(tokens)
    if max_new_tokens > room:
        fewer = f" or set max_new_tokens to at most {room}" if room > 0 else ""
        raise ConfigError(
            f"{len(tokens)} prompt tokens + max_new_tokens={max_new_tokens} exceed the model's "
            f"max_seq_len={config.max_seq_len}; shorten the prompt{fewer}"
        )
    return _generate(model, tokens, max_new_tokens, temperature, top_k, top_p, seed, eos_id)


def _generate(
    model: Transformer,
    tokens: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    eos_id: int | None,
) -> Iterator[int]:
    import torch

    from megalite.model.attention import KVCache

    config, like = model.config, model.embedding
    shape = (1, len(tokens) + max_new_tokens, config.num_kv_heads, config.head_dim)
    cache = [KVCache(like.new_empty(shape), like.new_empty(shape)) for _ in range(config.num_layers)]
    generator = torch.Generator().manual_seed(seed)
    new = list(tokens)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            hidden = model(torch.tensor([new], device=like.device), cache=cache)
            logits = model.logits(hidden[0, -1]).float().cpu()
        token = _pick(logits, temperature, top_k, top_p, generator)
        yield token
        if token == eos_id:
            return
        new = [token]


def _pick(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    """One token of fp32 logits [vocab]. Sorting is stable: among equals the lower id comes first.

    Raises:  CheckpointError if a score is not finite, of which no token follows
    """
    if not logits.isfinite().all():
        raise CheckpointError("the model's scores are not finite: its weights are not those of a whole model")
    if temperature == 0:
        return int(logits.argmax())
    # The largest becomes 0 first, and the quotient is float64: no temperature makes it infinite.
    ordered, ids = (logits - logits.max()).sort(descending=True, stable=True)
    if top_k:
        ordered = ordered[:top_k]
    p = (ordered.double() / temperature).softmax(-1)
    if top_p < 1:
        p[p.cumsum(-1) - p >= top_p] = 0.0  # kept while those before it fall short of top_p
    return int(ids[p.multinomial(1, generator=generator)])


# --- commands -------------------------------------------------------------------------------------


def add_command(subparsers: Any) -> None:
    """Add `generate`, `export` and `import` to the parser of `megalite`; each sets `func`."""
    command = _add(
        subparsers,
        "generate",
        "continue a text with a trained model",
        'megalite generate runs/quickstart --prompt "def main(" --max-new-tokens 100',
    )
    command.add_argument("path", type=Path, help="a run, a checkpoint, or a Hugging Face folder")
    command.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue")
    command.add_argument(
        "--max-new-tokens", type=int, default=200, metavar="N", help="stop after N (default 200)"
    )
    command.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0 is greedy (default 0.8)"
    )
    command.add_argument("--greedy", action="store_true", help="the same as --temperature 0")
    command.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest tokens (default 0: all)"
    )
    command.add_argument(
        "--top-p",
        type=float,
        default=0.95,
        metavar="P",
        help="draw from the fewest tokens that reach probability P (default 0.95; 1: all)",
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same text (default 0)")
    command.set_defaults(func=_run_generate)

    command = _add(
        subparsers,
        "export",
        "write a run as a Hugging Face folder (safetensors)",
        "megalite export runs/quickstart --to exported/quickstart",
    )
    command.add_argument("run", type=Path, help="a run or a checkpoint")
    command.add_argument("--to", type=Path, required=True, metavar="DIR", help="a new folder")
    command.set_defaults(func=_run_export)

    command = _add(
        subparsers,
        "import",
        "write a Hugging Face folder as a run to generate, export or train from",
        "megalite import Qwen3-0.6B --to runs/qwen\n"
        "  megalite data tokenize --text books/ --to data --tokenizer runs/qwen/tokenizer.json\n"
        "  megalite train runs/qwen/config.toml 'data.sources=[{path=\"data/train\"}]' train.steps=500",
    )
    command.add_argument("folder", type=Path, help="config.json, safetensors and tokenizer.json")
    command.add_argument("--to", type=Path, required=True, metavar="DIR", help="a new run folder")
    command.set_defaults(func=_run_import)


def _add(subparsers: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"example:\n  {example}\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def _run_generate(args: argparse.Namespace) -> int:
    import torch

    from megalite.data.tokenizer import DecodeStream

    if not args.prompt:
        raise ConfigError('--prompt ""; give at least one character to continue from')
    if not is_unicode(args.prompt):
        raise ConfigError(f"--prompt {args.prompt!r} is not UTF-8; give text in that encoding")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, tokenizer = load_model(args.path, device, dtype)
    new = generate(
        model,
        tokenizer.encode(args.prompt).tolist(),
        max_new_tokens=args.max_new_tokens,
        temperature=0.0 if args.greedy else args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        eos_id=tokenizer.eos_id,
    )
    stream = DecodeStream(tokenizer)
    print(args.prompt, end="", flush=True)
    for token in new:
        if token != tokenizer.eos_id:
            print(stream.feed(token), end="", flush=True)
    print(stream.flush())
    return 0


def _run_export(args: argparse.Namespace) -> int:
    from megalite.hf_folder import export

    export(args.run, args.to)
    print(f"wrote {args.to}", file=sys.stderr)
    return 0


def _run_import(args: argparse.Namespace) -> int:
    from megalite.hf_folder import import_hf

    import_hf(args.folder, args.to)
    print(f"wrote {args.to}; its config.toml wants data.sources of your own", file=sys.stderr)
    return 0
