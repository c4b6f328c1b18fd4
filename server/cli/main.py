"""The command line: ``nybble serve|pack|inspect|merge|…``, and ``serve`` by itself."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from nybble import __version__
from nybble.server.cli.commands.batch import batch
from nybble.server.cli.commands.bench import bench
from nybble.server.cli.commands.cache import cache
from nybble.server.cli.commands.doctor import doctor
from nybble.server.cli.commands.evaluate import evaluate
from nybble.server.cli.commands.evaluate_adapter import evaluate_adapter
from nybble.server.cli.commands.finetune import finetune
from nybble.server.cli.commands.merge import merge
from nybble.server.cli.commands.new_key import new_key
from nybble.server.cli.commands.packing import inspect, pack
from nybble.server.cli.commands.qat import qat
from nybble.server.cli.commands.quantize import quantize
from nybble.server.cli.commands.replicas import replicas
from nybble.server.cli.commands.serve import serve


class _Commands(TyperGroup):
    """The commands, whose errors do without the prefix that pydantic gives typer's."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")
            raise


app = typer.Typer(
    name="nybble",
    cls=_Commands,
    help="Serve 4-bit language models with an OpenAI-compatible API.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (serve, batch, bench, pack, inspect, doctor, merge):
    app.command()(command)
for command in (new_key, quantize, finetune, qat):
    app.command()(command)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(replicas)
app.command("eval")(evaluate)
app.command("eval-adapter")(evaluate_adapter)
app.add_typer(cache, name="cache")


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@contextmanager
def _whatever_becomes_of_the_log() -> Iterator[None]:
    """Python ends with status 120 if a full disk does not take what stderr still has to write."""
    try:
        yield
    finally:
        try:
            sys.stderr.flush()
        except OSError:
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (for as long as the process lives)


def main() -> None:
    """The ``nybble`` command."""
    with _whatever_becomes_of_the_log():
        app()


def serve_main() -> None:
    """The ``serve`` command: ``nybble serve`` by its short name."""
    with _whatever_becomes_of_the_log():
        app(["serve", *sys.argv[1:]], prog_name="nybble")
