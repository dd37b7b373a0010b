"""Text to token ids and back: bytes without any dependency, any tokenizer.json, or tiktoken's ranks.

Documents are data, not commands: a special token's name inside a text is spelled out, never turned
into the special id, so no document can forge an end of document.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megalite.data.byte_level import EOS, from_ranks
from megalite.data.remote import is_remote, open_folder
from megalite.errors import DataError

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"  # Hugging Face's place for the name of the eos token
RANKS_SUFFIX = ".tiktoken"
MAX_TOKENIZER_BYTES = 256 << 20
EOS_NAMES = (EOS, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|end▁of▁sentence|>", "<EOS>", "[EOS]")
REPLACEMENT = "\ufffd"

Ids = Sequence[int] | NDArray[np.integer[Any]]


class Tokenizer(Protocol):
    """What the data tools, the exporter and `generate` need of a tokenizer."""

    @property
    def kind(self) -> str:
        """`byte` or `huggingface`."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, special tokens included."""

    @property
    def eos_id(self) -> int:
        """The id that ends every document."""

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, over the canonical content and eos_id."""

    def encode(self, text: str) -> NDArray[np.int64]:
        """Ids of a text, int64 [tokens], without an eos."""

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """`encode` of many texts at once, on all cores where that helps."""

    def decode(self, ids: Ids) -> str:
        """The text of ids; special tokens appear by name, invalid UTF-8 as U+FFFD."""

    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer(folder)` reads back to an equal tokenizer."""


class ByteTokenizer:
    """UTF-8 bytes as ids 0–255, and 256 for the end of a document."""

    kind = "byte"
    vocab_size = 257
    eos_id = 256
    content = '{"megalite":"byte"}'

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, over the canonical content and eos_id."""
        return fingerprint(self.content.encode(), self.eos_id)

    def encode(self, text: str) -> NDArray[np.int64]:
        """Ids of a text, int64 [tokens], without an eos."""
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """`encode` of every text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Ids) -> str:
        """The text of ids; eos by name, invalid UTF-8 as U+FFFD, ids from 257 on as nothing."""
        special = {self.eos_id: EOS.encode()}
        parts = (bytes((i,)) if 0 <= i < 256 else special.get(i, b"") for i in map(int, ids))
        return b"".join(parts).decode("utf-8", "replace")

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`."""
        (folder / TOKENIZER_FILE).write_text(self.content, encoding="utf-8")


class JsonTokenizer:
    """Any Hugging Face `tokenizer.json`, through the optional `tokenizers` package.

    Raises:  DataError if the package or an eos token is missing, or the content is not a tokenizer
    """

    kind = "huggingface"

    def __init__(self, content: str, eos_token: str | None = None, origin: str = TOKENIZER_FILE) -> None:
        try:
            self._inner = tokenizers_package().Tokenizer.from_str(content)
        except DataError:
            raise
        except Exception as error:  # the package raises bare Exception
            raise DataError(f"{origin} is not a tokenizer: {error}") from None
        # A tokenizer.json may ask for truncation or padding; either would change the corpus silently.
        self._inner.no_truncation()
        self._inner.no_padding()
        self._inner.encode_special_tokens = True
        self.content = json.dumps(
            json.loads(content), sort_keys=True, ensure_ascii=False, separators=(",", ":")
        )
        self.vocab_size: int = 1 + max(self._inner.get_vocab(with_added_tokens=True).values(), default=-1)
        self.eos_token = self._find_eos(eos_token, origin)
        self.eos_id: int = self._inner.token_to_id(self.eos_token)

    def _find_eos(self, wanted: str | None, origin: str) -> str:
        names = (wanted,) if wanted is not None else EOS_NAMES
        for name in names:
            if self._inner.token_to_id(name) is not None:
                return name
        raise DataError(
            f"{origin} has no end-of-document token: none of {', '.join(names)} is in its vocabulary; "
            f'name its own as "eos_token" in a {CONFIG_FILE} beside it'
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, over the canonical content and eos_id."""
        return fingerprint(self.content.encode(), self.eos_id)

    def encode(self, text: str) -> NDArray[np.int64]:
        """Ids of a text, int64 [tokens], without an eos."""
        return np.array(self._inner.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """`encode` of many texts, on all cores."""
        encodings = self._inner.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def decode(self, ids: Ids) -> str:
        """The text of ids; special tokens by name, invalid UTF-8 as U+FFFD, unknown ids as nothing."""
        text: str = self._inner.decode([int(i) for i in ids], skip_special_tokens=False)
        return text

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and the `tokenizer_config.json` that names its eos token."""
        (folder / TOKENIZER_FILE).write_text(self.content, encoding="utf-8")
        config = json.dumps({"eos_token": self.eos_token}, ensure_ascii=False)
        (folder / CONFIG_FILE).write_text(config, encoding="utf-8")


class DecodeStream:
    """Text from ids that arrive one at a time, never showing half a character.

    >>> stream = DecodeStream(ByteTokenizer())
    >>> [stream.feed(byte) for byte in "é!".encode()]
    ['', 'é', '!']
    """

    # A UTF-8 character has at most four bytes, so four tokens that still end badly never become one.
    _LONGEST = 4

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._shown: list[int] = []  # the last ids shown: some decoders treat a text's first token apart
        self._held: list[int] = []

    def feed(self, token_id: int) -> str:
        """The text this id completes, empty while a character is unfinished."""
        self._held.append(token_id)
        text = self._held_text()
        if text.endswith(REPLACEMENT) and len(self._held) < self._LONGEST:
            return ""
        self._shown, self._held = self._held, []
        return text

    def flush(self) -> str:
        """What is still held, unfinished bytes as U+FFFD."""
        text = self._held_text()
        self._shown, self._held = [], []
        return text

    def _held_text(self) -> str:
        if not self._held:
            return ""
        before = self._tokenizer.decode(self._shown)
        return self._tokenizer.decode(self._shown + self._held)[len(before) :]


def train_bpe(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """Train a byte-level BPE: every text can be encoded, id 0 is `<|endoftext|>`.

    The vocabulary may come out smaller than asked when the texts hold too few pairs.

    Raises:  DataError if vocab_size < 257, there is no text, or `tokenizers` is not installed
    """
    if vocab_size < 257:
        raise DataError(f"vocab_size={vocab_size}: a byte-level BPE needs at least 257 (256 bytes and eos)")
    package = tokenizers_package()
    seen = 0

    def counted() -> Iterable[str]:
        nonlocal seen
        for text in texts:
            seen += len(text)
            yield text

    inner = package.Tokenizer(package.models.BPE())
    inner.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = package.decoders.ByteLevel()
    trainer = package.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=sorted(package.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(counted(), trainer)
    if not seen:
        raise DataError("no text to train a BPE tokenizer on; give it at least one non-empty document")
    return JsonTokenizer(inner.to_str(), EOS)


def load_tokenizer(path: str | Path, eos_token: str | None = None, pattern: str | None = None) -> Tokenizer:
    """Read a tokenizer from a `tokenizer.json`, a folder or dataset's address with one, or `.tiktoken` ranks.

    The end-of-document token is `eos_token`, else the one a `tokenizer_config.json` beside it
    names, else the first well-known name in the vocabulary. `pattern` names what cuts a rank file's text
    (see `from_ranks`); it is kept as a `tokenizer.json`.

    Raises:  DataError naming the file, what is wrong and the remedy
    """
    is_ranks = str(path).endswith(RANKS_SUFFIX)
    if pattern is not None and not is_ranks:
        raise DataError(
            f"pattern={pattern!r} is for {RANKS_SUFFIX} files; {path} says itself how it cuts text"
        )
    if is_remote(path) and is_ranks:
        raise DataError(f"{path}: rank files are read from local disks; fetch it first")
    if is_remote(path):
        return _load_remote(str(path), eos_token)
    path = Path(path)
    if is_ranks:
        return JsonTokenizer(
            from_ranks(_read_text(path).encode().splitlines(), pattern, str(path)), eos_token, str(path)
        )
    if path.is_dir():
        path = path / TOKENIZER_FILE
    content = _read_text(path)
    if _is_byte(content, str(path)):
        return ByteTokenizer()
    config = path.with_name(CONFIG_FILE)
    if eos_token is None and config.exists():
        eos_token = _eos_from_config(_read_text(config), str(config))
    return JsonTokenizer(content, eos_token, str(path))


def _load_remote(address: str, eos_token: str | None) -> Tokenizer:
    folder = open_folder(address)

    def text(name: str) -> str:
        try:
            return folder.read(name, MAX_TOKENIZER_BYTES).decode()
        except UnicodeDecodeError as error:
            raise DataError(f"cannot read {folder.locate(name)}: {error}") from None

    content = text(TOKENIZER_FILE)
    if _is_byte(content, folder.locate(TOKENIZER_FILE)):
        return ByteTokenizer()
    eos_token = eos_token or _eos_from_config(text(CONFIG_FILE), folder.locate(CONFIG_FILE))
    return JsonTokenizer(content, eos_token, folder.locate(TOKENIZER_FILE))


def fingerprint(content: bytes, eos_id: int) -> str:
    """SHA-256, in hex, of a saved tokenizer: the file's bytes and the eos id."""
    return hashlib.sha256(content + f"\neos_id={eos_id}".encode()).hexdigest()


def _read_text(path: Path) -> str:
    try:
        if (size := path.stat().st_size) > MAX_TOKENIZER_BYTES:
            raise DataError(f"{path} has {size} bytes; a tokenizer has at most {MAX_TOKENIZER_BYTES}")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(
            f"no tokenizer {path}; give a tokenizer.json, a folder holding one, or a {RANKS_SUFFIX} file"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from None


def _is_byte(content: str, origin: str) -> bool:
    """Whether a tokenizer.json is our own byte tokenizer's."""
    try:
        table = json.loads(content)
    except (ValueError, RecursionError, MemoryError) as error:
        raise DataError(f"{origin} is not valid JSON: {error}") from None
    return isinstance(table, dict) and table.get("megalite") == "byte"


def _eos_from_config(content: str, origin: str) -> str | None:
    """The eos token's name; older files hold it as an object with its content."""
    try:
        token = json.loads(content).get("eos_token")
    except (ValueError, AttributeError, RecursionError, MemoryError) as error:
        raise DataError(f"{origin} is not a tokenizer configuration: {error}") from None
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def tokenizers_package() -> Any:
    """The optional package `tokenizers`.

    Raises:  DataError if it is not installed
    """
    try:
        import tokenizers
    except ImportError:
        raise DataError(
            "this needs the tokenizers package; install it with: pip install 'megalite[tokenizers]', "
            "or use the byte tokenizer"
        ) from None
    return tokenizers
