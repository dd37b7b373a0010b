"""The `[data]` section: what is read, in which order and shape."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megalite.config.section import Section, divisors


class Source(Section):
    """One dataset and its share of the mixture."""

    path: str = Field(description="folder or address that holds a manifest.json")
    weight: float = Field(1.0, ge=0, description="share of samples, relative to the other sources")
    max_epochs: float | None = Field(
        None, gt=0, description="passes over it at most; then the other sources share what it had"
    )


class MixtureChange(Section):
    """Other shares from a token count on: weights, or a temperature."""

    tokens: int = Field(ge=0, lt=2**63, description="tokens read before the change")
    weights: tuple[float, ...] = Field((), strict=False, description="one for each of data.sources")
    temperature: float | None = Field(None, gt=0, description="instead of weights, see data.temperature")


class SeqLenChange(Section):
    """Another row length from a token count on."""

    tokens: int = Field(ge=0, lt=2**63, description="tokens read before the change")
    seq_len: int = Field(gt=0, description="tokens a row; divides data.seq_len")


class DataConfig(Section):
    """What is read, and in which shape it reaches the model."""

    sources: tuple[Source, ...] = Field(
        (), strict=False, description="training datasets: [{path, weight, max_epochs}]"
    )
    validation: tuple[Source, ...] = Field(
        (), strict=False, description="held-out datasets: [{path, weight}]"
    )
    mixture: None = Field(
        None,
        description="a file of `megalite data mix`, read in place of this key: sources, schedule, seq_len …",
    )
    temperature: float | None = Field(
        None, gt=0, description="T: shares in proportion to tokens^(1/T) in place of weights"
    )
    schedule: tuple[MixtureChange, ...] = Field(
        (), strict=False, description="later shares: [{tokens, weights}] or [{tokens, temperature}]"
    )
    seq_len: int = Field(gt=0, description="tokens a sample")
    seq_len_schedule: tuple[SeqLenChange, ...] = Field(
        (), strict=False, description="samples cut into shorter rows: [{tokens, seq_len}]"
    )
    packing: Literal["concat", "best_fit"] = Field(
        "concat", description="documents end to end and cut, or packed whole with padding"
    )
    document_mask: bool = Field(
        True, description="attention stays within a document, positions restart at each"
    )
    shuffle: bool = Field(True, description="permute samples, anew each epoch; false reads in stored order")
    shuffle_chunks: int = Field(
        48,
        gt=0,
        lt=2**31,
        description="chunks of neighbouring samples shuffled together; more mix better, open more",
    )
    skip: tuple[Annotated[tuple[int, int], Field(strict=False)], ...] = Field(
        (), strict=False, description="ranges of global sample indices left out: [[first, after], ...]"
    )
    prefetch: int = Field(2, ge=0, description="steps read ahead by a thread")
    max_bad_blocks: float = Field(
        0.001, ge=0, le=1, description="share of damaged record batches replaced before the run stops"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.temperature is not None and any(source.weight != 1.0 for source in self.sources):
            raise ValueError(f"temperature={self.temperature} with weights in sources; give one of the two")
        for n, change in enumerate(self.schedule):
            key, weights = f"schedule[{n}]", list(change.weights)
            if bool(weights) == (change.temperature is not None):
                raise ValueError(f"{key} needs either weights or a temperature")
            if weights and (len(weights) != len(self.sources) or min(weights) < 0 or not any(weights)):
                raise ValueError(
                    f"{key}.weights={weights}; give {len(self.sources)} numbers, one for each of sources, "
                    "none negative and not all 0"
                )
        for first, after in self.skip:
            if not 0 <= first < after:
                raise ValueError(f"skip has [{first}, {after}]; give [first, after] with 0 ≤ first < after")
        for n, stage in enumerate(self.seq_len_schedule):
            if self.seq_len % stage.seq_len:
                raise ValueError(
                    f"seq_len_schedule[{n}].seq_len={stage.seq_len} does not divide seq_len={self.seq_len}; "
                    f"use one of {divisors(self.seq_len)}"
                )
        for name, changes in (("schedule", self.schedule), ("seq_len_schedule", self.seq_len_schedule)):
            counts = [change.tokens for change in changes]
            if counts != sorted(set(counts)):
                raise ValueError(f"{name} has tokens {counts}; each change comes after the one before")
        return self

    @property
    def held_out(self) -> Self:
        """The same for the validation datasets: in stored order, end to end, nothing replaced."""
        plain = {"temperature": None, "schedule": (), "seq_len_schedule": (), "packing": "concat", "skip": ()}
        rest = {"sources": self.validation, "validation": (), "shuffle": False, "max_bad_blocks": 0.0}
        return self.model_copy(update=plain | rest)
