"""Which engine encodes a corpus, and its comparison with the reference on a sample.

The compiled encoder serves the byte-level BPEs it knows to the letter, the reference tokenizer all others.
"""

from __future__ import annotations

import os
import zlib
from importlib.util import find_spec
from itertools import pairwise
from typing import Protocol

import numpy as np

from data_tools.bpe import Encoded
from data_tools.bpe.model import Unknown, read_model
from data_tools.documents import Texts
from megalite.data.tokenizer import JsonTokenizer, Tokenizer

BYTES, COMPILED, REFERENCE = "bytes", "compiled", "tokenizers"  # engines
CHECK_ONE_IN = 1000
CHECK_HEAD_BYTES = 1024  # what the choice is made by
CHECK_BYTES = 16 << 10  # of one document


class Encoder(Protocol):
    """Gives ids to many texts."""

    def encode(self, texts: Texts) -> Encoded:
        """The ids of every text, each followed by the end of a document."""


def choose_engine(tokenizer: Tokenizer) -> tuple[str, str]:
    """The engine for a tokenizer, and why it is not the compiled one; empty if it is or is not needed."""
    if not isinstance(tokenizer, JsonTokenizer):
        return BYTES, ""
    if find_spec("numba") is None:
        return REFERENCE, "numba is not installed (pip install 'megalite[data]')"
    try:
        read_model(tokenizer.content)
    except Unknown as reason:
        return REFERENCE, f"the tokenizer {reason}"
    return COMPILED, ""


def build_encoder(tokenizer: Tokenizer, engine: str) -> Encoder:
    """An encoder of an engine that `choose_engine` gave, or of the reference. Runs on one core."""
    if engine == BYTES:
        return _ByteEncoder(tokenizer.eos_id)
    if engine == REFERENCE or not isinstance(tokenizer, JsonTokenizer):
        return _ReferenceEncoder(tokenizer)
    from data_tools.bpe.encoder import BpeEncoder

    return BpeEncoder(read_model(tokenizer.content), tokenizer.eos_id)


class SampleCheck:
    """Compares ids with the reference tokenizer's, as a job goes on.

    The sample: the first document, one in 1000 by a hash of its text, and of each batch the one with the
    longest pre-token. Of a long document its first 16 KiB are compared.
    """

    def __init__(self, tokenizer: Tokenizer, encoder: Encoder, engine: str) -> None:
        self._tokenizer, self._encoder, self._engine = tokenizer, encoder, engine
        self.checked = 0
        self.different = 0

    def look(self, texts: Texts, encoded: Encoded) -> list[int]:
        """The documents of a batch whose ids are not the reference's."""
        if self._engine != COMPILED:
            return []
        wrong = [row for row in self._sample(texts) if not self._is_equal(texts, encoded, row)]
        self.different += len(wrong)
        return wrong

    def _sample(self, texts: Texts) -> list[int]:
        data, offsets = memoryview(texts.data), texts.offsets.tolist()  # type: ignore[arg-type]
        rows = [
            row
            for row, (start, stop) in enumerate(pairwise(offsets))
            if zlib.crc32(data[start : min(stop, start + CHECK_HEAD_BYTES)]) % CHECK_ONE_IN == 0
            and stop > start
        ]
        if len(offsets) > 1:
            if not self.checked:
                rows.append(0)
            widest = getattr(self._encoder, "widest", texts.sizes)
            rows.append(int(np.argmax(widest)))
        rows = sorted(set(rows))
        self.checked += len(rows)
        return rows

    def _is_equal(self, texts: Texts, encoded: Encoded, row: int) -> bool:
        start, stop = int(texts.offsets[row]), int(texts.offsets[row + 1])
        ids = encoded.ids[encoded.bounds[row] : encoded.bounds[row + 1]]
        text = texts.data[start : min(stop, start + CHECK_BYTES)].tobytes().decode("utf-8", "ignore")
        if stop - start > CHECK_BYTES:
            head = np.frombuffer(text.encode(), dtype=np.uint8)
            ids = self._encoder.encode(Texts(head, np.array([0, head.size], dtype=np.int64))).ids
        return bool(np.array_equal(ids[:-1], self._tokenizer.encode(text)))


class _ByteEncoder:
    """Every byte is its id."""

    def __init__(self, end_id: int) -> None:
        self._end_id = end_id

    def encode(self, texts: Texts) -> Encoded:
        offsets = texts.offsets - texts.offsets[0]
        data = texts.data[texts.offsets[0] : texts.offsets[-1]].astype(np.int32)
        ids = np.insert(data, offsets[1:], np.int32(self._end_id))
        return Encoded(ids, offsets + np.arange(len(offsets)))


class _ReferenceEncoder:
    """The tokenizer itself."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        # Tasks are shared out over processes already.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._tokenizer = tokenizer

    def encode(self, texts: Texts) -> Encoded:
        rows = pairwise(texts.offsets.tolist())
        strings = [texts.data[start:stop].tobytes().decode() for start, stop in rows]
        parts = [np.append(ids, self._tokenizer.eos_id) for ids in self._tokenizer.encode_batch(strings)]
        bounds = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        return Encoded(np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int32), bounds)
