"""``nybble serve``: an OpenAI-compatible server."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from nybble.server.cli.errors import expected_errors, interruptible, on_stderr
from nybble.server.cli.options import (
    AliasesOption,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    HeadOption,
    KVCacheDtypeOption,
    QuantizeOption,
    memory_option,
    model_option,
    parse_bytes,
)
from nybble.server.observability.logs import LogFormat

if TYPE_CHECKING:
    from nybble.server.observability.tracing import Tracing

# Options by the panel that `--help` shows them in.
_network = partial(typer.Option, rich_help_panel="Network")
_keys = partial(typer.Option, rich_help_panel="Keys")
_adapters = partial(typer.Option, rich_help_panel="Adapters")
_fine_tuning = partial(typer.Option, rich_help_panel="Fine-tuning")
_failures = partial(typer.Option, rich_help_panel="Failures")
_logs = partial(typer.Option, rich_help_panel="Logging")
_RESTARTS = 3
_ENGINE_FAILED = 70  # EX_SOFTWARE, where 1 is for what was asked for in vain


def serve(
    model: Annotated[
        str, model_option(help="Model folder, hub name (org/name), alias, or 'demo'.")
    ],
    served_model_name: Annotated[
        list[str] | None, model_option(help="Name in the API, repeatable (default: --model).")
    ] = None,
    aliases: AliasesOption = None,
    quantize: QuantizeOption = None,
    head: HeadOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    max_model_len: Annotated[
        int | None, model_option(help="Tokens of prompt and output together.", min=1)
    ] = None,
    host: Annotated[str, _network(help="Address to listen on; 0.0.0.0: all.")] = "127.0.0.1",
    port: Annotated[int, _network(help="0 takes any free one.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        list[str] | None,
        _keys(help="Key that requests must carry, repeatable (default: none needed)."),
    ] = None,
    tenants: Annotated[
        Path | None,
        _keys(
            help="TOML file of tenants: keys, limits, weights. SIGHUP reads it again.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    ssl_certfile: Annotated[
        Path | None,
        _network(help="Certificate with its chain (PEM), for https.", exists=True, dir_okay=False),
    ] = None,
    ssl_keyfile: Annotated[
        Path | None,
        _network(
            help="Its key (PEM), unless that is in the same file.", exists=True, dir_okay=False
        ),
    ] = None,
    allowed_origins: Annotated[
        list[str] | None,
        _network(help="Origin whose pages may call the API, or '*', repeatable (default: none)."),
    ] = None,
    no_console: Annotated[bool, _network("--no-console", help="No page at /.")] = False,
    shutdown_timeout: Annotated[
        float, _network(help="Seconds for requests in flight to finish.", min=0)
    ] = 30,
    kv_cache_memory: Annotated[
        str, memory_option(help="For example 2GiB; auto is 1GiB on the CPU, what is free on a GPU.")
    ] = "auto",
    kv_cache_dtype: KVCacheDtypeOption = "auto",
    max_num_seqs: Annotated[int, memory_option(help="Sequences computed in one step.", min=1)] = 64,
    max_batched_tokens: Annotated[
        int | None,
        memory_option(
            help="Tokens computed in one step (default: 512 on a GPU, 128 on the CPU, where a step "
            "of many takes long and others wait).",
            min=1,
        ),
    ] = None,
    max_waiting: Annotated[
        int, memory_option(help="Sequences queued beyond --max-num-seqs; more get 429.", min=0)
    ] = 256,
    max_queue_seconds: Annotated[
        float,
        memory_option(
            help="Predicted wait beyond which requests get 429 (by the tokens that those in flight "
            "will need, and the rate observed; for each tenant by its share).",
            min=0,
        ),
    ] = 120,
    enable_lora: Annotated[
        bool,
        _adapters(
            "--enable-lora", help="Make room for adapters; the other adapter options imply it."
        ),
    ] = False,
    lora_modules: Annotated[
        list[str] | None,
        _adapters(
            metavar="NAME=PATH",
            help="Adapter to load at the start (folder or hub name), repeatable.",
        ),
    ] = None,
    merge_adapter: Annotated[
        str | None,
        _adapters(
            help="Adapter (folder or hub name) to merge into the model: it then costs nothing. On "
            "a 4-bit base the first start calibrates, for minutes."
        ),
    ] = None,
    lora_root: Annotated[
        list[Path] | None,
        _adapters(
            help="Folder the API may load adapters from, repeatable.", exists=True, file_okay=False
        ),
    ] = None,
    lora_state: Annotated[
        Path | None,
        _adapters(
            help="File that keeps what the API has loaded for the next start (default: in the "
            "cache, for this model, port and --lora-root).",
            dir_okay=False,
        ),
    ] = None,
    lora_watch: Annotated[
        Path | None,
        _adapters(
            help="Folder whose subfolders are adapters, loaded and unloaded as they come and go.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    max_loras: Annotated[int, _adapters(help="Adapters one step can mix.", min=1)] = 8,
    max_lora_rank: Annotated[
        int, _adapters(help="Highest rank; memory is taken for it.", min=1, max=256)
    ] = 64,
    lora_host_memory: Annotated[
        str, _adapters(help="For adapters that wait beside the slots.")
    ] = "4GiB",
    admin_key: Annotated[
        list[str] | None, _keys(help="Key that opens administration, repeatable (default: closed).")
    ] = None,
    fine_tuning: Annotated[
        bool, _fine_tuning("--fine-tuning", help="Take training files and jobs over the API.")
    ] = False,
    state_dir: Annotated[
        Path | None,
        _fine_tuning(
            help="Folder of files, jobs and trained adapters (default: ~/.local/state/nybble); "
            "implies --fine-tuning.",
            file_okay=False,
        ),
    ] = None,
    max_file_size: Annotated[str, _fine_tuning(help="Of an uploaded file.")] = "512MiB",
    file_quota: Annotated[str, _fine_tuning(help="Of one tenant's files together.")] = "4GiB",
    fine_tuning_threads: Annotated[
        int | None,
        _fine_tuning(help="Of a job on the CPU (default: half of the processors).", min=1),
    ] = None,
    tune: Annotated[
        bool,
        model_option(
            help="Measure at the start, for minutes, GPU kernels whose best configuration is not "
            "known; kept for later starts."
        ),
    ] = True,
    on_engine_failure: Annotated[
        Literal["exit", "restart"],
        _failures(
            help="Once clients are told: exit (code 70) for a supervisor, or begin again with the "
            "same weights, three times in ten minutes at most."
        ),
    ] = "exit",
    otlp_endpoint: Annotated[
        str | None, _logs(help="Send OpenTelemetry traces there: http://HOST:4318/v1/traces.")
    ] = None,
    config: ConfigOption = None,
    log_level: Annotated[Literal["debug", "info", "warning", "error"], _logs()] = "info",
    log_format: Annotated[
        LogFormat, _logs(help="json: an object a line, without progress bars.")
    ] = "text",
) -> None:
    """Serve a model on http://HOST:PORT/v1.

    nybble serve --model demo --api-key secret
    """
    from nybble.server.observability import logs

    logs.configure(log_level, log_format)
    kv_cache_bytes = None if kv_cache_memory == "auto" else parse_bytes(kv_cache_memory)
    report = logs.error if log_format == "json" else on_stderr
    with expected_errors(report), interruptible():
        from nybble.server.http.listen import bind

        # Before the model is loaded: a taken port is found out at once.
        sock = bind(host, port)
        import torch

        from nybble.engine import AdapterConfig, EngineConfig, EngineFailedError, resolve_device
        from nybble.server.adapters.state import default_path
        from nybble.server.http.cors import Cors
        from nybble.server.http.tls import tls_context
        from nybble.server.lifecycle.launch import ModelSource, launch
        from nybble.server.lifecycle.settings import ServerSettings
        from nybble.server.tenancy.tenants import Tenants
        from nybble.server.training.settings import (
            TrainingSettings,
            default_state,
            default_threads,
        )

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
            tuning = TrainingSettings(
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
            training=tuning,
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
        from nybble.server.observability.tracing import Tracing
    except ImportError as error:
        raise ValueError(
            f"--otlp-endpoint needs OpenTelemetry ({error.name} is missing): "
            "pip install 'nybble[otel]'"
        ) from None
    return Tracing.to(endpoint)
