"""The command line: ``nybble serve|pack|inspect|merge|…``, and ``serve`` by itself."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from nybble.server.cli.errors import expected_errors, interruptible
from nybble.server.cli.training import commands

# Nothing heavy is imported at the top: `--help` answers at once.


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(version("nybble"))
        raise typer.Exit


app = typer.Typer(
    name="nybble",
    help="Serve 4-bit language models with an OpenAI-compatible API.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


app.add_typer(commands)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
KVCacheDtype = Literal["auto", "int8"]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]
LayoutChoice = Literal["auto", "rows", "cpu_tiles"]

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{unit}iB": 1 << 10 * (i + 1) for i, unit in enumerate("KMGT")}
_UNITS |= {f"{unit}B": 1000 ** (i + 1) for i, unit in enumerate("KMGT")}


def parse_bytes(text: str) -> int:
    """Bytes of ``2GiB``, ``500MB``, ``1073741824``. Raises typer.BadParameter."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B|)", text.strip())
    if match is None or match[2] not in _UNITS:
        raise typer.BadParameter(f"{text!r} is not a size such as 2GiB, 500MB or 1073741824")
    return int(float(match[1]) * _UNITS[match[2]])


_AliasesOption = Annotated[
    Path | None,
    typer.Option(help="TOML file of alias = 'folder or hub name'.", dir_okay=False, exists=True),
]
_MODEL, _NETWORK, _MEMORY, _LOGS = "Model", "Network", "Memory and batching", "Logging"
_ADAPTERS = "Adapters"


@app.command()
def serve(
    model: Annotated[
        str,
        typer.Option(
            help="Model folder, hub name (org/name), alias, or 'demo'.", rich_help_panel=_MODEL
        ),
    ],
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            help="Name in the API, repeatable (default: --model).", rich_help_panel=_MODEL
        ),
    ] = None,
    aliases: Annotated[
        Path | None,
        typer.Option(
            help="TOML file of alias = 'folder or hub name'.",
            dir_okay=False,
            exists=True,
            rich_help_panel=_MODEL,
        ),
    ] = None,
    quantize: Annotated[
        Literal["nf4"] | None,
        typer.Option(help="Round a 16-bit model to 4 bits while loading.", rich_help_panel=_MODEL),
    ] = None,
    head: Annotated[
        Literal["int8"] | None,
        typer.Option(help="Round the output layer to 8 bits.", rich_help_panel=_MODEL),
    ] = None,
    device: Annotated[Device, typer.Option(rich_help_panel=_MODEL)] = "auto",
    dtype: Annotated[
        Dtype, typer.Option(help="Of activations and KV cache.", rich_help_panel=_MODEL)
    ] = "auto",
    max_model_len: Annotated[
        int | None,
        typer.Option(help="Tokens of prompt and output together.", rich_help_panel=_MODEL, min=1),
    ] = None,
    host: Annotated[str, typer.Option(rich_help_panel=_NETWORK)] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="0 takes any free one.", rich_help_panel=_NETWORK, min=0, max=65535)
    ] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Key that requests must carry, repeatable (default: none needed).",
            rich_help_panel=_NETWORK,
        ),
    ] = None,
    tenants: Annotated[
        Path | None,
        typer.Option(
            help="TOML file of tenants: keys, limits, weights. SIGHUP reads it again.",
            exists=True,
            dir_okay=False,
            rich_help_panel=_NETWORK,
        ),
    ] = None,
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
            rich_help_panel=_MEMORY,
        ),
    ] = "auto",
    kv_cache_dtype: Annotated[
        KVCacheDtype,
        typer.Option(help="int8 halves the KV cache's memory (GPU).", rich_help_panel=_MEMORY),
    ] = "auto",
    max_num_seqs: Annotated[
        int, typer.Option(help="Sequences computed in one step.", rich_help_panel=_MEMORY, min=1)
    ] = 64,
    max_batched_tokens: Annotated[
        int, typer.Option(help="Tokens computed in one step.", rich_help_panel=_MEMORY, min=1)
    ] = 512,
    max_waiting: Annotated[
        int,
        typer.Option(
            help="Sequences queued beyond --max-num-seqs; more get 429.",
            rich_help_panel=_MEMORY,
            min=0,
        ),
    ] = 256,
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
            rich_help_panel=_ADAPTERS,
        ),
    ] = None,
    log_level: Annotated[LogLevel, typer.Option(rich_help_panel=_LOGS)] = "info",
    log_format: Annotated[
        LogFormat,
        typer.Option(help="json: an object a line, without progress bars.", rich_help_panel=_LOGS),
    ] = "text",
) -> None:
    """Serve a model on http://HOST:PORT/v1."""
    from nybble.server import logs

    logs.configure(log_level, log_format)
    kv_cache_bytes = None if kv_cache_memory == "auto" else parse_bytes(kv_cache_memory)
    failures = expected_errors(logs.error) if log_format == "json" else expected_errors()
    with failures, interruptible():
        from nybble.server.listen import bind

        # Before the model is loaded: a taken port is found out at once.
        sock = bind(host, port)
        import torch
        from nybble.engine import AdapterConfig, EngineConfig, resolve_device

        named_adapters = _named_adapters(lora_modules or [])
        adapters = None
        if enable_lora or named_adapters or lora_root or lora_watch:
            adapters = AdapterConfig(max_loras, max_lora_rank, parse_bytes(lora_host_memory))
        chosen = str(resolve_device(device))
        config = EngineConfig(
            device=chosen,
            dtype=torch.bfloat16 if dtype == "auto" else getattr(torch, dtype),
            kv_cache_bytes=kv_cache_bytes,
            kv_dtype=kv_cache_dtype,
            max_num_seqs=max_num_seqs,
            max_batched_tokens=max_batched_tokens,
            max_model_len=max_model_len,
            max_waiting=max_waiting,
            adapters=adapters,
        )
        names = tuple(served_model_name or [model])
        _run_server(
            model,
            config,
            sock,
            names,
            aliases=aliases,
            quantize=quantize,
            head=head,
            merge_adapter=merge_adapter,
            api_keys=tuple(api_key or ()),
            adapters=named_adapters,
            admin_keys=tuple(admin_key or ()),
            adapter_roots=tuple(lora_root or ()),
            tenants=tenants,
            adapter_watch=lora_watch,
            shutdown_timeout=shutdown_timeout,
            log_format=log_format,
        )


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


def _run_server(
    model: str,
    config: Any,
    sock: Any,
    names: tuple[str, ...],
    *,
    aliases: Path | None,
    quantize: Any,
    head: Any,
    merge_adapter: str | None,
    api_keys: tuple[str, ...],
    adapters: dict[str, str],
    admin_keys: tuple[str, ...],
    adapter_roots: tuple[Path, ...],
    tenants: Path | None,
    adapter_watch: Path | None,
    shutdown_timeout: float,
    log_format: LogFormat,
) -> None:
    import asyncio
    import logging

    import torch
    from nybble.engine import Engine
    from nybble.server.cli.prepare import prepare_checkpoint
    from nybble.server.logs import Event
    from nybble.server.serve import serve as serve_engine
    from nybble.server.tenants import Tenants

    progress = log_format == "text"
    known_tenants = None if tenants is None else Tenants(tenants)
    checkpoint = prepare_checkpoint(
        model,
        device=torch.device(config.device),
        aliases=aliases,
        quantize=quantize,
        head=head,
        adapter=merge_adapter,
        progress=progress,
    )
    if taken := [name for name in adapters if name in names]:
        raise ValueError(f"--lora-modules: {taken[0]!r} is the name of the base model")
    engine = Engine.load(checkpoint, config, progress)
    for name, path in adapters.items():
        engine.load_adapter(name, path)
    engine.start()

    def announce() -> None:
        host, port = sock.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
        tokens = engine.stats().kv_blocks_total * config.block_size
        if log_format == "json":
            fields = {"url": url, "models": names, "device": config.device, "kv_tokens": tokens}
            logging.getLogger(__name__).info(Event("serving", fields))
            return
        print(
            f"Serving {', '.join(names)} ({checkpoint.config.model_type}) on {config.device}\n"
            f"  URL       {url}\n"
            f"  KV cache  {tokens:,} tokens; a sequence may have {engine.max_model_len:,}"
            + (f"\n  Adapters  {', '.join(adapters)}" if adapters else ""),
            file=sys.stderr,
            flush=True,
        )

    asyncio.run(
        serve_engine(
            engine,
            sock,
            models=names,
            max_sequences=config.max_num_seqs + config.max_waiting,
            api_keys=api_keys,
            admin_keys=admin_keys,
            adapter_roots=adapter_roots,
            tenants=known_tenants,
            adapter_watch=adapter_watch,
            shutdown_timeout=shutdown_timeout,
            ready=announce,
        )
    )


@app.command()
def pack(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Model folder, hub name or alias.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    layout: Annotated[
        LayoutChoice, typer.Option(help="Layout of the codes (auto: for this machine).")
    ] = "auto",
    aliases: _AliasesOption = None,
) -> None:
    """Write a model's packed form, which loads by memory-mapping."""
    with expected_errors(), interruptible():
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise FileExistsError(f"{target} exists and is not an empty folder")
        from nybble.engine import resolve_device
        from nybble.kernels.matmul import preferred_layout
        from nybble.loaders import open_checkpoint, resolve_model, save_packed

        save_packed(
            open_checkpoint(resolve_model(source, aliases=aliases)),
            target,
            layout=preferred_layout(resolve_device("auto")) if layout == "auto" else layout,
        )
        print(f"Wrote {target}", file=sys.stderr)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Model folder, hub name or alias.")],
    every: Annotated[
        bool, typer.Option("--all", help="Every layer, not one line for alike layers.")
    ] = False,
    aliases: _AliasesOption = None,
) -> None:
    """Show what a model's weights are made of."""
    with expected_errors(), interruptible():
        from nybble.loaders import open_checkpoint, resolve_model
        from nybble.loaders.inspect import inspect_checkpoint
        from nybble.server.cli.inspect_table import print_table

        checkpoint = open_checkpoint(resolve_model(model, aliases=aliases))
        print_table(inspect_checkpoint(checkpoint), every=every)


@app.command()
def doctor(
    model: Annotated[
        str | None,
        typer.Option(help="See whether this model fits: folder, hub name, alias, or 'demo'."),
    ] = None,
    device: Device = "auto",
    dtype: Annotated[Dtype, typer.Option(help="Of activations and KV cache.")] = "auto",
    kv_cache_dtype: KVCacheDtype = "auto",
    quantize: Annotated[Literal["nf4"] | None, typer.Option(help="As for serve.")] = None,
    head: Annotated[Literal["int8"] | None, typer.Option(help="As for serve.")] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(help="Tokens a sequence may have (default: 8192, or the model's).", min=1),
    ] = None,
    max_num_seqs: Annotated[
        int, typer.Option(help="Sequences of that length at once.", min=1)
    ] = 16,
    aliases: _AliasesOption = None,
) -> None:
    """Check this machine, and whether a model fits it; downloads and loads nothing."""
    with expected_errors(), interruptible():
        import torch
        from nybble.engine import EngineConfig
        from nybble.server.cli.doctor import Plan, examine, print_findings

        plan = None
        if model is not None:
            config = EngineConfig(
                dtype=torch.bfloat16 if dtype == "auto" else getattr(torch, dtype),
                kv_dtype=kv_cache_dtype,
                max_num_seqs=max_num_seqs,
                max_batched_tokens=max(512, max_num_seqs),
                max_model_len=max_model_len,
            )
            plan = Plan(model, config, aliases, quantize, head)
        if not print_findings(examine(device, plan)):
            raise typer.Exit(1)


@app.command()
def merge(
    base: Annotated[str, typer.Argument(help="Model folder, hub name or alias.")],
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER...", help="Adapter folders or hub names.")
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    out: Annotated[
        Literal["gptq", "awq", "nf4", "fp4", "bf16"] | None,
        typer.Option(help="Layout to write (default: the base's)."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="One number for each adapter, such as 0.7,0.3 (default: 1).")
    ] = None,
    combination: Annotated[
        Literal["cat", "linear"], typer.Option(help="How several adapters become one, as in PEFT.")
    ] = "cat",
    keep_16_bits: Annotated[
        bool, typer.Option("--keep-16-bits", help="Leave merged layers of a 4-bit base in 16 bits.")
    ] = False,
    text: Annotated[
        Path | None,
        typer.Option(
            help="Text to measure the divergence from the unmerged model on.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    aliases: _AliasesOption = None,
) -> None:
    """Merge adapters into a model, and say what rounding the result cost."""
    with expected_errors(), interruptible():
        from nybble.server.cli.merging import merge_and_report

        merge_and_report(
            base,
            adapters,
            target,
            format=out,
            weights=None if weights is None else [float(weight) for weight in weights.split(",")],
            combination=combination,
            keep_16_bits=keep_16_bits,
            text=text,
            aliases=aliases,
        )


@app.command()
def new_key() -> None:
    """Make an API key, and the line that a tenants file has for it."""
    from nybble.server.tenants import new_key as make

    key, stored = make()
    print(f'key (give it to the tenant): {key}\nin the file: keys = ["{stored}"]')


def main() -> None:
    """The ``nybble`` command."""
    app()


def serve_main() -> None:
    """The ``serve`` command: ``nybble serve`` by its short name."""
    app(["serve", *sys.argv[1:]], prog_name="nybble")
