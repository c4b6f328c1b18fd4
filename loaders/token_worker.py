"""The process that reads an adapter's tokenizer. It runs as a file and imports nothing of nybble.

To read a vocabulary of 150,000 tokens and to compare it with the base's takes Python a good part of
a second, in which no other thread would run: every stream of a server would pause.

The base's vocabulary comes in as JSON. The new tokens go out as JSON, or why the files are refused.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

TOKENIZER_JSON, SETTINGS = "tokenizer.json", "tokenizer_config.json"
ADDED, SPECIAL = "added_tokens.json", "special_tokens_map.json"
# The largest known, of vocabularies of 260,000 tokens, have 34 MB.
_MOST_BYTES = 128 << 20
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_WITHOUT = (
    "remove the tokenizer's files from the adapter's folder, or have the server use the base "
    "model's own (--no-lora-own-settings)"
)
# A token's text and its flags.
_Token = dict[str, Any]


class _RefusedError(Exception):
    """The message says all."""


def _answer(folder: Path, known: Mapping[str, int]) -> dict[str, Any]:
    """The new tokens by their ids, and those that the settings name."""
    for name in (TOKENIZER_JSON, ADDED, SPECIAL, SETTINGS):
        path = folder / name
        if path.is_file() and path.stat().st_size > _MOST_BYTES:
            return {"refused": f"{path} has over {_MOST_BYTES >> 20} MiB"}
    try:
        added, vocabulary = _tokens(folder)
        new = {number: each for number, each in added.items() if each["content"] not in known}
        if not new:
            return {"added": []}
        _require_same(folder, known, added, vocabulary)
        special = _named(folder, known.keys() | {token["content"] for token in new.values()})
    except _RefusedError as error:
        return {"refused": str(error)}
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError) as error:
        what = f"the tokenizer of {folder} cannot be read: {error!s}"
        return {"refused": f"{what}; mend it, or {_WITHOUT}"}
    return {"added": sorted(new.items()), "special": special}


def _tokens(folder: Path) -> tuple[dict[int, _Token], dict[str, int] | None]:
    """The added tokens by their ids, and the vocabulary beneath them if its file can be read."""
    if (path := folder / TOKENIZER_JSON).is_file():
        file = _object(path)
        pieces = file["model"]["vocab"]
        if isinstance(pieces, list):  # unigrams: [piece, score]
            pieces = {piece: number for number, (piece, _) in enumerate(pieces)}
        return {int(each["id"]): _token(each) for each in file.get("added_tokens") or ()}, pieces
    found = _object(folder / SETTINGS).get("added_tokens_decoder")
    if found:
        return {int(number): _token(each) for number, each in found.items()}, None
    named = set(_named(folder, None).values())
    return {
        int(number): {"content": text, "special": text in named, "normalized": text not in named}
        for text, number in _object(folder / ADDED).items()
    }, None


def _token(entry: Mapping[str, Any]) -> _Token:
    content = entry["content"]
    if not isinstance(content, str):
        raise TypeError(f"the added token {content!r} is no text")
    return {"content": content, **{flag: bool(entry[flag]) for flag in _FLAGS if flag in entry}}


def _require_same(
    folder: Path,
    known: Mapping[str, int],
    added: Mapping[int, _Token],
    vocabulary: Mapping[str, int] | None,
) -> None:
    """Refuses a vocabulary in which more than new tokens differ from the base's."""

    def refuse(what: str) -> _RefusedError:
        return _RefusedError(
            f"the tokenizer of {folder} {what}: an adapter's may add tokens to the base model's, "
            f"and leaves those as they are; {_WITHOUT}"
        )

    texts = {token["content"]: number for number, token in added.items()}
    own = {**(vocabulary or {}), **texts}
    taken = set(known.values())
    for token, number in own.items():
        if known.get(token, number) != number:
            raise refuse(f"has {token!r} as {number}, which is {known[token]} in the base")
        if token not in known and number in taken:
            raise refuse(f"has {token!r} as {number}, which is another token in the base")
    if vocabulary is not None:
        if others := vocabulary.keys() - known.keys() - texts.keys():
            raise refuse(f"has {min(others)!r} in its vocabulary, which is not in the base's")
        if missing := known.keys() - own.keys():
            raise refuse(f"lacks {min(missing)!r}, which the base has")


def _named(folder: Path, known: Iterable[str] | None) -> dict[str, str]:
    """The tokens that the tokenizer's settings name, of those that are known."""
    found: dict[str, str] = {}
    for name in (SPECIAL, SETTINGS):
        for key, value in _object(folder / name).items():
            text = value.get("content") if isinstance(value, dict) else value
            if not (key.endswith("_token") and isinstance(text, str)):
                continue
            if known is None or text in known:
                found[key] = text
    return found


def _object(path: Path) -> dict[str, Any]:
    """What a file of one JSON object holds; nothing if there is no file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a JSON object")
    return found


def main() -> None:
    known: dict[str, int] = json.load(sys.stdin)
    print(json.dumps(_answer(Path(sys.argv[1]), known)))


if __name__ == "__main__":
    main()
