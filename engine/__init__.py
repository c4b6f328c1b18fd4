"""Sequences, paged KV cache, scheduler, models and sampling: continuous batching."""

from nybble.engine.config import EngineConfig
from nybble.engine.engine import Engine, EngineStats
from nybble.engine.guide import GrammarCompiler, GrammarGuide
from nybble.engine.request import (
    EngineOverloadedError,
    EngineStoppedError,
    Guide,
    GuideError,
    ParameterError,
    Request,
    RequestOutput,
    SamplingParams,
    TokenLogprob,
)

__all__ = [
    "Engine",
    "EngineConfig",
    "EngineOverloadedError",
    "EngineStats",
    "EngineStoppedError",
    "GrammarCompiler",
    "GrammarGuide",
    "Guide",
    "GuideError",
    "ParameterError",
    "Request",
    "RequestOutput",
    "SamplingParams",
    "TokenLogprob",
]
