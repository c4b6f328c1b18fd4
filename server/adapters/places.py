"""Shared places of adapters, read through fsspec: a folder, S3, Google Cloud Storage, the hub.

A *source* holds PEFT folders which others put there; ``URL`` has ``{name}`` in it. A *registry* is
written by servers: ``URL/NAME/DIGEST/`` holds a version's files, named by the digest of their
content, and ``URL/NAME/current.json`` says which version is served. Neither is ever listed as a
whole, so that their size costs nothing.
"""

from __future__ import annotations

import json
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, TypeVar
from uuid import uuid4

import fsspec
from fsspec.implementations.local import LocalFileSystem

from nybble.loaders.adapter import OWN_FILES, content_digest, own_files
from nybble.server.adapters.archive import CONFIG, MAX_BYTES, WEIGHTS, ArchiveError, copy_bounded
from nybble.server.adapters.names import is_name

logger = logging.getLogger(__name__)

T = TypeVar("T")

_DIGEST = re.compile(r"[0-9a-f]{8,128}")
_POINTER = "current.json"
# The hub's file system raises the last for a path that can be no repository.
_ABSENT = (FileNotFoundError, NotADirectoryError, NotImplementedError)


class PlaceError(Exception):
    """A place did not answer as it should, or holds something that is no adapter."""


@dataclass(frozen=True)
class Found:
    """A version of an adapter in a shared place.

    folder: its path there.
    revision: differs for another version of the same name.
    digest: of its files' content, in hexadecimal; None if the place does not know it.
    sizes: bytes of PEFT's two files.
    """

    place: Place
    name: str
    folder: str
    revision: str
    digest: str | None
    sizes: dict[str, int]

    @property
    def nbytes(self) -> int:
        return sum(self.sizes.values())

    @property
    def key(self) -> str:
        """A file name which no other version of any adapter has."""
        parts = (self.place.url, self.name, self.revision)
        return blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def fetch(self, folder: Path) -> None:
        """Copy the files into a local folder. Blocks. Raises PlaceError, OSError for the folder.

        Those of the adapter's own tokenizer and settings are looked for only now: a look for each
        in every refresh would be as much work as all else.
        """
        for name in (CONFIG, WEIGHTS):
            self._reading(name, folder / name)
        for name in OWN_FILES:
            try:
                self._reading(name, folder / name)
            except FileNotFoundError:
                (folder / name).unlink(missing_ok=True)
        if self.digest is not None and content_digest(folder) != self.digest:
            raise PlaceError(f"{self.folder} is not what its digest says: publish it again")

    def _reading(self, name: str, target: Path) -> None:
        url = self.place.url
        source = asked(url, lambda: self.place.files.open(f"{self.folder}/{name}", "rb"))
        # What the copy's own disk says, as that it is full, is not the place's fault.
        with source, target.open("wb") as file:
            try:
                copy_bounded(_Asked(source, url), file, name)
            except ArchiveError as error:
                raise PlaceError(f"{self.folder}: {error}") from None


def asked(url: str, action: Callable[[], T]) -> T:
    """Do something with a file system, whose errors may be of any kind.

    Raises FileNotFoundError if something is absent, and otherwise PlaceError.
    """
    try:
        return action()
    except _ABSENT as error:
        raise FileNotFoundError(str(error)) from error
    except (PlaceError, ArchiveError):
        raise
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        raise PlaceError(f"{url} cannot be used: {reason.splitlines()[0]}") from error


class _Asked:
    """A file of a place: what goes wrong in reading it is told as :func:`asked` does."""

    def __init__(self, file: IO[bytes], url: str) -> None:
        self._file = file
        self._url = url

    def read(self, size: int) -> bytes:
        return asked(self._url, lambda: self._file.read(size))


class Place(ABC):
    """A file system and a path in it."""

    def __init__(self, url: str) -> None:
        """Raises ValueError for a URL that no installed package reads."""
        self.url = url
        try:
            # Listings must not be cached: others change them.
            self.files, self.path = fsspec.core.url_to_fs(
                url, use_listings_cache=False, skip_instance_cache=True
            )
        except (ImportError, ValueError, OSError) as error:
            raise ValueError(f"adapters cannot be read from {url}: {error}") from error

    @abstractmethod
    def covers(self, name: str) -> bool:
        """Whether a name may be looked for here."""

    @abstractmethod
    def find(self, name: str) -> Found | None:
        """The version of this name that is served now. Blocks. Raises PlaceError."""

    def _found(
        self, name: str, folder: str, digest: str | None, infos: dict[str, dict[str, Any]]
    ) -> Found:
        sizes = {file: int(info.get("size") or 0) for file, info in infos.items()}
        for file, size in sizes.items():
            if size > MAX_BYTES[file]:
                raise PlaceError(f"{folder}/{file} is larger than {MAX_BYTES[file]} bytes")
        # Size, time of change, ETag, generation, blob: whatever this kind of place says of a file.
        revision = digest or blake2b(repr(sorted(infos.items())).encode()).hexdigest()
        return Found(self, name, folder, revision, digest, sizes)

    def _infos(self, folder: str) -> dict[str, dict[str, Any]]:
        self.files.invalidate_cache()
        return {name: self.files.info(f"{folder}/{name}") for name in (CONFIG, WEIGHTS)}


class AdapterSource(Place):
    """PEFT folders at ``URL`` with the name in place of ``{name}``, for names of a pattern."""

    def __init__(self, rule: str) -> None:
        """rule: ``[NAMES=]URL``, where NAMES is a shell pattern, and ``/{name}`` may be left out.

        Raises ValueError.
        """
        names, equals, url = rule.partition("=")
        if not equals or "://" in names:
            names, url = "*", rule
        if not names or not url:
            raise ValueError(f"--lora-source {rule!r}: expected [NAMES=]URL")
        if url.count("{name}") > 1:
            raise ValueError(f"--lora-source {rule!r}: {{name}} is there more than once")
        if "{name}" not in url:
            url = f"{url.rstrip('/')}/{{name}}"
        super().__init__(url)
        self._names = names
        if isinstance(self.files, LocalFileSystem):
            folder = Path(self.path.partition("{name}")[0])
            if not folder.is_dir():
                raise ValueError(f"--lora-source {rule!r}: there is no folder {folder}")

    def covers(self, name: str) -> bool:
        return is_name(name) and fnmatchcase(name, self._names)

    def find(self, name: str) -> Found | None:
        folder = self.path.replace("{name}", name)
        try:
            infos = asked(self.url, lambda: self._infos(folder))
        except FileNotFoundError:
            return None
        # When a file was looked at says nothing about its content.
        kept = {file: _without_times_of_reading(info) for file, info in infos.items()}
        return self._found(name, folder, None, kept)


class AdapterRegistry(Place):
    """Versions which servers publish, each under the digest of its content."""

    def covers(self, name: str) -> bool:
        return is_name(name)

    def find(self, name: str) -> Found | None:
        pointer = f"{self.path}/{name}/{_POINTER}"

        def read() -> Found:
            self.files.invalidate_cache()
            digest = _digest_of(pointer, self.files.cat_file(pointer))
            folder = f"{self.path}/{name}/{digest}"
            return self._found(name, folder, digest, self._infos(folder))

        try:
            return asked(self.url, read)
        except FileNotFoundError:
            return None

    def store(self, name: str, folder: Path) -> Found:
        """Write the files of a version, which nobody is told of yet. Raises PlaceError."""
        digest = content_digest(folder)
        target = f"{self.path}/{name}/{digest}"

        def write() -> Found:
            try:
                return self._found(name, target, digest, self._infos(target))
            except FileNotFoundError:
                self.files.makedirs(target, exist_ok=True)
                for file in (*own_files(folder), WEIGHTS, CONFIG):
                    self.files.put_file(str(folder / file), f"{target}/{file}")
                return self._found(name, target, digest, self._infos(target))

        return asked(self.url, write)

    def point(self, found: Found) -> None:
        """Serve a stored version from now on. Raises PlaceError."""
        pointer = f"{self.path}/{found.name}/{_POINTER}"
        content = json.dumps({"version": found.digest}).encode()

        def write() -> None:
            if not isinstance(self.files, LocalFileSystem):
                self.files.pipe_file(pointer, content)  # object stores show all or nothing
                return
            partial = f"{pointer}.{uuid4().hex}"
            self.files.pipe_file(partial, content)
            Path(partial).replace(pointer)

        asked(self.url, write)

    def withdraw(self, name: str) -> None:
        """Serve no version of this name any more; the files stay. Raises PlaceError."""
        self._remove(f"{self.path}/{name}/{_POINTER}", recursive=False)

    def delete(self, name: str) -> None:
        """Remove every version of this name. Raises PlaceError."""
        self.withdraw(name)
        folder = f"{self.path}/{name}"
        for version in asked(self.url, lambda: self._versions(folder)):
            self._remove(version, recursive=True)
        if isinstance(self.files, LocalFileSystem):
            with suppress(OSError):  # other names begin with this one
                Path(folder).rmdir()

    def _versions(self, folder: str) -> list[str]:
        """Paths of the versions in a name's folder, where those of ``NAME/OTHER`` are too."""
        self.files.invalidate_cache()
        try:
            found = self.files.ls(folder, detail=False)
        except FileNotFoundError:
            return []
        digests = (path.rstrip("/") for path in found)
        digests = (path for path in digests if _DIGEST.fullmatch(path.rpartition("/")[2]))
        return [path for path in digests if self.files.exists(f"{path}/{CONFIG}")]

    def _remove(self, path: str, *, recursive: bool) -> None:
        def remove() -> None:
            self.files.invalidate_cache()
            self.files.rm(path, recursive=recursive)

        with suppress(FileNotFoundError):
            asked(self.url, remove)


def _digest_of(pointer: str, content: bytes) -> str:
    try:
        digest = json.loads(content)["version"]
    except (ValueError, KeyError, TypeError):
        digest = None
    if not (isinstance(digest, str) and _DIGEST.fullmatch(digest)):
        raise PlaceError(f'{pointer} is not {{"version": DIGEST}}: publish the adapter again')
    return digest


def _without_times_of_reading(info: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in info.items() if key not in ("atime", "nlink")}
