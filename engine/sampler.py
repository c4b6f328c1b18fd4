"""From logits to the next token, one sequence at a time.

Randomness is one uniform number per token from a generator of the sequence's own, turned into a
token by inverting the cumulative distribution: a seeded request draws the same tokens whatever
shares its batch.
"""

from __future__ import annotations

import secrets

import numpy as np
import torch
from nybble.engine.request import SamplingParams, TokenLogprob
from torch import Tensor

# Nucleus sampling looks at this many candidates before it sorts the whole vocabulary.
_NUCLEUS_CANDIDATES = 1024


class SequenceSampler:
    """The sampling state of one sequence: its random generator and the tokens it has seen.

    allowed: bool ``(vocab,)``, the tokens the next one may be, on any device; None for all. Whoever
    guides a sequence sets it before each step; it comes after biases and penalties.
    """

    def __init__(self, params: SamplingParams, prompt_token_ids: tuple[int, ...]) -> None:
        self.params = params
        self.allowed: Tensor | None = None
        seed = params.seed if params.seed is not None else secrets.randbits(63)
        self._random = np.random.Generator(np.random.PCG64(seed & (1 << 64) - 1))
        self._prompt_token_ids = prompt_token_ids
        self._seen: Tensor | None = None
        self._counts: Tensor | None = None

    def sample(self, logits: Tensor) -> tuple[int, TokenLogprob | None]:
        """Choose a token from float32 logits ``(vocab,)``, which may be overwritten."""
        params = self.params
        logprobs = torch.log_softmax(logits, dim=-1) if params.logprobs is not None else None
        self._penalize(logits)
        if self.allowed is not None:
            logits.masked_fill_(~self.allowed.to(logits.device), float("-inf"))
        if params.temperature == 0:
            token = int(logits.argmax())
        else:
            token = self._draw(logits.div_(params.temperature))
        if self._counts is not None:
            self._counts[token] += 1
        return token, None if logprobs is None else _report(logprobs, token, params.logprobs or 0)

    def _penalize(self, logits: Tensor) -> None:
        params = self.params
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=logits.device)
            logits[ids] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
        if not (
            params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
        ):
            return
        if self._counts is None:
            self._counts = torch.zeros_like(logits)
            self._seen = torch.zeros_like(logits, dtype=torch.bool)
            self._seen[list(self._prompt_token_ids)] = True
        assert self._seen is not None
        generated = self._counts > 0
        penalty = params.repetition_penalty
        if penalty != 1:
            seen = self._seen | generated
            penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits.copy_(torch.where(seen, penalized, logits))
        logits -= params.presence_penalty * generated + params.frequency_penalty * self._counts

    def _draw(self, logits: Tensor) -> int:
        """Truncate by top_k, then top_p, then min_p, and draw from what is left."""
        params = self.params
        probs = torch.softmax(logits, dim=-1)
        ids: Tensor | None = None
        if params.top_k and params.top_k < len(probs):
            probs, ids = probs.topk(params.top_k)
            probs = probs / probs.sum()
        if params.top_p < 1:
            probs, order = _nucleus(probs, params.top_p)
            ids = order if ids is None else ids[order]
        if params.min_p > 0:
            probs = torch.where(probs >= params.min_p * probs.max(), probs, 0.0)
        # float64, because a float32 sum over a large vocabulary misplaces its tail.
        cumulative = probs.double().cumsum(0)
        threshold = self._random.random() * float(cumulative[-1])
        # `right` finds the first entry above the threshold, so a token of probability 0 is never
        # chosen; the clamp covers a product that rounded up to the total.
        index = int(torch.searchsorted(cumulative, threshold, right=True))
        index = min(index, int(probs.nonzero()[-1]))
        return index if ids is None else int(ids[index])


def _nucleus(probs: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The fewest likeliest entries that sum to at least ``top_p``: (probabilities, indices)."""
    count = min(_NUCLEUS_CANDIDATES, len(probs))
    while True:
        top, ids = probs.topk(count)
        cumulative = top.cumsum(0)
        if float(cumulative[-1]) >= top_p or count == len(probs):
            # An entry stays if what precedes it has not yet reached top_p.
            keep = int((cumulative - top < top_p).sum())
            return top[:keep], ids[:keep]
        count = len(probs)


def _report(logprobs: Tensor, token: int, alternatives: int) -> TokenLogprob:
    values, ids = logprobs.topk(min(alternatives, len(logprobs)))
    return TokenLogprob(
        token_id=token,
        logprob=float(logprobs[token]),
        top=tuple(zip(ids.tolist(), values.tolist(), strict=True)),
    )
