"""`megalite data …`: the data tools on the command line. Imports what a command needs when it runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

_EXAMPLE = """example:
  {}
"""


def add_commands(subparsers: Any) -> None:
    """Add `data` with its subcommands to the parser of `megalite`; each sets `func(args) -> int`."""
    data = subparsers.add_parser("data", help="turn text into shards, check and show them")
    commands = data.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    _add_tokenize(commands)

    verify = _add(commands, "verify", "check every byte of a dataset", "megalite data verify data/train")
    verify.add_argument("folder", type=Path, help="a dataset, or a folder of datasets (train, valid)")
    verify.set_defaults(func=_verify)

    show = _add(
        commands, "show", "print a dataset's documents", "megalite data show data/train --documents 2"
    )
    show.add_argument("folder", type=Path, help="a dataset")
    show.add_argument("--documents", type=_positive, default=3, metavar="N", help="how many (default 3)")
    show.add_argument("--tokens", type=_positive, default=200, metavar="N", help="of each (default 200)")
    show.set_defaults(func=_show)


def _add_tokenize(commands: Any) -> None:
    parser = _add(
        commands,
        "tokenize",
        "text to training and held-out shards",
        "megalite data tokenize --text books/ --to data --tokenizer bpe --vocab-size 4096",
    )
    parser.add_argument(
        "--text",
        action="append",
        required=True,
        metavar="PATH",
        help="a text file, a folder, .jsonl(.gz|.zst) with a text field, or python-stdlib; repeatable",
    )
    parser.add_argument(
        "--to", type=Path, required=True, metavar="DIR", help="gets train/, valid/, stats.json"
    )
    parser.add_argument(
        "--tokenizer",
        default="bpe",
        metavar="KIND",
        help="byte, bpe (trained on this text), or the path of a tokenizer.json (default bpe)",
    )
    parser.add_argument(
        "--vocab-size", type=_positive, default=4096, metavar="N", help="of bpe (default 4096)"
    )
    parser.add_argument(
        "--valid-fraction", type=float, default=0.02, metavar="F", help="documents held out (default 0.02)"
    )
    parser.add_argument("--max-mib", type=float, metavar="N", help="read at most about N MiB of text")
    parser.add_argument("--compression", choices=["zstd"], help="compress the shards")
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


def _tokenize(args: argparse.Namespace) -> int:
    from data_tools.ingest import Corpus
    from data_tools.progress import progress
    from data_tools.tokenize import build_shards, finished_build

    recipe = {
        "text": args.text,
        "tokenizer": args.tokenizer,
        "vocab_size": args.vocab_size if args.tokenizer == "bpe" else None,
        "valid_fraction": args.valid_fraction,
        "max_mib": args.max_mib,
        "compression": args.compression,
    }
    if (stats := finished_build(args.to, recipe)) is not None:
        print(f"{args.to} is already built\n{stats.summary()}")
        return 0
    corpus = Corpus(args.text, None if args.max_mib is None else int(args.max_mib * 2**20))
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
            progress=lambda done: update(done, total),
        )
    print(f"{args.to}: {corpus.counts.summary()}\n{stats.summary()}")
    return 0


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
    from data_tools.progress import progress
    from megalite.data.manifest import MANIFEST_FILE
    from megalite.data.shards import verify

    folders = [args.folder]
    if not (args.folder / MANIFEST_FILE).exists():
        folders = sorted(path.parent for path in args.folder.glob(f"*/{MANIFEST_FILE}")) or folders
    for folder in folders:
        with progress(f"verifying {folder}") as update:
            dataset = verify(folder, update)
        print(
            f"{folder}: sound; {len(dataset.manifest.shards)} shards, {dataset.num_documents:,} documents, "
            f"{dataset.total_tokens:,} tokens, vocabulary {dataset.vocab_size:,}"
        )
    return 0


def _show(args: argparse.Namespace) -> int:
    from itertools import islice

    from megalite.data.shards import Dataset
    from megalite.data.tokenizer import load_tokenizer

    dataset = Dataset(args.folder)
    tokenizer = load_tokenizer(args.folder)
    begin = 0
    for document in islice(dataset.documents(), args.documents):
        size = len(document.tokens)
        print(f"── {document.source} {document.doc_id} · tokens [{begin:,}, {begin + size:,})")
        left = f"\n… {size - args.tokens:,} more tokens" if size > args.tokens else ""
        print(f"{tokenizer.decode(document.tokens[: args.tokens])}{left}\n")
        begin += size
    left_over = dataset.num_documents - args.documents
    print(f"{dataset.num_documents:,} documents, {dataset.total_tokens:,} tokens", end="")
    print(f"; {left_over:,} documents not shown" if left_over > 0 else "")
    return 0
