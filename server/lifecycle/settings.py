"""The server's settings, besides the engine's."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from ssl import SSLContext
from typing import TYPE_CHECKING, Literal

from nybble.server.adapters.places import AdapterRegistry, AdapterSource
from nybble.server.api.output.dialect import Dialects
from nybble.server.files.storage import StorageSettings
from nybble.server.http.cors import Cors
from nybble.server.tenancy.tenants import Tenants
from nybble.server.training.settings import TrainingSettings

if TYPE_CHECKING:  # they need packages of their own
    from nybble.server.observability.tracing import Tracing
    from nybble.server.tenancy.shared_limits import SharedLimiter


@dataclass(frozen=True, kw_only=True)
class SharedAdapters:
    """Places of adapters which other servers have too.

    sources: asked in this order, after the registry.
    registry: to which adapters loaded over the API are written.
    cache: the folder of local copies, and most bytes in it.
    refresh_seconds: how old the answer of a place may be.
    """

    sources: Sequence[AdapterSource]
    registry: AdapterRegistry | None
    cache: tuple[Path, int]
    refresh_seconds: float = 2.0


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings fixed for the life of a server.

    models: the base model's names, its own first.
    max_sequences: most sequences waiting and running at once.
    max_queue_seconds: the longest predicted wait with which a request is still accepted.
    api_keys: if there are any, requests must carry one of them or a tenant's.
    admin_keys: required for administration; without any, administration is refused.
    adapter_roots: folders that adapters may be loaded from.
    adapter_state: the file in which loaded adapters are kept for the next start.
    tenants: their keys are accepted too, each with its own limits.
    quotas: counts tenants' limits over all servers; None to count in this one.
    adapter_watch: a folder whose subfolders are loaded and unloaded as they come and go.
    shared_adapters: where adapters are looked for when a request first names them; None if nowhere.
    shutdown_timeout: seconds for requests in flight to finish.
    tls: the certificate, for https.
    cors: pages of other origins that may call the API.
    allowed_hosts: Host names that a server without keys answers to, besides localhost and IP
        addresses; None for any.
    root_path: a proxy's ``/prefix``.
    console: whether there is a page at ``/``.
    unknown_fields: how unknown fields of requests are handled.
    trust_chat_templates: whether requests may contain chat templates of their own.
    matryoshka: whether embeddings may be cut to any size.
    dialects: how reasoning and tool calls are written.
    response_store: the file in which responses are kept, and most bytes of each tenant's; None if
        they are not kept.
    tracing: None if requests are not traced.
    vllm_metrics: whether /metrics has vLLM's names too.
    model_folder: the folder of the served model, for training jobs.
    storage: where files are kept; needed for batches and training.
    batches: whether the server runs batches of requests.
    training: None if the server runs no training jobs.
    """

    models: tuple[str, ...]
    max_sequences: int
    max_queue_seconds: float = 120
    api_keys: Sequence[str] = ()
    admin_keys: Sequence[str] = ()
    adapter_roots: Sequence[Path] = ()
    adapter_state: Path | None = None
    tenants: Tenants | None = None
    quotas: SharedLimiter | None = None
    adapter_watch: Path | None = None
    shared_adapters: SharedAdapters | None = None
    shutdown_timeout: float = 30
    tls: SSLContext | None = None
    cors: Cors | None = None
    allowed_hosts: Collection[str] | None = ()
    root_path: str = ""
    console: bool = True
    unknown_fields: Literal["refuse", "warn", "ignore"] = "refuse"
    trust_chat_templates: bool = False
    matryoshka: bool = False
    dialects: Dialects = field(default_factory=Dialects)
    response_store: tuple[Path, int] | None = None
    tracing: Tracing | None = None
    vllm_metrics: bool = False
    model_folder: Path | None = None
    storage: StorageSettings | None = None
    batches: bool = False
    training: TrainingSettings | None = None
