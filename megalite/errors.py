"""Every error a user can cause or meet, each with the exit code the launchers act on.

One rule for messages: what is wrong, where (file, key or shape), the value seen, what would be right.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LISTED, _EXAMPLES = 12, 5  # names that are all told; and of more, so many of the nearest


class MegaliteError(Exception):
    """Base of all errors megalite raises on purpose; the CLI prints it on one line."""

    exit_code = 2
    is_shared = False  # whether every rank raised it alike, so that one of them may speak for all


class ConfigError(MegaliteError):
    """A configuration value is unknown, of the wrong type, or at odds with another."""


class DataError(MegaliteError):
    """A data shard, tokenizer or text source is missing, corrupt, or does not fit the model."""


class CheckpointError(MegaliteError):
    """A checkpoint is missing, corrupt, does not fit, or could not be written."""


class PreemptedError(MegaliteError):
    """The run was asked to stop, saved a checkpoint, and can be continued."""

    exit_code = 75


class HangError(MegaliteError):
    """A step or a collective did not finish in time or a peer is gone; a restart continues the run."""

    exit_code = 76


class BusyError(MegaliteError):
    """Another process is at work in the folder, or has the port at which the ranks meet. It may be the end of
    the run that this one continues, on a host that its launcher has lost; then a later start continues it."""

    exit_code = 76


class ReplicaError(MegaliteError):
    """Ranks that must hold the same weights do not. Every checkpoint was compared before it was written, so
    a restart continues from a good one; where software or a broken device is the cause, it happens again, and
    the supervisor gives up for want of progress."""

    exit_code = 76


class DivergedError(MegaliteError):
    """The loss stayed non-finite for longer than the run allows; a human must look."""

    exit_code = 77


def first_line(error: BaseException) -> str:
    """What a communication backend complains of, on one line. nccl tells the cause below its first line."""
    told = str(error) or type(error).__name__
    cause = told.partition("Last error:")[2].strip()
    return "; ".join(text.splitlines()[0][:200] for text in (told, cause) if text)


def is_unicode(text: str) -> bool:
    """Whether a word of the command line was UTF-8; Python keeps other bytes as signs that no file takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about a name that is not known: what was meant perhaps, or what there is."""
    names = sorted(known)
    if near := difflib.get_close_matches(name, names, n=1):
        return f"did you mean {near[0]!r}?"
    if len(names) <= _LISTED:
        return f"there are {', '.join(names) or 'none'}"
    some = difflib.get_close_matches(name, names, n=_EXAMPLES, cutoff=0.0)
    return f"there are {len(names)}, such as {', '.join(some)}"
