"""schemathesis against the server's own OpenAPI document, for two minutes: no request brings a 5xx,
an answer the document does not know, or a pass for what the document forbids."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from .conftest import Server

# The document is wider than the server, which also knows the vocabulary and the context's length;
# and an answer may be as long as the context.
NOT_ASKED = "positive_data_acceptance"


def test_the_server_is_true_to_its_document(server: Server) -> None:
    url = server.url.removesuffix("/v1") + "/openapi.json"
    command = [
        *(str(Path(sys.executable).with_name("st")), "run", url, "--no-color"),
        *("--phases", "examples,coverage,fuzzing", "--checks", "all"),
        *("--exclude-checks", NOT_ASKED, "--max-time", "120", "--continue-on-failure"),
        *("--max-response-time", "100", "--request-timeout", "100"),
    ]
    folder = str(Path(__file__).parent)
    hooks = {"PYTHONPATH": folder, "SCHEMATHESIS_HOOKS": "schemathesis_hooks"}
    done = subprocess.run(
        command, env={**os.environ, **hooks}, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-8000:]
