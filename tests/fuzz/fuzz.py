"""``fuzz.py TARGET [libFuzzer's options]``: atheris over one of the targets."""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["nybble.loaders", "nybble.server.api"]):
    import targets

if __name__ == "__main__":
    name = sys.argv.pop(1)
    atheris.Setup(sys.argv, targets.TARGETS[name])
    atheris.Fuzz()
