"""The command line: ``nybble serve|pack|inspect|quantize``, and ``serve`` by itself."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

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


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


Format = Literal["gptq", "awq", "nf4"]
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
LogLevel = Literal["debug", "info", "warning", "error"]
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


@contextmanager
def expected_errors() -> Iterator[None]:
    """What can go wrong without a bug is one line on stderr and exit code 1."""
    try:
        yield
    except (LookupError, ValueError, OSError) as error:
        # CheckpointError, UnsupportedModelError and the settings' errors are ValueErrors,
        # ModelNotFoundError is a LookupError; a KeyError or IndexError is a bug.
        if isinstance(error, KeyError | IndexError):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise typer.Exit(1) from None


_AliasesOption = Annotated[
    Path | None,
    typer.Option(help="TOML file of alias = 'folder or hub name'.", dir_okay=False, exists=True),
]
_MODEL, _NETWORK, _MEMORY, _LOGS = "Model", "Network", "Memory and batching", "Logging"


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
    shutdown_timeout: Annotated[
        float,
        typer.Option(
            help="Seconds for requests in flight to finish.", rich_help_panel=_NETWORK, min=0
        ),
    ] = 30,
    kv_cache_memory: Annotated[
        str, typer.Option(help="For example 2GiB.", rich_help_panel=_MEMORY)
    ] = "1GiB",
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
    log_level: Annotated[LogLevel, typer.Option(rich_help_panel=_LOGS)] = "info",
) -> None:
    """Serve a model on http://HOST:PORT/v1."""
    import logging

    logging.basicConfig(
        level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    kv_cache_bytes = parse_bytes(kv_cache_memory)
    with expected_errors(), _interruptible():
        from nybble.server.listen import bind

        # Before the model is loaded: a taken port is found out at once.
        sock = bind(host, port)
        import torch
        from nybble.engine import EngineConfig

        chosen = _device(device)
        config = EngineConfig(
            device=chosen,
            dtype=torch.bfloat16 if dtype == "auto" else getattr(torch, dtype),
            kv_cache_bytes=kv_cache_bytes,
            max_num_seqs=max_num_seqs,
            max_batched_tokens=max_batched_tokens,
            max_model_len=max_model_len,
            max_waiting=max_waiting,
        )
        names = tuple(served_model_name or [model])
        _run_server(
            model,
            config,
            sock,
            names,
            aliases=aliases,
            quantize=quantize,
            api_keys=tuple(api_key or ()),
            shutdown_timeout=shutdown_timeout,
        )


def _run_server(
    model: str,
    config: Any,
    sock: Any,
    names: tuple[str, ...],
    *,
    aliases: Path | None,
    quantize: Any,
    api_keys: tuple[str, ...],
    shutdown_timeout: float,
) -> None:
    import asyncio

    import torch
    from nybble.engine import Engine
    from nybble.server.prepare import prepare_checkpoint
    from nybble.server.serve import serve as serve_engine

    checkpoint = prepare_checkpoint(
        model, device=torch.device(config.device), aliases=aliases, quantize=quantize
    )
    engine = Engine.load(checkpoint, config)
    engine.start()

    def announce() -> None:
        host, port = sock.getsockname()[:2]
        tokens = engine.stats().kv_blocks_total * config.block_size
        print(
            f"Serving {', '.join(names)} ({checkpoint.config.model_type}) on {config.device}\n"
            f"  URL       http://{f'[{host}]' if ':' in host else host}:{port}/v1\n"
            f"  KV cache  {tokens:,} tokens; a sequence may have {engine.max_model_len:,}",
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
            shutdown_timeout=shutdown_timeout,
            ready=announce,
        )
    )


def _device(device: Device) -> str:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device; use --device cpu")
    return device


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C while loading ends without a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise typer.Exit(130) from None


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
    with expected_errors(), _interruptible():
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise FileExistsError(f"{target} exists and is not an empty folder")
        import torch
        from nybble.kernels.matmul import preferred_layout
        from nybble.loaders import open_checkpoint, resolve_model, save_packed

        save_packed(
            open_checkpoint(resolve_model(source, aliases=aliases)),
            target,
            layout=preferred_layout(torch.device(_device("auto"))) if layout == "auto" else layout,
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
    with expected_errors(), _interruptible():
        from nybble.loaders import open_checkpoint, resolve_model
        from nybble.loaders.inspect import inspect_checkpoint
        from nybble.server.inspect_table import print_table

        checkpoint = open_checkpoint(resolve_model(model, aliases=aliases))
        print_table(inspect_checkpoint(checkpoint), every=every)


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help="16-bit model.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    format: Annotated[Format, typer.Option(help="Public layout to write.")],
    group_size: Annotated[
        int, typer.Option(help="Inputs that share a scale; -1 for all (gptq, awq).", min=-1)
    ] = 128,
    sym: Annotated[bool, typer.Option("--sym", help="A fixed zero of 8 (gptq).")] = False,
    aliases: _AliasesOption = None,
) -> None:
    """Round a 16-bit model to 4 bits in a public checkpoint layout."""
    with expected_errors(), _interruptible():
        if group_size == 0:
            raise ValueError("--group-size is 0, expected a positive number or -1")
        if sym and format != "gptq":
            raise ValueError(f"--sym goes with --format gptq, not with {format}")
        from nybble.loaders import resolve_model
        from nybble.quantizers import quantize_checkpoint

        quantize_checkpoint(
            resolve_model(source, aliases=aliases),
            target,
            format=format,
            group_size=group_size,
            sym=sym,
        )
        print(f"Wrote {target}", file=sys.stderr)


def main() -> None:
    """The ``nybble`` command."""
    app()


def serve_main() -> None:
    """The ``serve`` command: ``nybble serve`` by its short name."""
    app(["serve", *sys.argv[1:]], prog_name="nybble")
