"""The server of a model that follows a script; ``make test-agents`` runs what is in this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ..conftest import Server, running_server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("agents") / "scripted"
    with running_server(folder, "agents/serve_scripted.py") as server:
        yield server
