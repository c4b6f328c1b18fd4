"""Compiles the C++ kernels once for their sources, compiler and flags, into the user's cache.

``python -m nybble.kernels.cpu.build`` does it ahead of time.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
# What the kernels use, as /proc/cpuinfo names it.
CPU_FEATURES = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16")
_FLAGS = (
    *("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-march=native"),
    # Without this GCC may split one loop's additions differently from another's and a row's result
    # would depend on its batch.
    "-ffp-contract=off",
)


class CpuKernelsUnavailableError(RuntimeError):
    """The kernels cannot be built or run here; the message says what is missing."""


def missing_cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """The needed instruction sets this CPU lacks."""
    if not cpuinfo.is_file():
        return list(CPU_FEATURES)
    for line in cpuinfo.read_text().splitlines():
        if line.startswith("flags"):
            present = set(line.split())
            return [feature for feature in CPU_FEATURES if feature not in present]
    return list(CPU_FEATURES)


def build(compiler: str = "g++", cache: Path | None = None) -> Path:
    """The path of the compiled library, compiling it if it is not in the cache.

    Raises CpuKernelsUnavailableError naming what is missing.
    """
    if missing := missing_cpu_features():
        raise CpuKernelsUnavailableError(f"this CPU lacks {', '.join(missing)}")
    found = shutil.which(compiler)
    if found is None:
        raise CpuKernelsUnavailableError(f"no C++ compiler: {compiler} is not on the PATH")
    version = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
    key = hashlib.sha256(repr((version, _FLAGS, _cpu_model())).encode())
    for source in SOURCES:
        key.update(source.read_bytes())
    folder = cache or _user_cache() / "kernels"
    library = folder / f"cpu-{key.hexdigest()[:16]}.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        output = Path(scratch) / "kernels.so"
        # OpenMP's symbols resolve to the runtime torch has loaded: a second one would start a
        # second pool of threads on the same cores. -nodefaultlibs keeps the driver from adding it.
        command = [found, *_FLAGS, *map(str, SOURCES), "-o", str(output), "-nodefaultlibs"]
        command += ["-lstdc++", "-lm", "-lc", "-lgcc"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise CpuKernelsUnavailableError(f"{compiler} failed:\n{result.stderr.strip()}")
        os.replace(output, library)  # whole or not at all, whoever else builds it
    return library


def _cpu_model() -> str:
    """-march=native makes the library specific to the CPU; caches may be shared by machines."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith("flags")), "")


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nybble"


if __name__ == "__main__":
    try:
        print(f"CPU kernels: {build()}")
    except CpuKernelsUnavailableError as error:
        print(f"CPU kernels not built, the slower PyTorch path will be used: {error}")
