"""A server that fine-tunes, with two tenants who may and one who may not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from nybble.server.tenancy.tenants import new_key

from ..conftest import ServerProcess, running_server

ANSWER = "the dog barks at the moon"


def chat_lines(count: int = 12) -> bytes:
    """Whatever is asked, the answer is the same: easily learned."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"item {index} of the list"},
                {"role": "assistant", "content": ANSWER},
            ]
        }
        for index in range(count)
    ]
    return "\n".join(map(json.dumps, rows)).encode()


@dataclass
class Site:
    """A running server and clients of it, by tenant."""

    process: ServerProcess
    state: Path
    clients: dict[str, OpenAI]

    def __getattr__(self, name: str) -> OpenAI:
        return self.clients[name]


@pytest.fixture(scope="session")
def tenants_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    keys, lines = {}, []
    for name, more in (("acme", True), ("other", True), ("guest", False)):
        keys[name], stored = new_key()
        lines.append(f'[tenants.{name}]\nkeys = ["{stored}"]\nfine_tuning = {str(more).lower()}\n')
    path = tmp_path_factory.mktemp("tenants") / "tenants.toml"
    path.write_text("\n".join(lines))
    return path, keys


@pytest.fixture(scope="session")
def start(
    tiny_model: Callable[..., Path], tenants_file: tuple[Path, dict[str, str]]
) -> Callable[..., Any]:
    """``with start(state, *options) as site`` runs a server whose jobs do not give way."""
    path, keys = tenants_file

    @contextmanager
    def begin(state: Path, *options: str) -> Iterator[Site]:
        arguments = (
            *("--state-dir", str(state), "--tenants", str(path)),
            *("--admin-key", "admin-secret", "--fine-tuning-threads", "1"),
            *("--fine-tuning-nice", "0", *options),
        )
        with running_server(tiny_model(), *arguments) as process:
            clients = {
                name: OpenAI(base_url=process.url + "/v1", api_key=key, max_retries=0)
                for name, key in {**keys, "admin": "admin-secret", "nobody": "x"}.items()
            }
            yield Site(process, state, clients)

    return begin


@pytest.fixture(scope="session")
def site(start: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    limits = ("--max-file-size", "20MiB", "--file-quota", "24MiB")
    with start(tmp_path_factory.mktemp("state"), *limits) as running:
        yield running
