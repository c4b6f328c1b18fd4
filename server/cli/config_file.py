"""A command's options from a TOML file: the flags' names without the dashes before them."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the file's values the command's defaults, so that flags override them.

    The callback of an eager option. Raises typer.BadParameter naming the file and key at fault.
    """
    if path is None:
        return None
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise typer.BadParameter(f"{path} cannot be read as TOML: {error}") from error
    options = {
        option.removeprefix("--"): parameter
        for parameter in context.command.params
        for option in parameter.opts
        if option.startswith("--")
        if parameter.param_type_name == "option" and not parameter.is_eager
    }
    defaults: dict[str, Any] = {}
    for key, value in settings.items():
        name = key.replace("_", "-")
        if name not in options:
            near = difflib.get_close_matches(name, options, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise typer.BadParameter(f"{path}: there is no option {key!r}{hint}")
        parameter: Any = options[name]
        if parameter.name in defaults:
            raise typer.BadParameter(f"{path}: {key!r} is there twice, with - and with _")
        where = f"{path}: {key!r}"
        given = defaults[str(parameter.name)] = _value(where, parameter, value)
        try:
            parameter.process_value(context, given)
        except typer.BadParameter as error:  # of a flag, which is not where the value stands
            raise typer.BadParameter(f"{where} is {value!r}: {error.message}") from None
    context.default_map = defaults
    return path


def _value(where: str, parameter: Any, value: Any) -> Any:
    """As the command line would have it: text to be parsed, lists of it, or true and false."""
    if parameter.is_flag:
        if not isinstance(value, bool):
            raise typer.BadParameter(f"{where} is {value!r}, expected true or false")
        return value
    values = value if parameter.multiple and isinstance(value, list) else [value]
    for each in values:
        if isinstance(each, bool) or not isinstance(each, str | int | float):
            expected = "a text, a number or a list of them" if parameter.multiple else "one value"
            raise typer.BadParameter(f"{where} is {each!r}, expected {expected}")
    texts = [str(each) for each in values]
    return texts if parameter.multiple else texts[0]


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        help="TOML file of these options by name: port = 8080. Flags win over it.",
        callback=read_config,
        dir_okay=False,
        exists=True,
        is_eager=True,
    ),
]
