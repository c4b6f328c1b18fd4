"""Runs a suite of another server: ``run.py llama_cpp|vllm [PYTEST OPTIONS]``."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest

BUILD = Path(__file__).parents[2] / "build" / "peer-suites"
# Where a suite's tests lie, as `make test-peer-suites` has unpacked them.
FOLDERS = {
    "llama_cpp": "llama_cpp_python-*/vendor/llama.cpp/tools/server/tests",
    "vllm": "vllm-*/",  # the folder, not the archive
}


def main(suite: str, *options: str) -> int:
    """The files to run and the reasons for which tests do not apply are in ``SUITE.toml``."""
    (root,) = BUILD.glob(FOLDERS[suite])
    sys.path.insert(0, str(root))
    settings = tomllib.loads(Path(__file__).with_name(f"{suite}.toml").read_text())
    return pytest.main(
        [
            *("-q", "--tb=short", "-c", "/dev/null", f"--rootdir={root}", f"--confcutdir={root}"),
            *("-p", "no:cacheprovider", "-p", "pytest_asyncio", "-p", f"{suite}_suite"),
            *("-W", "ignore", "--continue-on-collection-errors", *options),
            *(str(root / file) for file in settings["files"]),
        ]
    )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
