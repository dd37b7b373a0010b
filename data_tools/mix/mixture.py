"""The mixture of a run: shares of sources under caps and a budget, as a file that `data.mixture` names.

No token is copied. The plan counts samples as the loader does, and is checked against the loader's own
order before it is written.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from data_tools.crew import Crew
from data_tools.flow import Flow
from data_tools.mix.curriculum import Curriculum, stage_parts
from data_tools.mix.groups import Group, check_names, read_groups, sources_of
from data_tools.mix.shares import fill, wanted_shares
from data_tools.step import Step, read_report
from megalite.config import DataConfig
from megalite.config.section import Section, divisors
from megalite.config_file import toml_value
from megalite.data.mixture import MAX_PERIOD
from megalite.data.schedule import Blend, build_phases
from megalite.data.staging import write_text
from megalite.errors import DataError

KIND = "mix"
VERSION = 1
MIXTURE_FILE = "data.toml"
LEAST_SHARE = 2 / MAX_PERIOD  # what the loader can still draw; a smaller share is raised to it

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Epochs = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class MixSettings(Section):
    """How much of each source a run reads."""

    weights: dict[str, Weight] = Field(
        {}, description="share of each source, {} for sizes or temperature; 0 leaves one out"
    )
    temperature: float | None = Field(
        None, gt=0, description="T: shares in proportion to tokens^(1/T) in place of weights"
    )
    max_epochs: Epochs = Field(
        4.0,
        description="passes over a source at most, the others share the rest; up to 4 are nearly as good as "
        "fresh tokens (Muennighoff et al. 2023)",
    )
    source_epochs: dict[str, Epochs] = Field({}, description="other caps, by source")
    token_budget: int | None = Field(
        None, gt=0, description="tokens of the whole run; by default as many as there are"
    )
    seq_len: int = Field(2048, gt=0, description="tokens a sample of the run")
    curriculum: Curriculum | None = Field(None, description="stages in which buckets shift, needs [buckets]")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.weights and self.temperature is not None:
            raise ValueError(f"temperature={self.temperature} with weights; give one of the two")
        if self.curriculum and (lens := self.curriculum.row_lens):
            if len(lens) != self.curriculum.stages:
                raise ValueError(
                    f"curriculum.row_lens={list(lens)}; give {self.curriculum.stages}, one for each stage"
                )
            if bad := [length for length in lens if length < 1 or self.seq_len % length]:
                raise ValueError(
                    f"curriculum.row_lens has {bad[0]}, which does not divide seq_len={self.seq_len}; use of "
                    f"{divisors(self.seq_len)}"
                )
        return self


class Plan(NamedTuple):
    """Samples of each group in each stage, and the samples of each stage.

    Shapes:  parts float64 [stages, groups]; stages: one number each
    """

    groups: list[Group]
    parts: Floats
    stages: list[int]
    settings: MixSettings

    @property
    def samples(self) -> int:
        """Of the whole run."""
        return sum(self.stages)

    def max_epochs(self, group: Group) -> float:
        """The cap of a group: that of its source."""
        return self.settings.source_epochs.get(group.source, self.settings.max_epochs)


def run(settings: MixSettings, tokenized: Path, out: Path, crew: Crew, renew: bool = False) -> Flow:
    """Plan the mixture of a tokenization; writes `out/data.toml`, and the plan into the report.

    Raises:  DataError if sources are misnamed, or the caps leave less than the budget
    """
    step = Step(out, KIND, VERSION, settings, [tokenized, os.path.relpath(tokenized, out)], crew, renew=renew)
    if step.is_finished:
        return Flow.from_json(read_report(out))
    report = step.once("plan", partial(_write_plan, settings, tokenized, out))
    flow = Flow()
    for name in ("token_budget", "tokens_there"):
        flow.count(name, report[name])
    return step.finish([flow], **report)


def plan_mixture(settings: MixSettings, groups: Sequence[Group]) -> Plan:
    """Samples of each group and stage under the settings; groups without a whole sample are left out.

    Raises:  DataError
    """
    usable = [group for group in groups if group.samples(settings.seq_len)]
    if not usable:
        raise DataError(f"no group has {settings.seq_len + 1} tokens, a sample of mix.seq_len; shorten it")
    by_source = sources_of(usable)
    weights = _usable_weights(settings, groups, by_source)
    tokens = {source: sum(group.tokens for group in each) for source, each in by_source.items()}
    wanted = wanted_shares(tokens, weights, settings.temperature)
    budget = _budget(settings, usable)
    plan = Plan(usable, np.zeros((0, 0)), _stages(settings, usable, budget), settings)
    limits = _limits(plan)
    by_limit = [sum(limits[g] for g, group in enumerate(usable) if group.source == s) for s in by_source]
    _check_budget(settings, wanted, by_limit, tokens, budget)
    parts = np.zeros((len(plan.stages), len(usable)))
    for source, part in zip(by_source, fill(list(wanted.values()), by_limit, budget), strict=True):
        mine = [g for g, group in enumerate(usable) if group.source == source]
        each = fill([usable[g].tokens for g in mine], [limits[g] for g in mine], part)
        parts[:, mine] = _in_stages(settings.curriculum, each, plan.stages)
    return plan._replace(parts=parts)


def data_section(plan: Plan, folder: Path) -> dict[str, Any]:
    """The plan as the keys of a run's `[data]`, paths relative to `folder`."""
    settings, groups = plan.settings, plan.groups
    lengths = np.array(plan.stages, dtype=np.float64)[:, None]
    shares = np.where(plan.parts > 0, np.maximum(plan.parts / lengths, LEAST_SHARE), 0.0)
    weights = np.round(shares, 9).tolist()
    starts = (np.cumsum([0, *plan.stages[:-1]]) * settings.seq_len).tolist()

    def relative(path: Path) -> str:
        return Path(os.path.relpath(path, folder)).as_posix()

    section: dict[str, Any] = {
        "seq_len": settings.seq_len,
        "sources": [
            {"path": relative(group.train), "weight": weight, "max_epochs": plan.max_epochs(group)}
            for group, weight in zip(groups, weights[0], strict=True)
        ],
        # Of equal weight, so that the mean does not change its meaning with the mixture.
        "validation": [
            {"path": relative(group.valid)}
            for group in groups
            if group.valid is not None and group.has_valid(settings.seq_len)
        ],
    }
    if len(plan.stages) > 1:
        later = zip(starts[1:], weights[1:], strict=True)
        section["schedule"] = [{"tokens": tokens, "weights": stage} for tokens, stage in later]
        if settings.curriculum is not None and settings.curriculum.row_lens:
            lens = zip(starts, settings.curriculum.row_lens, strict=True)
            section["seq_len_schedule"] = [{"tokens": tokens, "seq_len": length} for tokens, length in lens]
    return section


def simulate(plan: Plan, section: DataConfig) -> Ints:
    """Samples that the loader would draw from each group in each stage, int64 [stages, groups].

    Raises:  DataError if it runs out of data before the end
    """
    phases = build_phases(section, [group.tokens for group in plan.groups])
    blend = Blend(phases, _limits(plan))
    if blend.end is not None and blend.end < plan.samples:
        raise DataError(
            f"the caps leave no room for the rounding of shares: the data would end after {blend.end} of "
            f"{plan.samples} samples; use mix.token_budget={blend.end * plan.settings.seq_len}"
        )
    ends = [blend.cursors(int(end)) for end in np.cumsum([0, *plan.stages])]
    return np.diff(np.array(ends, dtype=np.int64), axis=0)


def _usable_weights(
    settings: MixSettings, groups: Sequence[Group], usable: Mapping[str, Sequence[Group]]
) -> dict[str, float]:
    """The weights by hand of the sources that have a sample.

    Raises:  DataError if a name is no source, or one without a sample has a share
    """
    sources = list(sources_of(groups))
    check_names(settings.weights, sources, "mix.weights")
    check_names(settings.source_epochs, sources, "mix.source_epochs")
    for source, weight in settings.weights.items():
        if weight and source not in usable:
            raise DataError(
                f"mix.weights gives {source!r} a share, but it has not the {settings.seq_len + 1} tokens of "
                "one sample; give it 0"
            )
    return {source: weight for source, weight in settings.weights.items() if source in usable}


def _budget(settings: MixSettings, groups: Sequence[Group]) -> int:
    """Samples of the run."""
    if settings.token_budget is None:
        return sum(group.samples(settings.seq_len) for group in groups)
    if settings.token_budget < settings.seq_len:
        raise DataError(
            f"mix.token_budget={settings.token_budget} is less than a sample, mix.seq_len={settings.seq_len}"
        )
    return settings.token_budget // settings.seq_len


def _stages(settings: MixSettings, groups: Sequence[Group], budget: int) -> list[int]:
    """Samples of each stage, as equal as can be.

    Raises:  DataError if there is nothing to order, or not a sample for every stage
    """
    if settings.curriculum is None:
        return [budget]
    if all(group.bucket is None for group in groups):
        raise DataError("mix.curriculum orders buckets, but no source has any; add [buckets] to the recipe")
    stages = settings.curriculum.stages
    if budget < stages:
        raise DataError(f"mix.curriculum.stages={stages} for a run of {budget} samples; use fewer stages")
    return [(stage + 1) * budget // stages - stage * budget // stages for stage in range(stages)]


def _in_stages(curriculum: Curriculum | None, parts: Floats, stages: Sequence[int]) -> Floats:
    """Samples of the groups of one source in each stage, [stages, groups]."""
    if curriculum is None:
        return parts[None, :]
    return stage_parts(parts, stages, curriculum.order, curriculum.softness, LEAST_SHARE)


def _limits(plan: Plan) -> list[int]:
    """Samples that each group may give, as the loader counts them."""
    return [int(plan.max_epochs(group) * group.samples(plan.settings.seq_len)) for group in plan.groups]


def _check_budget(
    settings: MixSettings,
    wanted: dict[str, float],
    limits: Sequence[int],
    tokens: dict[str, int],
    budget: int,
) -> None:
    """Raises:  DataError with the budget that fits, if the caps leave less"""
    most = sum(limit for limit, share in zip(limits, wanted.values(), strict=True) if share > 0)
    if budget > most:
        there = sum(tokens[source] for source, share in wanted.items() if share > 0)
        raise DataError(
            f"mix.token_budget={budget * settings.seq_len:,} tokens of {there:,} need more than the "
            f"mix.max_epochs={settings.max_epochs:g} (and source_epochs) passes allow; use at most "
            f"{most * settings.seq_len}, or raise max_epochs"
        )


def _write_plan(settings: MixSettings, tokenized: Path, out: Path) -> dict[str, Any]:
    groups = read_groups(tokenized)
    plan = plan_mixture(settings, groups)
    text = _render(plan, data_section(plan, out))
    section = DataConfig.model_validate(tomllib.loads(text)["data"])  # as a run will read it
    drawn = simulate(plan, section)
    write_text(out / MIXTURE_FILE, text)
    return _report(plan, groups, drawn)


def _render(plan: Plan, section: dict[str, Any]) -> str:
    budget = plan.samples * plan.settings.seq_len
    lines = [
        f"# For {plan.samples:,} samples (train.steps × train.global_batch_size), {budget:,} tokens.",
        "# megalite train CONFIG data.mixture=THIS_FILE reads it; paths are relative to this file.",
        "[data]",
    ]
    for key, value in section.items():
        if isinstance(value, list):
            lines += [f"{key} = [", *(f"  {toml_value(item)}," for item in value), "]"]
        else:
            lines.append(f"{key} = {toml_value(value)}")
    return "\n".join(lines) + "\n"


def _report(plan: Plan, groups: Sequence[Group], drawn: Ints) -> dict[str, Any]:
    seq_len, planned = plan.settings.seq_len, plan.parts
    entries = []
    for g, group in enumerate(plan.groups):
        samples = int(drawn[:, g].sum())
        entries.append(
            {
                "group": group.name,
                "source": group.source,
                "tokens_there": group.tokens,
                "tokens_drawn": samples * seq_len,
                "share": round(samples / plan.samples, 9),
                "epochs": round(samples / group.samples(seq_len), 6),
                "max_epochs": plan.max_epochs(group),
                "is_capped": samples >= _limits(plan)[g],
                "stages": (drawn[:, g] * seq_len).tolist(),
            }
        )
    used = {group.name for group in plan.groups}
    return {
        "token_budget": plan.samples * seq_len,
        "tokens_there": sum(group.tokens for group in groups),
        "samples": plan.samples,
        "seq_len": seq_len,
        "stages": [stage * seq_len for stage in plan.stages],
        "groups": entries,
        "too_small": [group.name for group in groups if group.name not in used],
        "never_drawn": [
            group.name for g, group in enumerate(plan.groups) if planned[:, g].any() and not drawn[:, g].any()
        ],
        "without_validation": [group.name for group in plan.groups if not group.has_valid(seq_len)],
        "most_off_plan_samples": round(float(np.abs(drawn - planned).max()), 3),
    }
