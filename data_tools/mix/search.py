"""A search for the weights of a mixture: many tiny runs, a regression, a proposal (RegMix, Liu et al. 2024).

Mixture i depends on the seed and i alone, so a search can be killed, shared by ranks, and made longer.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from data_tools.crew import Crew, Task, write_json
from data_tools.flow import Flow
from data_tools.mix.groups import Group, check_names, read_groups, sources_of
from data_tools.mix.mixture import LEAST_SHARE, Epochs, Weight
from data_tools.mix.proxy import ProxySettings, train_proxy
from data_tools.mix.regression import cross_validate, propose, select
from data_tools.mix.shares import fill
from data_tools.step import Step
from megalite.config.section import Section
from megalite.data.mixture import temperature_weights
from megalite.errors import DataError

KIND = "search"
VERSION = 1
PROPORTIONAL_PART = 0.02  # of every mixture, so that none is without a source
CANDIDATES = 1 << 32  # a number no run has: of the mixtures the fit chooses from

Floats = NDArray[np.float64]


class _Runs(Section):
    """What the proxy runs depend on; how many there are is not of it."""

    seed: int = Field(0, ge=0, description="of the mixtures that are tried")
    concentrations: tuple[float, ...] = Field(
        (0.5, 1.0, 2.0, 4.0),
        strict=False,
        min_length=1,
        description="of the Dirichlet they are drawn from, per source: small ones reach far",
    )
    temperature: float = Field(
        2.0, ge=1, description="its centre, sizes^(1/T): above 1 small sources are tried more"
    )
    token_budget: int | None = Field(
        None, gt=0, description="tokens of the run the mixture is for; with it no mixture exceeds the caps"
    )
    max_epochs: Epochs = Field(4.0, description="passes over a source at most, as in [mix]")
    source_epochs: dict[str, Epochs] = Field({}, description="other caps, by source")
    proxy: ProxySettings = Field(ProxySettings(), description="the tiny runs")


class SearchSettings(_Runs):
    """How the weights are looked for."""

    runs: int = Field(64, ge=10, description="tiny runs; more can be added later")
    target: dict[str, Weight] = Field(
        {}, description="what counts: weight of each source's held-out loss, {} their mean"
    )
    candidates: int = Field(10_000, ge=100, description="mixtures the fit chooses from")
    best: int = Field(100, ge=1, description="of these the best, whose mean is proposed")
    bootstraps: int = Field(200, ge=20, description="fits on runs drawn anew, for the intervals")
    min_spearman: float = Field(
        0.5, gt=0, le=1, description="rank correlation on runs not fitted, below which nothing is proposed"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(not 0 < each < float("inf") for each in self.concentrations):
            raise ValueError(f"concentrations={list(self.concentrations)}; each should be above 0")
        if self.best > self.candidates:
            raise ValueError(f"best={self.best} of candidates={self.candidates}; use fewer")
        if self.target and not any(self.target.values()):
            raise ValueError("target has only zeros; give one source a weight")
        return self


def run(settings: SearchSettings, tokenized: Path, out: Path, crew: Crew, renew: bool = False) -> Flow:
    """Train the proxies that are not trained yet, fit, and write `out/mixture.json`.

    Raises:  DataError if names, caps or held-out sets are not as they must be, or a proxy fails
    """
    chosen = {name: getattr(settings, name) for name in _Runs.model_fields}
    step = Step(out, KIND, VERSION, _Runs.model_validate(chosen), [tokenized], crew, renew=renew)
    groups = [group for group in read_groups(tokenized) if group.samples(settings.proxy.seq_len)]
    prior = Prior(settings, groups)
    target = _target(settings, groups)
    mixtures = [prior.mixture(number) for number in range(settings.runs)]
    tasks = [
        Task(
            f"proxy-{number:05d}",
            partial(
                _train, settings.proxy, groups, dict(zip(prior.sources, mixture, strict=True)), out, number
            ),
            settings.proxy.steps * settings.proxy.batch_size * settings.proxy.seq_len,
        )
        for number, mixture in enumerate(mixtures)
    ]
    losses = step.run("proxies", tasks)
    digest = hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:16]
    found = step.once(f"fit-{digest}", partial(_conclude, settings, prior, target, mixtures, losses))
    if crew.is_first:
        write_json(out / "mixture.json", found)
        print(f"search: {found['conclusion']}", file=sys.stderr, flush=True)
    flow = Flow()
    flow.count("proxy runs", settings.runs)
    return step.finish([flow], anew=True, conclusion=found["conclusion"], weights=found["weights"])


class Prior:
    """The mixtures a search looks at: a Dirichlet around the sources' tempered sizes, below their caps.

    Raises:  DataError if there is nothing to mix, or the caps leave less than the budget
    """

    def __init__(self, settings: _Runs, groups: Sequence[Group]) -> None:
        by_source = sources_of(groups)
        self.sources = list(by_source)
        if len(self.sources) < 2:
            raise DataError(f"a search needs two sources with a sample of {settings.proxy.seq_len} tokens")
        check_names(settings.source_epochs, self.sources, "search.source_epochs")
        tokens = [sum(group.tokens for group in by_source[source]) for source in self.sources]
        sizes = np.array(tokens, dtype=np.float64)
        epochs = [settings.source_epochs.get(source, settings.max_epochs) for source in self.sources]
        self._limits = np.full(len(sizes), np.inf)
        if settings.token_budget is not None:
            self._limits = np.array(epochs) * sizes / settings.token_budget
            if self._limits.sum() < 1:
                raise DataError(
                    f"search.token_budget={settings.token_budget:,} of {sum(tokens):,} tokens is more than "
                    f"search.max_epochs={settings.max_epochs:g} passes allow; use at most "
                    f"{int(settings.token_budget * self._limits.sum())}"
                )
        self._sizes = sizes / sizes.sum()
        centre = np.array(temperature_weights(tokens, settings.temperature))
        self._centre = centre / centre.sum()
        self._settings = settings

    @property
    def proportional(self) -> Floats:
        """Shares by size, [sources]; also the mixture of run 0."""
        return fill(self._sizes, self._limits, 1.0)

    def mixture(self, number: int) -> Floats:
        """The shares of a run, [sources]."""
        if number == 0:
            return np.round(self.proportional, 6)
        return np.round(self._draw(np.random.default_rng([self._settings.seed, number]), number), 6)

    def candidates(self, count: int) -> Floats:
        """As many mixtures of the same kind as the runs', [count, sources]."""
        rng = np.random.default_rng([self._settings.seed, CANDIDATES])
        return np.stack([self._draw(rng, number) for number in range(count)])

    def _draw(self, rng: np.random.Generator, number: int) -> Floats:
        spread = self._settings.concentrations
        alphas = spread[number % len(spread)] * len(self._centre) * self._centre
        shares = (1 - PROPORTIONAL_PART) * rng.dirichlet(alphas) + PROPORTIONAL_PART * self._sizes
        return fill(shares, self._limits, 1.0)


def _target(settings: SearchSettings, groups: Sequence[Group]) -> dict[str, float]:
    """What each source's held-out loss counts, adding up to 1.

    Raises:  DataError if one that counts has no held-out sample
    """
    by_source = sources_of(groups)
    check_names(settings.target, list(by_source), "search.target")
    held_out = [s for s, each in by_source.items() if any(g.has_valid(settings.proxy.seq_len) for g in each)]
    if not held_out:
        raise DataError(f"no source has held-out documents of {settings.proxy.seq_len + 1} tokens together")
    target = settings.target or dict.fromkeys(held_out, 1.0)
    if absent := [source for source, weight in target.items() if weight and source not in held_out]:
        raise DataError(
            f"search.target names {absent[0]!r}, whose held-out documents do not make a sample of "
            f"{settings.proxy.seq_len} tokens; shorten search.proxy.seq_len or hold out more"
        )
    total = sum(target.values())
    return {source: weight / total for source, weight in target.items() if weight}


def _train(
    proxy: ProxySettings, groups: Sequence[Group], shares: Mapping[str, float], out: Path, number: int
) -> dict[str, Any]:
    """The loss of each source after a proxy run on these shares."""
    tokens = {source: sum(group.tokens for group in each) for source, each in sources_of(groups).items()}
    weights = {
        group.name: max(float(shares[group.source]) * group.tokens / tokens[group.source], LEAST_SHARE)
        for group in groups
    }
    return train_proxy(proxy, groups, weights, out / "runs" / f"proxy-{number:05d}")


def _conclude(
    settings: SearchSettings,
    prior: Prior,
    target: Mapping[str, float],
    mixtures: Sequence[Floats],
    losses: Sequence[Mapping[str, float]],
) -> dict[str, Any]:
    """Everything `mixture.json` says."""
    shares = np.stack(mixtures)
    values = np.array([sum(weight * each[s] for s, weight in target.items()) for each in losses])
    features, ridge = select(shares, values)
    power = cross_validate(shares, values, settings.seed)

    def by_source(numbers: Floats) -> dict[str, Any]:
        return dict(zip(prior.sources, np.round(numbers, 6).tolist(), strict=True))

    found: dict[str, Any] = {
        "target": dict(target),
        "proportional": by_source(prior.proportional),
        "fit": {
            "features": features,
            "ridge": ridge,
            **{name: round(value, 4) for name, value in asdict(power).items()},
        },
        "weights": None,
        "runs": [
            {"shares": by_source(mixture), "losses": dict(each), "target": round(float(value), 6)}
            for mixture, each, value in zip(mixtures, losses, values, strict=True)
        ],
    }
    quality = f"on runs left out of the fit R² is {power.r2:.2f} and Spearman's ρ {power.spearman:.2f}"
    if power.r2 <= 0 or power.spearman < settings.min_spearman:
        found["conclusion"] = (
            f"nothing is proposed, for the fit does not predict: {quality} (search.min_spearman="
            f"{settings.min_spearman:g}); use more search.runs or longer proxies"
        )
        return found
    proposal = propose(
        shares,
        values,
        prior.candidates(settings.candidates),
        prior.proportional,
        error=power.error,
        best=settings.best,
        bootstraps=settings.bootstraps,
        seed=settings.seed,
    )
    low, high = proposal.gain_interval
    found |= {
        "weights": by_source(proposal.weights),
        "intervals": by_source(proposal.intervals),
        "predicted_gain": round(proposal.gain, 6),
        "gain_interval": [round(low, 6), round(high, 6)],
    }
    surely = "" if low > 0 else "; that may be nothing at all"
    found["conclusion"] = (
        f"{quality}; against sizes alone the target should fall by {proposal.gain:.4f} nats a token "
        f"(90 % interval {low:.4f} to {high:.4f}){surely}"
    )
    return found
