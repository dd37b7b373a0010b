"""A whole recipe built and killed, over and over, in forks of one process that has everything loaded.

    python -m tests.data_tools.builds FOLDER ranks        once alone, then by 2 and by 4 ranks
    python -m tests.data_tools.builds FOLDER kills EVERY  killed before every EVERYth durable act, built again

Prints one line of JSON. A durable act is what another process could see: a rename, a link, a removal, an
fsync; a kill between two of them leaves what a kill right before the second does.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from data_tools.build import build
from data_tools.crew import Crew, Place
from data_tools.recipe import Recipe
from tests.data_tools.corpora import files_of

SHELVES = ("novels", "plays", "poems", "letters")
WORDS = [
    "time",
    "river",
    "stone",
    "light",
    "cat",
    "bread",
    "wind",
    "music",
    "house",
    "green",
    "seven",
    "letter",
    "garden",
    "window",
    "paper",
    "north",
    "winter",
    "bridge",
    "candle",
    "forest",
    "morning",
    "salt",
    "engine",
    "shadow",
    "copper",
    "village",
    "needle",
    "ocean",
    "thread",
    "summit",
]


def text(number: int, sentences: int = 12) -> str:
    """Prose of a kind, another for each number."""
    draw = random.Random(number)
    return "\n".join(f"The {' '.join(draw.choices(WORDS, k=9))} and that was all." for _ in range(sentences))


def write_corpus(folder: Path) -> None:
    """Sources with something for every step to do."""
    folder.mkdir(parents=True)
    rows = [{"id": f"d{n}", "text": text(n)} for n in range(24)]
    rows += [{"id": "same", "text": text(3)}, {"id": "close", "text": text(4, 40) + "\nOne more."}]
    rows += [{"id": "near", "text": text(4, 40)}, {"id": "short", "text": "No."}]
    rows += [{"id": "quoting", "text": f"{text(40)}\n{text(5, 30)}\n{text(41)}"}]
    rows += [{"id": "quoted", "text": text(5, 30)}, {"id": "mail", "text": text(50) + "\na@b.org"}]
    (folder / "web.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{broken")
    for shelf, name in enumerate(SHELVES):
        (folder / name).mkdir()
        for n in range(6):
            (folder / name / f"{n}.txt").write_text(text(100 * (shelf + 1) + n, 30))
    (folder / "exam.jsonl").write_text(json.dumps({"question": text(202, 3)}) + "\n")


def recipe(root: Path, out: Path) -> Recipe:
    """Every step but the search."""
    return Recipe.model_validate(
        {
            "out": str(out),
            "ingest": {
                "sources": [
                    {"name": "web", "path": str(root / "web.jsonl")},
                    *({"name": name, "path": str(root / name)} for name in SHELVES),
                ]
            },
            "clean": {"language": False, "statistics": {"c4": False}},
            "filter": {"c4": False, "thresholds": {"gopher_words": [20, 1000]}, "gopher_repetition": False},
            "exact": {},
            "near": {},
            "spans": {},
            "decontaminate": {"files": [{"path": str(root / "exam.jsonl"), "fields": ["question"]}]},
            "buckets": {"num_buckets": 2},
            "tokenize": {"tokenizer": "byte", "valid_fraction": 0.2},
            "mix": {"seq_len": 32},
        }
    )


def fork(act: Callable[[], Any]) -> int:
    """Do something in a fork; its process id."""
    if child := os.fork():
        return child
    try:
        act()
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)


def run(root: Path, out: Path, place: Place | None = None) -> None:
    """The whole recipe, as one rank."""
    with Crew(out, 1, place) as crew:
        build(recipe(root, out), crew)


def on_each_act(hear: Callable[[], None]) -> None:
    """From now on, `hear` is called before every durable act."""
    for name in ("rename", "replace", "link", "unlink", "rmdir", "fsync"):
        real = getattr(os, name)

        def act(*args: Any, _real: Any = real, **options: Any) -> Any:
            hear()
            return _real(*args, **options)

        setattr(os, name, act)


def killed_at(root: Path, out: Path, point: int) -> None:
    """Build, and die before the act of this number."""
    seen = 0

    def hear() -> None:
        nonlocal seen
        seen += 1
        if seen == point:
            os.kill(os.getpid(), signal.SIGKILL)

    on_each_act(hear)
    run(root, out)


def count_acts(root: Path, out: Path) -> None:
    """Build, and leave the number of acts in `out.count`."""
    seen = 0

    def hear() -> None:
        nonlocal seen
        seen += 1

    on_each_act(hear)
    run(root, out)
    out.with_suffix(".count").write_text(str(seen))


def difference(out: Path, expected: dict[str, bytes]) -> list[str]:
    """Files that are not as expected; report.html tells times."""
    found = files_of(out)
    names = (found.keys() | expected.keys()) - {"report.html"}
    return sorted(name for name in names if found.get(name) != expected.get(name))


def ranks(root: Path, expected: dict[str, bytes]) -> dict[str, Any]:
    """Several ranks against one process."""
    wrong: dict[str, Any] = {}
    for world in (2, 4):
        out = root / f"of-{world}"
        children = [fork(partial(run, root, out, Place(rank, world))) for rank in range(world)]
        codes = [os.waitpid(child, 0)[1] for child in children]
        wrong[str(world)] = difference(out, expected) or [code for code in codes if code]
    return {"wrong": wrong}


def kills(root: Path, expected: dict[str, bytes], every: int) -> dict[str, Any]:
    """Deaths before every so many acts, each made good by building again."""
    counted = root / "counted"
    os.waitpid(fork(partial(count_acts, root, counted)), 0)
    acts = int(counted.with_suffix(".count").read_text())
    wrong: dict[str, list[str]] = {}
    points = range(1, acts + 1, every)
    for point in points:
        out = root / "killed"
        _, status = os.waitpid(fork(partial(killed_at, root, out, point)), 0)
        died = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        _, status = os.waitpid(fork(partial(run, root, out)), 0)
        if bad := difference(out, expected) or ["not killed"] * (not died) or ["failed"] * (status != 0):
            wrong[str(point)] = bad
        shutil.rmtree(out)
    return {"acts": acts, "points": len(points), "wrong": wrong}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    write_corpus(folder)
    run(folder, folder / "alone")
    whole = files_of(folder / "alone")
    found = ranks(folder, whole) if sys.argv[2] == "ranks" else kills(folder, whole, int(sys.argv[3]))
    print(json.dumps({"files": len(whole), **found}))
