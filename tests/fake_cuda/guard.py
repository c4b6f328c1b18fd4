"""Builds and loads ``guard.cpp``. Imports no PyTorch: see there."""

from __future__ import annotations

import ctypes
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp


@cache
def load_guard() -> ctypes.CDLL:
    """The library with ``current_device()`` and ``set_device(index)`` of the calling thread."""
    found = find_spec("torch")
    assert found is not None
    assert found.origin is not None
    root = Path(found.origin).parent
    source, built = Path(__file__).with_name("guard.cpp"), Path(mkdtemp()) / "guard.so"
    command = ["g++", "-std=c++20", "-shared", "-fPIC", str(source), "-o", str(built)]
    command += [f"-I{root / 'include'}", f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True)
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(root / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(built))
