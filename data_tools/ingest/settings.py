"""Where text comes from and how it is read: the `[[ingest.sources]]` of a recipe."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from megalite.config.section import Section
from megalite.errors import DataError

MAX_DOCUMENT_BYTES = 1 << 30  # with what else is in its batch, what 32-bit offsets can say

Format = Literal["auto", "jsonl", "table", "text", "code", "html", "warc"]


class SourceSettings(Section):
    """One place text is read from, under the name that a mixture's weights use."""

    name: str = Field(min_length=1, max_length=200, description="what its documents are called in mixtures")
    path: str = Field(
        min_length=1,
        description="a file or folder; python-stdlib; or a Hugging Face dataset, hf:NAME[:CONFIG][:SPLIT]",
    )
    format: Format = Field(
        "auto",
        description="auto: by each file's name; else every file is read as this (table: Parquet, Arrow)",
    )
    include: tuple[str, ...] = Field(
        (), strict=False, description="read only files whose name below path fits one of these; * is any text"
    )
    exclude: tuple[str, ...] = Field((), strict=False, description="leave out files that fit one of these")
    follow_links: bool = Field(
        False, description="read also files outside of the folder that links in it name; never linked folders"
    )
    text_field: str = Field("text", min_length=1, description="field or column with a record's text")
    id_field: str = Field("id", min_length=1, description="field or column with its id, a string or number")
    meta_fields: tuple[str, ...] | None = Field(
        None, strict=False, description="fields or columns kept in meta; all others if not given"
    )
    max_meta_bytes: int = Field(
        16 << 10, ge=2, description="of JSON in a document's meta; its largest fields are left out above that"
    )
    max_document_bytes: int = Field(
        64 << 20, gt=0, le=MAX_DOCUMENT_BYTES, description="larger documents, lines and pages are set aside"
    )
    piece_bytes: int | None = Field(
        None, gt=0, description="cut plain text files into documents of about so much, at line ends"
    )
    encoding_errors: Literal["strict", "replace"] = Field(
        "strict", description="what is not UTF-8 is set aside, or its bad bytes are replaced by U+FFFD"
    )
    strip_front_matter: bool = Field(False, description="leave out the --- block a Markdown file begins with")
    html_extractor: Literal["resiliparse", "trafilatura"] = Field(
        "resiliparse", description="what finds the text of a page; trafilatura is 25 times slower"
    )
    html_main_content: bool = Field(True, description="leave out menus, headers, footers and the like")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.text_field == self.id_field:
            raise ValueError(f"text_field and id_field are both {self.text_field!r}; name two fields")
        return self


def source_at(path: str, name: str, **settings: Any) -> SourceSettings:
    """A source that a command line names.

    Raises:  DataError if the path or the name cannot be one
    """
    try:
        return SourceSettings(name=name, path=path, **settings)
    except ValidationError as error:
        first = error.errors()[0]
        what = f"a source cannot have the {first['loc'][0]} {first['input']!r} ({first['msg']})"
        raise DataError(f"{what}; name the place in a recipe's [ingest], or call it otherwise") from None


class IngestSettings(Section):
    """What text is read."""

    sources: tuple[SourceSettings, ...] = Field(
        strict=False, min_length=1, description="places of text: [{name, path, …}]"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [source.name for source in self.sources]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two sources are named {twice[0]!r}; give each a name of its own")
        return self
