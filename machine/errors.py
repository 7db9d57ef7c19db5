"""Errors that end a program with one sentence instead of a traceback."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from machine import processes


class UserError(ValueError):
    """What the user can correct: the message is printed on standard error as one sentence, and the exit code is 2."""


class CheckpointError(UserError):
    """A checkpoint that must not be used; the message says which, why, and what to use instead."""


class DataError(UserError):
    """Data that is missing or cannot be read; the message has the file, the 1-based line, the value and the way out."""


class MissingData(DataError):
    """A split that does not exist, as opposed to one that cannot be read."""


class ModelError(UserError):
    """A model that cannot be loaded; the message says which, why, and what to do."""


class ArgumentError(UserError):
    """An argument that cannot be used; the message names it, its value and the way out."""


class PromptError(UserError):
    """A prompt that cannot be built or does not fit; the message says which row it is and what to change."""


@contextlib.contextmanager
def clear_errors(program: str) -> Iterator[None]:
    """Bad input ends the program with exit code 2 and one sentence on standard error, without a traceback."""
    try:
        yield
    except UserError as error:
        if processes.is_main():
            print(f"{program}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


class TrainingError(RuntimeError):
    """A run that cannot continue; the message has the step, the reason and the last checkpoint."""
