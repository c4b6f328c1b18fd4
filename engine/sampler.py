"""From logits to the next tokens of a batch.

Randomness is one uniform number per token from a generator of the sequence's own, turned into a
token by inverting the cumulative distribution: a seeded request draws the same tokens whatever
shares its batch. On a GPU everything but that number stays on the device until one transfer brings
the tokens back.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from copy import copy

import numpy as np
import torch
from torch import Tensor

from nybble.engine.penalties import SeenTokens, penalize
from nybble.engine.request import (
    NotANumberError,
    NothingAllowedError,
    NoTokenError,
    SamplingParams,
    TokenLogprob,
)
from nybble.engine.transfer import send
from nybble.kernels.backend import Backend
from nybble.kernels.reference import TokenChoice

Sampled = tuple[int, TokenLogprob | None]

# Divided by less, logits could leave float32's range; here chance decides between ties alone.
_COLDEST = 1e-6


class SequenceSampler:
    """The sampling state of one sequence: its random generator and the tokens it has seen.

    It changes when a token is recorded and not before, so that a step which failed for lack of
    memory can be computed again with the same result.

    penalizes: whether tokens seen before change the logits.
    constrained: whether the parameters exclude tokens.
    adjusts: whether the parameters change the logits in any way.
    ends: the tokens that end the sequence. bad_words: the tokens of each that may not come.
    vocab: from how many logits its tokens are chosen; None for all there are.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: tuple[int, ...],
        *,
        ends: frozenset[int] = frozenset(),
        bad_words: tuple[tuple[int, ...], ...] = (),
        vocab: int | None = None,
    ) -> None:
        self.params = params
        self.vocab = vocab
        self.penalizes = bool(
            params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
        )
        self.constrained = bool(bad_words or params.allowed_token_ids or params.min_tokens)
        self.adjusts = bool(params.logit_bias) or self.penalizes or self.constrained
        self._ends = sorted(ends)
        self._bad_words = bad_words
        self._output: list[int] = []
        seed = params.seed if params.seed is not None else secrets.randbits(63)
        self._random = np.random.Generator(np.random.PCG64(seed & (1 << 64) - 1))
        self._uniforms: list[float] = []  # drawn for the next tokens
        self._prompt_token_ids = prompt_token_ids
        self._seen: SeenTokens | None = None

    def choice(self) -> TokenChoice:
        """How the next token is chosen: in the same way until it is recorded."""
        params = self.params
        if not params.temperature:
            return TokenChoice(0.0, params.top_k, params.top_p, params.min_p, 0.0)
        self._draw(1)
        temperature = max(params.temperature, _COLDEST)
        return TokenChoice(temperature, params.top_k, params.top_p, params.min_p, self._uniforms[0])

    def _draw(self, count: int) -> None:
        """Have random numbers for the next ``count`` tokens, each token its own."""
        while len(self._uniforms) < count:
            self._uniforms.append(self._random.random())

    def after(self, tokens: tuple[int, ...]) -> SequenceSampler:
        """How the token after these would be chosen, if these were recorded before."""
        if not tokens:
            return self
        ahead = copy(self)
        if self.params.temperature:
            self._draw(len(tokens) + 1)
            ahead._uniforms = self._uniforms[len(tokens) :]
        if self.constrained:
            ahead._output = [*self._output, *tokens]
        if self.penalizes:
            ahead._seen = self.seen().plus(tokens)
        return ahead

    def seen(self) -> SeenTokens:
        """The tokens that penalties look at."""
        if self._seen is None:
            self._seen = SeenTokens(self._prompt_token_ids, self._output)
        return self._seen

    def record(self, token: int) -> None:
        """Count a generated token; the next is chosen with another random number."""
        del self._uniforms[:1]
        self._output.append(token)
        if self._seen is not None:
            self._seen.add(token)

    def barred(self, guided: Tensor | None) -> list[int]:
        """The tokens that may not come next: ends before their time, the last of a bad word.

        guided: the tokens a grammar allows, bool ``(vocab,)`` on the CPU.
        """
        barred = [
            word[-1]
            for word in self._bad_words
            if len(word) == 1 or tuple(self._output[1 - len(word) :]) == word[:-1]
        ]
        early = len(self._output) < self.params.min_tokens
        # A grammar that is complete has nothing else to go on with.
        if early and (guided is None or guided.sum() > guided[self._ends].sum()):
            barred += self._ends
        return barred


class PendingSample:
    """Tokens that the device may still be computing."""

    def __init__(
        self,
        backend: Backend,
        logits: Tensor,
        samplers: Sequence[SequenceSampler],
        allowed: Sequence[Tensor | None] | None = None,
    ) -> None:
        """Start on float32 logits ``(rows, vocab)``, which it overwrites, a sampler for each.

        allowed: for each row the tokens the next one may be, bool ``(vocab,)`` on any device, or
        None for all; whatever biases and penalties say.
        """
        self._samplers = samplers
        self._asked = [row for row, each in enumerate(samplers) if each.params.logprobs is not None]
        logprobs = torch.log_softmax(_rows(logits, self._asked), dim=-1) if self._asked else None
        masks = allowed or [None] * len(samplers)
        self._masked = [mask is not None for mask in masks]
        if any(self._masked) or any(each.adjusts for each in samplers):
            _adjust(logits, samplers, masks)
        if all(not each.params.temperature for each in samplers):
            chosen = logits.argmax(-1)
        else:
            chosen = backend.sample_tokens(logits, [each.choice() for each in samplers])
        # Of a row with a NaN, NaN; of one with nothing that may follow, −inf.
        self._found = [chosen, logits.amax(-1)]
        if logprobs is not None:
            own = logprobs.gather(1, _rows(chosen, self._asked)[:, None])
            counts = [samplers[row].params.logprobs or 0 for row in self._asked]
            self._found += [own, *_likeliest(logprobs, counts)]
            named = [samplers[row].params.logprob_token_ids for row in self._asked]
            if any(named):
                longest = max(map(len, named))
                padded = [[*ids, *(0,) * (longest - len(ids))] for ids in named]
                self._found.append(logprobs.gather(1, send(padded, torch.int64, logits.device)))

    def result(self) -> list[Sampled | NoTokenError]:
        """The next token of each row, once the device has it; an error if it has none.

        Nothing is recorded.
        """
        tokens, largest, *reports = _to_host(self._found)
        sampled: list[Sampled | NoTokenError] = []
        rows = zip(self._samplers, tokens.tolist(), largest.tolist(), strict=True)
        for row, (each, token, most) in enumerate(rows):
            if not math.isfinite(most):
                constrained = each.constrained or self._masked[row]
                nothing = constrained and most == -math.inf
                sampled.append(NothingAllowedError() if nothing else NotANumberError())
                continue
            report = None
            if each.params.logprobs is not None:
                place = self._asked.index(row)
                report = _report(reports, place, token, each.params)
            sampled.append((token, report))
        return sampled


class PendingGroups:
    """Rows whose tokens are chosen from different numbers of logits; see PendingSample.

    What a row's are chosen from does not depend on the others, nor does the order of its sums.
    """

    def __init__(
        self,
        backend: Backend,
        logits: Tensor,
        samplers: Sequence[SequenceSampler],
        allowed: Sequence[Tensor | None],
    ) -> None:
        self._count = len(samplers)
        by_vocab: dict[int, list[int]] = {}
        for row, sampler in enumerate(samplers):
            by_vocab.setdefault(sampler.vocab or logits.shape[1], []).append(row)
        self._groups = [
            (
                rows,
                PendingSample(
                    backend,
                    logits[rows, :vocab].contiguous(),
                    [samplers[row] for row in rows],
                    [allowed[row] for row in rows],
                ),
            )
            for vocab, rows in by_vocab.items()
        ]

    def result(self) -> list[Sampled | NoTokenError]:
        found = {
            row: token
            for rows, pending in self._groups
            for row, token in zip(rows, pending.result(), strict=True)
        }
        return [found[row] for row in range(self._count)]


def start_sampling(
    backend: Backend,
    logits: Tensor,
    samplers: Sequence[SequenceSampler],
    allowed: Sequence[Tensor | None],
) -> PendingSample | PendingGroups:
    """Start choosing the next token of each row; see :class:`PendingSample`."""
    if all(each.vocab in (None, logits.shape[1]) for each in samplers):
        return PendingSample(backend, logits, samplers, allowed)
    return PendingGroups(backend, logits, samplers, allowed)


def sample(
    backend: Backend,
    logits: Tensor,
    samplers: Sequence[SequenceSampler],
    allowed: Sequence[Tensor | None] | None = None,
) -> list[Sampled]:
    """The next token of each sequence from float32 logits ``(rows, vocab)``; overwrites them.

    allowed: as :class:`PendingSample` takes it. The tokens are recorded. Raises NoTokenError if a
    sequence has none.
    """
    found: list[Sampled] = []
    pending = PendingSample(backend, logits, samplers, allowed)
    for sampler, each in zip(samplers, pending.result(), strict=True):
        if isinstance(each, NoTokenError):
            raise each
        sampler.record(each[0])
        found.append(each)
    return found


def _rows(tensor: Tensor, rows: list[int]) -> Tensor:
    if len(rows) == len(tensor):
        return tensor
    return tensor[send(rows, torch.int64, tensor.device)]


def _adjust(
    logits: Tensor, samplers: Sequence[SequenceSampler], masks: Sequence[Tensor | None]
) -> None:
    """Everything that changes logits before a token is chosen, each row by its own rules."""
    _bias(logits, samplers)
    _penalize(logits, samplers)
    for row, mask in enumerate(masks):
        if mask is not None:
            mask = mask.pin_memory() if logits.is_cuda else mask
            mask = mask.to(logits.device, non_blocking=True)
            logits[row].masked_fill_(~mask, float("-inf"))
    _exclude(logits, samplers, masks)


def _bias(logits: Tensor, samplers: Sequence[SequenceSampler]) -> None:
    entries = [
        (row, token, bias)
        for row, each in enumerate(samplers)
        for token, bias in each.params.logit_bias.items()
    ]
    if entries:
        rows, ids, biases = zip(*entries, strict=True)
        at = send([rows, ids], torch.int64, logits.device)
        logits[at[0], at[1]] += send(biases, logits.dtype, logits.device)


def _exclude(
    logits: Tensor, samplers: Sequence[SequenceSampler], guided: Sequence[Tensor | None]
) -> None:
    barred: list[tuple[int, int]] = []
    for row, (each, mask) in enumerate(zip(samplers, guided, strict=True)):
        if not each.constrained:
            continue
        if (only := each.params.allowed_token_ids) is not None:
            ids = send(only, torch.int64, logits.device)
            kept = logits[row, ids]
            logits[row] = float("-inf")
            logits[row, ids] = kept
        barred += [(row, token) for token in each.barred(mask)]
    if barred:
        at = send(list(zip(*barred, strict=True)), torch.int64, logits.device)
        logits[at[0], at[1]] = float("-inf")


def _likeliest(logprobs: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The values and ids of each row's likeliest tokens, as many as its count; then zeros.

    Among equals ``topk`` takes others for another count: each row's own keeps it as it is alone.
    """
    widest = min(max(counts), logprobs.shape[1])
    values = logprobs.new_zeros(len(counts), widest)
    ids = torch.zeros(len(counts), widest, dtype=torch.int64, device=logprobs.device)
    for count in set(counts) - {0}:
        rows = [row for row, each in enumerate(counts) if each == count]
        found = _rows(logprobs, rows).topk(min(count, widest))
        at = send(rows, torch.int64, logprobs.device)
        width = found.values.shape[1]
        values[at, :width], ids[at, :width] = found.values, found.indices
    return values, ids


def _penalize(logits: Tensor, samplers: Sequence[SequenceSampler]) -> None:
    rows = [row for row, each in enumerate(samplers) if each.penalizes]
    if not rows:
        return
    penalize(
        logits, rows, [samplers[row].params for row in rows], [samplers[row].seen() for row in rows]
    )


def _to_host(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors on the host, waiting for the device once."""
    if not tensors[0].is_cuda:
        return tensors
    copies = [
        torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)
        for t in tensors
    ]
    torch.cuda.current_stream(tensors[0].device).synchronize()
    return copies


def _report(reports: list[Tensor], row: int, token: int, params: SamplingParams) -> TokenLogprob:
    own, values, ids, *named = reports
    if params.logprob_token_ids:
        found = named[0][row].tolist()[: len(params.logprob_token_ids)]
        pairs = tuple(zip(params.logprob_token_ids, found, strict=True))
    else:
        pairs = tuple(zip(ids[row].tolist(), values[row].tolist(), strict=True))[: params.logprobs]
    return TokenLogprob(token, float(own[row, 0]), pairs)
