"""Loads what ``nybble serve`` was asked for, and serves it."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from socket import AF_UNIX, socket
from urllib.parse import quote

import torch

from nybble.engine import Engine, EngineConfig
from nybble.engine.adapters import require_rank
from nybble.engine.conversation import read_template
from nybble.engine.memory import check_memory, memory_explained
from nybble.engine.ranks import check_ranks
from nybble.loaders import Checkpoint, load_adapter, resolve_adapter, resolve_model
from nybble.models import architecture_of
from nybble.quantizers.drafts import prepared_draft, rounded_draft_parts, stored_draft
from nybble.quantizers.prepare import prepare_checkpoint, rounded_parts
from nybble.server.adapters.admin import restore, restore_mixtures, restore_uploads
from nybble.server.http.listen import BACKLOG, is_loopback
from nybble.server.lifecycle.configure import engine_config, server_settings
from nybble.server.lifecycle.flag_names import flags_named
from nybble.server.lifecycle.named_adapters import named_adapters
from nybble.server.lifecycle.options import ServeOptions
from nybble.server.lifecycle.serve import serve
from nybble.server.lifecycle.settings import ServerSettings
from nybble.server.lifecycle.startup import Startup, load_behind
from nybble.server.lifecycle.stores import require_stores
from nybble.server.observability.logs import LogEvent, LogFormat

logger = logging.getLogger(__name__)


def launch(options: ServeOptions, sock: socket) -> None:
    """Load the model and its adapters and serve them on the socket until a signal comes. SIGHUP
    reloads the tenants file.

    The socket answers at once, with 503 until everything is loaded. Threads may still be busy when
    this returns, with work whose result nobody waits for any more. Raises ValueError and OSError
    for options that cannot be met, what loading raises, and EngineFailedError if the engine does
    not recover from a failure.
    """
    with flags_named():
        config = engine_config(options)
        settings = server_settings(options, config.device, loopback=is_loopback(sock))
        adapters = named_adapters(options.adapters, settings.models)
        require_stores(settings)
        # asyncio.run would wait for those threads.
        loop = asyncio.new_event_loop()
        loop.run_until_complete(_load_and_serve(options, config, sock, settings, adapters))


async def _load_and_serve(
    options: ServeOptions,
    config: EngineConfig,
    sock: socket,
    settings: ServerSettings,
    adapters: Mapping[str, str],
) -> None:
    log_format = options.operation.log_format
    if settings.tenants is not None:  # already here: the signal would end a process that loads
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, settings.tenants.reload)
    startup = Startup(bars=log_format == "text" and sys.stderr.isatty())
    sock.listen(BACKLOG)  # before the log says where
    logger.info(LogEvent("starting", {"health": f"{_origin(sock, settings)}/health"}))
    if settings.adapter_roots and not settings.admin_keys:
        logger.warning(
            "--lora-root is given without --admin-key, so that nobody can load an adapter over the "
            "API: add --admin-key KEY, or name adapters at the start with --lora-modules NAME=PATH"
        )

    def load() -> tuple[Engine, Path]:
        return _load(options, config, settings, adapters, startup)

    async with load_behind(sock, settings.tls, startup, load) as (engine, folder):
        settings = replace(settings, model_folder=folder)
        origin = _origin(sock, settings)
        # What is there now stays. To look through all of it for garbage, again and again, would
        # hold up every stream each time.
        gc.collect()
        gc.freeze()
        await serve(
            engine,
            sock,
            settings,
            ready=lambda: _announce(origin, engine, config, settings, list(adapters), log_format),
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
        logger.info(LogEvent("serving", fields | {"kv_tokens": tokens}))
        return
    print(
        f"Serving {', '.join(models)} ({engine.model_type}) on {config.device}\n"
        f"  URL       {origin}/v1\n"
        + (f"  Page      {origin}/\n" if settings.console else "")
        + f"  KV cache  {tokens:,} tokens; a sequence may have {engine.max_model_len:,}"
        + (f"\n  Adapters  {', '.join(adapters)}" if adapters else "")
        + (f"\n  Loading   {loading}" if (loading := _loading(settings)) else ""),
        file=sys.stderr,
        flush=True,
    )


def _loading(settings: ServerSettings) -> str:
    """Which adapters the API loads, and for whom; empty if none."""
    if not (settings.adapter_roots and settings.admin_keys):
        return ""
    roots = ", ".join(map(str, settings.adapter_roots))
    return f"adapters below {roots}, by POST /v1/load_lora_adapter with the admin key"


def _load(
    options: ServeOptions,
    config: EngineConfig,
    settings: ServerSettings,
    adapters: Mapping[str, str],
    startup: Startup,
) -> tuple[Engine, Path]:
    engine, folder = load_engine(options, config, adapters, startup)
    restore(engine, settings.models, settings.adapter_roots, settings.adapter_state)
    restore_uploads(engine, settings.models, settings.adapter_roots)
    restore_mixtures(engine, settings.models, settings.adapter_state)
    engine.start()
    return engine, folder


def load_engine(
    options: ServeOptions, config: EngineConfig, adapters: Mapping[str, str], startup: Startup
) -> tuple[Engine, Path]:
    """An engine with its adapters, to be started, and the folder of its model.

    Raises ValueError and OSError for options that cannot be met, and what loading raises.
    """
    own_template = options.model.chat_template
    template = None if own_template is None else read_template(own_template)
    device, aliases = torch.device(config.device), options.model.aliases
    draft_name = options.model.draft_model
    startup.report("Finding the model", 0, None)  # which may have to be downloaded
    for name in (options.model.model, draft_name):
        if name is not None:
            resolve_model(name, aliases=aliases)
    folders = {name: resolve_adapter(path) for name, path in adapters.items()}
    startup.report("Preparing kernels", 0, None)  # the first start on a machine compiles them

    def check(model: Checkpoint) -> None:
        """Before anything is packed, the draft model included."""
        architecture = architecture_of(model.config)
        check_ranks(architecture, config)
        if config.adapters is not None:
            for folder in folders.values():
                require_rank(
                    folder, load_adapter(folder, architecture).rank, config.adapters.max_rank
                )
        own = options.model
        draft = stored_draft(
            model, config, draft_name, aliases=aliases, quantize=own.draft_quantize
        )
        check_memory(
            model,
            config,
            draft,
            rounded_parts(own.model, model, own.quantize, own.head),
            rounded_draft_parts(draft, own.model, draft_name, own.draft_quantize, own.quantize),
        )

    checkpoint = prepare_checkpoint(
        options.model.model,
        device=device,
        aliases=aliases,
        quantize=options.model.quantize,
        head=options.model.head,
        adapter=options.adapters.merge_adapter,
        check=check,
        progress=startup.report,
    )
    draft = prepared_draft(
        options.model.model,
        config,
        draft_name,
        device=device,
        aliases=aliases,
        quantize=options.model.draft_quantize,
        model_quantize=options.model.quantize,
        progress=startup.report,
    )
    with memory_explained(checkpoint, config, draft):
        engine = Engine.load(checkpoint, config, startup.report, draft=draft)
        if template is not None:
            engine.tokenizer.chat_template = template
        startup.status = "warming"
        engine.warm_up(startup.report)
    for name, folder in folders.items():
        engine.load_adapter(name, str(folder))
    return engine, checkpoint.folder


def _origin(sock: socket, settings: ServerSettings) -> str:
    scheme = "http" if settings.tls is None else "https"
    if sock.family == AF_UNIX:
        return f"{scheme}+unix://{quote(sock.getsockname(), safe='')}"
    host, port = sock.getsockname()[:2]
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
