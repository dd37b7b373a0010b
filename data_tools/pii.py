"""Personal data and secrets, masked with placeholders that say what stood there.

E-mail addresses, phone numbers, public IP addresses, payment cards, IBANs, and keys. Masking is repeated
until nothing more is found, so that doing it twice is the same as doing it once.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field

from data_tools.documents import Texts, text_column, texts, with_column
from data_tools.flow import Flow
from data_tools.pii_candidates import candidates
from data_tools.pii_kinds import KINDS, Span, judge
from megalite.config.section import Section

# Between marks that belong to no word or number, and without what could be masked itself.
Placeholder = Annotated[str, Field(pattern=r"^[<\[{|#*][^0-9@\n]{0,30}[>\]}|#*]$")]


class PiiSettings(Section):
    """What is masked, and with what."""

    email: bool = Field(True, description="mask e-mail addresses; those of example.com and the like stay")
    phone: bool = Field(
        True,
        description="mask phone numbers: +…, (212) 555-0123, 212-555-0123, any after tel, phone, fax",
    )
    ip: bool = Field(True, description="mask public IPv4 and IPv6 addresses; private and reserved ones stay")
    card: bool = Field(True, description="mask payment cards: an issuer's prefix and length, Luhn's digit")
    iban: bool = Field(True, description="mask IBANs: a country's length, and the check digits")
    key: bool = Field(
        True, description="mask keys with known prefixes, private key blocks, random values of api_key = … "
    )
    email_text: Placeholder = Field("<EMAIL>", description="what stands for an e-mail address")
    phone_text: Placeholder = Field("<PHONE>", description="what stands for a phone number")
    ip_text: Placeholder = Field("<IP>", description="what stands for an IP address")
    card_text: Placeholder = Field("<CARD>", description="what stands for a payment card's number")
    iban_text: Placeholder = Field("<IBAN>", description="what stands for an IBAN")
    key_text: Placeholder = Field("<KEY>", description="what stands for a key")


class Pii:
    """The operation: edits `text`, adds `pii_count` int32, counts what was masked by kind."""

    def __init__(self, settings: PiiSettings) -> None:
        values = settings.model_dump()
        self._masks = {kind: values[f"{kind}_text"].encode() for kind in KINDS if values[kind]}

    def __call__(self, batch: pa.RecordBatch, flow: Flow) -> pa.RecordBatch:
        column = batch.column("text")
        counts = np.zeros(batch.num_rows, dtype=np.int32)
        rows, part = np.arange(batch.num_rows), column
        while rows.size:
            old = texts(part)
            of_row, spans = self._find(old)
            for span in spans:
                flow.count(f"pii: {span.kind}")
            masked = np.bincount(of_row, minlength=rows.size)
            changed = masked > 0
            if not changed.any():
                break
            counts[rows] += masked.astype(np.int32)
            part = _masked(old, of_row, spans, self._masks).filter(pa.array(changed))
            rows = rows[changed]
            mask = np.zeros(batch.num_rows, dtype=bool)
            mask[rows] = True
            column = pc.replace_with_mask(column, pa.array(mask), part)
        if counts.any():
            batch = with_column(batch, "text", column)
            flow.count("pii: documents", int(np.count_nonzero(counts)))
        return with_column(batch, "pii_count", pa.array(counts))

    def _find(self, old: Texts) -> tuple[NDArray[np.int64], list[Span]]:
        """What is to be masked, in order and apart, and the row of each."""
        found = candidates(old.data, old.offsets)
        text = old.data.tobytes()
        lows, highs = old.offsets[found.row], old.offsets[found.row + 1]
        spans = [
            (row, span)
            for row, *where in zip(*(a.tolist() for a in (found.row, lows, highs, *found[1:])), strict=True)
            for span in judge(text, *where)
            if span.kind in self._masks
        ]
        spans.sort(key=lambda item: (item[1].start, KINDS.index(item[1].kind), -item[1].end))
        apart: list[tuple[int, Span]] = []
        for row, span in spans:
            if apart and span.start < apart[-1][1].end:
                continue
            apart.append((row, span))
        return np.array([row for row, _ in apart], dtype=np.int64), [span for _, span in apart]


def _masked(old: Texts, of_row: NDArray[np.int64], spans: list[Span], masks: dict[str, bytes]) -> pa.Array:
    """The column with the spans' bytes replaced."""
    text = memoryview(old.data.data)
    pieces: list[bytes | memoryview] = []
    at = int(old.offsets[0])
    growth = np.zeros(len(old.offsets), dtype=np.int64)
    for row, span in zip(of_row.tolist(), spans, strict=True):
        pieces += [text[at : span.start], masks[span.kind]]
        growth[row + 1] += len(masks[span.kind]) - (span.end - span.start)
        at = span.end
    pieces.append(text[at : int(old.offsets[-1])])
    data = np.frombuffer(b"".join(pieces), dtype=np.uint8)
    return text_column(data, old.offsets - old.offsets[0] + np.cumsum(growth))
