"""What a server is told besides its engine."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from ssl import SSLContext
from typing import TYPE_CHECKING, Literal

from nybble.server.http.cors import Cors
from nybble.server.tenancy.tenants import Tenants
from nybble.server.training.settings import TrainingSettings

if TYPE_CHECKING:  # it needs packages of its own
    from nybble.server.observability.tracing import Tracing


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """models: the names it answers to, the first being its own.
    max_sequences: how many may be waiting and running at once.
    max_queue_seconds: how long a request may have to wait.
    api_keys: with any, requests must carry one of them.
    admin_keys: the same for administration, which needs one.
    adapter_roots: folders that adapters may be loaded from.
    adapter_state: the file that keeps them for the next start.
    tenants: whose keys are taken too, each with what it allows.
    adapter_watch: a folder whose adapters come and go.
    shutdown_timeout: seconds for requests in flight to finish.
    tls: the certificate, for https.
    cors: pages elsewhere that may call the API.
    allowed_hosts: names in requests' Host that a server without keys answers to, besides localhost
        and addresses; None for any.
    root_path: a proxy's ``/prefix``.
    console: whether there is a page at ``/``.
    unknown_fields: what is made of requests' fields that are not known.
    trust_chat_templates: whether requests may bring templates of their own.
    tracing: None for a server without.
    model_folder: of the model that is served, for jobs to train on.
    training: None for a server without.
    """

    models: tuple[str, ...]
    max_sequences: int
    max_queue_seconds: float = 120
    api_keys: Sequence[str] = ()
    admin_keys: Sequence[str] = ()
    adapter_roots: Sequence[Path] = ()
    adapter_state: Path | None = None
    tenants: Tenants | None = None
    adapter_watch: Path | None = None
    shutdown_timeout: float = 30
    tls: SSLContext | None = None
    cors: Cors | None = None
    allowed_hosts: Collection[str] | None = ()
    root_path: str = ""
    console: bool = True
    unknown_fields: Literal["refuse", "warn", "ignore"] = "refuse"
    trust_chat_templates: bool = False
    tracing: Tracing | None = None
    model_folder: Path | None = None
    training: TrainingSettings | None = None
