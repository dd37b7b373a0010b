"""fastText models from a file: a label's probability for a text. The format is plain binary, no pickle."""

from __future__ import annotations

import hashlib
import mmap
import struct
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from megalite.errors import DataError

MAGIC = 793712314
PREFIX = "__label__"
_HEAD = struct.Struct("<ii12idiiiqq")  # magic, version, arguments, and the dictionary's counts


class FastTextModel:
    """A supervised model, loaded.

    Raises:  DataError if fastText is not installed, or the file is missing, cut, or not such a model
    """

    def __init__(self, path: str) -> None:
        try:
            import fasttext
        except ImportError:
            raise DataError(
                "this needs fastText; install it with: pip install 'megalite[fasttext]'"
            ) from None
        _check(path)
        try:
            with redirect_stderr(StringIO()):  # it warns of what changed in 2018
                # The package's own predict fails with numpy 2, so its compiled half is called without it.
                self._model: Any = fasttext.load_model(path).f
        except (ValueError, RuntimeError, MemoryError) as error:
            raise DataError(f"{path} is a damaged fastText model ({error})") from None
        self.labels = tuple(label.removeprefix(PREFIX) for label in self._model.getLabels("strict")[0])

    def best(self, text: str) -> tuple[str, float]:
        """The likeliest label and its probability; ("", 0.0) for a text that it sees nothing in."""
        found = self._model.predict(_line(text), 1, 0.0, "strict")
        return (found[0][1].removeprefix(PREFIX), min(float(found[0][0]), 1.0)) if found else ("", 0.0)

    def probability(self, text: str, label: str) -> float:
        """The probability of one label."""
        found = self._model.predict(_line(text), len(self.labels), 0.0, "strict")
        return next((min(float(p), 1.0) for p, name in found if name == PREFIX + label), 0.0)


def digest_of(path: str) -> str:
    """What identifies a model's file, wherever it lies.

    Raises:  DataError if it cannot be read
    """
    try:
        with open(path, "rb") as file:
            return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read the model {path}: {error.strerror}") from None


def _line(text: str) -> str:
    """Single-line text, as fastText is trained on: words parted by one space."""
    return " ".join(text.split()) + "\n"


def _check(path: str) -> None:
    """Refuse what is no model, or not all of one: fastText itself goes on with garbage, or for ever."""
    try:
        with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            magic, labels, size = _extent(data)
            actual = len(data)
    except OSError as error:
        raise DataError(f"cannot read the model {path}: {error.strerror}") from None
    except (ValueError, IndexError, struct.error):
        raise DataError(f"{path} is not a fastText model (.bin or .ftz), or cut short") from None
    if magic != MAGIC:
        raise DataError(f"{path} is not a fastText model (.bin or .ftz)")
    if not labels:
        raise DataError(f"{path} is a fastText model without labels; a supervised one is needed")
    if size != actual:
        raise DataError(f"{path} has {actual} bytes, but says of itself to have {size}; copy it again")


def _extent(data: mmap.mmap) -> tuple[int, int, int]:
    """Magic number, labels, and the bytes the whole file must have by the counts in it."""
    magic, _, *_, words, _, labels, _, pruned = _HEAD.unpack_from(data)
    at = _HEAD.size
    if magic != MAGIC:
        return magic, 0, 0
    for _ in range(words):  # a word, a NUL, its count and its kind
        at = data.find(b"\0", at) + 10
        if at < 10 or at > len(data):
            raise ValueError("the words go on behind the end")
    at += 8 * max(pruned, 0)
    for _ in ("input", "output"):
        is_quantised = data[at]
        at = _matrix_end(data, at + 1, bool(is_quantised))
    return magic, labels, at


def _matrix_end(data: mmap.mmap, at: int, is_quantised: bool) -> int:
    """Where a matrix ends that starts here."""
    if not is_quantised:
        rows, columns = struct.unpack_from("<qq", data, at)
        return int(at + 16 + 4 * rows * columns)
    has_norms, rows, _, codes = struct.unpack_from("<?qqi", data, at)
    at = _centroids_end(data, at + 21 + codes)
    return _centroids_end(data, at + rows) if has_norms else at


def _centroids_end(data: mmap.mmap, at: int) -> int:
    return int(at + 16 + 4 * 256 * struct.unpack_from("<i", data, at)[0])
