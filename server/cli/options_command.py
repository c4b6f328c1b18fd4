"""A typer command of an options class: what the class says, the command line and its help show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from inspect import Parameter, Signature
from typing import Any, TypeVar, get_type_hints

from nybble.server.cli.config_file import ConfigOption

T = TypeVar("T")


def parameters(options: type[Any]) -> Iterator[Parameter]:
    """A parameter for each field of a dataclass, with those of a field that is one in its place."""
    hints = get_type_hints(options, include_extras=True)
    for field in fields(options):
        hint = hints[field.name]
        if is_dataclass(hint):
            assert isinstance(hint, type)
            yield from parameters(hint)
            continue
        default = Parameter.empty if field.default is MISSING else field.default
        yield Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def filled(options: type[T], values: dict[str, Any]) -> T:
    """The options with the values that are named as their parameters are."""
    hints = get_type_hints(options)
    given = {
        field.name: filled(hints[field.name], values)
        if is_dataclass(hints[field.name])
        else values[field.name]
        for field in fields(options)  # type: ignore[arg-type]
    }
    return options(**given)


def takes(options: type[T]) -> Callable[[Callable[[T], None]], Callable[..., None]]:
    """Make a command of a function of ``options``: with its flags, and ``--config`` for a file."""

    def decorate(run: Callable[[T], None]) -> Callable[..., None]:
        def command(**values: Any) -> None:
            run(filled(options, values))

        config = Parameter("config", Parameter.KEYWORD_ONLY, default=None, annotation=ConfigOption)
        command.__signature__ = Signature([*parameters(options), config])  # type: ignore[attr-defined]
        command.__annotations__ = {}
        command.__name__, command.__doc__ = run.__name__, run.__doc__
        return command

    return decorate
