"""``nybble replicas``: several servers of one model on this machine, behind HAProxy."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from nybble.server.cli.errors import expected_errors
from nybble.server.cli.model_path import require_named
from nybble.server.cli.options_command import filled
from nybble.server.lifecycle.options import ServeOptions
from nybble.server.observability import logs
from nybble.server.replicas.options import NOT_FOR_REPLICAS


def replicas(
    context: typer.Context,
    count: Annotated[
        int | None, typer.Option(help="Servers (default: one for each GPU).", min=1)
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port; the servers have those after it.", min=1, max=65535)
    ] = 8000,
    ssl_certfile: Annotated[
        Path | None,
        typer.Option(
            help="Certificate and its chain (PEM), for https.", exists=True, dir_okay=False
        ),
    ] = None,
    ssl_keyfile: Annotated[
        Path | None,
        typer.Option(
            help="The certificate's key (PEM), if it is not in the same file.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print HAProxy's configuration and end.")
    ] = False,
) -> None:
    """Serve a model from several processes, one a GPU, on http://HOST:PORT/v1.

    All other options are those of `nybble serve`. Needs HAProxy. SIGHUP replaces one server after
    the other; a server that ends is started again.

    nybble replicas --count 4 --model org/name --lora-source adapters
    """
    with expected_errors():
        if port + (count or 1) > 65535:
            raise ValueError(f"--port {port}: the servers' ports after it end at 65535")
        if ssl_keyfile is not None and ssl_certfile is None:
            raise ValueError("--ssl-keyfile goes with --ssl-certfile")
        if print_config:
            from nybble.server.replicas.haproxy import configuration

            if ssl_keyfile is not None and str(ssl_keyfile) != f"{ssl_certfile}.key":
                raise ValueError(
                    f"--print-config: HAProxy looks for the key in {ssl_certfile} and in "
                    f"{ssl_certfile}.key, not in {ssl_keyfile}"
                )

            addresses = [f"127.0.0.1:{port + i}" for i in range(1, (count or 2) + 1)]
            shared = any(each.startswith("--lora-registry") for each in context.args)
            text = configuration(
                f"{host}:{port}", addresses, shared_registry=shared, certificate=ssl_certfile
            )
            typer.echo(text, nl=False)
            return
        options = _serve_options(context)
        logs.configure(options["log_level"], options["log_format"])
        from nybble.server.replicas.supervise import (
            ReplicaError,
            ReplicaSettings,
            Supervisor,
            find_haproxy,
        )

        haproxy = find_haproxy()
        settings = ReplicaSettings(
            host=host,
            port=port,
            arguments=context.args,
            environments=_environments(count, options),
            shutdown_timeout=options["shutdown_timeout"],
            shared_registry=bool(options["lora_registry"]),
            certificate=ssl_certfile,
            key=ssl_keyfile,
        )
        try:
            asyncio.run(Supervisor(settings, haproxy).run())
        except ReplicaError as error:
            logs.error(str(error))
            raise typer.Exit(1) from None


def _serve_options(context: typer.Context) -> dict[str, Any]:
    """The values of the options for ``serve``. Wrong ones end the command as they would end it.

    Raises ValueError for an option that several servers cannot have.
    """
    assert context.parent is not None
    group = context.parent.command
    assert isinstance(group, TyperGroup)
    with group.commands["serve"].make_context("nybble serve", [*context.args]) as parsed:
        options = dict(parsed.params)
    model = options["argument"] or options["model"]
    if model is None:
        raise ValueError("say which model: --model NAME")
    require_named(filled(ServeOptions, options | {"model": model}))
    for name, instead in NOT_FOR_REPLICAS.items():
        if options.get(name.replace("-", "_")):
            raise ValueError(f"--{name} is not for replicas: {instead}")
    return options


def _environments(count: int | None, options: dict[str, Any]) -> list[dict[str, str]]:
    """What each server's environment has besides this one's: its GPUs, or its share of the cores.

    Raises ValueError for more servers than there are GPUs.
    """
    size: int = options["tensor_parallel_size"]
    if options["device"] != "cpu" and (gpus := _gpus()):
        most = len(gpus) // size
        if (count or 1) > most:
            each = "one" if size == 1 else f"{size} (--tensor-parallel-size)"
            raise ValueError(
                f"--count {count or 1}, but there are {len(gpus)} GPUs, and each server needs "
                f"{each}"
            )
        lots = (gpus[first : first + size] for first in range(0, most * size, size))
        return [{"CUDA_VISIBLE_DEVICES": ",".join(lot)} for lot in lots][:count]
    if count is None:
        raise ValueError("there is no GPU: say with --count how many servers to start")
    if "OMP_NUM_THREADS" in os.environ:
        return [{}] * count
    threads = max(1, len(os.sched_getaffinity(0)) // (count * size))
    return [{"OMP_NUM_THREADS": str(threads)}] * count


def _gpus() -> list[str]:
    """Names for ``CUDA_VISIBLE_DEVICES`` of the GPUs which this process may use."""
    import torch

    if not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",")][: torch.cuda.device_count()]
    return [str(i) for i in range(torch.cuda.device_count())]
