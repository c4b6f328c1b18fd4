"""Keys open whatever bytes they are made of."""

from __future__ import annotations

import os

import pytest
from typer.testing import CliRunner

from nybble.server.cli.main import app
from nybble.server.tenancy.keys import Keys


@pytest.mark.parametrize("key", ["secret", "ключ", os.fsdecode(b"\xff\xfe")])
def test_a_key_as_a_command_line_and_a_header_bring_it_opens(key: str) -> None:
    keys = Keys([key, "other"], kind="API key")
    assert keys.hold(key)
    assert not keys.hold(key + "x")
    assert not Keys([], kind="API key").hold(key)


@pytest.mark.parametrize("key", ["", "  ", " secret", "secret\n"])
def test_a_key_that_anyone_or_nobody_could_send_is_refused(key: str) -> None:
    """Such as that of an environment variable which is not set."""
    with pytest.raises(ValueError, match="API key "):
        Keys(["other", key], kind="API key")
    flags = "--admin-key", key
    refused = CliRunner().invoke(app, ["serve", "demo", *flags])
    assert refused.exit_code == 1
    assert "--admin-key " in refused.output
