"""Compiles the C++ kernels once per source, compiler and target, into the user's cache.

``python -m nybble.kernels.cpu.build`` does it ahead of time.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_FLAGS = (
    *("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp"),
    # Without this GCC may split one loop's additions differently from another's and a row's result
    # would depend on its batch.
    "-ffp-contract=off",
)


@dataclass(frozen=True)
class Target:
    """Instruction sets the kernels are compiled for.

    features: what the CPU must have, as /proc/cpuinfo names it. flags: the compiler's.
    """

    name: str
    features: tuple[str, ...]
    flags: tuple[str, ...]


_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq")
TARGETS = (  # the fastest first
    Target(
        "avx512",
        (*_AVX512, "avx512_bf16"),
        ("-march=haswell", *(f"-m{feature}" for feature in _AVX512), "-mavx512bf16"),
    ),
    Target("avx2", ("avx2", "fma", "f16c"), ("-march=haswell",)),
)


class CpuKernelsUnavailableError(RuntimeError):
    """The kernels cannot be built or run here; the message says what is missing."""


def missing_cpu_features(target: Target, cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """The instruction sets of ``target`` this CPU lacks."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return [feature for feature in target.features if feature not in flags]


def best_target(cpuinfo: Path = Path("/proc/cpuinfo")) -> Target:
    """The fastest target this CPU runs. Raises CpuKernelsUnavailableError naming what it lacks."""
    for target in TARGETS:
        missing = missing_cpu_features(target, cpuinfo)
        if not missing:
            return target
    raise CpuKernelsUnavailableError(f"this CPU lacks {', '.join(missing)}")


def build(
    target: Target | None = None, *, compiler: str = "g++", cache: Path | None = None
) -> Path:
    """The path of the library for ``target`` (the best one), compiling it if it is not cached.

    Raises CpuKernelsUnavailableError naming what is missing.
    """
    target = target or best_target()
    found = shutil.which(compiler)
    if found is None:
        raise CpuKernelsUnavailableError(f"no C++ compiler: {compiler} is not on the PATH")
    version = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
    folder_here = Path(__file__).parent
    sources = sorted(folder_here.glob("*.cpp"))
    key = hashlib.sha256(repr((version, _FLAGS, target)).encode())
    for source in (*sources, *sorted(folder_here.glob("*.h"))):
        key.update(source.read_bytes())
    folder = cache or _user_cache() / "kernels"
    library = folder / f"cpu-{target.name}-{key.hexdigest()[:16]}.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        output = Path(scratch) / "kernels.so"
        # OpenMP's symbols resolve to the runtime torch has loaded: a second one would start a
        # second pool of threads on the same cores. -nodefaultlibs keeps the driver from adding it.
        command = [found, *_FLAGS, *target.flags, *map(str, sources), "-o", str(output)]
        command += ["-nodefaultlibs", "-lstdc++", "-lm", "-lc", "-lgcc"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise CpuKernelsUnavailableError(f"{compiler} failed:\n{result.stderr.strip()}")
        os.replace(output, library)  # whole or not at all, whoever else builds it
    return library


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nybble"


if __name__ == "__main__":
    try:
        print(f"CPU kernels: {build()}")
    except CpuKernelsUnavailableError as error:
        print(f"CPU kernels not built, the slower PyTorch path will be used: {error}")
