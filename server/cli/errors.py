"""How commands end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import typer


def on_stderr(message: str) -> None:
    """Print the error that ends the command."""
    print(f"error: {message}", file=sys.stderr)


@contextmanager
def expected_errors(report: Callable[[str], None] = on_stderr) -> Iterator[None]:
    """Turn expected errors into one line and exit code 1. report: receives the line."""
    try:
        yield
    except (LookupError, ValueError, OSError) as error:
        # CheckpointError, UnsupportedModelError and the settings' errors are ValueErrors,
        # ModelNotFoundError is a LookupError; a KeyError or IndexError is a bug.
        if isinstance(error, KeyError | IndexError):
            raise
        report(" ".join(str(error).split()))
        raise typer.Exit(1) from None


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C while loading ends without a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise typer.Exit(130) from None


def end_at_once(code: int) -> NoReturn:
    """End the process, whatever its threads still do.

    Python's own end frees each object by itself, which takes seconds of processor time after a
    model, and waits for every thread: for a grammar, or for a file of a place that does not answer.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a full disk
            stream.flush()
    os._exit(code)
