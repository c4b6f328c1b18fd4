"""Imports go one way: server → finetune → quantizers → engine → loaders → models → kernels."""

from __future__ import annotations

import ast
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


def test_a_model_is_prepared_without_the_server() -> None:
    code = (
        "import sys, nybble.quantizers.prepare, nybble.engine.memory\n"
        "assert not [name for name in sys.modules\n"
        "            if name.startswith(('nybble.server', 'aiohttp.', 'typer'))]\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_a_server_starts_without_the_code_of_transformers_models() -> None:
    """It would take more than a second: it imports PyTorch's compiler."""
    code = (
        "import sys, nybble.server.lifecycle.launch\n"
        "assert not {'transformers.modeling_utils', 'torch._dynamo.convert_frame'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
