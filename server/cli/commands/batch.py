"""``nybble batch``: a file of requests, answered without a server."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from nybble.server.cli.errors import expected_errors, interruptible
from nybble.server.cli.model_path import require_named
from nybble.server.cli.options_command import takes
from nybble.server.cli.threads import use_threads
from nybble.server.lifecycle.options import (
    AdapterOptions,
    LoraDtypeOption,
    LoraModulesOption,
    MaxLoraRankOption,
    MemoryOptions,
    MergeAdapterOption,
    ModelOptions,
    NetworkOptions,
    ReasoningParserOption,
    ServeOptions,
    ToolCallParserOption,
)


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """Those of ``nybble serve`` that have to do with the model."""

    requests: Annotated[
        Path,
        typer.Argument(
            metavar="IN", help="JSON lines as OpenAI's batches have them.", dir_okay=False
        ),
    ]
    results: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="File of results. Those that it has already are kept, and not made again.",
            dir_okay=False,
        ),
    ]
    model: ModelOptions
    memory: MemoryOptions
    lora_modules: LoraModulesOption = None
    merge_adapter: MergeAdapterOption = None
    max_lora_rank: MaxLoraRankOption = 64
    lora_dtype: LoraDtypeOption = "auto"
    reasoning_parser: ReasoningParserOption = "auto"
    tool_call_parser: ToolCallParserOption = "auto"

    def served(self) -> ServeOptions:
        """The options of a server that would answer the same."""
        return ServeOptions(
            model=self.model,
            memory=self.memory,
            network=NetworkOptions(
                reasoning_parser=self.reasoning_parser, tool_call_parser=self.tool_call_parser
            ),
            adapters=AdapterOptions(
                lora_modules=self.lora_modules,
                merge_adapter=self.merge_adapter,
                max_lora_rank=self.max_lora_rank,
                lora_dtype=self.lora_dtype,
            ),
        )


@takes(BatchOptions)
def batch(options: BatchOptions) -> None:
    """Answer a file of requests, and write a file of results.

    nybble batch requests.jsonl results.jsonl --model demo

    Each line is as in OpenAI's Batch API: custom_id, method, url and body; lines may be for
    different endpoints. A run that was interrupted goes on if it is started again.
    """
    with expected_errors(), interruptible():
        served = options.served()
        require_named(served)
        if not options.results.absolute().parent.is_dir():
            raise ValueError(
                f"{options.results}: there is no folder {options.results.absolute().parent}"
            )
        use_threads(options.model.threads)
        from nybble.server.batches.offline import answer_file, read_requests
        from nybble.server.lifecycle.configure import dialects_of, engine_config
        from nybble.server.lifecycle.flag_names import flags_named
        from nybble.server.lifecycle.launch import load_engine
        from nybble.server.lifecycle.named_adapters import named_adapters
        from nybble.server.lifecycle.startup import Startup

        index = read_requests(options.requests)
        with flags_named():
            config, dialects = engine_config(served), dialects_of(served)
            adapters = named_adapters(served.adapters, served.served_names)
            startup = Startup(bars=sys.stderr.isatty())
            engine, _ = load_engine(served, config, adapters, startup)
        startup.close()
        engine.start()
        try:
            done = asyncio.run(
                answer_file(
                    index,
                    options.results,
                    engine,
                    served.served_names,
                    dialects,
                    max_waiting=config.max_waiting,
                    matryoshka=served.model.matryoshka,
                )
            )
        finally:
            engine.stop()
        print(
            f"{options.results}: {done.completed} answered, {done.failed} failed"
            + (f", {done.earlier} had results already" if done.earlier else ""),
            file=sys.stderr,
        )
        if done.failed:
            raise typer.Exit(1)
