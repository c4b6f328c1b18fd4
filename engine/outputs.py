"""Turns sampled tokens into the outputs of a request's stream."""

from __future__ import annotations

from nybble.engine.prompt_reader import EmbeddingReader, LogprobReader
from nybble.engine.request import FinishReason, RequestOutput
from nybble.engine.sampler import Sampled
from nybble.engine.sequence import Sequence


def advance(sequence: Sequence, sampled: Sampled) -> RequestOutput:
    """What a sequence's newest token adds to its output. Raises GuideError."""
    token = sampled[0]
    guide = sequence.request.guide
    complete = guide is not None and guide.accept(token)
    reason: FinishReason | None = None
    text = ""
    if token in sequence.stop_token_ids:
        reason = "stop"
        if sequence.request.params.include_stop_str_in_output:
            text = sequence.detokenizer.add(token)
    else:
        text = sequence.detokenizer.add(token)
        if sequence.detokenizer.stopped or complete:
            reason = "stop"
        elif sequence.num_output_tokens >= sequence.max_tokens:
            reason = "length"
    if reason is not None:
        text += sequence.detokenizer.flush()
    return output_of(sequence, sampled, text, reason)


def goes_on(sequence: Sequence) -> bool:
    """Whether a sequence certainly continues after its newest token, whatever the text is."""
    return (
        not sequence.request.params.stop
        and sequence.request.guide is None
        and sequence.num_output_tokens < sequence.max_tokens
        and sequence.token_ids[-1] not in sequence.stop_token_ids
    )


def output_of(
    sequence: Sequence, sampled: Sampled | None, text: str, reason: FinishReason | None
) -> RequestOutput:
    reader, sequence.reader = sequence.reader, None
    logprob = None if sampled is None else sampled[1]
    return RequestOutput(
        text=text,
        token_ids=() if sampled is None else sampled[:1],
        logprobs=() if logprob is None else (logprob,),
        finish_reason=reason,
        prompt_tokens=sequence.num_prompt_tokens,
        completion_tokens=sequence.num_output_tokens,
        cached_tokens=sequence.num_cached_tokens or 0,
        queue_seconds=sequence.queue_seconds,
        prompt_logprobs=reader.result() if isinstance(reader, LogprobReader) else None,
        embedding=reader.result() if isinstance(reader, EmbeddingReader) else None,
    )
