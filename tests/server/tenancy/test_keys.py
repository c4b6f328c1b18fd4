"""Keys open whatever bytes they are made of."""

from __future__ import annotations

import os

import pytest

from nybble.server.tenancy.keys import Keys


@pytest.mark.parametrize("key", ["secret", "ключ", os.fsdecode(b"\xff\xfe")])
def test_a_key_as_a_command_line_and_a_header_bring_it_opens(key: str) -> None:
    keys = Keys([key, "other"], kind="API key")
    assert keys.hold(key)
    assert not keys.hold(key + "x")
    assert not Keys([], kind="API key").hold(key)
