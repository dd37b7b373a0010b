"""Plain text, Markdown and source code: a file is a document, or is cut into pieces."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from pathlib import Path

from data_tools.ingest.found import HEAD_BYTES, Document, Found, Reason, SetAside
from data_tools.ingest.settings import SourceSettings
from data_tools.ingest.unpack import BUFFER_BYTES, BrokenStreamError, open_bytes

MARKDOWN = (".md", ".markdown", ".mdx")
# What source code is written in, by the end of its name; other files of a code tree are left out.
LANGUAGES = {
    language: frozenset(suffixes.split())
    for language, suffixes in {
        "ada": ".adb .ads",
        "assembly": ".s .asm",
        "c": ".c .h",
        "c++": ".cc .cpp .cxx .hh .hpp .hxx .cu .cuh",
        "c#": ".cs",
        "clojure": ".clj .cljs",
        "css": ".css .scss .less",
        "d": ".d",
        "dart": ".dart",
        "elixir": ".ex .exs",
        "erlang": ".erl .hrl",
        "fortran": ".f .f90 .f95 .f03 .f08",
        "f#": ".fs .fsx",
        "go": ".go",
        "haskell": ".hs .lhs",
        "html": ".html .htm",
        "java": ".java",
        "javascript": ".js .jsx .mjs .cjs",
        "julia": ".jl",
        "kotlin": ".kt .kts",
        "lisp": ".el .lisp .scm .rkt",
        "lua": ".lua",
        "markdown": ".md .markdown .rst",
        "ocaml": ".ml .mli",
        "pascal": ".pas .pp",
        "perl": ".pl .pm",
        "php": ".php",
        "protobuf": ".proto",
        "python": ".py .pyi .pyx",
        "r": ".r",
        "ruby": ".rb",
        "rust": ".rs",
        "scala": ".scala",
        "shell": ".sh .bash .zsh",
        "solidity": ".sol",
        "sql": ".sql",
        "swift": ".swift",
        "tcl": ".tcl",
        "tex": ".tex",
        "typescript": ".ts .tsx",
        "verilog": ".v .sv .svh",
        "vhdl": ".vhd .vhdl",
        "zig": ".zig",
    }.items()
}
_BY_SUFFIX = {suffix: language for language, suffixes in LANGUAGES.items() for suffix in suffixes}
_BY_NAME = {"makefile": "make", "dockerfile": "docker", "cmakelists.txt": "cmake"}
VENDORED = frozenset(
    {
        *("node_modules", "bower_components", "vendor", "third_party", "third-party", "thirdparty"),
        *("site-packages", "dist-packages", "__pycache__", "venv", "target", "dist"),
    }
)
MACHINE_MADE = (".min.js", ".min.css", ".bundle.js", "_pb2.py", ".pb.go", ".g.dart")


def language_of(name: str) -> str | None:
    """What a file of source code is written in, None if it is none, or made by a machine."""
    base = name.rpartition("/")[2].lower().removesuffix(".gz").removesuffix(".zst")
    if base.endswith(MACHINE_MADE):
        return None
    return _BY_NAME.get(base) or _BY_SUFFIX.get(Path(base).suffix)


def read_text(path: Path, name: str, source: SourceSettings) -> Iterator[Found]:
    """The document a text file is, or its pieces of about `source.piece_bytes`."""
    try:
        with open_bytes(path) as stream:
            if source.piece_bytes is not None:
                yield from _read_pieces(stream, name, source)
                return
            head = stream.peek(HEAD_BYTES)
            if b"\0" in head:  # pictures and programs need not be read to their end
                yield SetAside(name, Reason.BINARY, head[:HEAD_BYTES], path.stat().st_size)
            else:
                yield _document(name, stream, head[:HEAD_BYTES], source)
    except BrokenStreamError as error:
        yield SetAside(name, error.reason, why=error.why)


def read_code(path: Path, name: str, source: SourceSettings) -> Iterator[Found]:
    """The same with the path and the language in meta."""
    for found in read_text(path, name, source):
        if isinstance(found, Document):
            yield found._replace(meta={"path": name, "language": language_of(name)})
        else:
            yield found


def read_whole(stream: io.BufferedReader, limit: int) -> bytes | None:
    """All of a stream, None if it is more than `limit` bytes."""
    data = bytearray()
    while piece := stream.read(min(BUFFER_BYTES, limit + 1 - len(data))):
        data += piece
        if len(data) > limit:
            return None
    return bytes(data)


def _document(name: str, stream: io.BufferedReader, head: bytes, source: SourceSettings) -> Found:
    data = read_whole(stream, source.max_document_bytes)
    if data is None:
        why = f"more than {source.max_document_bytes} bytes"
        return SetAside(name, Reason.TOO_LONG, head, source.max_document_bytes, why)
    if b"\0" in data:
        return SetAside(name, Reason.BINARY, head, len(data))
    try:
        text = data.decode("utf-8-sig", source.encoding_errors)
    except UnicodeDecodeError as error:
        return SetAside(name, Reason.NOT_UTF8, head, len(data), f"byte {error.start}: {error.reason}")
    if source.strip_front_matter and name.lower().removesuffix(".gz").removesuffix(".zst").endswith(MARKDOWN):
        text = without_front_matter(text)
    if not text or text.isspace():
        return SetAside(name, Reason.EMPTY, head, len(data))
    return Document(name, text.encode(), raw_bytes=len(data))


def without_front_matter(text: str) -> str:
    """Markdown without the YAML or TOML block it begins with."""
    for fence in ("---", "+++"):
        if text.startswith((f"{fence}\n", f"{fence}\r\n")):
            rows = text.splitlines(keepends=True)
            for number, row in enumerate(rows[1:], 1):
                if row.rstrip() == fence or (fence == "---" and row.rstrip() == "..."):
                    return "".join(rows[number + 1 :])
    return text


def _read_pieces(stream: io.BufferedReader, name: str, source: SourceSettings) -> Iterator[Found]:
    """Pieces that end at a line's end where there is one near, and never within a character."""
    size = source.piece_bytes or BUFFER_BYTES
    decoder = codecs.getincrementaldecoder("utf-8")(source.encoding_errors)
    number = at = 0
    mark = "\ufeff"  # of byte order, until something was read
    while piece := stream.read(size):
        piece += stream.readline(size)
        is_last = not stream.peek(1)
        try:
            text = decoder.decode(piece, is_last)
            if text:
                text, mark = text.removeprefix(mark), ""
        except UnicodeDecodeError as error:
            reason = Reason.STOPS if number else Reason.NOT_UTF8
            yield SetAside(f"{name}@{at}", reason, piece[:HEAD_BYTES], len(piece), error.reason)
            return
        if "\0" in text:
            reason = Reason.STOPS if number else Reason.BINARY
            yield SetAside(f"{name}@{at}", reason, piece[:HEAD_BYTES], len(piece), "a NUL byte")
            return
        place = f"{name}#{number}"
        if text and not text.isspace():
            yield Document(place, text.encode())
        elif text:
            yield SetAside(place, Reason.EMPTY, piece[:HEAD_BYTES], len(piece))
        number += 1
        at += len(piece)
