"""`megalite data build`, and a recipe's steps one at a time. Imports what a command needs when it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_tools.crew import Crew
    from data_tools.recipe import Recipe
    from megalite.config.section import Section

Add = Callable[[Any, str, str, str], argparse.ArgumentParser]

_BUILD_HELP = """\
Run a recipe: raw text to a cleaned, deduplicated, mixed and tokenized corpus. A step whose table is missing
is left out. A command that was stopped goes on where it was; a step is made again only if its settings or
what it reads has changed. Under torchrun, deepspeed or a Slurm array on a shared file system all ranks share
the work, to the same bytes.
"""

# Steps that read one step's folder and write another: what they do, and an example of a setting.
_STEPS = {
    "clean": ("mend texts, find their languages, measure them, mask personal data", "pii=false"),
    "filter": ("leave out documents by what was measured", "gopher_repetition=false"),
    "decontaminate": ("leave out what evaluations ask", "'files=[{path=\"mmlu.jsonl\"}]'"),
    "buckets": ("sort each source's documents for a curriculum", "by=quality"),
    "mix": ("plan a run's mixture of sources", "temperature=2"),
    "search": ("look for better weights with many tiny runs", "runs=32"),
}
_DEDUP = {
    "exact": ("keep equal documents, paragraphs or lines once", "unit=paragraph"),
    "near": ("keep one of documents that are nearly equal", "threshold=0.7"),
    "spans": ("cut out long spans that occurred before", "span_words=100"),
}


def add_steps(commands: Any, add: Add) -> None:
    """Add `build` and a command for each step; each sets `func(args) -> int`."""
    _add_build(commands, add)
    _add_ingest(commands, add)
    for name, (text, setting) in _STEPS.items():
        _add_step(commands, add, name, name, text, setting)
    dedup = commands.add_parser("dedup", help="leave out what is there twice")
    kinds = dedup.add_subparsers(dest="dedup_kind", required=True, metavar="KIND")
    for name, (text, setting) in _DEDUP.items():
        _add_step(kinds, add, name, f"dedup {name}", text, setting)


def add_folders(parser: argparse.ArgumentParser, name: str) -> None:
    """Add what a step's command needs beside its source and `--to`."""
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help=f"of the recipe's [{name}]")
    parser.add_argument("--recipe", type=Path, metavar="FILE", help=f"take settings from its [{name}]")
    add_crew(parser)
    parser.set_defaults(step=name)


def add_crew(parser: argparse.ArgumentParser) -> None:
    """Add who does the work."""
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    parser.add_argument("--rank", type=int, metavar="R", help="this one of --world; a launcher says it too")
    parser.add_argument("--world", type=int, metavar="W", help="how many run this command together")


def refuse(args: argparse.Namespace, options: Sequence[str], why: str) -> None:
    """Raises:  DataError if one of these options was given, where it would do nothing"""
    from megalite.errors import DataError

    for name in options:
        if getattr(args, name) is not None:
            raise DataError(f"--{name.replace('_', '-')} {why}")


def build_crew(args: argparse.Namespace, root: Path) -> Crew:
    """The crew that options and environment name.

    Raises:  DataError if they make no sense
    """
    from data_tools.crew import Crew, Place, place_from_environment
    from megalite.errors import DataError

    if (args.rank is None) != (args.world is None):
        raise DataError("--rank and --world go together; give both, or neither under a launcher")
    if args.workers is not None and args.workers < 1:
        raise DataError(f"--workers {args.workers}: give at least 1")
    if args.rank is None:
        return Crew(root, args.workers, place_from_environment())
    if not 0 <= args.rank < args.world:
        raise DataError(f"--rank {args.rank} --world {args.world}: a rank is from 0 to {args.world - 1}")
    return Crew(root, args.workers, Place(args.rank, args.world))


def run_step(args: argparse.Namespace) -> int:
    """Run the step `args.step` on the folder `args.source`."""
    from data_tools.steps import find_step
    from megalite.config_file import load_settings
    from megalite.errors import DataError

    if args.recipe is None:
        settings: Any = load_settings(find_step(args.step)[0], args.settings)
    elif (settings := getattr(_recipe(args), args.step)) is None:
        raise DataError(f"{args.recipe} has no [{args.step}] table; add one, or leave --recipe out")
    if getattr(args, "preview", False):
        from data_tools.filter import preview

        refuse(args, ("to", "workers", "rank", "world"), "does nothing with --preview; leave one of them out")
        print(preview(settings, args.source).summary())
        return 0
    return _run(args, settings, args.source)


def _add_build(commands: Any, add: Add) -> None:
    example = (
        "megalite data build configs/corpus.toml\n  megalite data build configs/corpus.toml --until near"
    )
    parser = add(commands, "build", "run a recipe: raw text to shards", example)
    parser.description = _BUILD_HELP
    parser.add_argument("recipe", type=Path, nargs="?", help="a TOML file, such as configs/corpus.toml")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="e.g. near.threshold=0.7")
    parser.add_argument("--until", metavar="STEP", help="stop after this step")
    parser.add_argument("--dry-run", action="store_true", help="check the recipe and print it, defaults too")
    parser.add_argument("--keys", action="store_true", help="list every setting with what it means")
    add_crew(parser)
    parser.set_defaults(func=_build)


def _add_ingest(commands: Any, add: Add) -> None:
    example = "megalite data ingest books/ wiki.jsonl.zst --to work/in"
    parser = add(commands, "ingest", "read text from files and folders of many kinds", example)
    parser.add_argument("paths", nargs="*", metavar="PATH", help="what to read, each a source named after it")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="the step's folder")
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="read the recipe's sources instead")
    add_crew(parser)
    parser.set_defaults(func=_ingest, step="ingest")


def _add_step(commands: Any, add: Add, name: str, command: str, text: str, setting: str) -> None:
    parser = add(commands, name, text, f"megalite data {command} work/in --to work/out {setting}")
    parser.add_argument("source", type=Path, help="folder of the step before")
    parser.add_argument("--to", type=Path, required=name != "filter", metavar="DIR", help="the step's folder")
    add_folders(parser, name)
    if name == "filter":
        parser.add_argument("--preview", action="store_true", help="only say what each rule would leave out")
    parser.set_defaults(func=run_step)


def _build(args: argparse.Namespace) -> int:
    from data_tools.build import build, plan
    from data_tools.mix.mixture import MIXTURE_FILE
    from data_tools.recipe import Recipe, load_recipe
    from megalite.config_file import describe_keys, to_toml
    from megalite.errors import DataError

    if args.keys:
        print(describe_keys(Recipe))
        return 0
    if args.recipe is None:
        raise DataError("no recipe named; configs/corpus.toml is an example, --keys lists all settings")
    recipe = load_recipe(args.recipe, args.settings)
    if args.dry_run:
        names = ", ".join(step.name for step in plan(recipe, args.until))
        print(f"# steps: {names}\n\n{to_toml(recipe)}", end="")
        return 0
    with build_crew(args, Path(recipe.out)) as crew:
        page = build(recipe, crew, args.until)
        if crew.is_first:
            print(f"{page} tells what became of every document")
            if recipe.mix is not None and args.until in (None, "mix", "search"):
                mixture = Path(recipe.out, "mix", MIXTURE_FILE)
                print(f"train on it: megalite train CONFIG.toml data.mixture={mixture}")
    return 0


def _ingest(args: argparse.Namespace) -> int:
    from data_tools.ingest import IngestSettings
    from data_tools.ingest.plan import check_apart
    from data_tools.ingest.settings import source_at
    from megalite.errors import DataError

    if bool(args.paths) == (args.recipe is not None):
        raise DataError("give either paths to read, or --recipe")
    if args.recipe is not None:
        settings = _recipe(args).ingest
        check_apart(settings.sources, args.to)
        return _run(args, settings)
    names = [Path(path).resolve().name.split(".")[0] or path for path in args.paths]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"two paths would be sources named {twice[0]!r}; name them in a recipe's [ingest]")
    sources = tuple(source_at(path, name) for name, path in zip(names, args.paths, strict=True))
    check_apart(sources, args.to)
    return _run(args, IngestSettings(sources=sources))


def _recipe(args: argparse.Namespace) -> Recipe:
    from data_tools.recipe import load_recipe

    return load_recipe(args.recipe, [f"{args.step}.{item}" for item in getattr(args, "settings", ())])


def _run(args: argparse.Namespace, settings: Section, *sources: Path) -> int:
    from data_tools.report import summary
    from data_tools.steps import find_step
    from megalite.errors import DataError

    if args.to is None:
        raise DataError("--to DIR is missing: the folder this step is to make")
    with build_crew(args, args.to) as crew:
        flow = find_step(args.step)[1](settings, *sources, args.to, crew)
        if crew.is_first:
            print(summary(args.step, flow))
    return 0
