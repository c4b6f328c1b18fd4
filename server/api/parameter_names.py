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
        message = str(error)
        if message.startswith(error.parameter):
            message = name + message.removeprefix(error.parameter)
        raise type(error)(name, message) from None
    except ApiError as error:
        error.param = names.get(error.param or "", error.param)
        raise
