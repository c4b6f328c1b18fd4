"""The prompts to send, and when to send them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_WORDS = (
    *("function", "returns", "value", "list", "index", "error", "while", "reading", "file"),
    *("buffer", "parse", "tree", "token", "stream", "client", "server", "request", "response"),
    *("cache", "block", "memory", "thread", "queue", "lock", "write", "test", "simple", "fast"),
)
_CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class Ask:
    """A prompt, and how many tokens to generate."""

    prompt: str
    max_tokens: int


def random_prompt(words: int, seed: int) -> str:
    """Random words. Prompts differ from the first word on, so that no prefix is cached."""
    generator = random.Random(seed)
    return " ".join([str(seed), *(generator.choice(_WORDS) for _ in range(words))])


def lengths(text: str) -> Callable[[random.Random], int]:
    """The distribution of lengths which a text describes.

    It is ``128`` (always), ``64-256`` (uniform) or ``~128`` (exponential with that mean). Raises
    ValueError for anything else.
    """
    match = re.fullmatch(r"(?P<mean>~)?(?P<low>\d+)(?:-(?P<high>\d+))?", text)
    low = int(match["low"]) if match else 0
    if match is None or low < 1 or (match["mean"] and match["high"]):
        raise ValueError(f"length {text!r}: expected 128, 64-256 or ~128")
    if match["mean"]:
        return lambda generator: max(1, round(generator.expovariate(1 / low)))
    high = int(match["high"] or low)
    if high < low:
        raise ValueError(f"length {text!r}: {high} is less than {low}")
    return lambda generator: generator.randint(low, high)


def random_asks(count: int, words: str, tokens: str, seed: int) -> list[Ask]:
    """Prompts of random words.

    words, tokens: distributions of the prompt's and the answer's length; see ``lengths``.
    """
    generator = random.Random(seed)
    prompt, output = lengths(words), lengths(tokens)
    base = generator.randrange(1 << 30)
    return [
        Ask(random_prompt(prompt(generator), base + index), output(generator))
        for index in range(count)
    ]


def dataset_asks(path: Path, count: int, tokens: str | None, seed: int) -> list[Ask]:
    """Prompts from the lines of a file in random order, repeated if there are fewer than ``count``.

    A line is ``{"prompt": …}`` or ShareGPT's ``{"conversations": [{"from", "value"}, …]}``, whose
    first two turns are used.

    tokens: how many to generate; None for as many as the answer in the file has.

    Raises ValueError naming the line at fault.
    """
    generator = random.Random(seed)
    output = None if tokens is None else lengths(tokens)
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                rows.append(_turns(json.loads(line)))
            except (ValueError, LookupError, TypeError):
                raise ValueError(
                    f"{path}, line {number}: expected an object with 'prompt' or 'conversations'"
                ) from None
    if not rows:
        raise ValueError(f"{path} has no lines")
    generator.shuffle(rows)
    asks = []
    for index in range(count):
        prompt, answer = rows[index % len(rows)]
        about = max(1, len(answer) // _CHARACTERS_PER_TOKEN) if answer else 128
        asks.append(Ask(prompt, about if output is None else output(generator)))
    return asks


def _turns(row: Any) -> tuple[str, str]:
    if "prompt" in row:
        prompt, answer = row["prompt"], row.get("completion", "")
    else:
        prompt, answer = (turn["value"] for turn in row["conversations"][:2])
    if not (isinstance(prompt, str) and isinstance(answer, str) and prompt):
        raise ValueError
    return prompt, answer


def poisson_arrivals(rate: float, seed: int) -> Iterator[float]:
    """Arrival times of requests in seconds from the start, ``rate`` per second on average."""
    generator = random.Random(seed)
    at = 0.0
    while True:
        yield at
        at += generator.expovariate(rate)
