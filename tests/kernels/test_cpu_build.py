"""How the CPU kernels are compiled: which target, by which compiler, and what may fail."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE

import pytest

from nybble.kernels.cpu.build import (
    TARGETS,
    CpuKernelsUnavailableError,
    build,
    build_fastest,
    load,
    machine,
    usable_targets,
    wanted_targets,
)
from nybble.kernels.cpu.library import CpuLibrary

SAPPHIRE_RAPIDS = (
    "avx512f avx512bw avx512vl avx512dq avx512_vnni avx512_bf16 amx_bf16 amx_tile amx_int8"
)


def test_a_missing_compiler_and_a_missing_instruction_set_are_named(tmp_path: Path) -> None:
    with pytest.raises(CpuKernelsUnavailableError, match="no C\\+\\+ compiler: no-such-compiler"):
        build_fastest(compiler="no-such-compiler", cache=tmp_path)
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags\t: fpu sse avx2 fma\n")
    with pytest.raises(CpuKernelsUnavailableError, match="this CPU lacks f16c"):
        usable_targets(cpuinfo, "x86_64")
    with pytest.raises(CpuKernelsUnavailableError, match=r"64-bit ARM .* this CPU is riscv64"):
        usable_targets(cpuinfo, "riscv64")


@pytest.mark.parametrize(
    ("added", "best"),
    [
        ("", "avx2"),
        ("avx_vnni", "avx2_vnni"),
        ("avx512f avx512bw avx512vl", "avx2"),  # Knights Landing and the like lack some
        ("avx512f avx512bw avx512vl avx512dq", "avx512"),
        ("avx512f avx512bw avx512vl avx512dq avx512_vnni", "avx512_vnni"),
        ("avx512f avx512bw avx512vl avx512dq avx512_vnni avx512_bf16", "avx512_bf16"),
        (SAPPHIRE_RAPIDS, "amx"),
    ],
)
def test_the_best_target_is_chosen_by_the_flags_of_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, added: str, best: str
) -> None:
    monkeypatch.setattr("nybble.kernels.cpu.build.tiles_are_permitted", lambda: True)
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"flags\t: avx2 fma f16c {added}\n")
    assert usable_targets(cpuinfo, "x86_64")[0].name == best


def test_a_system_that_does_not_let_a_process_use_tiles_is_one_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nybble.kernels.cpu.build.tiles_are_permitted", lambda: False)
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"flags\t: avx2 fma f16c {SAPPHIRE_RAPIDS}\n")
    assert usable_targets(cpuinfo, "x86_64")[0].name == "avx512_bf16"
    with pytest.raises(ValueError, match="amx, but this CPU lacks amx_tile, amx_bf16, amx_int8"):
        wanted_targets("amx", cpuinfo, "x86_64")


@pytest.mark.parametrize(
    ("added", "names"),
    [
        ("", ["neon"]),
        ("asimddp", ["neon_dotprod", "neon"]),
        ("asimddp bf16", ["neon_dotprod", "neon"]),
        ("asimddp i8mm bf16", ["neon_i8mm", "neon_dotprod", "neon"]),
    ],
)
def test_targets_of_arm_are_chosen_by_its_features(
    tmp_path: Path, added: str, names: list[str]
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nFeatures\t: fp asimd evtstrm aes {added}\n")
    assert [target.name for target in usable_targets(cpuinfo, "aarch64")] == names
    cpuinfo.write_text("Features\t: fp\n")
    with pytest.raises(CpuKernelsUnavailableError, match="this CPU lacks asimd"):
        usable_targets(cpuinfo, "aarch64")
    with pytest.raises(ValueError, match="is neon_dotprod, but this CPU lacks asimd, asimddp"):
        wanted_targets("neon_dotprod", cpuinfo, "aarch64")
    with pytest.raises(ValueError, match="is 'avx2', expected neon_i8mm, neon_dotprod, neon; or"):
        wanted_targets("avx2", cpuinfo, "aarch64")


def test_a_target_may_be_named_and_another_one_is_not_taken_in_its_place(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "flags\t: avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512_vnni avx512_bf16\n"
    )
    assert [target.name for target in wanted_targets("avx2", cpuinfo, "x86_64")] == ["avx2"]
    assert [target.name for target in wanted_targets("", cpuinfo, "x86_64")] == [
        "avx512_bf16",
        "avx512_vnni",
        "avx512",
        "avx2",
    ]
    with pytest.raises(
        ValueError, match="is 'sse', expected amx, avx512_bf16, avx512_vnni, avx512, "
    ):
        wanted_targets("sse", cpuinfo, "x86_64")
    cpuinfo.write_text("flags\t: avx2 fma f16c avx512f avx512bw avx512vl avx512dq\n")
    with pytest.raises(
        ValueError, match="is avx512_bf16, but this CPU lacks avx512_vnni, avx512_bf16"
    ):
        wanted_targets("avx512_bf16", cpuinfo, "x86_64")


def test_the_environment_names_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touched = compiler_script(tmp_path, 'while [ "$1" != -o ]; do shift; done; touch "$2"')
    for target in usable_targets():
        monkeypatch.setenv("NYBBLE_CPU_TARGET", target.name)
        library = build_fastest(compiler=touched, cache=tmp_path / "cache")
        assert library.name.startswith(f"cpu-{target.name}-")


_BOTH_WAYS = """
#include "ints.h"
extern "C" {vector} intrinsic({vector} total, {vector} a, {vector} b) {{
    return _mm{bits}_{name}_epi32(total, a, b);
}}
extern "C" {vector} written_out({vector} total, {vector} a, {vector} b) {{
    NYBBLE_ADD_PRODUCTS("x", NYBBLE_VEX "vp{name}", total, a, b);
    return total;
}}
"""


@pytest.mark.skipif(machine() != "x86_64", reason="instructions of x86")
@pytest.mark.parametrize(
    ("target", "bits"), [("avx512_vnni", "512"), ("avx512_vnni", "256"), ("avx2_vnni", "256")]
)
@pytest.mark.parametrize("name", ["dpwssd", "dpbusd"])
def test_an_instruction_that_is_written_out_is_that_of_its_intrinsic(
    tmp_path: Path, target: str, bits: str, name: str
) -> None:
    """Few CPUs have it, on which alone a wrong order of its operands would be seen."""
    (flags,) = (each.flags for each in TARGETS if each.name == target)
    source, compiled = tmp_path / "both.cpp", tmp_path / "both.o"
    source.write_text(_BOTH_WAYS.format(vector=f"__m{bits}i", bits=bits, name=name))
    include = f"-I{Path(build.__code__.co_filename).parent}"
    subprocess.run(
        ["g++", "-O2", "-std=c++17", *flags, include, "-c", source, "-o", compiled], check=True
    )
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", compiled], check=True, text=True, stdout=PIPE
    ).stdout
    code = {
        function: re.findall(r"\t(.*)", listing.split(f"<{function}>:")[1].split("\tret")[0])
        for function in ("intrinsic", "written_out")
    }
    assert any(f"vp{name}" in line for line in code["intrinsic"])
    assert code["intrinsic"] == code["written_out"]


def compiler_script(folder: Path, body: str) -> str:
    path = folder / "g++"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_a_compiler_too_old_for_the_best_target_builds_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if len(usable_targets()) < 2:
        pytest.skip("this CPU runs no target but the last")
    best, second, *_ = usable_targets()
    flag = next(flag for flag in best.flags if flag not in second.flags)
    monkeypatch.delenv("NYBBLE_CPU_TARGET", raising=False)
    old = compiler_script(
        tmp_path,
        f'case "$*" in *{flag}*) echo unrecognized option >&2; exit 1;; esac\n'
        'while [ "$1" != -o ]; do shift; done; touch "$2"',
    )
    library = build_fastest(compiler=old, cache=tmp_path / "cache")
    assert library.name.startswith(f"cpu-{second.name}-")
    assert f"no {best.name} kernels" in caplog.text
    assert "unrecognized option" in caplog.text


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CpuKernelsUnavailableError, match=r"file/kernels cannot be written .*XDG_"):
        build_fastest(cache=tmp_path / "file" / "kernels")


@pytest.mark.parametrize("content", [b"", b"not a library"])
def test_a_library_that_cannot_be_loaded_is_built_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    whole = build_fastest()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    spoilt = tmp_path / "nybble" / "kernels" / whole.name
    spoilt.parent.mkdir(parents=True)
    spoilt.write_bytes(content)
    copying = compiler_script(tmp_path, f'while [ "$1" != -o ]; do shift; done; cp "{whole}" "$2"')
    monkeypatch.setenv("PATH", f"{Path(copying).parent}:{os.environ['PATH']}")
    CpuLibrary(load())
    assert spoilt.read_bytes() == whole.read_bytes()


def test_the_sources_are_compiled_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processors, and a compiler that waits for another one at work: it would wait for ever."""
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    meeting = compiler_script(
        tmp_path,
        f'cd {tmp_path}; case "$*" in *"-c "*)'
        " mkdir one 2>/dev/null || mkdir two 2>/dev/null || exit 0;"
        " for _ in $(seq 100); do [ -d two ] && exit 0; sleep 0.1; done; exit 1;; esac; "
        'while [ "$1" != -o ]; do shift; done; touch "$2"',
    )
    assert build_fastest(compiler=meeting, cache=tmp_path / "cache").is_file()


def test_builds_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    slow = compiler_script(
        tmp_path, 'while [ "$1" != -o ]; do shift; done; sleep 0.2; echo whole > "$2"'
    )
    with ThreadPoolExecutor(4) as pool:
        calls = [
            pool.submit(build_fastest, compiler=slow, cache=tmp_path / "cache") for _ in range(4)
        ]
        (library,) = {call.result() for call in calls}
    assert library.read_text() == "whole\n"
    assert {path.name for path in library.parent.iterdir()} == {library.name, "build.lock"}


def test_a_build_is_told_of_and_removes_what_a_killed_one_has_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    endless = compiler_script(tmp_path, "sleep 60")
    code = (
        "from pathlib import Path; from nybble.kernels.cpu.build import build_fastest; "
        f"build_fastest(compiler={endless!r}, cache=Path({str(cache)!r}))"
    )
    killed = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    while not list(cache.glob("tmp*")):
        assert killed.poll() is None
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    (left,) = cache.glob("tmp*")
    quick = compiler_script(tmp_path, 'while [ "$1" != -o ]; do shift; done; touch "$2"')
    with caplog.at_level(logging.INFO):
        library = build_fastest(compiler=quick, cache=cache)
        build_fastest(compiler=quick, cache=cache)
    assert not left.exists()
    assert {path.name for path in cache.iterdir()} == {library.name, "build.lock"}
    told = [each.getMessage() for each in caplog.records if "compiling" in each.getMessage()]
    assert len(told) == 1
    assert "once for this machine" in told[0]
