"""Byte-level BPE as it is written down: letters for bytes, expressions that cut text, tiktoken's rank files.

A rank file has a token a line, base64 and its rank. tiktoken merges the neighbours whose joint bytes have the
lowest rank; a `tokenizer.json` lists the merges. They are the same: while a token is put together nothing
crosses its bounds, so it comes of the two parts that its own bytes alone come down to.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NamedTuple

from megalite.errors import DataError, nearest

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
EOS = "<|endoftext|>"


class Encoding(NamedTuple):
    """A published tokenizer: its expression, how many ranks it has, and its special tokens."""

    expression: str
    ranks: int
    special: dict[str, int]


ENCODINGS = {
    "gpt2": Encoding(GPT2, 50256, {EOS: 50256}),
    "r50k_base": Encoding(GPT2, 50256, {EOS: 50256}),
    "p50k_base": Encoding(GPT2, 50280, {EOS: 50256}),
    "cl100k_base": Encoding(
        CL100K,
        100256,
        {
            EOS: 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": Encoding(O200K, 199998, {EOS: 199999, "<|endofprompt|>": 200018}),
}


def byte_letters() -> list[str]:
    """The printable character that stands for each byte in a vocabulary (Radford et al. 2019)."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = iter(range(0x100, 0x200))
    return [chr(byte if byte in shown else next(moved)) for byte in range(256)]


def from_ranks(lines: Iterable[bytes], pattern: str | None, origin: str) -> str:
    """The `tokenizer.json` that gives the ids tiktoken gives with these ranks.

    `pattern` names the encoding whose expression cuts the text; without it the number of ranks must be that
    of one. Special tokens are the encoding's, for ranks of one's own `<|endoftext|>` after the last.

    Raises:  DataError naming the line, or the pattern with the nearest match
    """
    ranks = _read_ranks(lines, origin)
    encoding = _encoding(len(ranks), pattern, origin)
    is_own = len(ranks) != encoding.ranks
    special = {EOS: max(ranks.values()) + 1} if is_own else encoding.special
    if taken := set(special.values()) & set(ranks.values()):
        raise DataError(
            f"{origin}: rank {min(taken)} belongs to a special token of {pattern or 'its pattern'}"
        )
    letters = byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    come_of = [_last_two(token, ranks) for token in sorted(ranks, key=ranks.__getitem__)]
    merges = [[spelled[part] for part in parts] for parts in come_of if parts]
    vocab = {spelled[token]: rank for token, rank in ranks.items()} | special
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    cut = {
        "type": "Split",
        "pattern": {"Regex": encoding.expression},
        "behavior": "Isolated",
        "invert": False,
    }
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    table: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [{"id": number, "content": name, **flags} for name, number in special.items()],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, byte_level]},
        "decoder": byte_level,
        # tiktoken looks for the whole word first.
        "model": {"type": "BPE", "ignore_merges": True, "vocab": vocab, "merges": merges},
    }
    return json.dumps(table, ensure_ascii=False)


def _encoding(count: int, pattern: str | None, origin: str) -> Encoding:
    if pattern is None:
        for encoding in ENCODINGS.values():
            if encoding.ranks == count:
                return encoding
        raise DataError(
            f"{origin} has {count} ranks, as no known encoding; name its pattern: {', '.join(ENCODINGS)}"
        )
    if pattern not in ENCODINGS:
        raise DataError(f"pattern {pattern!r} is not known; {nearest(pattern, ENCODINGS)}")
    return ENCODINGS[pattern]


def _read_ranks(lines: Iterable[bytes], origin: str) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    seen: set[int] = set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            key, value = base64.b64decode(token, validate=True), int(rank)
        except (ValueError, binascii.Error):
            raise DataError(f"{origin}:{number}: {line[:40]!r} is not a base64 token and its rank") from None
        if not key or key in ranks or value in seen or not 0 <= value < 2**31:
            raise DataError(
                f"{origin}:{number}: token {key[:40]!r} of rank {value} is empty, a repeat or wrong"
            )
        ranks[key] = value
        seen.add(value)
    if missing := [byte for byte in range(256) if bytes((byte,)) not in ranks]:
        raise DataError(
            f"{origin} has no rank for the byte 0x{missing[0]:02x}; it is no byte-level tokenizer"
        )
    return ranks


def _last_two(token: bytes, ranks: dict[bytes, int]) -> list[bytes] | None:
    """What a token's bytes come down to before it is whole; None if they do not come down to two parts."""
    parts = [bytes((byte,)) for byte in token]
    never = 1 << 31
    pairs = [ranks.get(a + b, never) for a, b in pairwise(parts)]
    while len(parts) > 2:
        lowest = min(pairs)
        if lowest == never:
            return None
        at = pairs.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del pairs[at]
        if at:
            pairs[at - 1] = ranks.get(parts[at - 1] + parts[at], never)
        if at < len(pairs):
            pairs[at] = ranks.get(parts[at] + parts[at + 1], never)
    return parts if len(parts) == 2 else None
