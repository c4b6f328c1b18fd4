"""Extracts an adapter from an uploaded archive: only the files that the engine reads are written,
PEFT's two and, beside them, those of the adapter's own tokenizer and settings.

Dangerous archives are refused: those with absolute or ``..`` paths, links or devices, and those
with too many members or too many bytes after decompression.
"""

from __future__ import annotations

import errno
import gzip
import io
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Protocol, cast

from nybble.loaders.adapter import OWN_FILES

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_BYTES = {CONFIG: 1 << 20, WEIGHTS: 2 << 30, **dict.fromkeys(OWN_FILES, 128 << 20)}
_MAX_MEMBERS = 1000
_MAX_UNPACKED = 4 << 30
# No honest header or name is this long, and tarfile would hold it in memory.
_MAX_READ = 8 << 20
_CHUNK = 1 << 20


class ArchiveError(ValueError):
    """The archive is refused; the message says why."""


def extract_adapter(archive: Path, folder: Path) -> None:
    """Write the adapter's files of a zip or tar (also gzip) to ``folder``. Raises ArchiveError."""
    taken: dict[str, PurePosixPath] = {}
    try:
        with archive.open("rb") as file:
            zipped = file.read(2) == b"PK"
        members = _zip(archive) if zipped else _tar(archive)
        for count, (path, stream) in enumerate(members):
            if count >= _MAX_MEMBERS:
                raise ArchiveError(f"the archive has more than {_MAX_MEMBERS} members")
            if stream is None or path.name not in MAX_BYTES:
                continue
            if path.name in taken:
                raise ArchiveError(
                    f"the archive has two {path.name}: {taken[path.name]} and {path}"
                )
            taken[path.name] = path
            with stream, (folder / path.name).open("xb") as target:
                copy_bounded(stream, target, path.name)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, RuntimeError) as error:
        raise ArchiveError(f"the archive cannot be read: {error}") from error
    except (gzip.BadGzipFile, NotImplementedError, UnicodeDecodeError) as error:
        raise ArchiveError(f"the archive cannot be read: {error}") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL is a bad archive; others are the disk's
            raise
        raise ArchiveError("the archive names a place that it does not have") from error
    parents = {taken[name].parent for name in (CONFIG, WEIGHTS) if name in taken}
    if len(parents) > 1:
        raise ArchiveError("the adapter's files are in different folders of the archive")
    for name, path in taken.items():
        if path.parent not in parents:  # such as the base's tokenizer
            (folder / name).unlink()


class Readable(Protocol):
    """What can be read by bytes."""

    def read(self, size: int, /) -> bytes: ...


def copy_bounded(source: Readable, target: IO[bytes], name: str) -> None:
    """Copy a file. Raises ArchiveError if it is larger than a file of this name may be."""
    left = MAX_BYTES[name]
    while chunk := source.read(_CHUNK):
        left -= len(chunk)
        if left < 0:
            raise ArchiveError(f"{name} is larger than {MAX_BYTES[name]} bytes")
        target.write(chunk)


def _zip(archive: Path) -> Iterator[tuple[PurePosixPath, IO[bytes] | None]]:
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            # The file type of a member that was written on Unix.
            kind = info.external_attr >> 28 if info.create_system == 3 else 0
            if kind not in (0, 0o4, 0o10):  # unknown, folder, regular file
                raise ArchiveError(f"{info.filename!r} is a link or a device")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ArchiveError(f"{info.filename!r} is not compressed as zip files usually are")
            path = _safe(info.filename)
            wanted = path.name in MAX_BYTES and not info.is_dir()
            yield path, file.open(info) if wanted else None


def _tar(archive: Path) -> Iterator[tuple[PurePosixPath, IO[bytes] | None]]:
    with _unpacked(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as file:
        for member in file:
            if not (member.isreg() or member.isdir()):
                raise ArchiveError(f"{member.name!r} is a link or a device")
            yield _safe(member.name), file.extractfile(member)


@contextmanager
def _unpacked(archive: Path) -> Iterator[IO[bytes]]:
    with archive.open("rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        stream: IO[bytes] | gzip.GzipFile = gzip.GzipFile(fileobj=raw) if zipped else raw
        yield cast(IO[bytes], _Bounded(stream))


class _Bounded(io.RawIOBase):
    """Refuses positions beyond ``_MAX_UNPACKED`` bytes and reads of more than ``_MAX_READ``."""

    def __init__(self, stream: IO[bytes] | gzip.GzipFile) -> None:
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_READ:
            raise ArchiveError("the archive has a header too large to be true")
        chunk = self._stream.read(size)
        self._check(self._stream.tell())
        return chunk

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET
        self._check(offset)
        return self._stream.seek(offset)

    def tell(self) -> int:
        return self._stream.tell()

    def _check(self, position: int) -> None:
        if position > _MAX_UNPACKED:
            raise ArchiveError(f"the archive unpacks to more than {_MAX_UNPACKED} bytes")


def _safe(name: str) -> PurePosixPath:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or "\0" in name or ":" in name:
        raise ArchiveError(f"{name!r} leads out of the archive")
    return path
