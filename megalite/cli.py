"""The command line. Errors a user can mend end in one line and the exit code of their kind."""

from __future__ import annotations

import argparse
import errno
import faulthandler
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from megalite import __version__
from megalite.errors import BusyError, ConfigError, DataError, HangError, MegaliteError, first_line
from megalite.resilience.exits import record_exit
from megalite.resilience.preempt import PreemptionFlag

if TYPE_CHECKING:
    from megalite.config import Config
    from megalite.parallel.mesh import Mesh

_TRAIN_HELP = """\
Train a model, or continue a run: if run_dir holds a checkpoint, the newest whole one is where it
goes on, on any number of processes. SIGTERM or Ctrl-C saves and exits with code 75.

examples:
  megalite train configs/quickstart.toml
  megalite train configs/125m.toml run_dir=runs/a optim.lr=6e-4 'data.sources=[{path="data/train"}]'
  torchrun --standalone --nproc-per-node 2 -m megalite train configs/quickstart.toml
  deepspeed --module megalite train configs/1b.toml
  megalite train configs/70b.toml --dry-run

exit codes: 0 done, 2 a mistake in the input, 75 stopped after a save, 77 diverged, 76 a rank hung or was
lost, or another run is at work in run_dir or on the port
"""

_CHECK_HELP = """\
Compute three steps of a run in its own configuration and in the plainest one (fp32, nothing divided, nothing
compiled), and compare loss, gradient norm and, by AdamW's moments, every parameter's gradients. On the
machines, with the launcher and on the data of the run to come, it says within minutes whether they give the
right answer, and if not, whether kernels, layout, precision or compiler do not. It writes nothing.

examples:
  megalite check configs/quickstart.toml
  torchrun --standalone --nproc-per-node 8 -m megalite check configs/8b.toml mesh.tp=4 'data.sources=[…]'

It takes three layers of the model (more with more pipeline stages, all with mesh.pp_layers), each process
holding them whole. Exit codes: 0 they agree, 1 they do not, 2 a mistake in the input.
"""

_PLAN_HELP = """\
Look at a layout before spending on it. --draw prints a pipeline schedule as a timeline: a row for each
rank, a column for each unit of time (a forward; a backward takes two), with the share of time the ranks
are idle and the activations they hold.

examples:
  megalite plan --draw 1f1b --pp 4 --micro-batches 8
  megalite plan --draw interleaved --pp 4 --micro-batches 8 --chunks 2
  megalite plan --draw zero_bubble --pp 4 --micro-batches 8
"""

_SPIKES_HELP = """\
examples:
  megalite spikes runs/a                         every step left out, every rollback, with its curve
  megalite spikes runs/a --documents 20          and the documents that were left out, 20 a rollback
  megalite spikes runs/a --replay 1              was it the data? the first rollback's window, computed with
                                                 the weights of the newest checkpoint
  megalite spikes runs/a --replay 1 --at 4000    … or with those of another one
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    code = 1  # what Python makes of an error nobody foresaw
    _open_standard_files()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without our signs shows "?", and no traceback
    try:
        with _lossy_stderr():
            code = _command(argv)
    except SystemExit as left:  # how argparse leaves
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
        raise
    finally:
        record_exit(code)
    return code


def _open_standard_files() -> None:
    """Those that were closed (`2>&-`, some daemons): else a file of ours took the number, and what C code
    says of its own would land in it."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


class _LossyText(io.TextIOWrapper):
    """A text file that takes what it can."""

    def write(self, text: str, /) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


@contextmanager
def _lossy_stderr() -> Iterator[None]:
    """Where stderr is for who watches: a terminal or a pipe's reader that leaves does not end the work."""
    console = sys.stderr
    if not isinstance(console, io.TextIOWrapper):
        yield
        return
    ours = _LossyText(console.buffer, console.encoding, console.errors, line_buffering=True)
    try:
        with redirect_stderr(ours):
            yield
    finally:
        ours.detach()  # or it would close the file with itself
        try:
            console.flush()
        except OSError:  # Python would exit with 120 for what is stuck in there
            os.dup2(os.open(os.devnull, os.O_WRONLY), console.fileno())


def _command(argv: Sequence[str] | None) -> int:
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # argparse takes key=value only in one place; after an option they are left over.
    is_setting = [not item.startswith("-") and "=" in item for item in rest]
    if rest and (not hasattr(args, "settings") or not all(is_setting)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.settings = [*args.settings, *rest]
    if args.func is None:
        args.show_help()
        return 2
    try:
        _check_working_folder()
        code: int = args.func(args)
        sys.stdout.flush()
    except MegaliteError as error:
        return _fail(error)
    except BrokenPipeError:  # the reader of our output (head, a pager) has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as left:
        if not isinstance(left.__context__, BrokenPipeError):
            raise
        return 0  # rich has done the same, and would exit with 1
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return _fail(ConfigError(f"path {str(error.filename)[:60]}… is longer than the system takes"))
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = "the output" if error.filename is None else str(error.filename)
        print(f"megalite: {error.strerror}: {where} is not whole", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # Python would try again, and exit with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1  # it may pass with a restart, which exit code 2 would rule out
    except KeyboardInterrupt:
        return 130
    return code


def _check_working_folder() -> None:
    """Relative paths lead nowhere without one, and torch does not even load (or ends the process).

    Raises:  ConfigError if the folder the command was started in was removed
    """
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError(f"the working folder is gone ({error.strerror}); cd to one that is there") from None


def _fail(error: MegaliteError) -> int:
    rank = os.environ.get("RANK", "0")
    # What all ranks know is said once; a lost peer or a corrupt batch is one rank's own news.
    is_own = isinstance(error, (HangError, DataError)) and not error.is_shared
    if rank == "0" or is_own:
        who = f"rank {rank}: " if is_own and "WORLD_SIZE" in os.environ else ""
        print(f"megalite: {who}{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megalite", description="A small, provably right trainer for decoder-only language models."
    )
    parser.add_argument("--version", action="version", version=f"megalite {__version__}")
    # deepspeed's launcher puts it before the command, and says the same in LOCAL_RANK.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    parser.set_defaults(func=None, show_help=parser.print_help)
    commands = parser.add_subparsers(metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="train a model, or continue a run",
        description=_TRAIN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="`megalite train --keys` lists every configuration key with its meaning and default.",
    )
    _add_config(train, is_needed=False)
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved config, parameters, bytes, FLOPs; train nothing",
    )
    train.add_argument("--keys", action="store_true", help="print every configuration key and leave")
    train.set_defaults(func=_train)
    _add_check(commands)
    _add_plan(commands)
    _add_spikes(commands)
    _add_other_commands(commands)
    return parser


def _add_config(parser: argparse.ArgumentParser, is_needed: bool) -> None:
    parser.add_argument("config", nargs=None if is_needed else "?", help="TOML file; see configs/")
    parser.add_argument(
        "settings", nargs="*", default=[], metavar="section.key=value", help="values that replace the file's"
    )


def _add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "check",
        help="see on this machine whether a configuration computes what it should",
        description=_CHECK_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_config(parser, is_needed=True)
    parser.set_defaults(func=_check)


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    plan = commands.add_parser(
        "plan",
        help="look at a layout before spending on it",
        description=_PLAN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plan.add_argument("--draw", metavar="SCHEDULE", help="gpipe, 1f1b, interleaved or zero_bubble")
    plan.add_argument("--pp", type=int, default=4, help="pipeline ranks (default 4)")
    plan.add_argument("--micro-batches", type=int, default=8, help="micro-batches a step (default 8)")
    plan.add_argument("--chunks", type=int, default=1, help="stages a rank, for interleaved (default 1)")
    plan.set_defaults(func=_plan)


def _add_spikes(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "spikes",
        help="list a run's spikes and the documents in them; replay one",
        epilog=_SPIKES_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--documents", type=int, default=0, metavar="N", help="documents shown a rollback")
    parser.add_argument("--replay", type=int, metavar="N", help="compute the N-th rollback's window again")
    parser.add_argument("--at", type=int, metavar="STEP", help="with this checkpoint's weights")
    parser.set_defaults(func=_spikes)


def _add_other_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from data_tools.cli import add_commands as add_data_commands
    from megalite.checkpoint.command import add_command as add_checkpoint_command
    from megalite.generate import add_command as add_generate_commands
    from megalite.kernels_command import add_command as add_kernels_command

    add_generate_commands(commands)
    add_kernels_command(commands)
    add_data_commands(commands)
    add_checkpoint_command(commands)


def _train(args: argparse.Namespace) -> int:
    from megalite.config_file import describe_keys, load_config

    if args.keys:
        print(describe_keys())
        return 0
    if args.config is None:
        raise ConfigError("no config file given; try megalite train configs/quickstart.toml")
    config = load_config(args.config, args.settings)
    if args.dry_run:
        from megalite.dry_run import describe

        print(describe(config))
        return 0
    # Before the seconds that loading torch and meeting the other ranks take: a signal meant to make the
    # run save and leave must find someone who listens, or this rank dies of it and the others hang.
    with PreemptionFlag() as flag:
        from megalite.trainer import Trainer

        def fit(mesh: Mesh) -> int:
            Trainer(config, mesh).fit(flag)
            return 0

        return _on_ranks(config, fit)


def _check(args: argparse.Namespace) -> int:
    from megalite.check import check
    from megalite.config_file import load_config

    config = load_config(args.config, args.settings)
    return _on_ranks(config, lambda mesh: check(config, mesh))


def _plan(args: argparse.Namespace) -> int:
    from megalite.parallel.schedule import build_schedule
    from megalite.parallel.timeline import draw, simulate

    if args.draw is None:
        raise ConfigError("nothing to plan; try megalite plan --draw 1f1b --pp 4 --micro-batches 8")
    schedule = build_schedule(args.draw, args.pp, args.micro_batches, args.chunks)
    chunks = f", {args.chunks} chunks a rank" if args.chunks > 1 else ""
    print(
        draw(simulate(schedule), f"{args.draw}, {args.pp} ranks, {args.micro_batches} micro-batches{chunks}")
    )
    return 0


def _spikes(args: argparse.Namespace) -> int:
    from megalite.spikes import show

    return show(args)


def _on_ranks(config: Config, work: Callable[[Mesh], int]) -> int:
    """Do `work` together with the other processes of the launcher, in the layout of `config`."""
    import torch.distributed as dist

    from megalite.parallel.mesh import MeshShape, build_mesh, close_mesh, world_size

    with suppress(AttributeError, OSError, ValueError):  # a stderr that is no file, as under pytest
        faulthandler.enable()  # a backend that aborts says from where it was called
    # A layout that cannot be is refused before any process group is built.
    config.grad_accum_steps(config.data_parallel_size(world_size()))
    shape = MeshShape(config.mesh.tp, config.mesh.pp, config.kv_copies, config.mesh.zero_shard_size)
    timeout_s = config.resilience.comm_timeout_s
    try:
        mesh = build_mesh(timeout_s, shape)
    except dist.DistError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        if "EADDRINUSE" in str(error):
            raise BusyError(
                f"the processes cannot meet at {place}: the port is in use, perhaps by another run; wait "
                "until that has ended, or give the launcher a free one (torchrun: --standalone; "
                "deepspeed: --master_port)"
            ) from error
        raise HangError(
            f"the processes did not find each other within {timeout_s:.0f} s at {place} "
            f"({first_line(error)}); is every host up, and that port free and reachable?"
        ) from error
    try:
        code = work(mesh)
    except dist.DistError as error:
        raise HangError(
            f"a peer is gone or silent for {timeout_s:.0f} s "
            f"({first_line(error)}); start the same command again to continue"
        ) from error
    close_mesh(mesh)
    return code
