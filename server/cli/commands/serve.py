"""``nybble serve``: an OpenAI-compatible server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from nybble.server.cli.errors import expected_errors, interruptible, on_stderr
from nybble.server.cli.options import (
    MEMORY,
    MODEL,
    AliasesOption,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    HeadOption,
    KVCacheDtypeOption,
    LogFormat,
    QuantizeOption,
    parse_bytes,
)

if TYPE_CHECKING:
    from nybble.server.tracing import Tracing

_NETWORK, _KEYS, _ADAPTERS, _LOGS = "Network", "Keys", "Adapters", "Logging"
_FAILURES, _FINE_TUNING = "Failures", "Fine-tuning"
_RESTARTS = 3
_ENGINE_FAILED = 70  # EX_SOFTWARE, where 1 is for what was asked for in vain


def serve(
    model: Annotated[
        str,
        typer.Option(
            help="Model folder, hub name (org/name), alias, or 'demo'.", rich_help_panel=MODEL
        ),
    ],
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="Name in the API, repeatable (default: --model).", rich_help_panel=MODEL),
    ] = None,
    aliases: AliasesOption = None,
    quantize: QuantizeOption = None,
    head: HeadOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    max_model_len: Annotated[
        int | None,
        typer.Option(help="Tokens of prompt and output together.", rich_help_panel=MODEL, min=1),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0: all.", rich_help_panel=_NETWORK)
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="0 takes any free one.", rich_help_panel=_NETWORK, min=0, max=65535)
    ] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Key that requests must carry, repeatable (default: none needed).",
            rich_help_panel=_KEYS,
        ),
    ] = None,
    tenants: Annotated[
        Path | None,
        typer.Option(
            help="TOML file of tenants: keys, limits, weights. SIGHUP reads it again.",
            exists=True,
            dir_okay=False,
            rich_help_panel=_KEYS,
        ),
    ] = None,
    ssl_certfile: Annotated[
        Path | None,
        typer.Option(
            help="Certificate with its chain (PEM), for https.",
            exists=True,
            dir_okay=False,
            rich_help_panel=_NETWORK,
        ),
    ] = None,
    ssl_keyfile: Annotated[
        Path | None,
        typer.Option(
            help="Its key (PEM), unless that is in the same file.",
            exists=True,
            dir_okay=False,
            rich_help_panel=_NETWORK,
        ),
    ] = None,
    allowed_origins: Annotated[
        list[str] | None,
        typer.Option(
            help="Origin whose pages may call the API, or '*', repeatable (default: none).",
            rich_help_panel=_NETWORK,
        ),
    ] = None,
    no_console: Annotated[
        bool, typer.Option("--no-console", help="No page at /.", rich_help_panel=_NETWORK)
    ] = False,
    shutdown_timeout: Annotated[
        float,
        typer.Option(
            help="Seconds for requests in flight to finish.", rich_help_panel=_NETWORK, min=0
        ),
    ] = 30,
    kv_cache_memory: Annotated[
        str,
        typer.Option(
            help="For example 2GiB; auto is 1GiB on the CPU, what is free on a GPU.",
            rich_help_panel=MEMORY,
        ),
    ] = "auto",
    kv_cache_dtype: KVCacheDtypeOption = "auto",
    max_num_seqs: Annotated[
        int, typer.Option(help="Sequences computed in one step.", rich_help_panel=MEMORY, min=1)
    ] = 64,
    max_batched_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens computed in one step (default: 512 on a GPU, 128 on the CPU, where a step "
            "of many takes long and others wait).",
            rich_help_panel=MEMORY,
            min=1,
        ),
    ] = None,
    max_waiting: Annotated[
        int,
        typer.Option(
            help="Sequences queued beyond --max-num-seqs; more get 429.",
            rich_help_panel=MEMORY,
            min=0,
        ),
    ] = 256,
    max_queue_seconds: Annotated[
        float,
        typer.Option(
            help="Predicted wait beyond which requests get 429 (by the tokens that those in flight "
            "will need, and the rate observed; for each tenant by its share).",
            rich_help_panel=MEMORY,
            min=0,
        ),
    ] = 120,
    enable_lora: Annotated[
        bool,
        typer.Option(
            "--enable-lora",
            help="Make room for adapters; the other adapter options imply it.",
            rich_help_panel=_ADAPTERS,
        ),
    ] = False,
    lora_modules: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="Adapter to load at the start (folder or hub name), repeatable.",
            rich_help_panel=_ADAPTERS,
        ),
    ] = None,
    merge_adapter: Annotated[
        str | None,
        typer.Option(
            help="Adapter (folder or hub name) to merge into the model: it then costs nothing.",
            rich_help_panel=_ADAPTERS,
        ),
    ] = None,
    lora_root: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder the API may load adapters from, repeatable.",
            exists=True,
            file_okay=False,
            rich_help_panel=_ADAPTERS,
        ),
    ] = None,
    lora_state: Annotated[
        Path | None,
        typer.Option(
            help="File that keeps what the API has loaded for the next start (default: in the "
            "cache, for this model, port and --lora-root).",
            dir_okay=False,
            rich_help_panel=_ADAPTERS,
        ),
    ] = None,
    lora_watch: Annotated[
        Path | None,
        typer.Option(
            help="Folder whose subfolders are adapters, loaded and unloaded as they come and go.",
            exists=True,
            file_okay=False,
            rich_help_panel=_ADAPTERS,
        ),
    ] = None,
    max_loras: Annotated[
        int, typer.Option(help="Adapters one step can mix.", rich_help_panel=_ADAPTERS, min=1)
    ] = 8,
    max_lora_rank: Annotated[
        int,
        typer.Option(
            help="Highest rank; memory is taken for it.", rich_help_panel=_ADAPTERS, min=1, max=256
        ),
    ] = 64,
    lora_host_memory: Annotated[
        str,
        typer.Option(help="For adapters that wait beside the slots.", rich_help_panel=_ADAPTERS),
    ] = "4GiB",
    admin_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Key that opens administration, repeatable (default: closed).",
            rich_help_panel=_KEYS,
        ),
    ] = None,
    fine_tuning: Annotated[
        bool,
        typer.Option(
            "--fine-tuning",
            help="Take training files and jobs over the API.",
            rich_help_panel=_FINE_TUNING,
        ),
    ] = False,
    state_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder of files, jobs and trained adapters (default: ~/.local/state/nybble); "
            "implies --fine-tuning.",
            file_okay=False,
            rich_help_panel=_FINE_TUNING,
        ),
    ] = None,
    max_file_size: Annotated[
        str, typer.Option(help="Of an uploaded file.", rich_help_panel=_FINE_TUNING)
    ] = "512MiB",
    file_quota: Annotated[
        str, typer.Option(help="Of one tenant's files together.", rich_help_panel=_FINE_TUNING)
    ] = "4GiB",
    fine_tuning_threads: Annotated[
        int | None,
        typer.Option(
            help="Of a job on the CPU (default: half of the processors).",
            min=1,
            rich_help_panel=_FINE_TUNING,
        ),
    ] = None,
    tune: Annotated[
        bool,
        typer.Option(
            help="Measure at the start, for minutes, GPU kernels whose best configuration is not "
            "known; kept for later starts.",
            rich_help_panel=MODEL,
        ),
    ] = True,
    on_engine_failure: Annotated[
        Literal["exit", "restart"],
        typer.Option(
            help="Once clients are told: exit (code 70) for a supervisor, or begin again with the "
            "same weights, three times in ten minutes at most.",
            rich_help_panel=_FAILURES,
        ),
    ] = "exit",
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(
            help="Send OpenTelemetry traces there: http://HOST:4318/v1/traces.",
            rich_help_panel=_LOGS,
        ),
    ] = None,
    config: ConfigOption = None,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], typer.Option(rich_help_panel=_LOGS)
    ] = "info",
    log_format: Annotated[
        LogFormat,
        typer.Option(help="json: an object a line, without progress bars.", rich_help_panel=_LOGS),
    ] = "text",
) -> None:
    """Serve a model on http://HOST:PORT/v1.

    nybble serve --model demo --api-key secret
    """
    from nybble.server import logs

    logs.configure(log_level, log_format)
    kv_cache_bytes = None if kv_cache_memory == "auto" else parse_bytes(kv_cache_memory)
    report = logs.error if log_format == "json" else on_stderr
    with expected_errors(report), interruptible():
        from nybble.server.listen import bind

        # Before the model is loaded: a taken port is found out at once.
        sock = bind(host, port)
        import torch
        from nybble.engine import AdapterConfig, EngineConfig, EngineFailedError, resolve_device
        from nybble.server.adapters.state import default_path
        from nybble.server.cli.launch import ModelSource, launch
        from nybble.server.cors import Cors
        from nybble.server.fine_tuning.settings import (
            FineTuningSettings,
            default_state,
            default_threads,
        )
        from nybble.server.settings import ServerSettings
        from nybble.server.tenants import Tenants
        from nybble.server.tls import tls_context

        if ssl_keyfile is not None and ssl_certfile is None:
            raise ValueError("--ssl-keyfile goes with --ssl-certfile")
        named_adapters = _named_adapters(lora_modules or [])
        adapters = None
        tunes = fine_tuning or state_dir is not None
        if enable_lora or named_adapters or lora_root or lora_watch or tunes:
            adapters = AdapterConfig(max_loras, max_lora_rank, parse_bytes(lora_host_memory))
        chosen = resolve_device(device)
        default_tokens = 128 if chosen.type == "cpu" else 512
        engine_config = EngineConfig(
            device=str(chosen),
            dtype=torch.bfloat16 if dtype == "auto" else getattr(torch, dtype),
            kv_cache_bytes=kv_cache_bytes,
            kv_dtype=kv_cache_dtype,
            max_num_seqs=max_num_seqs,
            max_batched_tokens=max_batched_tokens or max(default_tokens, max_num_seqs),
            max_model_len=max_model_len,
            max_waiting=max_waiting,
            adapters=adapters,
            tune=tune,
            restarts=_RESTARTS if on_engine_failure == "restart" else 0,
        )
        tuning = None
        if tunes:
            tuning = FineTuningSettings(
                state=state_dir or default_state(),
                device=engine_config.device,
                max_rank=max_lora_rank,
                max_file_bytes=parse_bytes(max_file_size),
                quota_bytes=parse_bytes(file_quota),
                threads=fine_tuning_threads or default_threads(),
            )
        settings = ServerSettings(
            models=tuple(served_model_name or [model]),
            max_sequences=max_num_seqs + max_waiting,
            max_queue_seconds=max_queue_seconds,
            api_keys=tuple(api_key or ()),
            admin_keys=tuple(admin_key or ()),
            adapter_roots=tuple(lora_root or ()),
            adapter_state=lora_state or default_path(model, port, lora_root or ()),
            tenants=None if tenants is None else Tenants(tenants),
            adapter_watch=lora_watch,
            shutdown_timeout=shutdown_timeout,
            tls=None if ssl_certfile is None else tls_context(ssl_certfile, ssl_keyfile),
            cors=Cors(allowed_origins) if allowed_origins else None,
            console=not no_console,
            tracing=None if otlp_endpoint is None else _tracing(otlp_endpoint),
            fine_tuning=tuning,
        )
        source = ModelSource(model, aliases, quantize, head, merge_adapter, named_adapters)
        try:
            launch(source, engine_config, sock, settings, log_format=log_format)
        except EngineFailedError as error:
            report(str(error))
            raise typer.Exit(_ENGINE_FAILED) from None


def _named_adapters(options: list[str]) -> dict[str, str]:
    """Adapters' paths by name, of ``name=path`` options."""
    adapters: dict[str, str] = {}
    for option in options:
        name, separator, path = option.partition("=")
        if not (name and separator and path):
            raise ValueError(f"--lora-modules {option!r}: expected NAME=PATH")
        if name in adapters:
            raise ValueError(f"--lora-modules: two adapters are called {name!r}")
        adapters[name] = path
    return adapters


def _tracing(endpoint: str) -> Tracing:
    try:
        from nybble.server.tracing import Tracing
    except ImportError as error:
        raise ValueError(
            f"--otlp-endpoint needs OpenTelemetry ({error.name} is missing): "
            "pip install 'nybble[otel]'"
        ) from None
    return Tracing.to(endpoint)
