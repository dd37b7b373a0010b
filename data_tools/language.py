"""Which language a document is in: py3langid's model in a compiled loop, or a fastText model.

Source: Lui and Baldwin 2012, langid.py: naive Bayes over byte n-grams, found by one automaton.
"""

from __future__ import annotations

import unicodedata
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from data_tools.compiled import compiled
from data_tools.documents import texts, with_column
from data_tools.fasttext_model import FastTextModel
from data_tools.flow import Flow
from megalite.config.section import Section
from megalite.errors import DataError

BLOCK = 64 << 10
UNKNOWN = "und"  # ISO 639's code for undetermined


class LanguageSettings(Section):
    """How a document's language is found."""

    engine: Literal["langid", "fasttext"] = Field(
        "langid",
        description="langid: py3langid's model; fasttext: the model given, such as lid.176",
    )
    model: str | None = Field(None, description="file of the fastText model, for that engine alone")
    max_bytes: int = Field(
        64 << 10, ge=0, description="look at no more than this from the start of a document; 0 for all of it"
    )

    @model_validator(mode="after")
    def _has_its_model(self) -> LanguageSettings:
        if (self.engine == "fasttext") != (self.model is not None):
            raise ValueError(f"model={self.model!r} with engine={self.engine!r}; fasttext alone needs a file")
        return self


class Language:
    """The operation: adds `language`, an ISO 639 code or "und", and `language_score` float32, from 0 to 1.

    Raises:  DataError if the engine is not installed or its model cannot be loaded
    """

    def __init__(self, settings: LanguageSettings) -> None:
        self._settings = settings
        self._model = _load_langid() if settings.model is None else FastTextModel(settings.model)

    def __call__(self, batch: pa.RecordBatch, flow: Flow) -> pa.RecordBatch:
        column = batch.column("text")
        names, scores = (
            self._by_langid(self._model, column)
            if isinstance(self._model, LangidModel)
            else (self._by_fasttext(self._model, column))
        )
        flow.tally("language", names)
        batch = with_column(batch, "language", pa.array(names, pa.string()))
        return with_column(batch, "language_score", pa.array(scores, pa.float32()))

    def _by_langid(self, model: LangidModel, column: pa.Array) -> tuple[list[str], NDArray[np.float32]]:
        data, offsets = texts(column)
        starts, ends, unusual = _beginnings(data, offsets, self._settings.max_bytes)
        labels, scores = model.classify(data, starts, ends)
        # Shouting and loose accents are seen as py3langid sees them; few documents have either.
        for row in np.flatnonzero(unusual).tolist():
            text = data[starts[row] : ends[row]].tobytes().decode()
            usual = unicodedata.normalize("NFC", text.lower() if text.isupper() else text)
            if usual != text:
                alone = np.frombuffer(usual.encode(), dtype=np.uint8)
                found = model.classify(alone, np.array([0]), np.array([alone.size]))
                labels[row], scores[row] = found[0][0], found[1][0]
        return [model.languages[label] for label in labels.tolist()], scores

    def _by_fasttext(self, model: FastTextModel, column: pa.Array) -> tuple[list[str], NDArray[np.float32]]:
        data, offsets = texts(column)
        starts, ends, _ = _beginnings(data, offsets, self._settings.max_bytes)
        found = [
            model.best(data[start:end].tobytes().decode())
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
        ]
        return [name or UNKNOWN for name, _ in found], np.array([p for _, p in found], dtype=np.float32)


class LangidModel(NamedTuple):
    """py3langid's model.

    Shapes:  row_of uint16 [states], where a state's moves lie; moves uint32 [rows, 256], the next state;
             feature_of int32 [states], −1 for none; weights float32 [features, classes]; prior float32
             [classes]; same_as int64 [classes], the first class of the same language
    """

    languages: list[str]  # of each class, and "und" last
    row_of: NDArray[np.uint16]
    moves: NDArray[np.uint32]
    feature_of: NDArray[np.int32]
    weights: NDArray[np.float32]
    prior: NDArray[np.float32]
    same_as: NDArray[np.int64]

    def classify(
        self, data: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The likeliest class of each span and its probability; "und" and 0 if it has no feature.

        log P(c | text) = log P(c) + Σ_f log(1 + n_f) · w[f, c], softened by the root of the text's bytes

        Shapes:  data uint8 [bytes]; starts, ends int64 [spans]; returns int64 [spans], float32 [spans]
        """
        sizes = ends - starts
        sums, features = _sums(
            data, starts, ends, np.argsort(sizes), self.row_of, self.moves, self.feature_of, self.weights
        )
        sums += self.prior
        sums /= np.sqrt(np.maximum(sizes, 1)).astype(np.float32)[:, None]
        mass = np.exp(sums - sums.max(axis=1, keepdims=True))
        scores = np.zeros(sizes.size, dtype=np.float32)
        np.divide(1, mass.sum(axis=1), out=scores, where=features > 0)
        for label, same in enumerate(self.same_as.tolist()):
            if same != label:
                mass[:, same] += mass[:, label]
                mass[:, label] = 0
        labels = np.where(features > 0, mass.argmax(axis=1), len(self.languages) - 1)
        return labels, scores * mass.max(axis=1)


def langid_version() -> str:
    """Of the installed package, which holds the model.

    Raises:  DataError if it is not installed
    """
    try:
        import py3langid
    except ImportError:
        raise DataError("this needs py3langid; install it with: pip install 'megalite[data]'") from None
    return str(py3langid.__version__)


def _load_langid() -> LangidModel:
    """The package reads its own file, numpy arrays without objects."""
    langid_version()
    from py3langid.langid import MODEL_DIR, MODEL_FILE
    from py3langid.modelio import load_model

    weights, prior, languages, moves, row_of, feature_of = load_model(MODEL_DIR / MODEL_FILE)
    first = {name: number for number, name in reversed(list(enumerate(languages)))}
    return LangidModel(
        [*languages, UNKNOWN],
        np.array(row_of, dtype=np.uint16),
        np.array(moves, dtype=np.uint32).reshape(-1, 256),
        np.array(feature_of, dtype=np.int32),
        np.array(weights, dtype=np.float32),
        np.array(prior, dtype=np.float32),
        np.array([first[name] for name in languages]),
    )


@compiled
def _beginnings(
    data: NDArray[np.uint8], offsets: NDArray[np.int64], max_bytes: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Where to look in each row, cut between characters; and which have no small letter or loose accents."""
    rows = offsets.size - 1
    starts, ends = offsets[:-1].copy(), offsets[1:].copy()
    unusual = np.zeros(rows, dtype=np.bool_)
    for row in range(rows):
        start, end = starts[row], ends[row]
        if max_bytes and end - start > max_bytes:
            end = start + max_bytes
            while end > start and data[end] & 0xC0 == 0x80:
                end -= 1
            ends[row] = end
        small = False
        for at in range(start, end):
            byte = data[at]
            small |= 0x61 <= byte <= 0x7A
            if byte >= 0xCC:  # leads a character from U+0300 on; those below are as NFC has them
                unusual[row] = True
                break
        if not small:
            unusual[row] = True
    return starts, ends, unusual


@compiled
def _step(
    state: int,
    byte: int,
    met: NDArray[np.int32],
    size: int,
    row_of: NDArray[np.uint16],
    moves: NDArray[np.uint32],
    feature_of: NDArray[np.int32],
) -> tuple[int, int]:
    """Go on by a byte and note the feature that ends there, if any; without a branch to be mispredicted."""
    state = moves[row_of[state], byte]
    met[size] = feature_of[state]
    return state, size + (met[size] >= 0)


@compiled
def _walk_four(
    data: NDArray[np.uint8],
    starts: NDArray[np.int64],
    bytes_each: int,
    met: NDArray[np.int32],
    sizes: NDArray[np.int64],
    states: NDArray[np.int64],
    row_of: NDArray[np.uint16],
    moves: NDArray[np.uint32],
    feature_of: NDArray[np.int32],
) -> None:
    """Walk side by side in four spans, for a walk waits for memory at every byte."""
    a = b = c = d = i = j = k = m = 0
    p, q, r, s = starts[0], starts[1], starts[2], starts[3]
    for at in range(bytes_each):
        a, i = _step(a, data[p + at], met[0], i, row_of, moves, feature_of)
        b, j = _step(b, data[q + at], met[1], j, row_of, moves, feature_of)
        c, k = _step(c, data[r + at], met[2], k, row_of, moves, feature_of)
        d, m = _step(d, data[s + at], met[3], m, row_of, moves, feature_of)
    states[0], states[1], states[2], states[3] = a, b, c, d
    sizes[0], sizes[1], sizes[2], sizes[3] = i, j, k, m


@compiled
def _sums(
    data: NDArray[np.uint8],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    order: NDArray[np.int64],
    row_of: NDArray[np.uint16],
    moves: NDArray[np.uint32],
    feature_of: NDArray[np.int32],
    weights: NDArray[np.float32],
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Σ_f log(1 + n_f) · w[f, c] of each span and class, and how many features f it has.

    Shapes:  order int64 [spans], shortest first; returns float32 [spans, classes], int64 [spans]
    """
    totals = np.zeros((order.size, weights.shape[1]), dtype=np.float32)
    different = np.zeros(order.size, dtype=np.int64)
    counts, seen = np.zeros(weights.shape[0], dtype=np.int32), np.empty(weights.shape[0], dtype=np.int32)
    met = np.empty((4, BLOCK + 1), dtype=np.int32)
    sizes, states = np.zeros(4, dtype=np.int64), np.zeros(4, dtype=np.int64)
    for group in range(0, order.size, 4):
        lanes = order[group : group + 4]
        shared = 0
        sizes[:] = states[:] = 0
        if lanes.size == 4 and ends[lanes[3]] - starts[lanes[3]] <= BLOCK:
            shared = ends[lanes[0]] - starts[lanes[0]]
            _walk_four(data, starts[lanes], shared, met, sizes, states, row_of, moves, feature_of)
        for lane in range(lanes.size):
            span, size, state = lanes[lane], sizes[lane], states[lane]
            begin, features = starts[span] + shared, 0
            while begin < ends[span] or size:
                stop = min(ends[span], begin + BLOCK - size)
                for at in range(begin, stop):
                    state, size = _step(state, data[at], met[lane], size, row_of, moves, feature_of)
                for place in range(size):
                    feature = met[lane, place]
                    if counts[feature] == 0:
                        seen[features] = feature
                        features += 1
                    counts[feature] += 1
                begin, size = stop, 0
            total = totals[span]
            for place in range(features):
                feature = seen[place]
                factor = np.float32(np.log1p(np.float64(counts[feature])))
                counts[feature] = 0
                for label in range(weights.shape[1]):
                    total[label] += factor * weights[feature, label]
            different[span] = features
    return totals, different
