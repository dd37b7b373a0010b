"""The text of web pages: which bytes are which characters, and which of them a reader came for.

resiliparse's main-content heuristics by default, trafilatura by choice; both are optional packages.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.ingest.found import HEAD_BYTES, Document, Found, Note, Reason, SetAside
from data_tools.ingest.settings import SourceSettings
from data_tools.ingest.text import read_whole
from data_tools.ingest.unpack import BrokenStreamError, open_bytes
from megalite.errors import DataError

# Finding the main content takes time that grows with the square of the depth: 0.2 s at 3000, minutes at
# 100,000. Browsers stop at 512. Pages of fewer tags than could make it slow are not looked at.
MAX_DEPTH, FEW_TAGS = 1000, 3000
_BOMS = {b"\xef\xbb\xbf": "utf-8", b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}
_DEEPER = " > ".join(["*"] * (MAX_DEPTH + 1))


class Page(NamedTuple):
    """What a reader sees of a page."""

    text: str
    title: str | None
    replaced: bool  # some bytes were not what the page's encoding allows


def check_extractor(source: SourceSettings) -> None:
    """Raises:  DataError with what to install, if the chosen package is missing"""
    try:
        import resiliparse  # noqa: F401
    except ImportError:
        raise DataError(
            f"source {source.name!r} has web pages; install what reads them with: "
            "pip install 'megalite[data]'"
        ) from None
    if source.html_extractor == "trafilatura":
        try:
            import trafilatura  # noqa: F401
        except ImportError:
            raise DataError(
                f"source {source.name!r} has html_extractor='trafilatura'; install it with: "
                "pip install 'megalite[trafilatura]', or use 'resiliparse'"
            ) from None


def extractor_version(source: SourceSettings) -> str:
    """The chosen package with its version: another finds other text."""
    return f"{source.html_extractor} {version(source.html_extractor)}"


def read_html(path: Path, name: str, source: SourceSettings) -> Iterator[Found]:
    """The document a page is."""
    try:
        with open_bytes(path) as stream:
            head = stream.peek(HEAD_BYTES)[:HEAD_BYTES]
            data = read_whole(stream, source.max_document_bytes)
    except BrokenStreamError as error:
        yield SetAside(name, error.reason, why=error.why)
        return
    if data is None:
        why = f"more than {source.max_document_bytes} bytes"
        yield SetAside(name, Reason.TOO_LONG, head, source.max_document_bytes, why)
        return
    yield from page_document(name, name, data, None, {}, source)


def page_document(
    place: str, doc_id: str, data: bytes, charset: str | None, meta: dict[str, Any], source: SourceSettings
) -> Iterator[Found]:
    """A page's bytes as a document with its title in meta, or set aside.

    `charset` is what came with the page, such as the HTTP header's.
    """
    if not data.strip():
        yield SetAside(place, Reason.EMPTY, data[:HEAD_BYTES], len(data))
        return
    try:
        page = extract(data, charset, source)
    except _TooDeepError as error:
        yield SetAside(place, Reason.TOO_DEEP, data[:HEAD_BYTES], len(data), str(error))
        return
    except (ValueError, LookupError, RuntimeError) as error:  # of the parser, which has seen much
        yield SetAside(place, Reason.BROKEN_PAGE, data[:HEAD_BYTES], len(data), str(error))
        return
    if page.replaced:
        yield Note("pages with bytes that are not of their encoding, replaced by U+FFFD")
    if not page.text or page.text.isspace():
        yield SetAside(place, Reason.NOTHING_EXTRACTED, data[:HEAD_BYTES], len(data))
        return
    meta = {**meta, "title": page.title} if page.title else meta
    yield Document(doc_id, page.text.encode("utf-8", "replace"), meta or None, len(data))


def extract(data: bytes, charset: str | None, source: SourceSettings) -> Page:
    """What a reader sees of a page.

    Raises:  ValueError if it nests too deeply; whatever the parser raises
    """
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.html import HTMLTree

    markup = decode(data, charset)
    replaced = "\ufffd" in markup and b"\xef\xbf\xbd" not in data
    tree = HTMLTree.parse(markup)
    if markup.count("<") > FEW_TAGS and tree.document and tree.document.query_selector(_DEEPER):
        raise _TooDeepError(f"more than {MAX_DEPTH} elements within each other")
    title = " ".join((tree.title or "").split())[:500] or None
    if source.html_extractor == "trafilatura":
        import trafilatura

        return Page(trafilatura.extract(markup) or "", title, replaced)
    text = extract_plain_text(tree, preserve_formatting=True, main_content=source.html_main_content)
    return Page(text, title, replaced)


def decode(data: bytes, charset: str | None) -> str:
    """Markup as text: by its byte order mark, the charset it came with, its meta tag, or its looks."""
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding, map_encoding_to_html5

    for bom, encoding in _BOMS.items():
        if data.startswith(bom):
            return data[len(bom) :].decode(encoding, "replace")
    if charset is not None and (known := map_encoding_to_html5(charset, fallback_utf8=False)):
        return str(bytes_to_str(data, known, errors="replace", fallback_encodings=()))
    try:
        # Valid UTF-8 is hardly ever anything else.
        return data.decode()
    except UnicodeDecodeError:
        guess = detect_encoding(data, from_html_meta=True) or "utf-8"
        return str(bytes_to_str(data, guess, errors="replace", fallback_encodings=()))


class _TooDeepError(ValueError):
    pass
