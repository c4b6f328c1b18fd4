"""Patterns of files that people download end in time."""

from __future__ import annotations

import re
from typing import Literal

import pytest

from nybble.loaders import AdapterError, CheckpointError
from nybble.loaders.patterns import match

MODULE = "model.layers.1.self_attn.q_proj"
ENDLESS = r"((.|..|...)+)+(?<=\d\d)"


@pytest.mark.parametrize("how", ["match", "fullmatch", "search"])
@pytest.mark.parametrize("pattern", ["model", r".*q_proj", r"layers\.(\d+)\.", "mlp"])
def test_it_is_that_of_the_standard_library(
    pattern: str, how: Literal["match", "fullmatch", "search"]
) -> None:
    expected = getattr(re, how)(pattern, MODULE)
    found = match(pattern, MODULE, how)
    assert (found and found.span()) == (expected and expected.span())


@pytest.mark.parametrize("error", [CheckpointError, AdapterError])
def test_one_that_takes_too_long_is_named(error: type[CheckpointError]) -> None:
    said = f"the pattern {ENDLESS!r} takes over 1.0 s to match {MODULE}: simplify it"
    with pytest.raises(error, match=f"^{re.escape(said)}$"):
        match(ENDLESS, MODULE, error=error)
