"""Names of files: the parts of a split one, and which of several GGUF files a tag means."""

from __future__ import annotations

import re
from collections.abc import Sequence

from nybble.model_name import ModelNotFoundError

_PART = re.compile(r"-(\d{5})-of-(\d{5})(\.gguf|\.safetensors)$")
_TAG = re.compile(r"[-._/]((?:I?Q\d|TQ\d|BF16|F16|F32|MXFP4)\w*)(?:-\d{5}-of-\d{5})?\.gguf$", re.I)


def parts_of(file: str) -> list[str]:
    """The names of all parts of a split model, or the file's own."""
    match = _PART.search(file)
    if match is None:
        return [file]
    stem, count, suffix = file[: match.start()], int(match[2]), match[3]
    return [f"{stem}-{part:05}-of-{count:05}{suffix}" for part in range(1, count + 1)]


def models_among(files: Sequence[str]) -> list[str]:
    """One file for each language model: of a split one, the first part."""
    return [
        file
        for file in sorted(files)
        if file.endswith(".gguf")
        and not file.rpartition("/")[2].startswith("mmproj")
        and file == parts_of(file)[0]
    ]


def tagged(files: Sequence[str], tag: str) -> list[str]:
    """The models that ``tag`` may mean: a type such as ``Q4_K_M`` in any case, or a name."""
    own = re.compile(rf"(?:^|[-._/]){re.escape(tag)}(?:[-./]|$)", re.I)
    models = models_among(files)
    named = [file for file in models if tag in (file, file.rpartition("/")[2])]
    return named or [file for file in models if own.search(file)]


def choose(repository: str, files: Sequence[str], tag: str) -> str | None:
    """The one model of a repository that its name and tag mean; None if no file has the tag.

    tag: may be empty. Raises ModelNotFoundError, which lists the tags, if there are several.
    """
    found = tagged(files, tag) if tag else models_among(files)
    if len(found) > 1:
        names = ", ".join(f"{repository}:{each}" for each in _tags(found))
        raise ModelNotFoundError(f"{repository} holds several models: give one of {names}")
    return found[0] if found else None


def _tags(files: Sequence[str]) -> list[str]:
    """What tells files apart: their types if these differ, else their names."""
    types = [match[1] if (match := _TAG.search(file)) else file for file in files]
    return types if len(set(types)) == len(types) else list(files)
