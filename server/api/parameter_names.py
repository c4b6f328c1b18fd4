"""Errors name parameters as the endpoint does that was called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from nybble.engine import ParameterError
from nybble.server.http.errors import ApiError


@contextmanager
def parameters_called(names: Mapping[str, str]) -> Iterator[None]:
    """Rename the engine's parameters in errors to the endpoint's names for them."""
    try:
        yield
    except ParameterError as error:
        name = names.get(error.parameter, error.parameter)
        raise type(error)(name, _renamed(str(error), error.parameter, name)) from None
    except ApiError as error:
        if error.param is not None and error.param in names:
            error.message = _renamed(error.message, error.param, names[error.param])
            error.param = names[error.param]
        raise


def _renamed(message: str, parameter: str, name: str) -> str:
    """A message that begins with the parameter's name."""
    if message.startswith(parameter):
        return name + message.removeprefix(parameter)
    return message
