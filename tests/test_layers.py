"""Imports go one way: server → finetune → quantizers → engine → loaders → models → kernels."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each layer may import itself and what stands below it.
LAYERS = ("kernels", "models", "loaders", "engine", "quantizers", "finetune", "server")


def imported(file: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith("nybble."):
                yield node.lineno, name.split(".")[1]


@pytest.mark.parametrize("layer", LAYERS)
def test_no_layer_imports_one_above(layer: str) -> None:
    below = set(LAYERS[: LAYERS.index(layer) + 1])
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports nybble.{name}"
        for file in sorted((ROOT / layer).rglob("*.py"))
        if file.parent.name != "bench"  # scripts, which measure a layer from outside
        for line, name in imported(file)
        if name in LAYERS and name not in below
    ]
    assert not wrong


@pytest.fixture(scope="module")
def imported_after() -> list[set[str]]:
    """The modules that are there once the offline API, the preparation of models and a server have
    been imported in turn: in one process, because each import takes long."""
    code = (
        "import json, sys\n"
        "from nybble import LLM, SamplingParams\n"
        "print(json.dumps([*sys.modules]))\n"
        "import nybble.quantizers.prepare, nybble.engine.memory\n"
        "print(json.dumps([*sys.modules]))\n"
        "import nybble.server.cli.main, nybble.server.lifecycle.launch\n"
        "print(json.dumps([*sys.modules]))\n"
    )
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [set(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("stage", [0, 1], ids=["offline API", "preparation"])
def test_a_model_is_prepared_and_used_without_the_server(
    imported_after: list[set[str]], stage: int
) -> None:
    server = ("nybble.server", "aiohttp.", "typer")
    assert not [name for name in imported_after[stage] if name.startswith(server)]


def test_a_server_starts_without_the_code_of_transformers_models(
    imported_after: list[set[str]],
) -> None:
    """It would take more than a second: it imports PyTorch's compiler."""
    heavy = {"transformers.modeling_utils", "torch._dynamo.convert_frame"}
    assert not heavy & imported_after[2]


def test_what_only_starts_servers_and_leads_to_them_imports_no_pytorch() -> None:
    code = (
        "import sys, nybble.server.replicas.one, nybble.server.replicas.supervise\n"
        "assert not {'torch', 'transformers', 'nybble.engine'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_without_an_endpoint_for_traces_nothing_of_opentelemetry_is_imported(
    imported_after: list[set[str]],
) -> None:
    assert not [name for name in imported_after[2] if name.startswith("opentelemetry")]
