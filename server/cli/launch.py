"""Loads what ``nybble serve`` was asked for, and serves it."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from socket import socket
from typing import Literal

import torch
from nybble.engine import Engine, EngineConfig
from nybble.server.cli.options import LogFormat
from nybble.server.cli.prepare import prepare_checkpoint
from nybble.server.logs import Event
from nybble.server.serve import serve
from nybble.server.settings import ServerSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSource:
    """Names and options as they were given. merged: the adapter to merge into the model;
    adapters: paths of those to load, by name."""

    model: str
    aliases: Path | None
    quantize: Literal["nf4"] | None
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

    Raises what loading does; ValueError where an adapter has the base model's name.
    """
    progress = log_format == "text"
    checkpoint = prepare_checkpoint(
        source.model,
        device=torch.device(config.device),
        aliases=source.aliases,
        quantize=source.quantize,
        head=source.head,
        adapter=source.merged,
        progress=progress,
    )
    if taken := [name for name in source.adapters if name in settings.models]:
        raise ValueError(f"--lora-modules: {taken[0]!r} is the name of the base model")
    engine = Engine.load(checkpoint, config, progress)
    for name, path in source.adapters.items():
        engine.load_adapter(name, path)
    engine.start()

    def announce() -> None:
        host, port = sock.getsockname()[:2]
        scheme = "http" if settings.tls is None else "https"
        url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/v1"
        tokens = engine.stats().kv_blocks_total * config.block_size
        models = settings.models
        if log_format == "json":
            fields = {"url": url, "models": models, "device": config.device, "kv_tokens": tokens}
            logger.info(Event("serving", fields))
            return
        print(
            f"Serving {', '.join(models)} ({checkpoint.config.model_type}) on {config.device}\n"
            f"  URL       {url}\n"
            f"  KV cache  {tokens:,} tokens; a sequence may have {engine.max_model_len:,}"
            + (f"\n  Adapters  {', '.join(source.adapters)}" if source.adapters else ""),
            file=sys.stderr,
            flush=True,
        )

    asyncio.run(serve(engine, sock, settings, ready=announce))
