"""Keys open whatever bytes they are made of."""

from __future__ import annotations

import os

import pytest
from aiohttp.test_utils import make_mocked_request
from nybble.server.errors import ApiError
from nybble.server.keys import Keys


@pytest.mark.parametrize("key", ["secret", "ключ", os.fsdecode(b"\xff\xfe")])
def test_a_key_from_the_command_line_opens_and_another_does_not(key: str) -> None:
    keys = Keys([key, "other"], kind="API key")
    keys.require(make_mocked_request("GET", "/", {"Authorization": f"Bearer {key}"}))
    for wrong in ({}, {"Authorization": f"Bearer {key}x"}, {"Authorization": f"Basic {key}"}):
        with pytest.raises(ApiError, match="a valid API key is required"):
            keys.require(make_mocked_request("GET", "/", wrong))
