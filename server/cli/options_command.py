"""Makes a typer command from an options class: its fields become flags with their help."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from inspect import Parameter, Signature
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import typer

from nybble.server.cli.config_file import ConfigOption

T = TypeVar("T")


def parameters(options: type[Any]) -> Iterator[Parameter]:
    """A parameter for each field of a dataclass; nested dataclasses are flattened."""
    hints = get_type_hints(options, include_extras=True)
    for field in fields(options):
        hint = hints[field.name]
        if is_dataclass(hint):
            assert isinstance(hint, type)
            yield from parameters(hint)
            continue
        default = Parameter.empty if field.default is MISSING else field.default
        yield _keyword(field.name, hint, default)


def filled(options: type[T], values: dict[str, Any]) -> T:
    """An options object from values by parameter name."""
    hints = get_type_hints(options)
    given = {
        field.name: filled(hints[field.name], values)
        if is_dataclass(hints[field.name])
        else values[field.name]
        for field in fields(options)  # type: ignore[arg-type]
    }
    return options(**given)


def takes(
    options: type[T], *, positional: str | None = None
) -> Callable[[Callable[[T], None]], Callable[..., None]]:
    """Make a command of a function of ``options``: with its flags, and ``--config`` for a file.

    positional: a required field, which may be given by its flag or as the command's argument.
    """
    if positional is None:
        return _with_flags(options)
    flag = f"--{positional.replace('_', '-')}"
    argument = typer.Argument(metavar=positional.upper(), help=f"The same as {flag}.")

    def decorate(run: Callable[[T], None]) -> Callable[..., None]:
        def command(context: typer.Context, argument: str | None, **values: Any) -> None:
            option = values[positional]
            source = context.get_parameter_source(positional)
            if argument is None and option is None:
                raise typer.BadParameter(f"say which: {context.command_path} NAME, or {flag} NAME")
            if argument is not None and source is not None and source.name == "COMMANDLINE":
                raise typer.BadParameter(f"{argument!r} and {flag} {option!r}: give one of them")
            run(filled(options, values | {positional: option if argument is None else argument}))

        command.__signature__ = Signature(  # type: ignore[attr-defined]
            [
                _keyword("context", typer.Context),
                _keyword("argument", Annotated[str | None, argument], None),
                *(
                    _not_required(each) if each.name == positional else each
                    for each in parameters(options)
                ),
                _keyword("config", ConfigOption, None),
            ]
        )
        command.__annotations__ = {}
        command.__name__, command.__doc__ = run.__name__, run.__doc__
        return command

    return decorate


def _with_flags(options: type[T]) -> Callable[[Callable[[T], None]], Callable[..., None]]:
    def decorate(run: Callable[[T], None]) -> Callable[..., None]:
        def command(**values: Any) -> None:
            run(filled(options, values))

        config = _keyword("config", ConfigOption, None)
        command.__signature__ = Signature([*parameters(options), config])  # type: ignore[attr-defined]
        command.__annotations__ = {}
        command.__name__, command.__doc__ = run.__name__, run.__doc__
        return command

    return decorate


def _keyword(name: str, annotation: Any, default: Any = Parameter.empty) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _not_required(parameter: Parameter) -> Parameter:
    kind, *rest = get_args(parameter.annotation)
    return parameter.replace(default=None, annotation=Annotated[(kind | None, *rest)])
