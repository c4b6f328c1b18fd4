"""The limits of sampling parameters.

:class:`nybble.engine.SamplingParams` enforces them, and the OpenAPI document of the server shows
them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Protocol

MAX_LOGPROBS = 20
_MAX_CHARACTERS = 256


class OutsideLimitError(ValueError):
    """A value that a limit does not allow. The message goes on behind the parameter's name."""


class Limit(Protocol):
    """What a parameter may be."""

    @property
    def schema(self) -> dict[str, Any]:
        """In JSON Schema, without the type."""
        ...

    def taken(self, value: Any) -> Any:
        """The value in the parameter's own type. Raises OutsideLimitError."""
        ...


def _wrong(value: Any, expected: str, part: str = "") -> OutsideLimitError:
    shown = value if isinstance(value, int | float) else f"{value!r:.60}"
    return OutsideLimitError(f"{part} is {shown}, expected {expected}")


@dataclass(frozen=True)
class Number:
    """above: whether ``lowest`` itself is too low.

    highest: None for no limit.
    spelling: what other servers write, and what it means here.
    note: on what these or the lowest mean.
    """

    lowest: float
    highest: float | None = None
    whole: bool = False
    above: bool = False
    spelling: Mapping[int, int | None] = field(default_factory=dict)
    note: str = ""

    @property
    def schema(self) -> dict[str, Any]:
        lowest = min((self.lowest, *self.spelling))
        found = {"exclusiveMinimum" if self.above else "minimum": lowest}
        return found if self.highest is None else {**found, "maximum": self.highest}

    def taken(self, value: Any, part: str = "") -> Any:
        """part: of the parameter, that the value is."""
        if isinstance(value, bool) or not self._is_of_kind(value):
            raise _wrong(value, self._expected, part)
        if value in self.spelling:
            return self.spelling[value]
        # NaN is within no limits.
        low = value > self.lowest if self.above else value >= self.lowest
        if not low or not value <= (math.inf if self.highest is None else self.highest):
            raise _wrong(value, self._expected, part)
        if isinstance(value, int | float):
            return value
        return int(value) if self.whole else float(value)  # NumPy's

    def _is_of_kind(self, value: object) -> bool:
        return isinstance(value, Integral if self.whole else Real)

    @property
    def _expected(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        if self.highest is None:
            scope = f"of {self.lowest} or more"
        elif self.above:
            scope = f"above {self.lowest} and at most {self.highest}"
        else:
            scope = f"between {self.lowest} and {self.highest}"
        return f"{kind} {scope}{self.note}"


@dataclass(frozen=True)
class Flag:
    schema: dict[str, Any] = field(default_factory=dict)

    def taken(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise _wrong(value, "True or False")
        return value


@dataclass(frozen=True)
class Texts:
    """One text or several. most: how many. blank: whether spaces alone are one."""

    most: int
    blank: bool

    @property
    def schema(self) -> dict[str, Any]:
        text = {"type": "string", "maxLength": _MAX_CHARACTERS}
        return {"maxItems": self.most, "items": text}

    def taken(self, value: Any) -> tuple[str, ...]:
        texts = (value,) if isinstance(value, str) else _listed(value, "texts", 0, self.most)
        for index, text in enumerate(texts):
            part = "" if isinstance(value, str) else f"[{index}]"
            if not isinstance(text, str):
                raise _wrong(text, "a text", part)
            if len(text) > _MAX_CHARACTERS:
                raise OutsideLimitError(
                    f"{part} has {len(text)} characters, expected at most {_MAX_CHARACTERS}"
                )
            if not (text if self.blank else text.strip()):
                kind = "a text that is not empty" if self.blank else "a text with more than spaces"
                raise _wrong(text, kind, part)
        return texts


@dataclass(frozen=True)
class TokenIds:
    """least, most: how many."""

    least: int
    most: int

    @property
    def schema(self) -> dict[str, Any]:
        return {"minItems": self.least, "maxItems": self.most}

    def taken(self, value: Any) -> tuple[int, ...]:
        ids = _listed(value, "token ids", self.least, self.most)
        if set(map(type, ids)) <= {int}:  # there may be many
            return ids
        for index, token in enumerate(ids):
            if isinstance(token, bool) or not isinstance(token, Integral):
                raise _wrong(token, "a token id", f"[{index}]")
        return tuple(map(int, ids))


@dataclass(frozen=True)
class Biases:
    """Numbers by token id, each between −highest and highest. most: how many."""

    most: int
    highest: float

    @property
    def schema(self) -> dict[str, Any]:
        number = {"type": "number", "minimum": -self.highest, "maximum": self.highest}
        return {"maxProperties": self.most, "additionalProperties": number}

    def taken(self, value: Any) -> dict[int, float]:
        if not isinstance(value, Mapping):
            raise _wrong(value, "numbers by token id")
        _listed(value.keys(), "biases", 0, self.most)
        limit = Number(-self.highest, self.highest)
        for token in value:
            if isinstance(token, bool) or not isinstance(token, Integral):
                raise OutsideLimitError(f" has the key {token!r:.60}, expected a token id")
        return {
            int(token): limit.taken(bias, f" of token {token}") for token, bias in value.items()
        }


def _listed(value: Any, kind: str, least: int, most: int) -> tuple[Any, ...]:
    """The elements of a list, tuple, set or array."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Collection):
        raise _wrong(value, f"a list of {kind}")
    if not least <= len(value) <= most:
        between = f"{least} to {most}" if least else f"at most {most}"
        raise OutsideLimitError(f" has {len(value) or 'no'} {kind}, expected {between}")
    return tuple(value)


_PENALTY = Number(-2, 2)
_LOGPROBS = Number(0, MAX_LOGPROBS, whole=True)
_FLAG = Flag()

LIMITS: Mapping[str, Limit] = {
    "n": Number(1, 128, whole=True),
    "max_tokens": Number(0, whole=True, spelling={-1: None}, note=", or -1 for no limit"),
    "min_tokens": Number(0, whole=True),
    "temperature": Number(0, 100),
    "top_p": Number(0, 1, above=True),
    "top_k": Number(0, 2**31 - 1, whole=True, spelling={-1: 0}, note="; 0 and -1 are off"),
    "min_p": Number(0, 1),
    "repetition_penalty": Number(0.01, 100),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "logit_bias": Biases(1024, 100),
    "bad_words": Texts(256, blank=False),
    "allowed_token_ids": TokenIds(1, 1 << 18),
    # −1 asks other servers for a random one.
    "seed": Number(-(2**63), 2**63 - 1, whole=True, spelling={-1: None}),
    "stop": Texts(16, blank=True),
    "stop_token_ids": TokenIds(0, 16),
    "include_stop_str_in_output": _FLAG,
    "ignore_eos": _FLAG,
    "skip_special_tokens": _FLAG,
    "spaces_between_special_tokens": _FLAG,
    "logprobs": _LOGPROBS,
    "logprob_token_ids": TokenIds(0, 128),
    "prompt_logprobs": _LOGPROBS,
}
