"""The whole recipe: its steps in their order, each in a folder of its own, each done once.

A step is made again only if its settings or what it reads has changed; what comes after it follows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from data_tools import clean, decontaminate, tokenize_parts
from data_tools.crew import Crew
from data_tools.recipe import Recipe
from data_tools.report import summary, write_report
from data_tools.steps import STEPS, find_step
from megalite.errors import DataError

REPORT_PAGE = "report.html"

# What can be found wrong before any work is done; ingest looks at its own at once.
CHECKS: dict[str, Callable[[Any], None]] = {
    "clean": clean.check,
    "decontaminate": decontaminate.check,
    "tokenize": tokenize_parts.check,
}
_READ_SHARDS = ("mix", "search")


class Planned(NamedTuple):
    """A step of a recipe: its settings, the folders it reads, and its own."""

    name: str
    settings: Any
    sources: tuple[Path, ...]
    folder: Path


def plan(recipe: Recipe, until: str | None = None) -> list[Planned]:
    """The steps of a recipe in their order, to the step `until` if one is named.

    Raises:  DataError if the recipe has no such step
    """
    out = Path(recipe.out)
    before: tuple[Path, ...] = ()
    steps = []
    for name in STEPS:
        if (settings := getattr(recipe, name)) is not None:
            sources = (out / "tokenize",) if name in _READ_SHARDS else before
            steps.append(Planned(name, settings, sources, out / name))
            before = (out / name,)
    names = [step.name for step in steps]
    if until is None:
        return steps
    if until not in names:
        raise DataError(f"the recipe has no step {until!r}; it has {', '.join(names)}")
    return steps[: names.index(until) + 1]


def build(recipe: Recipe, crew: Crew, until: str | None = None) -> Path:
    """Run a recipe, to the step `until` if one is named; the page that tells what became of every document.

    Raises:  DataError if the recipe has no step `until`, or a file or package that a step needs is missing,
    both before any work; or of the step that fails
    """
    steps = plan(recipe, until)
    for step in steps:
        if step.name in CHECKS:
            CHECKS[step.name](step.settings)
    page = Path(recipe.out) / REPORT_PAGE
    if crew.is_first:
        for path in page.parent.glob(f"{REPORT_PAGE}.*.tmp"):  # of kills
            path.unlink(missing_ok=True)
    for number, step in enumerate(steps, 1):
        _, run = find_step(step.name)
        flow = run(step.settings, *step.sources, step.folder, crew, renew=True)
        if crew.is_first:
            print(summary(step.name, flow), file=sys.stderr, flush=True)
            done = [(each.name, each.folder) for each in steps[:number]]
            write_report(done, page, f"Corpus {Path(recipe.out).resolve().name}")
    return page
