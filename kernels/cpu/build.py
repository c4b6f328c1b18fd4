"""Compiles the C++ kernels once per source and target, into the user's cache.

``python -m nybble.kernels.cpu.build`` does it ahead of time. NYBBLE_CPU_TARGET, the name of one of
``TARGETS``, says which instruction sets to use; by default the fastest which this CPU has are used.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

_FLAGS = (
    *("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp"),
    # Without this GCC may split one loop's additions differently from another's and a row's result
    # would depend on its batch.
    "-ffp-contract=off",
)


@dataclass(frozen=True)
class Target:
    """Instruction sets the kernels are compiled for.

    features: what the CPU must have, as named in /proc/cpuinfo.
    flags: for the compiler.
    """

    name: str
    features: tuple[str, ...]
    flags: tuple[str, ...]


_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq")
_AVX512_FLAGS = ("-march=haswell", *(f"-m{feature}" for feature in _AVX512))
TARGETS = (  # the fastest first
    # Zen 4, Sapphire Rapids, Cooper Lake and later
    Target("avx512_bf16", (*_AVX512, "avx512_bf16"), (*_AVX512_FLAGS, "-mavx512bf16")),
    # Cascade Lake, Ice Lake, Tiger Lake
    Target("avx512_vnni", (*_AVX512, "avx512_vnni"), (*_AVX512_FLAGS, "-mavx512vnni")),
    Target("avx512", _AVX512, _AVX512_FLAGS),  # Skylake-X
    # Alder Lake and later laptops
    Target("avx2_vnni", (*_AVX2, "avx_vnni"), ("-march=haswell", "-mavxvnni")),
    Target("avx2", _AVX2, ("-march=haswell",)),
)


class CpuKernelsUnavailableError(RuntimeError):
    """The kernels cannot be built or run here; the message says what is missing."""


class CompilerError(CpuKernelsUnavailableError):
    """The compiler does not take the sources or the flags of a target."""


def missing_cpu_features(target: Target, cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """The instruction sets of ``target`` this CPU lacks."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return [feature for feature in target.features if feature not in flags]


def usable_targets(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[Target]:
    """The targets this CPU runs, the fastest first: one at least.

    Raises CpuKernelsUnavailableError naming what it lacks.
    """
    lacking = [missing_cpu_features(target, cpuinfo) for target in TARGETS]
    usable = [target for target, missing in zip(TARGETS, lacking, strict=True) if not missing]
    if not usable:
        raise CpuKernelsUnavailableError(f"this CPU lacks {', '.join(lacking[-1])}")
    return usable


def wanted_targets(name: str | None, cpuinfo: Path = Path("/proc/cpuinfo")) -> list[Target]:
    """The usable targets, or the one which NYBBLE_CPU_TARGET is set to, ``name``.

    Raises ValueError if it is no target or if this CPU does not run it. There is no fallback to
    another target. Raises CpuKernelsUnavailableError as :func:`usable_targets` does.
    """
    if not name:
        return usable_targets(cpuinfo)
    known = {target.name: target for target in TARGETS}
    if name not in known:
        expected = ", ".join(known)
        raise ValueError(f"NYBBLE_CPU_TARGET is {name!r}, expected {expected}; or leave it unset")
    if missing := missing_cpu_features(known[name], cpuinfo):
        raise ValueError(
            f"NYBBLE_CPU_TARGET is {name}, but this CPU lacks {', '.join(missing)}; leave it unset"
        )
    return [known[name]]


def load() -> ctypes.CDLL:
    """The library for the fastest target that this CPU runs and the compiler knows.

    Raises CpuKernelsUnavailableError if it cannot be built, OSError if it cannot be loaded.
    """
    library = build_fastest()
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        # The file was truncated by a power failure, or built against newer system libraries.
        logger.warning("building the CPU kernels anew: %s", error)
        library.unlink(missing_ok=True)
        return ctypes.CDLL(str(build_fastest()))


def build_fastest(*, compiler: str = "g++", cache: Path | None = None) -> Path:
    """:func:`build` for the first wanted target that the compiler, which may be old, knows."""
    *faster, last = wanted_targets(os.environ.get("NYBBLE_CPU_TARGET"))
    for target in faster:
        try:
            return build(target, compiler=compiler, cache=cache)
        except CompilerError as error:
            logger.warning("no %s kernels, slower ones will be used: %s", target.name, error)
    return build(last, compiler=compiler, cache=cache)


def build(target: Target, *, compiler: str = "g++", cache: Path | None = None) -> Path:
    """The path of the library for ``target``, compiling it if it is not cached.

    Raises CpuKernelsUnavailableError naming what is missing.
    """
    folder_here = Path(__file__).parent
    sources = sorted(folder_here.glob("*.cpp"))
    key = hashlib.sha256(repr((_FLAGS, target)).encode())
    for source in (*sources, *sorted(folder_here.glob("*.h"))):
        key.update(source.read_bytes())
    folder = cache or _user_cache() / "kernels"
    library = folder / f"cpu-{target.name}-{key.hexdigest()[:16]}.so"
    if library.is_file():
        return library
    found = shutil.which(compiler)
    if found is None:
        raise CpuKernelsUnavailableError(f"no C++ compiler: {compiler} is not on the PATH")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            output = Path(scratch) / "kernels.so"
            _compile(found, target, sources, output)
            os.replace(output, library)  # atomic, even if other processes build it too
    except OSError as error:
        raise CpuKernelsUnavailableError(
            f"{folder} cannot be written ({error.strerror}): set XDG_CACHE_HOME to one that can"
        ) from error
    return library


def _compile(compiler: str, target: Target, sources: list[Path], output: Path) -> None:
    # OpenMP's symbols resolve to the runtime torch has loaded: a second one would start a second
    # pool of threads on the same cores. -nodefaultlibs keeps the driver from adding it.
    command = [compiler, *_FLAGS, *target.flags, *map(str, sources), "-o", str(output)]
    command += ["-nodefaultlibs", "-lstdc++", "-lm", "-lc", "-lgcc"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise CompilerError(f"{compiler} failed:\n{result.stderr.strip()}")


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nybble"


if __name__ == "__main__":
    try:
        print(f"CPU kernels: {build_fastest()}")
    except CpuKernelsUnavailableError as error:
        print(f"CPU kernels not built, the slower PyTorch path will be used: {error}")
