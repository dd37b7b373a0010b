"""Print what a model will see: documents, or rows of a fixed number of tokens cut from their stream."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path

from rich.console import Console
from rich.text import Text

from megalite.data.shards import Dataset, Span
from megalite.data.tokenizer import Tokenizer, load_tokenizer
from megalite.errors import DataError

BOUNDARY = "┃"  # before the first token of a document, inside a row
COLOURS = ("cyan", "green", "yellow", "magenta")  # of a document and the next, in turn
NOT_TRAINED = "dim strike"  # tokens that do not count for the loss


def show_documents(path: str | Path, count: int, tokens: int) -> int:
    """Print the first `count` documents, at most `tokens` of each.

    Raises:  DataError if the dataset is missing or damaged
    """
    dataset, tokenizer, console = Dataset(path), load_tokenizer(path), _console()
    nothing = dataset.read(0, 0).boundaries
    begin = 0
    for number, document in enumerate(islice(dataset.documents(), count)):
        size = len(document.tokens)
        names = printable(f"{document.source} {document.doc_id}")
        console.print(Text(f"── {names} · tokens [{begin:,}, {begin + size:,})"))
        mask = None if document.loss_mask is None else document.loss_mask[:tokens]
        console.print(coloured(Span(document.tokens[:tokens], nothing, mask), tokenizer, number))
        console.print(f"… {size - tokens:,} more tokens\n" if size > tokens else "")
        begin += size
    left_over = dataset.num_documents - count
    rest = f"; {left_over:,} documents not shown" if left_over > 0 else ""
    console.print(f"{dataset.num_documents:,} documents, {dataset.total_tokens:,} tokens{rest}")
    return 0


def show_rows(path: str | Path, count: int, seq_len: int, start: int) -> int:
    """Print `count` rows of `seq_len` tokens, documents end to end, from row `start` on.

    Raises:  DataError if the dataset is missing or damaged, or has no row `start`
    """
    dataset, tokenizer, console = Dataset(path), load_tokenizer(path), _console()
    rows = -(-dataset.total_tokens // seq_len)
    if start >= rows:
        raise DataError(f"{dataset.path} has {rows:,} rows of {seq_len} tokens; there is no row {start:,}")
    for row in range(start, min(start + count, rows)):
        begin, end = row * seq_len, min((row + 1) * seq_len, dataset.total_tokens)
        span = dataset.read(begin, end)
        inner = int((span.boundaries > 0).sum())
        console.print(
            f"── row {row:,} · tokens [{begin:,}, {end:,}) · {inner + 1} "
            f"{'documents' if inner else 'document'}, begins "
            f"{'with' if len(span.boundaries) > inner else 'inside'} one"
        )
        console.print(coloured(span, tokenizer, 0))
        console.print("")
    console.print(f"{rows:,} rows of {seq_len:,} tokens, {dataset.num_documents:,} documents")
    return 0


def _console() -> Console:
    return Console(file=sys.stdout, highlight=False, soft_wrap=True)


def coloured(span: Span, tokenizer: Tokenizer, number: int) -> Text:
    """The text of a span, each document in another colour than its neighbours; `number` sets the first's.

    A boundary mark precedes every document that begins inside. Decoding stops at documents and where
    what counts for the loss changes, so a character cut there shows as U+FFFD.
    """
    text = Text()
    for start, stop in _pieces(span):
        is_begin = start > 0 and start in span.boundaries
        number += is_begin
        colour = COLOURS[number % len(COLOURS)]
        is_trained = span.loss_mask is None or bool(span.loss_mask[start])
        text.append(BOUNDARY if is_begin else "", style="bold red")
        style = colour if is_trained else f"{colour} {NOT_TRAINED}"
        text.append(printable(tokenizer.decode(span.tokens[start:stop])), style=style)
    return text


def _pieces(span: Span) -> Iterator[tuple[int, int]]:
    cuts = {0, len(span.tokens), *span.boundaries.tolist()}
    if span.loss_mask is not None:
        mask = span.loss_mask
        cuts |= set(((mask[1:] != mask[:-1]).nonzero()[0] + 1).tolist())
    return pairwise(sorted(cuts))


def printable(text: str) -> str:
    """The text with control characters made visible, so that none of them reaches the terminal."""
    return "".join(
        chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else "\ufffd" if 127 <= ord(c) < 160 else c
        for c in text
    )
