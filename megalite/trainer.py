"""The training loop. Read this file first.

A step: the loader gives this rank's micro-batches, the engine computes reduced gradients without
touching a weight, all ranks agree on what the step was worth from one small all-reduce, and only
then the optimizer moves. Everything a run is lies in (config, checkpoint): the data order, dropout
and the learning rate are functions of the seed, the position and the step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megalite.agreement import together
from megalite.checkpoint.store import Checkpoint, newest, save
from megalite.config import Config
from megalite.config_file import changed_keys, to_toml
from megalite.data.batch import IGNORE, Batch, Replacement
from megalite.data.loader import Share
from megalite.data.tokenizer import load_tokenizer
from megalite.engines.allocator import keep_freed_memory
from megalite.engines.engine import Engine, StepSums
from megalite.engines.native import NativeEngine
from megalite.errors import CheckpointError, ConfigError, DataError, DivergedError, PreemptedError
from megalite.log import RunLog
from megalite.model.flops import has_products, peak_flops, token_flops
from megalite.optim.lr import learning_rate
from megalite.parallel.collectives import all_reduce, gather_json
from megalite.parallel.mesh import Mesh
from megalite.resilience.preempt import PreemptionFlag
from megalite.run_data import PACKING_FOLDER, open_loaders
from megalite.version import code_version


@dataclass(frozen=True)
class StepReport:
    """What all ranks know of a step after their one all-reduce."""

    loss: float  # nats per valid token
    z_loss: float
    grad_norm: float  # of the mean loss, before clipping
    tokens: int  # valid labels in the global batch
    is_applied: bool  # whether the weights moved
    is_overflow: bool  # not applied, but a smaller loss scale may do (fp16)
    is_preempted: bool  # whether any rank was asked to stop
    has_replaced: bool  # whether any rank could not read one of its samples


class Trainer:
    """One run on one rank, from the newest checkpoint (or the seed) to the last step."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        """Open the data, build the model, restore the newest checkpoint.

        Raises:  ConfigError, DataError, CheckpointError
        """
        self.config, self.mesh = config, mesh
        self.run_dir = Path(config.run_dir)
        config.grad_accum_steps(mesh.dp.size)
        self._agree_on_config()
        if mesh.device.type == "cpu":
            keep_freed_memory()
        self.loader, self.validation = open_loaders(config, mesh)
        self._agree_on_data()
        self.engine: Engine = together(self._engine_class, mesh)(config, mesh)
        self.step = 0  # optimizer steps taken or skipped
        self.position = 0  # samples consumed
        self.tokens = 0  # valid labels trained on
        self.skipped_in_a_row = 0
        self.has_new_mixture = False  # whether it is another than that of the checkpoint
        self._peak_flops = peak_flops(mesh.device)
        self._saved_step = -1
        found = newest(self.run_dir / "checkpoints", mesh)
        self._restore(found)
        # Not before: a config that does not fit the run in run_dir must leave its files alone.
        together(self._prepare_run_dir, mesh)
        self.log = RunLog(self.run_dir, mesh.rank == 0, config.train.steps, config.log.every_steps)
        self._announce(found)

    # --- the loop -------------------------------------------------------------------------------

    def fit(self, flag: PreemptionFlag) -> None:
        """Train until `train.steps`, saving and validating on the way, or until any rank's flag is up.

        Raises:  PreemptedError after a save when asked to stop; DivergedError
        """
        train, checkpoint = self.config.train, self.config.checkpoint
        self._started = time.perf_counter()
        self._productive_s = 0.0
        with (
            self.log,
            self.loader.steps(
                self.position,
                Share(train.global_batch_size, train.micro_batch_size, self.mesh.dp.rank, self.mesh.dp.size),
                self.config.data.prefetch,
            ) as stream,
        ):
            self.log.resume(self.step)
            while self.step < train.steps:
                began, waited = time.perf_counter(), stream.wait_s
                rate = learning_rate(self.config.optim, self.step, train.steps)
                batches = next(stream)
                report = self.train_step(batches, rate, flag.requested)
                self.step += 1
                self.position += train.global_batch_size
                self.tokens += report.tokens if report.is_applied else 0
                times = time.perf_counter() - began, stream.wait_s - waited
                if report.has_replaced:
                    self._quarantine(batches)
                record = self._record(report, rate, batches[0].tokens.shape[1], *times)
                is_last = self.step == train.steps
                if train.eval_every_steps and (self.step % train.eval_every_steps == 0 or is_last):
                    record["val_loss"] = self.evaluate()
                self.log.step(record)
                self._check_divergence(report)
                every = checkpoint.every_steps
                if is_last or report.is_preempted or (every and self.step % every == 0):
                    self.save()
                if report.is_preempted and not is_last:
                    self.log.event("preempted", self.step, cause=flag.cause)
                    raise PreemptedError(
                        f"asked to stop: saved step {self.step} in {self.run_dir}; the same command continues"
                    )

    def train_step(self, micro_batches: list[Batch], lr: float, wants_stop: bool = False) -> StepReport:
        """One optimizer step on this rank's micro-batches.

        A step whose loss or gradient is not finite is not applied: the optimizer is not called, so
        weights, moments and AdamW's step count stay as they were. In fp16 the loss scale is lowered then.
        """
        sums = self.engine.forward_backward(micro_batches)
        has_replaced = any(batch.replaced for batch in micro_batches)
        total, wants_stop, has_replaced = self._agree_on_sums(sums, wants_stop, has_replaced)
        valid = max(total.tokens, 1.0)
        # The engine divided by the batch's nominal token count; labels that are ignored make it fewer.
        correction = self.config.tokens_per_step / valid
        norm = correction * math.sqrt(total.grad_norm_squared) if total.grad_norm_squared >= 0 else math.nan
        is_usable = math.isfinite(total.loss) and math.isfinite(norm) and total.tokens > 0
        if is_usable:
            clip = self.config.optim.grad_clip
            scale = min(1.0, clip / norm) if clip and norm > 0 else 1.0
            self.engine.optimizer_step(lr, correction * scale)
        is_overflow = not is_usable and math.isfinite(total.loss) and self.engine.loss_scale.can_shrink
        self.engine.loss_scale.update(is_usable)
        return StepReport(
            total.loss / valid,
            total.z_loss / valid,
            norm,
            int(total.tokens),
            is_usable,
            is_overflow,
            wants_stop,
            has_replaced,
        )

    def evaluate(self) -> float:
        """Mean cross-entropy in nats over the validation samples, the same samples every time."""
        if self.validation is None:
            raise ConfigError("data.validation is empty; name a held-out dataset")
        count = min(self.config.train.eval_samples, sum(self.validation.samples))
        dp, width, loader = self.mesh.dp, self.config.train.micro_batch_size, self.validation
        # Every rank takes as many, since a forward pass may need the others' weights: what is over is
        # computed with no label asked.
        mine = np.arange(dp.rank, -(-count // dp.size) * dp.size, dp.size)

        def batch(indices: NDArray[np.int64]) -> Batch:
            found = loader.batch(np.minimum(indices, count - 1))
            asked = (indices < count)[:, None]
            return replace(found, labels=np.where(asked, found.labels, IGNORE))

        batches = (batch(mine[i : i + width]) for i in range(0, len(mine), width))
        sums = torch.tensor(self.engine.evaluate(batches), dtype=torch.float64, device=self.mesh.device)
        loss, tokens = all_reduce(sums, self.mesh.world).tolist()
        return float(loss / max(tokens, 1.0))

    def save(self) -> None:
        """Commit a checkpoint of this step; a second call at the same step does nothing.

        Raises:  CheckpointError, the same on every rank; the older checkpoints are whole
        """
        if self._saved_step == self.step:
            return
        meta = {
            "applied_steps": self.engine.applied_steps,
            "loss_scale": self.engine.loss_scale.state(),
            "tokens": self.tokens,
            "skipped_in_a_row": self.skipped_in_a_row,
            "tokenizer": self.loader.datasets[0].tokenizer.fingerprint,
            "loader": self.loader.state(self.position),
            "config": self.config.model_dump(mode="json"),
        }
        save(
            self.run_dir / "checkpoints",
            self.step,
            self.position,
            self.engine.state_slices(),
            meta,
            self.mesh,
            self.config.checkpoint.keep_last,
        )
        self._saved_step = self.step

    # --- start ----------------------------------------------------------------------------------

    def _agree_on_config(self) -> None:
        """Every rank must have been given the same configuration, and run the same code.

        Raises:  ConfigError, on every rank, naming what differs first
        """
        mine = {"megalite": code_version(), "config": self.config.model_dump(mode="json")}
        everyone = gather_json(mine, self.mesh.world, self.mesh.device)
        first = everyone[0]
        for rank, other in enumerate(everyone[1:], 1):
            if other["megalite"] != first["megalite"]:
                raise ConfigError(
                    f"rank 0 runs megalite {first['megalite']} but rank {rank} {other['megalite']}; install "
                    "the same code on every host"
                )
            for key, (here, there) in changed_keys(first["config"], other["config"]).items():
                raise ConfigError(f"{key}={here!r} on rank 0 but {there!r} on rank {rank}; use one config")

    def _agree_on_data(self) -> None:
        """Every rank must see the same datasets, whatever its host keeps under these paths.

        Raises:  DataError, on every rank, naming the first dataset that differs
        """
        loaders = [loader for loader in (self.loader, self.validation) if loader is not None]
        datasets = [dataset for loader in loaders for dataset in loader.datasets]
        digests = [dataset.manifest.digest for dataset in datasets]
        everyone = gather_json(digests, self.mesh.world, self.mesh.device)
        for rank, others in enumerate(everyone[1:], 1):
            for dataset, here, there in zip(datasets, everyone[0], others, strict=True):
                if here != there:
                    error = DataError(
                        f"{dataset.path} has manifest {here} on rank 0 but {there} on rank {rank}; copy one "
                        "dataset to every host, or put it on shared storage"
                    )
                    error.is_shared = True
                    raise error

    def _engine_class(self) -> Callable[[Config, Mesh], Engine]:
        if self.config.mesh.zero_engine == "native":
            return NativeEngine
        from megalite.engines import deepspeed  # imported when asked for: it takes seconds

        deepspeed.load(self.mesh.device, self.config.train.precision)
        return deepspeed.DeepSpeedEngine

    def _prepare_run_dir(self) -> None:
        if self.mesh.rank > 0:
            return
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            (self.run_dir / "config.toml").write_text(to_toml(self.config), encoding="utf-8")
            load_tokenizer(self.loader.datasets[0].path).save(self.run_dir)
            self.loader.save_tables(self.run_dir / PACKING_FOLDER)
        except OSError as error:
            raise ConfigError(f"run_dir={str(self.run_dir)!r} cannot be written: {error.strerror}") from None

    def _restore(self, found: Checkpoint | None) -> None:
        """Start from the newest checkpoint that verifies, else from the seed.

        Raises:  CheckpointError if it is of another model or tokenizer; ConfigError if the data would be
                 read in another order; DataError if it does not last for the run
        """
        if found is not None:
            self._load(found)
        else:
            self.engine.initialize()
        self.loader.check_length(self.config.train.steps * self.config.train.global_batch_size)

    def _load(self, found: Checkpoint) -> None:
        fingerprint = self.loader.datasets[0].tokenizer.fingerprint
        if found.meta["tokenizer"] != fingerprint:
            raise CheckpointError(
                f"{found.folder} was trained with tokenizer {found.meta['tokenizer'][:16]}…, data.sources "
                f"holds {fingerprint[:16]}…; use the same dataset's tokenizer or another run_dir"
            )
        self.step, self.position = found.step, found.position
        self.has_new_mixture = self.loader.restore(found.meta["loader"], self.position)
        self.engine.load_state(found)
        self.tokens = int(found.meta["tokens"])
        self.skipped_in_a_row = int(found.meta["skipped_in_a_row"])
        self._saved_step = self.step

    def _announce(self, found: Checkpoint | None) -> None:
        precision = self.config.train.precision
        if not has_products(self.mesh.device, precision):
            self.log.say(
                f"note: this processor has no {precision} matrix products, so torch emulates them many times "
                "slower than fp32; use train.precision=fp32 here"
            )
        mesh = self.mesh
        if mesh.size > 1:
            sizes = f"dp {mesh.dp.size} × pp {mesh.pp.size} × tp {mesh.tp.size}"
            self.log.say(
                f"{mesh.size} processes = {sizes}; rank = (dp · {mesh.pp.size} + pp) · {mesh.tp.size} + tp"
            )
        if found is None:
            begun = {"processes": self.mesh.size, "parameters": self.engine.num_parameters}
            self.log.event("start", 0, **begun, sources=self.loader.summary())
            for (file, block), reason in self.loader.bad_blocks.items():
                self.log.event("bad_block", 0, file=file, batch=block, reason=reason, samples=[])
            return
        self.log.event("resume", self.step, processes=self.mesh.size, refused=list(found.refused))
        self.log.say(f"continuing {self.run_dir} at step {self.step} of {self.config.train.steps}")
        if self.has_new_mixture:
            self.log.event("mixture", self.step, position=self.position)
            self.log.say(
                "note: the mixture of sources is another from here on; each continues where it stood"
            )
        for key, (old, new) in changed_keys(
            found.meta["config"], self.config.model_dump(mode="json")
        ).items():
            if key != "run_dir":
                self.log.say(f"note: {key} was {old!r} when step {found.step} was saved and is now {new!r}")

    # --- after a step ---------------------------------------------------------------------------

    def _agree_on_sums(
        self, sums: StepSums, wants_stop: bool, has_replaced: bool
    ) -> tuple[StepSums, bool, bool]:
        """The global batch's sums, and whether any rank was asked to stop or could not read a sample: the
        step's one small all-reduce. Every later decision is a function of what it returns."""
        flags = float(wants_stop), float(has_replaced)
        values = (sums.loss, sums.z_loss, sums.tokens, sums.grad_norm_squared, *flags)
        vector = torch.tensor(values, dtype=torch.float64, device=self.mesh.device)
        loss, z_loss, tokens, norm, stop, replaced = all_reduce(vector, self.mesh.world).tolist()
        return StepSums(loss, z_loss, tokens, norm), stop > 0, replaced > 0

    def _quarantine(self, batches: Sequence[Batch]) -> None:
        """Report the samples that could not be read on any rank, and the record batches at fault.

        Raises:  DataError, on every rank alike, when these are too many
        """
        mine = [replacement for batch in batches for replacement in batch.replaced]
        found = sorted(
            {
                Replacement(*each)
                for rank in gather_json(mine, self.mesh.world, self.mesh.device)
                for each in rank
            }
        )
        for (file, block), group in groupby(sorted(found, key=itemgetter(1, 2)), key=itemgetter(1, 2)):
            samples = list(group)
            self.log.event(
                "bad_block",
                self.step,
                file=file,
                batch=block,
                reason=samples[0].reason,
                samples=[each.sample_id for each in samples],
            )
        self.loader.quarantine(found)

    def _check_divergence(self, report: StepReport) -> None:
        """Count steps that were not applied.

        Raises:  DivergedError when there are too many in a row
        """
        if report.is_applied:
            self.skipped_in_a_row = 0
        if report.is_applied or report.is_overflow:  # the latter ends, for the scale cannot shrink for ever
            return
        self.skipped_in_a_row += 1
        first = self.position - self.config.train.global_batch_size
        self.log.event(
            "skip", self.step, loss=report.loss, grad_norm=report.grad_norm, samples=[first, self.position]
        )
        self.log.say(
            f"step {self.step} not applied: loss {report.loss}, gradient norm {report.grad_norm}, "
            f"samples {first} to {self.position - 1}"
        )
        limit = self.config.resilience.max_skipped_steps
        if self.skipped_in_a_row > limit:
            raise DivergedError(
                f"{self.skipped_in_a_row} steps in a row were not finite "
                f"(resilience.max_skipped_steps={limit}); lower optim.lr, look at samples "
                f"up to {self.position}, and continue from {self.run_dir}/checkpoints"
            )

    def _record(
        self, report: StepReport, lr: float, seq_len: int, step_s: float, wait_s: float
    ) -> dict[str, Any]:
        self._productive_s += step_s if report.is_applied else 0.0
        per_s = self.config.tokens_per_step / step_s
        peak = self._peak_flops * self.mesh.size if self._peak_flops else None
        flops = token_flops(self.config.model, seq_len)
        return {
            "step": self.step,
            "position": self.position,
            "loss": report.loss,
            "z_loss": report.z_loss,
            "grad_norm": report.grad_norm,
            "lr": lr,
            "tokens": self.tokens,
            "seq_len": seq_len,
            "tokens_per_s": round(per_s, 1),
            "mfu": per_s * flops.strict / peak if peak else None,
            "mfu_non_causal": per_s * flops.non_causal / peak if peak else None,
            "goodput": round(self._productive_s / (time.perf_counter() - self._started), 4),
            "step_s": round(step_s, 4),
            "data_wait_s": round(wait_s, 4),
            "bad_blocks": len(self.loader.bad_blocks),
            "events": self._events(report),
            **({"loss_scale": scale.value} if (scale := self.engine.loss_scale).is_dynamic else {}),
        }

    def _events(self, report: StepReport) -> list[str]:
        events = ["replaced"] if report.has_replaced else []
        return events if report.is_applied else [*events, "overflow" if report.is_overflow else "skip"]
