"""From the options of ``nybble serve`` to the settings of the engine and of the server."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nybble.engine import AdapterConfig, EngineConfig, resolve_device
from nybble.loaders.cache import cache_folder
from nybble.server.adapters.places import AdapterRegistry, AdapterSource
from nybble.server.adapters.state import default_path
from nybble.server.api.output.dialect import REASONING_NAMES, TOOL_NAMES, Dialects
from nybble.server.files.storage import StorageSettings, default_state
from nybble.server.http.cors import Cors
from nybble.server.http.tls import tls_context
from nybble.server.lifecycle.options import KeyOptions, ServeOptions
from nybble.server.lifecycle.settings import ServerSettings, SharedAdapters
from nybble.server.tenancy.keys import require_keys
from nybble.server.tenancy.tenants import Tenants
from nybble.server.training.settings import TrainingSettings, default_threads

if TYPE_CHECKING:  # they need packages of their own
    from nybble.server.observability.tracing import Tracing
    from nybble.server.tenancy.shared_limits import SharedLimiter

_RESTARTS = 3


def engine_config(options: ServeOptions) -> EngineConfig:
    """The engine's settings. Raises ValueError for a missing device and for contradictions."""
    model, memory = options.model, options.memory
    device = resolve_device(model.device)
    return EngineConfig(
        device=str(device),
        dtype=torch.bfloat16 if model.dtype == "auto" else getattr(torch, model.dtype),
        kv_cache_bytes=memory.kv_cache_memory,
        kv_dtype=memory.kv_cache_dtype,
        max_num_seqs=memory.max_num_seqs,
        max_batched_tokens=memory.max_batched_tokens
        or default_batched_tokens(device, memory.max_num_seqs),
        max_model_len=model.max_model_len,
        # Lines of batches may fill all seats, and must not take the places of requests that wait.
        max_waiting=memory.max_waiting + (memory.max_num_seqs if options.storage.batches else 0),
        speculate=memory.speculate or ("auto" if model.draft_model else "off"),
        max_draft_tokens=memory.max_draft_tokens,
        deterministic=model.deterministic,
        activations=model.activations,
        adapters=_adapter_config(options),
        tune=model.tune,
        tensor_parallel_size=model.tensor_parallel_size,
        restarts=_RESTARTS if options.operation.on_engine_failure == "restart" else 0,
    )


def default_batched_tokens(device: torch.device, max_num_seqs: int) -> int:
    """Tokens of a step, if ``--max-batched-tokens`` is not given."""
    return max(128 if device.type == "cpu" else 512, max_num_seqs)


def _adapter_config(options: ServeOptions) -> AdapterConfig | None:
    """None if the server has no adapter slots."""
    asked = options.adapters
    named = asked.enable_lora or asked.lora_modules or asked.lora_root or asked.lora_watch
    shared = asked.lora_source or asked.lora_registry
    if not (named or shared or options.trains):
        return None
    return AdapterConfig(
        asked.max_loras,
        asked.max_lora_rank,
        asked.lora_host_memory,
        asked.lora_own_settings,
        asked.lora_device_memory,
        asked.lora_dtype,
    )


def server_settings(options: ServeOptions, device: str, *, loopback: bool) -> ServerSettings:
    """The server's settings.

    device: the device that training jobs use.
    loopback: whether the server listens on a loopback address only.

    Raises ValueError and OSError naming the option at fault.
    """
    model, network, memory = options.model, options.network, options.memory
    keys, adapters, endpoint = options.keys, options.adapters, options.operation.otlp_endpoint
    hosts = (network.host, *(network.allowed_hosts or ()))
    roots = tuple(adapters.lora_root or ())
    state = adapters.lora_state or default_path(model.model, network.uds or network.port, roots)
    if adapters.lora_state is not None:
        _require_folder("--lora-state", adapters.lora_state.absolute().parent)
    if network.response_store is not None:
        _require_folder("--response-store", network.response_store.absolute().parent)
    if adapters.lora_cache_dir is not None:
        _require_folder("--lora-cache-dir", adapters.lora_cache_dir)
    tenants = None if keys.tenants is None else Tenants(keys.tenants)
    return ServerSettings(
        models=options.served_names,
        max_sequences=memory.max_num_seqs + memory.max_waiting,
        max_queue_seconds=memory.max_queue_seconds,
        api_keys=require_keys(keys.api_key or (), "--api-key"),
        admin_keys=require_keys(keys.admin_key or (), "--admin-key"),
        adapter_roots=roots,
        adapter_state=state,
        tenants=tenants,
        quotas=None if keys.quota_store is None else _quotas(keys, tenants),
        adapter_watch=adapters.lora_watch,
        shared_adapters=_shared_adapters(options),
        shutdown_timeout=network.shutdown_timeout,
        tls=tls_context(network.ssl_certfile, network.ssl_keyfile),
        cors=Cors(network.allowed_origins) if network.allowed_origins else None,
        # On other addresses the server's names are not known.
        allowed_hosts=hosts if loopback and "*" not in hosts else None,
        root_path=network.root_path,
        console=not network.no_console,
        unknown_fields=network.unknown_fields,
        trust_chat_templates=network.trust_request_chat_template,
        dialects=dialects_of(options),
        matryoshka=model.matryoshka,
        response_store=None
        if network.response_store is None
        else (network.response_store, network.response_store_size),
        vllm_metrics=options.operation.vllm_metrics,
        tracing=None if endpoint is None else _tracing(endpoint),
        storage=_storage_settings(options),
        batches=options.storage.batches,
        training=_training_settings(options, device) if options.trains else None,
    )


def dialects_of(options: ServeOptions) -> Dialects:
    """How the model's reasoning and tool calls are written. Raises ValueError."""
    network = options.network
    return Dialects(
        _known("--reasoning-parser", network.reasoning_parser, REASONING_NAMES),
        _known("--tool-call-parser", network.tool_call_parser, TOOL_NAMES),
    )


def _known(flag: str, name: str, names: Sequence[str]) -> str:
    if name not in names:
        raise ValueError(f"{flag} is {name!r}, expected one of {', '.join(names)}")
    return name


def _training_settings(options: ServeOptions, device: str) -> TrainingSettings:
    return TrainingSettings(
        device=device,
        max_rank=options.adapters.max_lora_rank,
        threads=options.training.fine_tuning_threads or default_threads(),
        nice=options.training.fine_tuning_nice,
    )


def _storage_settings(options: ServeOptions) -> StorageSettings | None:
    asked = options.storage
    if not (asked.batches or options.trains):
        return None
    state = asked.state_dir or default_state()
    _require_folder("--state-dir", state)
    return StorageSettings(
        state=state,
        max_file_bytes=asked.max_file_size,
        quota_bytes=asked.file_quota,
    )


def _require_folder(flag: str, folder: Path) -> None:
    """Make a folder that is written while the server runs, before the model is loaded.

    Raises ValueError if it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ValueError(f"{flag}: {folder} cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{flag}: {folder} cannot be written")


def _shared_adapters(options: ServeOptions) -> SharedAdapters | None:
    asked = options.adapters
    if not (asked.lora_source or asked.lora_registry):
        return None
    network = options.network
    own = default_path(options.model.model, network.uds or network.port, ()).stem
    return SharedAdapters(
        sources=[AdapterSource(rule) for rule in asked.lora_source or ()],
        registry=None if asked.lora_registry is None else AdapterRegistry(asked.lora_registry),
        cache=(
            asked.lora_cache_dir or cache_folder() / "fetched-adapters" / own,
            asked.lora_cache_size,
        ),
        refresh_seconds=asked.lora_refresh_seconds,
    )


def _quotas(options: KeyOptions, tenants: Tenants | None) -> SharedLimiter:
    assert options.quota_store is not None
    if tenants is None:
        raise ValueError("--quota-store counts what tenants use: give --tenants too")
    try:
        from nybble.server.tenancy.shared_limits import SharedLimiter
    except ImportError as error:
        raise ValueError(
            f"--quota-store needs redis-py ({error.name} is missing): pip install 'nybble[redis]'"
        ) from None
    try:
        return SharedLimiter(options.quota_store, options.quota_store_failure, tenants)
    except ValueError as error:
        raise ValueError(f"--quota-store {options.quota_store}: {error}") from None


def _tracing(endpoint: str) -> Tracing:
    if not re.match(r"https?://[^/]", endpoint):
        raise ValueError(
            f"--otlp-endpoint is {endpoint!r}, expected a URL such as http://HOST:4318/v1/traces"
        )
    try:
        from nybble.server.observability.tracing import Tracing
    except ImportError as error:
        raise ValueError(
            f"--otlp-endpoint needs OpenTelemetry ({error.name} is missing): "
            "pip install 'nybble[otel]'"
        ) from None
    return Tracing.to(endpoint)
