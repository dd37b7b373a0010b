"""The training loop. Read this file first.

A step: the loader gives this rank's micro-batches, the engine computes reduced gradients without
touching a weight, all ranks agree on what the step was worth from one small all-reduce, and only
then the optimizer moves. Everything a run is lies in (config, checkpoint): the data order, dropout
and the learning rate are functions of the seed, the position and the step.
"""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path
from typing import Any

from megalite.agreement import agree_on_config, agree_on_data, together
from megalite.checkpoint.history import Rollback, read_ledger
from megalite.checkpoint.snapshots import KeptSnapshot
from megalite.checkpoint.store import Checkpoint, newest
from megalite.checkpoint.writer import Writer
from megalite.config import Config
from megalite.config_file import changed_keys
from megalite.data.batch import Batch
from megalite.data.loader import Share
from megalite.engines.allocator import keep_freed_memory
from megalite.engines.choice import engine_class
from megalite.engines.engine import Engine
from megalite.errors import CheckpointError, ConfigError, DataError, DivergedError, PreemptedError
from megalite.log import LEDGER, RunLog
from megalite.meter import Measured, Meter, StepReport, measure
from megalite.model.flops import has_products
from megalite.optim.lr import learning_rate
from megalite.parallel.mesh import Mesh
from megalite.recovery import Recovery
from megalite.resilience.ladder import Spike
from megalite.resilience.preempt import PreemptionFlag
from megalite.resilience.rank_watch import RankWatch
from megalite.resilience.rerun import blame, changed_ranks
from megalite.run_data import open_loaders, quarantine
from megalite.run_folder import RunFolder
from megalite.spikes import write_report
from megalite.validation import validate


class Trainer:
    """One run on one rank, from the newest checkpoint (or the seed) to the last step."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        """Open the data, build the model, restore the newest checkpoint.

        Raises:  ConfigError, DataError, CheckpointError; BusyError if another run is at work in run_dir
        """
        self.config, self.mesh = config, mesh
        self.run_dir = Path(config.run_dir)
        config.grad_accum_steps(mesh.dp.size)
        agree_on_config(config, mesh)
        if mesh.device.type == "cpu":
            keep_freed_memory()
        self.loader, self.validation = open_loaders(config, mesh)
        agree_on_data([loader for loader in (self.loader, self.validation) if loader is not None], mesh)
        self.engine: Engine = together(partial(engine_class, config, mesh.device), mesh)(config, mesh)
        self.step = 0  # optimizer steps taken or skipped
        self.position = 0  # samples consumed
        self.tokens = 0  # valid labels trained on
        self.has_new_mixture = False  # whether it is another than that of the checkpoint
        self._meter = Meter(config, mesh)
        self.recovery = Recovery(config, mesh)
        self.folder = RunFolder(config, mesh)
        ledger = read_ledger(self.run_dir, mesh)
        found = newest(self.run_dir / "checkpoints", mesh, ledger=ledger)
        self._restore(found, ledger)
        # Not before: a config that does not fit the run in run_dir must leave its files alone.
        self.folder.prepare(self.loader)
        steps, every = config.train.steps, config.log.every_steps
        self.log = together(lambda: RunLog(self.run_dir, mesh.rank == 0, steps, every), mesh)
        self.writer = Writer(config, mesh, self.log, self.engine.num_parameters)
        self.watch = RankWatch(config, mesh, self.engine, self.log)
        self._announce(found)

    # --- the loop -------------------------------------------------------------------------------

    def fit(self, flag: PreemptionFlag) -> None:
        """Train until `train.steps`, saving and validating on the way, or until any rank's flag is up.

        Raises:  PreemptedError after a save when asked to stop; DivergedError
        """
        self._meter.start()
        with self.folder, self.log, self.writer, self.watch:
            self.log.resume(self.step)
            while self.step < self.config.train.steps:
                spike = self._run(flag)
                if spike is not None:
                    self._go_back(spike)

    def _run(self, flag: PreemptionFlag) -> Spike | None:
        """Steps from here to the last, or to one after which the run must go back."""
        train, every, scale = self.config.train, self.config.checkpoint.every_steps, self.engine.loss_scale
        share = Share(train.global_batch_size, train.micro_batch_size, self.mesh.dp.rank, self.mesh.dp.size)
        with self.loader.steps(self.position, share, self.config.data.prefetch) as stream:
            while self.step < train.steps:
                began, waited = time.perf_counter(), stream.wait_s
                rate = learning_rate(self.config.optim, self.step, train.steps)
                rate *= self.recovery.ladder.lr_factor(self.step)
                self.recovery.enter(self.loader.regime(self.position))
                with self.watch.step(self.step + 1):
                    batches = next(stream)
                    report = self.train_step(batches, rate, flag.requested)
                self.step += 1
                self.position += train.global_batch_size
                self.tokens += report.tokens if report.is_applied else 0
                times = time.perf_counter() - began, stream.wait_s - waited
                if report.has_replaced:
                    quarantine(self.loader, batches, self.step, self.mesh, self.log)
                counts = {"step": self.step, "position": self.position, "tokens": self.tokens, "lr": rate}
                record = counts | self._meter.record(report, batches[0].tokens.shape[1], *times)
                record["bad_blocks"] = len(self.loader.bad_blocks)
                if scale.is_dynamic:
                    record["loss_scale"] = scale.value
                is_last, is_preempted = self.step == train.steps, report.is_preempted
                is_due = train.eval_every_steps and self.step % train.eval_every_steps == 0
                # Who asks to stop waits for the save; only the end has no later validation.
                if (is_due and not is_preempted) or (train.eval_every_steps and is_last):
                    losses = self.evaluate(None if is_last else flag)
                    is_preempted = is_preempted or losses is None
                    record |= losses or {}
                self.log.step(record)
                spike = self._review(report)
                if spike is not None:
                    return spike
                if is_last or is_preempted or (every and self.step % every == 0):
                    self.save(record, is_last or is_preempted)
                self.writer.poll()
                snapshots = self.recovery.snapshots
                if snapshots.is_due(self.step):
                    snapshots.take(self.step, self.position, self._meta(), self.engine.snapshot)
                if is_preempted and not is_last:
                    self.log.event("preempted", self.step, cause=flag.cause)
                    raise PreemptedError(
                        f"asked to stop: saved step {self.step} in {self.run_dir}; the same command continues"
                    )
        return None

    def train_step(self, micro_batches: list[Batch], lr: float, wants_stop: bool = False) -> StepReport:
        """One optimizer step on this rank's micro-batches, if healthy training could have produced it.

        Else the optimizer is not called: weights, moments and AdamW's step count stay as they were. Such a
        step is computed again before it is given up, since a processor may have erred. In fp16 the loss
        scale is lowered where the gradient overflows.

        Raises:  DivergedError, on every rank, if a step comes out differently each time it is computed
        """
        measured = measure(self.engine, micro_batches, self.config, self.mesh, wants_stop)
        verdict = self.recovery.detector.judge(measured.loss, measured.grad_norm)
        scale = self.engine.loss_scale
        is_overflow = verdict == "not finite" and math.isfinite(measured.loss) and scale.can_shrink
        cause = ""
        if verdict != "healthy" and not is_overflow and self.config.resilience.rerun_steps:
            measured, cause = self._measure_again(measured, micro_batches)
            verdict = self.recovery.detector.judge(measured.loss, measured.grad_norm)
        is_applied = verdict == "healthy" and measured.tokens > 0
        if verdict == "healthy" and not is_applied:
            cause = "no labels"
        if is_applied:
            self.engine.optimizer_step(lr, measured.grad_scale(self.config.optim.grad_clip))
        scale.update(verdict != "not finite")
        return StepReport(**vars(measured), is_applied=is_applied, is_overflow=is_overflow, cause=cause)

    def _measure_again(self, first: Measured, micro_batches: list[Batch]) -> tuple[Measured, str]:
        """A refused step once more, twice if the second run differs: the last run, and who is to blame.

        Raises:  DivergedError, on every rank, if no two runs agree
        """
        runs = [first]
        shares = [self.recovery.shares(first.sums)]
        while len(runs) < 2 or (len(runs) < 3 and changed_ranks(shares[0], shares[1])):
            runs.append(measure(self.engine, micro_batches, self.config, self.mesh, first.is_preempted))
            shares.append(self.recovery.shares(runs[-1].sums))
        found = blame(*shares)
        if found.cause == "data":
            return runs[-1], "data"
        self.log.event("hardware", self.step + 1, cause=found.cause, ranks=list(found.ranks), shares=shares)
        ranks = " or ".join(f"rank {rank}" for rank in found.ranks)
        line = (
            f"step {self.step + 1} came out differently when computed again: {found.cause} error on {ranks}"
        )
        self.log.say(line)
        if found.cause == "persistent":
            raise DivergedError(f"{line}; take its host out, and continue from {self.run_dir}/checkpoints")
        return runs[-1], "hardware"

    def evaluate(self, flag: PreemptionFlag | None = None) -> dict[str, Any] | None:
        """The losses of validation, see `validate`; None, on every rank, if the flag of any goes up."""
        if self.validation is None:
            raise ConfigError("data.validation is empty; name a held-out dataset")
        return validate(self.engine, self.validation, self.config.train, self.mesh, flag)

    def save(self, record: dict[str, Any], is_last: bool) -> None:
        """Save this step, of which `record` tells the losses; see `Writer.save`.

        Raises:  CheckpointError if the last save of this process failed; the older checkpoints are whole
        """
        self.watch.check_replicas(self.step)
        losses = {
            key: record[key] for key in ("loss", "val_loss") if math.isfinite(record.get(key, math.nan))
        }
        self.writer.save(self.step, self.position, self._meta() | losses, self.engine, is_last)

    def _meta(self) -> dict[str, Any]:
        """What a checkpoint and a snapshot keep beside the state of the engine."""
        return {
            "applied_steps": self.engine.applied_steps,
            "loss_scale": self.engine.loss_scale.state(),
            "tokens": self.tokens,
            "recovery": self.recovery.state(),
            "tokenizer": self.loader.datasets[0].tokenizer.fingerprint,
            "loader": self.loader.state(self.position),
            "config": self.config.model_dump(mode="json"),
        }

    # --- start ----------------------------------------------------------------------------------

    def _restore(self, found: Checkpoint | KeptSnapshot | None, ledger: list[Rollback]) -> None:
        """Go on from a checkpoint that verifies or from a snapshot; without either from the seed.

        In either case without the samples that the ledger's rollbacks left out.

        Raises:  CheckpointError if it is of another model or tokenizer; ConfigError if the data would be
                 read in another order; DataError if it does not last for the run
        """
        self.has_new_mixture = False
        if found is None:
            self.step = self.position = self.tokens = 0
            self.loader.restore(None, 0)
            self.engine.initialize()
        else:
            self.step, self.position = found.step, found.position
            if isinstance(found, KeptSnapshot):
                self.engine.load_snapshot(found.state)
            else:
                self._check_tokenizer(found)
                # An imported model has read nothing.
                self.has_new_mixture = self.loader.restore(found.meta.get("loader"), self.position)
                self.engine.load_state(found)
            self.tokens = int(found.meta["tokens"])
        self.recovery.load(None if found is None else found.meta, ledger)
        last_read = max(self.position - 1, 0)
        before = self.loader.skips.index_at(last_read)
        self.loader.skip([*self.config.data.skip, *(rollback.skipped for rollback in ledger)])
        if self.position and self.loader.skips.index_at(last_read) != before:
            raise ConfigError(
                f"data.skip={list(self.config.data.skip)} leaves out samples up to {before}, which this run "
                "has read; leave out later ones, or use another run_dir"
            )
        left = max(self.config.train.steps - self.step, 0)
        self.loader.check_length(self.position + left * self.config.train.global_batch_size)

    def _check_tokenizer(self, found: Checkpoint) -> None:
        fingerprint = self.loader.datasets[0].tokenizer.fingerprint
        if found.meta["tokenizer"] != fingerprint:
            raise CheckpointError(
                f"{found.folder} was trained with tokenizer {found.meta['tokenizer'][:16]}…, data.sources "
                f"holds {fingerprint[:16]}…; use the same dataset's tokenizer or another run_dir"
            )

    def _announce(self, found: Checkpoint | None) -> None:
        precision = self.config.train.precision
        if not has_products(self.mesh.device, precision):
            self.log.say(
                f"note: this processor has no {precision} matrix products, so torch emulates them many times "
                "slower than fp32; use train.precision=fp32 here"
            )
        if not self.folder.has_locks:
            self.log.say("note: run_dir's file system has no locks; see that no second run writes there")
        mesh = self.mesh
        if mesh.size > 1:
            sizes = f"dp {mesh.dp.size} × pp {mesh.pp.size} × tp {mesh.tp.size}"
            self.log.say(
                f"{mesh.size} processes = {sizes}; rank = (dp · {mesh.pp.size} + pp) · {mesh.tp.size} + tp"
            )
        if skipped := [rollback.skipped for rollback in self.recovery.ladder.rollbacks]:
            self.log.say(f"note: {LEDGER} has rollbacks; samples {skipped} stay left out")
        if found is None:
            begun = {"processes": mesh.size, "parameters": self.engine.num_parameters}
            self.log.event("start", 0, **begun, sources=self.loader.summary())
            for (file, block), reason in self.loader.bad_blocks.items():
                self.log.event("bad_block", 0, file=file, batch=block, reason=reason, samples=[])
            return
        self.log.event("resume", self.step, processes=mesh.size, refused=list(found.refused))
        steps = self.config.train.steps
        rest = "" if self.step < steps else ", so nothing is left to do; a larger train.steps goes on"
        self.log.say(f"continuing {self.run_dir} at step {self.step} of {steps}{rest}")
        self._tell_of_mixture()
        for key, (old, new) in changed_keys(
            found.meta["config"], self.config.model_dump(mode="json")
        ).items():
            if key != "run_dir":
                self.log.say(f"note: {key} was {old!r} when step {found.step} was saved and is now {new!r}")

    def _tell_of_mixture(self) -> None:
        if self.has_new_mixture:
            self.log.event("mixture", self.step, position=self.position)
            self.log.say(
                "note: the mixture of sources is another from here on; each continues where it stood"
            )

    # --- after a step ---------------------------------------------------------------------------

    def _review(self, report: StepReport) -> Spike | None:
        """Take note of what became of a step; the spike that it confirms, if the run may go back.

        Raises:  DivergedError when too many steps are refused in a row
        """
        recovery, limits = self.recovery, self.config.resilience
        if report.is_applied:
            spike = recovery.applied(self.step, report.loss, report.grad_norm)
        elif report.is_overflow:
            return None  # that ends, for the scale cannot shrink for ever
        else:
            places = self.position - self.config.train.global_batch_size, self.position - 1
            first, last = map(self.loader.skips.index_at, places)
            what = f"loss {report.loss:.4g}, gradient norm {report.grad_norm:.4g}"
            if report.cause == "no labels":
                what = "no label to learn from"
            values = {"loss": report.loss, "grad_norm": report.grad_norm, "cause": report.cause}
            self.log.event("skip", self.step, samples=[first, last + 1], **values)
            self.log.say(f"step {self.step} not applied: {what}, samples {first} to {last}")
            if report.cause == "no labels":
                return None  # which says nothing of the weights
            spike = recovery.ladder.refused(self.step, what)
            in_a_row = recovery.ladder.refused_in_a_row
            if in_a_row > limits.max_skipped_steps:
                raise self._diverged(
                    f"{in_a_row} steps in a row were refused, the last with {what} "
                    f"(resilience.max_skipped_steps={limits.max_skipped_steps})",
                    (first, last + 1),
                )
        return spike if limits.max_rollbacks else None

    def _go_back(self, spike: Spike) -> None:
        """To weights from well before the spike, and on from there without the samples around it.

        Raises:  DivergedError when that has been done too often; ConfigError if the ledger cannot be written
        """
        ladder, batch = self.recovery.ladder, self.config.train.global_batch_size
        every, left = self.config.checkpoint.every_steps, self.step
        done = self.position - self.step * batch  # 0, unless the batch size has changed in this run

        def samples(window: tuple[int, int], begun: int) -> tuple[int, int]:
            """Of a window of steps, as global indices; none of the first `begun`."""
            start = max(window[0] * batch + done, begun)
            stop = max(window[1] * batch + done, start + (window[1] - window[0]) * batch)
            return self.loader.skips.index_at(start), self.loader.skips.index_at(stop)

        hopeless = ladder.exhausted(spike)
        if hopeless is not None:
            read = samples((spike.onset - 1, spike.detected), 0)
            raise self._diverged(f"a spike at step {spike.onset} after {hopeless}", read)
        self.writer.wait()
        found = self.recovery.target(spike)
        to_step, begun = (0, 0) if found is None else (found.step, found.position)
        skipped = samples(ladder.window(spike, to_step), begun)
        rollback = Rollback(spike.onset, spike.detected, spike.reason, to_step, skipped)
        curve = f"spikes/rollback_{len(ladder.rollbacks) + 1:04d}.jsonl"
        self.log.keep_curve(self.run_dir / curve, to_step)
        told = rollback.to_json() | {"curve": curve}
        together(lambda: self.log.commit("rollback", self.step, **told), self.mesh)
        self.log.say(
            f"spike at step {spike.onset} ({spike.reason}): back to step {to_step}, and on without samples "
            f"{rollback.skipped[0]} to {rollback.skipped[1] - 1}"
        )
        self._restore(found, [*ladder.rollbacks, rollback])
        self._tell_of_mixture()  # of a checkpoint from before it was changed
        self.recovery.snapshots.forget_after(to_step)
        self.log.resume(to_step)
        if every and isinstance(found, KeptSnapshot) and left // every > to_step // every:
            self.save({}, is_last=False)  # what lies on disk is of the future that was left

    def _diverged(self, reason: str, samples: tuple[int, ...]) -> DivergedError:
        """The error that ends a run which cannot help itself, once its report is written."""
        path = self.run_dir / "diverged.md"
        if self.mesh.rank == 0:
            try:
                write_report(path, reason, samples, self.recovery.ladder.rollbacks, self.loader)
            except (OSError, CheckpointError, DataError) as error:
                # The divergence is what the run ends with, on every rank.
                self.log.say(f"alert: cannot write {path}: {error}")
        self.log.event("diverged", self.step, reason=reason, samples=list(samples))
        return DivergedError(f"{reason}; {path} says what was tried and which documents were read")
