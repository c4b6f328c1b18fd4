"""What a batch's lines came to, on disk: how far it is, and later its two files."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic_core import from_json

from nybble.server.batches.answers import Answer

EXPIRED = "batch_expired"  # the code of a line whose time was over


class Results:
    """Two growing files. Every line in them is whole, whenever the process is killed.

    done: custom_ids of the lines that have a result.
    expired: whether it is for some of them that their time was over.
    bytes: of both files.
    """

    def __init__(self, output: Path, errors: Path) -> None:
        """Open or create the files, which may be one; what a killed process wrote of a line is
        removed.

        output: of requests that succeeded. errors: of the others.
        """
        self.output, self.errors = output, errors
        self.done: set[str] = set()
        self.expired = False
        self._counts: dict[Path, int] = {}
        self._sizes: dict[Path, int] = {}
        for path in {output, errors}:
            self._open(path)

    @property
    def completed(self) -> int:
        return self._counts[self.output]

    @property
    def failed(self) -> int:
        return self._counts[self.errors]

    @property
    def bytes(self) -> int:
        return sum(self._sizes.values())

    @classmethod
    def in_folder(cls, folder: Path) -> Results:
        folder.mkdir(parents=True, exist_ok=True)
        return cls(folder / "output.jsonl", folder / "errors.jsonl")

    def add(self, custom_id: str, answer: Answer) -> None:
        """Append a result. Raises OSError, and then the files are as they were."""
        path = self.output if answer.ok else self.errors
        with path.open("ab", buffering=0) as file:
            try:
                written = file.write(answer.data)
                if written != len(answer.data):
                    raise OSError(f"{path} took {written} of {len(answer.data)} bytes")
            except OSError:
                os.ftruncate(file.fileno(), self._sizes[path])
                raise
        self._sizes[path] += len(answer.data)
        self._counts[path] += 1
        self.done.add(custom_id)
        self.expired |= answer.code == EXPIRED

    def _open(self, path: Path) -> None:
        size = count = 0
        with path.open("a+b") as file:
            file.seek(0)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    result = from_json(line)
                    self.done.add(result["custom_id"])
                except (ValueError, LookupError, TypeError):
                    raise ValueError(f"{path} has a line that is no result of a batch") from None
                self.expired |= (result["error"] or {}).get("code") == EXPIRED
                size += len(line)
                count += 1
            os.ftruncate(file.fileno(), size)
        self._sizes[path], self._counts[path] = size, count
