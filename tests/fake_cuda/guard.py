"""Builds and loads ``guard.cpp``. Imports no PyTorch: see there."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock


@cache
def load_guard() -> ctypes.CDLL:
    """The library with ``current_device()`` and ``set_device(index)`` of the calling thread."""
    found = find_spec("torch")
    assert found is not None
    assert found.origin is not None
    root = Path(found.origin).parent
    source = Path(__file__).with_name("guard.cpp")
    command = ["g++", "-std=c++20", "-shared", "-fPIC", str(source)]
    command += [f"-I{root / 'include'}", f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
    # PyTorch's headers take a quarter of a minute: one process compiles for all that run tests.
    version = (root / "version.py").read_text()
    of = hashlib.sha256(f"{command} {version}".encode() + source.read_bytes()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nybble"
    cache.mkdir(parents=True, exist_ok=True)
    built = cache / f"fake-cuda-{of}.so"
    with FileLock(built.with_suffix(".lock")):
        if not built.exists():
            partial = built.with_suffix(".partial")
            subprocess.run([*command, "-o", str(partial)], check=True)
            partial.replace(built)
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(root / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(built))
