"""A library of the CPU kernels for ARM as ctypes would have it, run by qemu-user.

The kernels run in another process, which has copies of what they are given: every tensor whose
address a call has is sent there and read back. How long it is was noted when its address was taken.
"""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from nybble.kernels.cpu.build import Target, build

COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"
_SYSROOT = "/usr/aarch64-linux-gnu"

# The arguments which themselves hold addresses.
_HOLDING_ADDRESSES = {
    "nybble_grouped_matmul": {1},
    "nybble_lora_add": {2, 3, 5},
    "nybble_decoder_layers": {0, 1},
}

_VALUE, _NULL = -2, -1

# Address: where its memory begins, and how long it is.
_memory: dict[int, tuple[int, int]] = {}


_data_ptr = Tensor.data_ptr


def _noted(tensor: Tensor) -> int:
    address, storage = _data_ptr(tensor), tensor.untyped_storage()
    _memory[address] = storage.data_ptr(), storage.nbytes()
    return address


@cache
def emulated(target: Target) -> EmulatedLibrary:
    """The library for a target; a test is skipped if the compiler or the emulator is missing."""
    for tool in (COMPILER, EMULATOR):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}: install g++-aarch64-linux-gnu and qemu-user")
    Tensor.data_ptr = _noted  # type: ignore[method-assign]
    return EmulatedLibrary(target)


class EmulatedLibrary:
    """Has the functions of a ctypes.CDLL."""

    def __init__(self, target: Target) -> None:
        self._folder = tempfile.TemporaryDirectory()
        driver = Path(self._folder.name) / "driver"
        source = Path(__file__).with_name("arm_driver.cpp")
        options = "-std=c++17", "-O1", "-pthread"
        subprocess.run([COMPILER, *options, source, "-ldl", "-o", driver], check=True)
        library = build(target, compiler=COMPILER)
        self._process = subprocess.Popen(
            [EMULATOR, "-L", _SYSROOT, driver, library],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __getattr__(self, name: str) -> _Function:
        return _Function(name, self)

    def call(self, request: bytes, sizes: list[int]) -> tuple[int, list[bytes]]:
        """The result, and what the buffers have become."""
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        answer = self._process.stdout.read(4 + sum(sizes))
        if len(answer) < 4 + sum(sizes):
            raise AssertionError(f"the emulated kernels ended with {self._process.wait()}")
        at, contents = 4, []
        for size in sizes:
            contents.append(answer[at : at + size])
            at += size
        return struct.unpack_from("<i", answer)[0], contents


class _Function:
    """As ctypes has them: its types are set before it is called."""

    argtypes: tuple[type, ...] = ()
    restype: type | None = None

    def __init__(self, name: str, library: EmulatedLibrary) -> None:
        self._name, self._library = name, library

    def __call__(self, *arguments: Any) -> int:
        call = _Call()
        for index, (kind, value) in enumerate(zip(self.argtypes, arguments, strict=True)):
            if kind is ctypes.c_float:
                call.floats.append(float(value))
            elif kind is ctypes.c_void_p:
                nested = index in _HOLDING_ADDRESSES.get(self._name, ())
                call.integers.append(call.place(value, nested=nested))
            else:
                call.integers.append((_VALUE, int(value)))
        status, contents = self._library.call(call.request(self._name), call.sizes())
        call.write_back(contents)
        return status


class _Call:
    def __init__(self) -> None:
        self.integers: list[tuple[int, int]] = []
        self.floats: list[float] = []
        self._buffers: dict[int, tuple[int, int]] = {}  # by address: number, size
        self._addresses: list[tuple[int, int, int, int]] = []

    def place(self, value: Any, *, nested: bool) -> tuple[int, int]:
        """The number of the buffer which holds ``value``, and where in it."""
        if value is None:
            return _NULL, 0
        if isinstance(value, int):
            address = value
            if not address:
                return _NULL, 0
            start, size = _memory[address]
        else:
            address = start = ctypes.addressof(value)
            size = ctypes.sizeof(value)
        if start not in self._buffers:
            self._buffers[start] = len(self._buffers), size
            if nested:
                self._follow(start, size)
        return self._buffers[start][0], address - start

    def _follow(self, start: int, size: int) -> None:
        number = self._buffers[start][0]
        words = struct.unpack(f"<{size // 8}q", ctypes.string_at(start, size // 8 * 8))
        for index, word in enumerate(words):
            if word in _memory and word:
                self._addresses.append((number, index * 8, *self.place(word, nested=False)))

    def sizes(self) -> list[int]:
        return [size for _, size in self._buffers.values()]

    def request(self, name: str) -> bytes:
        parts = [struct.pack("<q", len(name)), name.encode(), struct.pack("<q", len(self._buffers))]
        for start, (_, size) in self._buffers.items():
            parts += struct.pack("<q", size), ctypes.string_at(start, size)
        parts.append(struct.pack("<q", len(self._addresses)))
        parts += (struct.pack("<4q", *each) for each in self._addresses)
        parts.append(struct.pack("<q", len(self.integers)))
        parts += (struct.pack("<2q", *each) for each in self.integers)
        parts.append(struct.pack(f"<q{len(self.floats)}f", len(self.floats), *self.floats))
        return b"".join(parts)

    def write_back(self, contents: list[bytes]) -> None:
        for (start, (_, size)), content in zip(self._buffers.items(), contents, strict=True):
            if ctypes.string_at(start, size) != content and not self._holds_addresses(start):
                ctypes.memmove(start, content, size)

    def _holds_addresses(self, start: int) -> bool:
        number = self._buffers[start][0]
        return any(number == each[0] for each in self._addresses)
