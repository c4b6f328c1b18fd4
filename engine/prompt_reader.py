"""Results about a request's prompt itself: log probabilities of its tokens, or an embedding.

A reader gets the hidden states of a prompt chunk by chunk as it is prefilled. If a prompt is
preempted and computed again, it is read again, which gives the same result.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from nybble.engine.request import Embedding, Pooling, PromptLogprobs
from nybble.engine.transfer import send
from nybble.loaders import Checkpoint, CheckpointError
from nybble.loaders.json_file import read_json_object
from nybble.loaders.model_config import generates, num_labels
from nybble.loaders.model_files import embedding_modules

if TYPE_CHECKING:
    from nybble.engine.adapter_ends import StepEnds
    from nybble.engine.decoder import Decoder

# Logits of a prompt in memory at once, and as much again for log probabilities: of a chunk of 512
# tokens the logits alone would be 300 MB for a vocabulary of 150,000.
_MAX_LOGITS_BYTES = 32 << 20


class PromptReader(Protocol):
    """whole: it must see every position, so that none may come from the prefix cache."""

    whole: bool

    def read(
        self, decoder: Decoder, hidden: Tensor, start: int, ends: StepEnds | None = None
    ) -> None:
        """Take hidden states ``(tokens, hidden)`` of the prompt's positions from ``start`` on.

        ends: what the adapter changes outside of the projections; None if nothing.
        """
        ...

    def logit_rows(self, tokens: int, start: int) -> int:
        """Of how many of so many positions, from the first, :meth:`read` wants logits.

        It asks for them by :func:`chunked_logits`, as all ranks do.
        """
        ...


def chunked_logits(
    decoder: Decoder, hidden: Tensor, ends: StepEnds | None
) -> Iterator[tuple[int, Tensor]]:
    """The logits of hidden states, of some rows at a time, each time with the first of them.

    ends: what the rows' adapters change; None if nothing.
    """
    vocab = max(decoder.architecture.vocab, 0 if ends is None else ends.rows)
    step = max(1, _MAX_LOGITS_BYTES // (4 * vocab))
    for first in range(0, len(hidden), step):
        rows = hidden[first : first + step]
        own = None if ends is None else ends.of(torch.arange(first, first + len(rows)))
        yield first, decoder.logits(rows, own)


class LogprobReader:
    """Log probabilities of a prompt's tokens, a bounded number of rows of logits at a time."""

    whole = True

    def __init__(self, prompt: Sequence[int], alternatives: int) -> None:
        self._prompt = prompt
        self._alternatives = alternatives
        self._found: tuple[Tensor, ...] | None = None  # one row per token but the first

    def read(
        self, decoder: Decoder, hidden: Tensor, start: int, ends: StepEnds | None = None
    ) -> None:
        vocab = max(decoder.architecture.vocab, 0 if ends is None else ends.rows)
        if self._found is None:
            rows, top = len(self._prompt) - 1, min(self._alternatives, vocab)
            kinds = ((rows,), torch.float32), ((rows,), torch.int32)
            tops = ((rows, top), torch.float32), ((rows, top), torch.int32)
            self._found = tuple(
                torch.empty(shape, dtype=dtype, device=hidden.device)
                for shape, dtype in (*kinds, *tops)
            )
        # The state at a position tells the token at the next; the last one's is the output's.
        targets = send(
            self._prompt[start + 1 : start + 1 + len(hidden)], torch.int64, hidden.device
        )
        count = len(targets)
        own = None if ends is None else ends.of(torch.arange(count))
        for first, logits in chunked_logits(decoder, hidden[:count], own):
            last = first + len(logits)
            self._write(slice(start + first, start + last), logits, targets[first:last])

    def logit_rows(self, tokens: int, start: int) -> int:
        return min(tokens, len(self._prompt) - 1 - start)

    def _write(self, at: slice, logits: Tensor, targets: Tensor) -> None:
        assert self._found is not None
        logprobs, ranks, top_logprobs, top_ids = self._found
        # On a GPU the order of its sum, unlike logsumexp's, does not depend on the number of rows.
        normed = torch.log_softmax(logits, dim=-1)
        own = logits.gather(1, targets[:, None])
        logprobs[at] = normed.gather(1, targets[:, None])[:, 0]
        ranks[at] = (logits > own).sum(-1, dtype=torch.int32) + 1
        top = logits.topk(top_ids.shape[1])
        top_logprobs[at] = normed.gather(1, top.indices)
        top_ids[at] = top.indices.int()

    def result(self) -> PromptLogprobs:
        """Once the whole prompt was read; waits for the device."""
        assert self._found is not None
        return PromptLogprobs(tuple(self._prompt), *(part.cpu().numpy() for part in self._found))


class EmbeddingReader:
    """The final hidden states as transformers' ``last_hidden_state``, pooled, of unit length.

    Of a classifier, the logits of its head for the last one.
    """

    def __init__(self, prompt: Sequence[int], pooling: Pooling) -> None:
        self._length = len(prompt)
        self._pooling = pooling
        self.whole = pooling == "mean"
        self._sum: Tensor | None = None

    def read(
        self, decoder: Decoder, hidden: Tensor, start: int, ends: StepEnds | None = None
    ) -> None:
        if self._pooling == "mean":
            part = decoder.normed(hidden, ends).float().sum(0)
            self._sum = part if self._sum is None or start == 0 else self._sum + part
        elif start + len(hidden) == self._length:
            last = None if ends is None else ends.of(torch.tensor([len(hidden) - 1]))
            self._sum = decoder.normed(hidden[-1:], last).float()[0]
            if self._pooling == "score":
                assert decoder.score is not None
                self._sum = decoder.score.float() @ self._sum

    def logit_rows(self, tokens: int, start: int) -> int:
        return 0

    def result(self) -> Embedding:
        """Once the whole prompt was read; waits for the device."""
        assert self._sum is not None
        if self._pooling == "score":
            scores: Embedding = self._sum.cpu().numpy()
            return scores
        # A mean and a sum have the same direction.
        vector: Embedding = torch.nn.functional.normalize(self._sum, dim=0).cpu().numpy()
        return vector


@dataclass(frozen=True)
class EmbeddingSettings:
    """What a checkpoint says of the embeddings it makes, besides pooling.

    made_for: whether it is a model of embeddings.
    sizes: to which they may be cut; "any" for all below their own.
    prompts: what stands before a text, by the name of its use; default: the name of the usual one.
    """

    made_for: bool = False
    sizes: tuple[int, ...] | Literal["any"] = ()
    prompts: Mapping[str, str] = field(default_factory=dict)
    default: str | None = None


def read_embedding_settings(checkpoint: Checkpoint) -> EmbeddingSettings:
    """From sentence-transformers' files, and vLLM's fields of ``config.json``.

    Raises CheckpointError and ValueError for files that cannot be read.
    """
    folder, config = checkpoint.folder, checkpoint.config
    sizes = getattr(config, "matryoshka_dimensions", None)
    if not sizes and getattr(config, "is_matryoshka", False):
        sizes = "any"
    path = folder / "config_sentence_transformers.json"
    own = read_json_object(path) if path.is_file() else {}
    prompts = own.get("prompts") or {}
    default = own.get("default_prompt_name")
    made_for = bool(embedding_modules(folder)) or not (generates(config) or num_labels(config))
    return EmbeddingSettings(
        made_for, sizes if sizes == "any" else tuple(sizes or ()), prompts, default
    )


_MODULES = ("Transformer", "Pooling", "Normalize")  # of sentence-transformers


def read_pooling(folder: Path) -> Pooling | None:
    """How the checkpoint's makers pool, in sentence-transformers' ``1_Pooling/config.json``.

    ``last`` if they say nothing: of a causal model, only the last token has seen all others.
    None if they pool in another way. Raises CheckpointError naming a module of ``modules.json``
    which is not computed here (without it, embeddings would be others), and ValueError for a file
    that is no JSON object.
    """
    path = folder / "1_Pooling"
    for module in embedding_modules(folder):
        if module.kind not in _MODULES:
            raise CheckpointError(
                f"{folder / 'modules.json'}: the module {module.kind} ({module.path}) is not "
                f"supported; supported are {', '.join(_MODULES)}"
            )
        if module.kind == "Pooling":
            path = folder / module.path
    path = path / "config.json"
    if embedding_modules(folder) and "AutoModel" in _own_code(folder):
        return None  # GTE-Qwen's attends to later tokens
    if not path.is_file():
        return "last"
    config = read_json_object(path)
    mode = config.get("pooling_mode")
    modes = [mode] if isinstance(mode, str) else []
    modes += [k.removeprefix("pooling_mode_") for k, on in config.items() if on is True]
    known: dict[str, Pooling] = {
        "lasttoken": "last",
        "mean": "mean",
        "mean_tokens": "mean",
    }
    modes = [each for each in modes if each != "include_prompt"]
    return known.get(modes[0]) if len(modes) == 1 else None


def _own_code(folder: Path) -> Collection[str]:
    """The classes for which the checkpoint has code of its own."""
    path = folder / "config.json"
    classes = read_json_object(path).get("auto_map") if path.is_file() else None
    return classes if isinstance(classes, dict) else ()
