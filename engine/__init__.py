"""Sequences, paged KV cache, scheduler, models and sampling: continuous batching."""

from nybble.engine.config import EngineConfig, resolve_device
from nybble.engine.engine import Engine, EngineStats
from nybble.engine.request import (
    EngineOverloadedError,
    EngineStoppedError,
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
    "ParameterError",
    "Request",
    "RequestOutput",
    "SamplingParams",
    "TokenLogprob",
    "resolve_device",
]
