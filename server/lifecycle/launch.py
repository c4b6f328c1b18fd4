"""Loads what ``nybble serve`` was asked for, and serves it."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from socket import socket
from typing import Literal

import torch

from nybble.engine import Engine, EngineConfig
from nybble.engine.memory import memory_explained
from nybble.quantizers.in_flight import InFlightFormat
from nybble.quantizers.prepare import prepare_checkpoint
from nybble.server.adapters.admin import restore, restore_uploads
from nybble.server.http.listen import BACKLOG
from nybble.server.lifecycle.serve import serve
from nybble.server.lifecycle.settings import ServerSettings
from nybble.server.lifecycle.startup import Startup, load_behind
from nybble.server.observability.logs import Event, LogFormat

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSource:
    """Names and options as they were given. merged: the adapter to merge into the model;
    adapters: paths of those to load, by name."""

    model: str
    aliases: Path | None
    quantize: InFlightFormat | None
    head: Literal["int8"] | None
    merged: str | None
    adapters: Mapping[str, str]


def launch(
    source: ModelSource,
    config: EngineConfig,
    sock: socket,
    settings: ServerSettings,
    *,
    log_format: LogFormat,
) -> None:
    """Load the model and its adapters and serve them on the socket until a signal comes.

    The socket answers at once, with 503 until everything is loaded. Raises what loading does;
    ValueError where an adapter has the base model's name; EngineFailedError where the engine does
    not recover from a failure.
    """
    if taken := [name for name in source.adapters if name in settings.models]:
        raise ValueError(f"--lora-modules: {taken[0]!r} is the name of the base model")
    asyncio.run(_load_and_serve(source, config, sock, settings, log_format))


async def _load_and_serve(
    source: ModelSource,
    config: EngineConfig,
    sock: socket,
    settings: ServerSettings,
    log_format: LogFormat,
) -> None:
    startup = Startup(bars=log_format == "text")
    sock.listen(BACKLOG)  # before it is told where it listens
    logger.info(Event("starting", {"health": f"{_origin(sock, settings)}/health"}))

    def load() -> tuple[Engine, Path]:
        return _load(source, config, settings, startup)

    async with load_behind(sock, settings.tls, startup, load) as (engine, folder):
        settings = replace(settings, model_folder=folder)
        origin = _origin(sock, settings)
        await serve(
            engine,
            sock,
            settings,
            ready=lambda: _announce(
                origin, engine, config, settings, list(source.adapters), log_format
            ),
        )


def _announce(
    origin: str,
    engine: Engine,
    config: EngineConfig,
    settings: ServerSettings,
    adapters: list[str],
    log_format: LogFormat,
) -> None:
    tokens = engine.stats().kv_blocks_total * config.block_size
    models = settings.models
    if log_format == "json":
        fields = {"url": f"{origin}/v1", "models": models, "device": config.device}
        logger.info(Event("serving", fields | {"kv_tokens": tokens}))
        return
    print(
        f"Serving {', '.join(models)} ({engine.model_type}) on {config.device}\n"
        f"  URL       {origin}/v1\n"
        + (f"  Page      {origin}/\n" if settings.console else "")
        + f"  KV cache  {tokens:,} tokens; a sequence may have {engine.max_model_len:,}"
        + (f"\n  Adapters  {', '.join(adapters)}" if adapters else ""),
        file=sys.stderr,
        flush=True,
    )


def _load(
    source: ModelSource, config: EngineConfig, settings: ServerSettings, startup: Startup
) -> tuple[Engine, Path]:
    startup.report("Preparing kernels", 0, None)  # the first start on a machine compiles them
    checkpoint = prepare_checkpoint(
        source.model,
        device=torch.device(config.device),
        aliases=source.aliases,
        quantize=source.quantize,
        head=source.head,
        adapter=source.merged,
        progress=startup.report,
    )
    with memory_explained(checkpoint, config):
        engine = Engine.load(checkpoint, config, startup.report)
        startup.status = "warming"
        engine.warm_up(startup.report)
    for name, path in source.adapters.items():
        engine.load_adapter(name, path)
    restore(engine, settings.models, settings.adapter_roots, settings.adapter_state)
    restore_uploads(engine, settings.models, settings.adapter_roots)
    engine.start()
    return engine, checkpoint.folder


def _origin(sock: socket, settings: ServerSettings) -> str:
    host, port = sock.getsockname()[:2]
    scheme = "http" if settings.tls is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
