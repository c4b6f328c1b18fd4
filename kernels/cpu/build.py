"""Compiles the C++ kernels once per source and target, into the user's cache.

``python -m nybble.kernels.cpu.build`` does it ahead of time. NYBBLE_CPU_TARGET, the name of one of
``TARGETS``, says which instruction sets to use; by default the fastest which this CPU has are used.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from filelock import FileLock

logger = logging.getLogger(__name__)

_LOCK = "build.lock"
_FLAGS = (
    *("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread"),
    # Without this GCC may split one loop's additions differently from another's and a row's result
    # would depend on its batch.
    "-ffp-contract=off",
)


@dataclass(frozen=True)
class Target:
    """Instruction sets the kernels are compiled for.

    features: what the CPU must have, as named in /proc/cpuinfo.
    flags: for the compiler.
    machine: the CPU's architecture, as Linux names it.
    """

    name: str
    features: tuple[str, ...]
    flags: tuple[str, ...]
    machine: str = "x86_64"


_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq")
_AVX512_FLAGS = ("-march=haswell", *(f"-m{feature}" for feature in _AVX512))
_BF16 = Target(
    "avx512_bf16",
    (*_AVX512, "avx512_vnni", "avx512_bf16"),
    (*_AVX512_FLAGS, "-mavx512vnni", "-mavx512bf16"),
)
TARGETS = (  # the fastest first
    # Sapphire Rapids and later
    Target(
        "amx",
        (*_BF16.features, "amx_tile", "amx_bf16", "amx_int8"),
        (*_BF16.flags, "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
    ),
    _BF16,  # Zen 4, Cooper Lake and later
    # Cascade Lake, Ice Lake, Tiger Lake
    Target("avx512_vnni", (*_AVX512, "avx512_vnni"), (*_AVX512_FLAGS, "-mavx512vnni")),
    Target("avx512", _AVX512, _AVX512_FLAGS),  # Skylake-X
    # Alder Lake and later laptops
    Target("avx2_vnni", (*_AVX2, "avx_vnni"), ("-march=haswell", "-mavxvnni")),
    Target("avx2", _AVX2, ("-march=haswell",)),
)
_ARM = "aarch64"
_NEON_DOTPROD = ("asimd", "asimddp")
ARM_TARGETS = (  # the fastest first
    # Neoverse N2 and V1 (Graviton 3) and later, Apple M2 and later
    Target(
        "neon_i8mm", (*_NEON_DOTPROD, "i8mm", "bf16"), ("-march=armv8.2-a+dotprod+i8mm+bf16",), _ARM
    ),
    # Neoverse N1 (Graviton 2, Ampere Altra), Cortex-A76 as in the Raspberry Pi 5, Apple M1
    Target("neon_dotprod", _NEON_DOTPROD, ("-march=armv8.2-a+dotprod",), _ARM),
    # Any 64-bit ARM: Cortex-A72 as in the Raspberry Pi 4
    Target("neon", ("asimd",), ("-march=armv8-a",), _ARM),
)
_TARGETS_OF = {"x86_64": TARGETS, _ARM: ARM_TARGETS}
# What Linux calls a feature of ARM is this key of macOS's sysctl.
_MACOS_KEYS = {
    "asimd": "hw.optional.neon",
    "asimddp": "hw.optional.arm.FEAT_DotProd",
    "i8mm": "hw.optional.arm.FEAT_I8MM",
    "bf16": "hw.optional.arm.FEAT_BF16",
}


class CpuKernelsUnavailableError(RuntimeError):
    """The kernels cannot be built or run here; the message says what is missing."""


class CompilerError(CpuKernelsUnavailableError):
    """The compiler does not take the sources or the flags of a target."""


def machine() -> str:
    """This CPU's architecture as Linux names it."""
    name = platform.machine()
    return {"arm64": "aarch64", "AMD64": "x86_64"}.get(name, name)


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """The CPU's instruction sets, as Linux names them."""
    if platform.system() == "Darwin" and not cpuinfo.is_file():
        return {name for name, key in _MACOS_KEYS.items() if _macos_has(key)}
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    # The list's name on x86 and on ARM.
    found = (line.split() for line in lines if line.startswith(("flags", "Features")))
    features = set(next(found, ()))
    if "amx_tile" in features and not tiles_are_permitted():
        return {feature for feature in features if not feature.startswith("amx_")}
    return features


@cache
def tiles_are_permitted() -> bool:
    """Whether Linux lets this process use the tile registers of AMX, for which it must be asked.

    Linux 5.16 and later do, some sandboxes do not. All threads of the process may use them then.
    """
    arch_prctl, ask_for_permission, tile_data = 158, 0x1023, 18  # asm/unistd_64.h, asm/prctl.h
    return bool(ctypes.CDLL(None).syscall(arch_prctl, ask_for_permission, tile_data) == 0)


def _macos_has(key: str) -> bool:
    result = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True)
    return result.stdout.strip() == "1"


def missing_cpu_features(target: Target, cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """The instruction sets of ``target`` this CPU lacks."""
    features = cpu_features(cpuinfo)
    return [feature for feature in target.features if feature not in features]


def usable_targets(
    cpuinfo: Path = Path("/proc/cpuinfo"), machine_name: str | None = None
) -> list[Target]:
    """The targets this CPU runs, the fastest first: one at least.

    Raises CpuKernelsUnavailableError naming what it lacks.
    """
    name = machine_name or machine()
    if name not in _TARGETS_OF:
        raise CpuKernelsUnavailableError(
            f"they are for x86-64 and 64-bit ARM (aarch64), and this CPU is {name}"
        )
    targets = _TARGETS_OF[name]
    lacking = [missing_cpu_features(target, cpuinfo) for target in targets]
    usable = [target for target, missing in zip(targets, lacking, strict=True) if not missing]
    if not usable:
        raise CpuKernelsUnavailableError(f"this CPU lacks {', '.join(lacking[-1])}")
    return usable


def wanted_targets(
    name: str | None, cpuinfo: Path = Path("/proc/cpuinfo"), machine_name: str | None = None
) -> list[Target]:
    """The usable targets, or the one which NYBBLE_CPU_TARGET is set to, ``name``.

    Raises ValueError if it is no target or if this CPU does not run it. There is no fallback to
    another target. Raises CpuKernelsUnavailableError as :func:`usable_targets` does.
    """
    if not name:
        return usable_targets(cpuinfo, machine_name)
    known = {target.name: target for target in _TARGETS_OF.get(machine_name or machine(), ())}
    if name not in known:
        expected = ", ".join(known) or "no target: there is none for this CPU"
        raise ValueError(f"NYBBLE_CPU_TARGET is {name!r}, expected {expected}; or leave it unset")
    if missing := missing_cpu_features(known[name], cpuinfo):
        raise ValueError(
            f"NYBBLE_CPU_TARGET is {name}, but this CPU lacks {', '.join(missing)}; leave it unset"
        )
    return [known[name]]


def multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself, so that PyTorch does it faster than float32.

    On others a product of float32 is 4 times as fast, one with a transposed matrix 40 times.
    NYBBLE_CPU_TARGET counts as for the kernels.
    """
    try:
        features = wanted_targets(os.environ.get("NYBBLE_CPU_TARGET"))[0].features
    except CpuKernelsUnavailableError:
        return False
    return not {"avx512_bf16", "bf16"}.isdisjoint(features)


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


def default_compiler() -> str:
    """macOS calls clang g++ too, but under its own name it is clear what it is."""
    return "clang++" if platform.system() == "Darwin" else "g++"


def build_fastest(*, compiler: str | None = None, cache: Path | None = None) -> Path:
    """:func:`build` for the first wanted target that the compiler, which may be old, knows."""
    *faster, last = wanted_targets(os.environ.get("NYBBLE_CPU_TARGET"))
    for target in faster:
        try:
            return build(target, compiler=compiler, cache=cache)
        except CompilerError as error:
            logger.warning("no %s kernels, slower ones will be used: %s", target.name, error)
    return build(last, compiler=compiler, cache=cache)


def build(target: Target, *, compiler: str | None = None, cache: Path | None = None) -> Path:
    """The path of the library for ``target``, compiling it if it is not cached.

    Raises CpuKernelsUnavailableError naming what is missing.
    """
    compiler = compiler or default_compiler()
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
        # One process builds, and those that start at the same time wait for it.
        with FileLock(folder / _LOCK):
            for left in folder.glob(f"{tempfile.gettempprefix()}*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            if library.is_file():
                return library
            logger.info(
                "compiling the kernels of %s for this CPU: once for this machine, later starts "
                "find them in %s",
                target.name,
                folder,
            )
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                output = Path(scratch) / "kernels.so"
                _compile(found, target.flags, sources, output)
                os.replace(output, library)  # complete or not at all
    except OSError as error:
        raise CpuKernelsUnavailableError(
            f"{folder} cannot be written ({error.strerror}): set XDG_CACHE_HOME to one that can"
        ) from error
    return library


def _compile(compiler: str, flags: Sequence[str], sources: list[Path], output: Path) -> None:
    """Compiles the sources, as many at once as there are processors, and links them."""

    def run(*arguments: str | Path) -> None:
        command = [compiler, *_FLAGS, *flags, *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise CompilerError(f"{compiler} failed:\n{result.stderr.strip()}")

    objects = [output.with_name(f"{source.stem}.o") for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = [
            pool.submit(run, "-c", source, "-o", path)
            for source, path in zip(sources, objects, strict=True)
        ]
        try:
            for one in compiled:
                one.result()
        except CompilerError:
            pool.shutdown(cancel_futures=True)  # they would fail alike
            raise
    run(*objects, "-o", output)


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nybble"


if __name__ == "__main__":
    try:
        print(f"CPU kernels: {build_fastest()}")
    except CpuKernelsUnavailableError as error:
        print(f"CPU kernels not built, the slower PyTorch path will be used: {error}")
