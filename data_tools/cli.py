"""`megalite data …`: the data tools on the command line. Imports what a command needs when it runs."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from data_tools.cli_steps import add_folders, add_steps, refuse, run_step

_OF_TEXT = ("tokenizer", "vocab_size", "valid_fraction", "max_mib", "compression")
_EXAMPLE = """example:
  {}
"""


def add_commands(subparsers: Any) -> None:
    """Add `data` with its subcommands to the parser of `megalite`; each sets `func(args) -> int`."""
    data = subparsers.add_parser("data", help="turn text into shards, check and show them")
    commands = data.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    add_steps(commands, _add)
    _add_tokenize(commands)
    _add_verify(commands)
    _add_show(commands)
    _add_stats(commands)


def _add_verify(commands: Any) -> None:
    verify = _add(commands, "verify", "check every byte of a dataset", "megalite data verify data/train")
    verify.add_argument("dataset", type=_dataset, help="a dataset, or a folder of datasets (train, valid)")
    verify.set_defaults(func=_verify)


def _add_show(commands: Any) -> None:
    show = _add(
        commands,
        "show",
        "print a dataset's documents, or the rows a model is trained on",
        "megalite data show data/train --documents 2\n"
        "  megalite data show data/train --seq-len 256 --start 1000",
    )
    show.add_argument("dataset", type=_dataset, help="a dataset's folder or address")
    show.add_argument("--documents", type=_positive, metavar="N", help="how many (default 3)")
    show.add_argument("--tokens", type=_positive, metavar="N", help="of each (default 200)")
    show.add_argument(
        "--seq-len", type=_positive, metavar="N", help="show rows of N tokens instead, documents end to end"
    )
    show.add_argument("--rows", type=_positive, metavar="N", help="how many rows (default 3)")
    show.add_argument("--start", type=_count, metavar="N", help="the first row (default 0)")
    show.set_defaults(func=_show)


def _add_stats(commands: Any) -> None:
    stats = _add(
        commands,
        "stats",
        "count a dataset's documents and tokens by source and length",
        "megalite data stats data/train --svg lengths.svg",
    )
    stats.add_argument("dataset", type=_dataset, help="a dataset's folder or address")
    stats.add_argument("--json", action="store_true", help="print JSON")
    stats.add_argument("--svg", type=Path, metavar="FILE", help="draw the document lengths as a picture")
    stats.set_defaults(func=_stats)


def _add_tokenize(commands: Any) -> None:
    parser = _add(
        commands,
        "tokenize",
        "text to training and held-out shards",
        "megalite data tokenize --text books/ --to data --tokenizer bpe --vocab-size 4096\n"
        "  megalite data tokenize work/near --to work/tokens tokenizer=gpt2/",
    )
    parser.add_argument("source", type=Path, nargs="?", help="folder of a recipe's step; or give --text")
    parser.add_argument(
        "--to", type=Path, required=True, metavar="DIR", help="gets train/, valid/, stats.json; or a step"
    )
    add_folders(parser, "tokenize")
    text = parser.add_argument_group("text that needs no recipe, by one process")
    text.add_argument(
        "--text",
        action="append",
        metavar="PATH",
        help="files or folders of text, JSON lines, pages, tables; or python-stdlib; repeatable",
    )
    text.add_argument(
        "--tokenizer",
        metavar="KIND",
        help="byte, bpe (trained on this text), or the path of a tokenizer.json (default bpe)",
    )
    text.add_argument("--vocab-size", type=_positive, metavar="N", help="of bpe (default 4096)")
    text.add_argument("--valid-fraction", type=float, metavar="F", help="documents held out (default 0.02)")
    text.add_argument("--max-mib", type=_size, metavar="N", help="read at most about N MiB of text")
    text.add_argument(
        "--compression",
        choices=["lz4", "zstd", "zstd-shard"],
        help="compress record batches (lz4, zstd), or whole files for slow networks (zstd-shard)",
    )
    parser.set_defaults(func=_tokenize)


def _add(commands: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=_EXAMPLE.format(example),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def _size(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{value:g} is not a size above 0")
    return value


def _dataset(text: str) -> str | Path:
    return text if "://" in text else Path(text)


def _tokenize(args: argparse.Namespace) -> int:
    from megalite.errors import DataError

    if (args.source is None) == (args.text is None):
        raise DataError("give either the folder of a step, or text with --text")
    if args.source is not None:
        refuse(args, _OF_TEXT, "goes with --text; of a step say KEY=VALUE")
        return run_step(args)
    refuse(args, ("recipe", "workers", "rank", "world"), "goes with a step's folder, not --text")
    args.tokenizer = args.tokenizer or "bpe"
    if args.tokenizer != "bpe":
        refuse(args, ("vocab_size",), f"is of --tokenizer bpe, not {args.tokenizer}")
    args.vocab_size = args.vocab_size or 4096
    args.valid_fraction = 0.02 if args.valid_fraction is None else args.valid_fraction
    return _tokenize_text(args)


def _tokenize_text(args: argparse.Namespace) -> int:
    from data_tools.ingest import Corpus
    from data_tools.ingest.plan import check_apart
    from data_tools.tokenize import build_shards, finished_build
    from megalite.progress import progress

    recipe = {
        "text": args.text,
        "tokenizer": args.tokenizer,
        "vocab_size": args.vocab_size if args.tokenizer == "bpe" else None,
        "valid_fraction": args.valid_fraction,
        "max_mib": args.max_mib,
        "compression": args.compression,
    }
    if (stats := finished_build(args.to, recipe)) is not None:
        changes = []
        if _is_other_text(args.text, stats.text):
            changes.append(f", from other text than {' '.join(args.text)} holds now")
        if _is_other_tokenizer(args.tokenizer, args.to):
            changes.append(f", with another tokenizer than {args.tokenizer} is now")
        remedy = ": remove it to build anew" if changes else ""
        print(f"{args.to} is already built{''.join(changes)}{remedy}\n{stats.summary()}")
        return 0
    corpus = Corpus(args.text, None if args.max_mib is None else int(args.max_mib * 2**20))
    check_apart(corpus.sources, args.to)
    tokenizer = _tokenizer(args, corpus)
    total = corpus.estimate_bytes()
    with progress("tokenizing") as update:
        stats = build_shards(
            corpus,
            tokenizer,
            args.to,
            valid_fraction=args.valid_fraction,
            compression=args.compression,
            recipe=recipe,
            text=corpus.fingerprints(),
            progress=lambda done: update(done, total),
        )
    print(f"{args.to}: {corpus.counts.summary()}\n{stats.summary()}")
    return 0


def _is_other_text(places: list[str], before: list[str]) -> bool:
    """Whether these places have changed; not if they are gone, or would have to be downloaded."""
    from data_tools.ingest import Corpus
    from data_tools.ingest.hub import PREFIX
    from megalite.errors import DataError

    if any(place.startswith(PREFIX) for place in places):
        return False
    try:
        return Corpus(places).fingerprints() != before
    except DataError:
        return False


def _is_other_tokenizer(tokenizer: str, built: Path) -> bool:
    """Whether a tokenizer's file is another than what shards were made with; not if it is gone."""
    from megalite.data.tokenizer import load_tokenizer

    if tokenizer in ("byte", "bpe") or not Path(tokenizer).exists():
        return False
    return load_tokenizer(tokenizer).fingerprint != load_tokenizer(built / "train").fingerprint


def _tokenizer(args: argparse.Namespace, corpus: Any) -> Any:
    from data_tools.tokenize import BPE_SAMPLE_CHARS, sample_texts
    from megalite.data.tokenizer import ByteTokenizer, load_tokenizer, train_bpe

    if args.tokenizer == "byte":
        return ByteTokenizer()
    if args.tokenizer != "bpe":
        return load_tokenizer(args.tokenizer)
    print(f"training a BPE tokenizer of {args.vocab_size} tokens", file=sys.stderr, flush=True)
    return train_bpe(sample_texts(corpus, args.valid_fraction, BPE_SAMPLE_CHARS), args.vocab_size)


def _verify(args: argparse.Namespace) -> int:
    from data_tools.verify import run

    return run(args.dataset)


def _show(args: argparse.Namespace) -> int:
    from data_tools.show import show_documents, show_rows

    if args.seq_len is None:
        refuse(args, ("rows", "start"), "is of rows; give --seq-len")
        return show_documents(args.dataset, args.documents or 3, args.tokens or 200)
    refuse(args, ("documents", "tokens"), "is of documents; leave --seq-len out")
    return show_rows(args.dataset, args.rows or 3, args.seq_len, args.start or 0)


def _stats(args: argparse.Namespace) -> int:
    from data_tools.stats import run

    return run(args.dataset, args.json, args.svg)
