"""``nybble doctor``: checks the machine, and whether a model fits it."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Literal

import typer

from nybble.server.cli.errors import expected_errors, interruptible
from nybble.server.lifecycle.options import (
    AliasesOption,
    DeviceOption,
    DtypeOption,
    HeadOption,
    KVCacheDtypeOption,
    KVCacheMemoryOption,
    MemoryOptions,
    QuantizeOption,
)


def doctor(
    model: Annotated[
        str | None,
        typer.Option(help="See whether this model fits: folder, hub name, alias, or 'demo'."),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    kv_cache_memory: KVCacheMemoryOption = None,
    kv_cache_dtype: KVCacheDtypeOption = "auto",
    quantize: QuantizeOption = None,
    head: HeadOption = "auto",
    max_model_len: Annotated[
        int | None,
        typer.Option(
            help="Tokens a sequence has to have room for (default: the model's, or as many as the "
            "KV cache holds).",
            min=1,
        ),
    ] = None,
    max_num_seqs: Annotated[
        int | None,
        typer.Option(
            help="Sequences of that length which have to fit at once (default: one; `serve` "
            f"computes {MemoryOptions.max_num_seqs} at most).",
            min=1,
        ),
    ] = None,
    speculate: Annotated[
        Literal["mtp"] | None, typer.Option(help="See whether its MTP head fits too.")
    ] = None,
    draft_model: Annotated[
        str | None, typer.Option(help="See whether this draft model fits beside it.")
    ] = None,
    draft_quantize: Annotated[
        Literal["nf4"] | None,
        typer.Option(help="Round a 16-bit draft model or MTP head to 4 bits."),
    ] = None,
    aliases: AliasesOption = None,
) -> None:
    """Check this machine, and whether a model fits it; downloads and loads nothing."""
    with expected_errors(), interruptible():
        import torch

        from nybble.engine import EngineConfig, resolve_device
        from nybble.server.cli.doctor import Plan, examine, print_findings
        from nybble.server.lifecycle.configure import default_batched_tokens

        plan = None
        if model is not None:
            sequences = max_num_seqs or MemoryOptions.max_num_seqs
            found = torch.device("cpu")
            with suppress(ValueError):  # that it is missing is a finding
                found = resolve_device(device)
            config = EngineConfig(
                dtype=torch.bfloat16 if dtype == "auto" else getattr(torch, dtype),
                kv_cache_bytes=kv_cache_memory,
                kv_dtype=kv_cache_dtype,
                max_num_seqs=sequences,
                max_batched_tokens=default_batched_tokens(found, sequences),
                max_model_len=max_model_len,
                speculate=speculate or "off",
            )
            needed = max_num_seqs or 1
            plan = Plan(model, config, aliases, quantize, head, needed, draft_model, draft_quantize)
        if not print_findings(examine(device, plan)):
            raise typer.Exit(1)
