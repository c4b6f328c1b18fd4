"""Sequences, paged KV cache, scheduler, models and sampling: continuous batching."""

from nybble.engine.adapters import AdapterConflictError, AdapterInfo
from nybble.engine.config import AdapterConfig, EngineConfig, resolve_device
from nybble.engine.engine import Engine
from nybble.engine.guide import GrammarCompiler, GrammarGuide, StructuralTag
from nybble.engine.limits import LIMITS
from nybble.engine.reasoning_budget import BudgetGuide, ReasoningLimit
from nybble.engine.request import (
    MAX_MIXED_ADAPTERS,
    AdapterMixture,
    AdapterReplacedError,
    AdapterUnavailableError,
    ContextLengthError,
    DisallowedTokenError,
    EngineFailedError,
    EngineOverloadedError,
    EngineStoppedError,
    Guide,
    GuideError,
    NotANumberError,
    NothingAllowedError,
    NoTokenError,
    OutOfMemoryError,
    ParameterError,
    Pooling,
    PromptLogprobs,
    Request,
    RequestOutput,
    SamplingParams,
    TokenLogprob,
    UnknownAdapterError,
    require_known_tokens,
)
from nybble.engine.stats import EngineStats
from nybble.engine.tokens import Tokens
from nybble.engine.vocabulary import Vocabulary
from nybble.loaders import AdapterError

__all__ = [
    "LIMITS",
    "MAX_MIXED_ADAPTERS",
    "AdapterConfig",
    "AdapterConflictError",
    "AdapterError",
    "AdapterInfo",
    "AdapterMixture",
    "AdapterReplacedError",
    "AdapterUnavailableError",
    "BudgetGuide",
    "ContextLengthError",
    "DisallowedTokenError",
    "Engine",
    "EngineConfig",
    "EngineFailedError",
    "EngineOverloadedError",
    "EngineStats",
    "EngineStoppedError",
    "GrammarCompiler",
    "GrammarGuide",
    "Guide",
    "GuideError",
    "NoTokenError",
    "NotANumberError",
    "NothingAllowedError",
    "OutOfMemoryError",
    "ParameterError",
    "Pooling",
    "PromptLogprobs",
    "ReasoningLimit",
    "Request",
    "RequestOutput",
    "SamplingParams",
    "StructuralTag",
    "TokenLogprob",
    "Tokens",
    "UnknownAdapterError",
    "Vocabulary",
    "require_known_tokens",
    "resolve_device",
]
