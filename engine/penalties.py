"""Repetition, presence and frequency penalties: only logits of tokens seen before change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nybble.engine.request import SamplingParams
from nybble.engine.transfer import send


class SeenTokens:
    """The tokens of a sequence's prompt and output, each once, and how often each was generated."""

    def __init__(self, prompt: Sequence[int], output: Iterable[int]) -> None:
        self._ids = np.unique(np.array(prompt, dtype=np.int64))
        self._counts = np.zeros_like(self._ids)
        self._places = {token: place for place, token in enumerate(self._ids.tolist())}
        for token in output:
            self.add(token)

    def add(self, token: int) -> None:
        """Count a generated token."""
        place = self._places.get(token, len(self._places))
        if place == len(self._ids):  # doubling it, so that a long text is not copied every time
            self._ids = np.pad(self._ids, (0, place + 16))
            self._counts = np.pad(self._counts, (0, place + 16))
        self._ids[place] = token
        self._counts[place] += 1
        self._places[token] = place

    def plus(self, tokens: Iterable[int]) -> SeenTokens:
        """These and more generated tokens; itself unchanged."""
        more = copy(self)
        more._ids, more._counts = self._ids.copy(), self._counts.copy()
        more._places = self._places.copy()
        for token in tokens:
            more.add(token)
        return more

    @property
    def ids(self) -> NDArray[np.int64]:
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> NDArray[np.int64]:
        """How often each of ``ids`` was generated: 0 if it is in the prompt alone."""
        return self._counts[: len(self._places)]


def penalize(
    logits: Tensor,
    rows: Sequence[int],
    params: Sequence[SamplingParams],
    seen: Sequence[SeenTokens],
) -> None:
    """Change ``logits`` (float32 ``(all rows, vocab)``) of these rows by each one's penalties.

    The work is that of the tokens seen, not of the vocabulary, and the same few operations for any
    number of rows.
    """
    sizes = [len(each.ids) for each in seen]
    if not sum(sizes):
        return
    ids = np.concatenate([each.ids for each in seen])
    times = np.concatenate([each.counts for each in seen])
    entries = np.stack((np.repeat(rows, sizes), ids, times, np.repeat(range(len(rows)), sizes)))
    row, token, generated, which = send(entries, torch.int64, logits.device)
    penalized = logits[row, token]

    def column(name: str, off: float) -> Tensor | None:
        values = [getattr(each, name) for each in params]
        if all(value == off for value in values):
            return None
        return send(values, logits.dtype, logits.device)[which]

    if (repetition := column("repetition_penalty", 1)) is not None:
        penalized = torch.where(penalized > 0, penalized / repetition, penalized * repetition)
    if (presence := column("presence_penalty", 0)) is not None:
        penalized = penalized - presence * (generated > 0)
    if (frequency := column("frequency_penalty", 0)) is not None:
        penalized = penalized - frequency * generated
    logits[row, token] = penalized
