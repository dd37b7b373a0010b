"""What a `tokenizer.json` says, if it is a byte-level BPE that is known to the letter; else why not."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.bpe.pretokens import PATTERNS
from megalite.data.byte_level import GPT2, byte_letters

# Two ways to say that what the expression matches are the pre-tokens: it matches everything.
_KEPT_WHOLE = (("Isolated", False), ("Removed", True))


class Unknown(Exception):  # noqa: N818
    """The tokenizer is of another kind; the message completes "the tokenizer …"."""


class Model(NamedTuple):
    """A byte-level BPE.

    `pattern` is the place of its expression in PATTERNS. `words` are pre-tokens that have an id whatever
    merges say, by their bytes. Rules int64 [merges, 3] are left, right and merged id, by rank.
    """

    pattern: int
    byte_ids: NDArray[np.int32]
    rules: NDArray[np.int64]
    words: dict[bytes, int]


def read_model(content: str) -> Model:
    """Read a valid `tokenizer.json`.

    Raises:  Unknown with the first thing about it that the compiled encoder does not do
    """
    table = json.loads(content)
    model = table.get("model") or {}
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise Unknown(f"is a {model.get('type')} model, not BPE")
    if table.get("normalizer") is not None:
        raise Unknown(f"normalizes text ({_kind(table['normalizer'])})")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise Unknown(f"has {key}={model[key]!r}")
    for token in table.get("added_tokens") or []:
        if not token.get("special"):
            raise Unknown(f"finds its added token {token.get('content')!r} in any text")
    vocab: dict[str, int] = model["vocab"]
    letters = byte_letters()
    if missing := [letter for letter in letters if letter not in vocab]:
        raise Unknown(f"has no token for the byte 0x{letters.index(missing[0]):02x}")
    pairs = [tuple(rule.split(" ")) if isinstance(rule, str) else tuple(rule) for rule in model["merges"]]
    rules = [(vocab[left], vocab[right], vocab[left + right]) for left, right in pairs]
    words = _spelled(vocab) if model.get("ignore_merges") else {}
    return Model(
        _pattern(table.get("pre_tokenizer")),
        np.array([vocab[letter] for letter in letters], dtype=np.int32),
        np.array(rules, dtype=np.int64).reshape(-1, 3),
        words,
    )


def _spelled(vocab: dict[str, int]) -> dict[bytes, int]:
    """Tokens by their bytes, but for those of other characters, which no pre-token can be."""
    letters = byte_letters()
    is_letters = set(letters).issuperset
    to_latin_1 = str.maketrans({letter: chr(byte) for byte, letter in enumerate(letters)})
    return {
        token.translate(to_latin_1).encode("latin-1"): number
        for token, number in vocab.items()
        if token and is_letters(token)
    }


def _pattern(pre_tokenizer: dict[str, Any] | None) -> int:
    """The place of the expression in PATTERNS."""
    steps = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {}]
    *before, last = steps
    if _kind(last) != "ByteLevel":
        raise Unknown(f"ends its pre-tokenizer with {_kind(last)}, not ByteLevel")
    if last.get("add_prefix_space"):
        raise Unknown("adds a space before every text")
    has_own = last.get("use_regex", True)
    if not before and has_own:
        return PATTERNS.index(GPT2)
    if len(before) != 1 or has_own or _kind(before[0]) != "Split":
        raise Unknown(f"has a pre-tokenizer of {', '.join(map(_kind, steps))}")
    expression = before[0].get("pattern", {}).get("Regex")
    way = before[0].get("behavior"), bool(before[0].get("invert"))
    if way not in _KEPT_WHOLE or expression not in PATTERNS:
        raise Unknown(f"splits text by another expression: {str(expression)[:80]}")
    return PATTERNS.index(expression)


def _kind(part: Any) -> str:
    return str(part.get("type")) if isinstance(part, dict) else "something else"
