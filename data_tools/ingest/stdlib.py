"""The Python standard library as a corpus that every machine has: sources, docstrings, the reference."""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from data_tools.ingest.found import Document, Found
from data_tools.ingest.settings import SourceSettings
from data_tools.ingest.text import read_text

STDLIB = "python-stdlib"
TOPICS = "topics"  # the language reference that pydoc carries
DOCSTRINGS = "#docstrings"  # ends the id of a module's prose, which its source repeats

# What is not the library, and tables: megabytes of near-identical lines without language.
_LEFT_OUT = ("site-packages/", "dist-packages/", "pydoc_data/", "encodings/", "lib2to3/tests/data/")
_TESTS = {"test", "tests", "idle_test"}  # their docstrings say little


def stdlib_files() -> list[tuple[Path, str]]:
    """Its sources with their names, shuffled by name so that any first part of them is varied."""
    root = Path(sysconfig.get_path("stdlib"))
    found = [(path, path.relative_to(root).as_posix()) for path in root.rglob("*.py")]
    varied = [(path, name) for path, name in found if not name.startswith(_LEFT_OUT)]
    return sorted(varied, key=lambda item: hashlib.sha256(item[1].encode()).digest())


def read_topics() -> Iterator[Found]:
    """The language reference, a document a topic; nothing where it is packaged apart."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for topic, text in sorted(topics.items()):
        yield Document(f"{TOPICS}/{topic}", text.encode())


def read_stdlib(path: Path, name: str, source: SourceSettings) -> Iterator[Found]:
    """A source file, and the prose of its docstrings as another document."""
    for found in read_text(path, name, source):
        yield found
        if isinstance(found, Document) and not _TESTS.intersection(name.split("/")):
            prose = docstrings(found.text.decode())
            if prose and not prose.isspace():
                yield Document(f"{name}{DOCSTRINGS}", prose.encode())


def family_of(doc_id: str) -> str:
    """What documents that repeat parts of each other share, so that none is held out alone: a name."""
    return doc_id.removesuffix(DOCSTRINGS)


def docstrings(source: str) -> str:
    """Every docstring of a module in order, each under the name of what it describes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd escapes in old sources are not our business
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            return ""
    return "\n\n".join(_named_docstrings(tree, ""))


def _named_docstrings(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[str]:
    if prose := ast.get_docstring(node):
        yield f"{name}\n{prose}" if name else prose
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _named_docstrings(child, f"{name}.{child.name}" if name else child.name)
