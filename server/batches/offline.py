"""A file of requests, answered without a server."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from nybble.engine import Engine
from nybble.kernels.progress import Bar
from nybble.loaders.templates import TemplateRenderer
from nybble.server.adapters.owners import AdapterOwners
from nybble.server.api.model_names import ModelNames
from nybble.server.api.output.dialect import Dialects
from nybble.server.api.parse import UnknownFields
from nybble.server.api.routes import Api
from nybble.server.batches.answers import Answers
from nybble.server.batches.lines import LineIndex
from nybble.server.batches.results import Results
from nybble.server.http.gate import Gate
from nybble.server.observability.metrics import Metrics
from nybble.server.tenancy.admission import Admission, Capacity
from nybble.server.tenancy.limits import Limiter
from nybble.server.tenancy.usage import UsageLedger


@dataclass(frozen=True)
class Done:
    """Requests that were answered, that were not, and that had their results already."""

    completed: int
    failed: int
    earlier: int


def read_requests(path: Path) -> LineIndex:
    """The lines of a file. Raises ValueError naming the first wrong line."""
    index = LineIndex.read(path)
    if index.errors:
        first = index.errors[0]
        where = f"{path}:{first['line']}" if first.get("line") else str(path)
        raise ValueError(f"{where}: {first['message']}")
    return index


async def answer_file(
    index: LineIndex,
    output: Path,
    engine: Engine,
    models: tuple[str, ...],
    dialects: Dialects,
    *,
    max_waiting: int,
    matryoshka: bool = False,
    progress: bool = True,
) -> Done:
    """Answer the lines that have no result in ``output`` yet, with a started engine.

    Results are appended as they come, those of failed requests too. Raises OSError.

    models: the names of the model.
    """
    seats = engine.max_num_seqs
    capacity = Capacity(seats + max_waiting, seats, engine.kv_cache_tokens, float("inf"))
    admission = Admission(capacity, lambda: engine.stats().computed_tokens)
    templates = TemplateRenderer()
    api = Api(
        engine,
        Metrics(engine, admission),
        ModelNames(engine, models, AdapterOwners()),
        admission,
        Gate(),
        Limiter(),
        UsageLedger(),
        templates,
        dialects=dialects,
        matryoshka=matryoshka,
    )
    # As in the background of a server: a line waits for seats, and is never refused.
    answers = Answers(api.endpoints, api.generation, UnknownFields(), background=True)
    results = Results(output, output)
    left = [i for i, id in enumerate(index.custom_ids) if id not in results.done]
    earlier, places = len(index.offsets) - len(left), asyncio.Semaphore(2 * seats)
    completed = 0
    try:
        with Bar(total=len(left), desc="Answering", unit=" requests", disable=not progress) as bar:

            async def answer(position: int) -> None:
                nonlocal completed
                try:
                    line = index.line(position)
                    found = await answers.answer(line, lambda: None)
                    results.add(line.custom_id, found)
                    completed += found.ok
                    bar.update()
                finally:
                    places.release()

            async with asyncio.TaskGroup() as tasks:
                for position in left:
                    await places.acquire()
                    tasks.create_task(answer(position))
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    finally:
        templates.close()
    return Done(completed, len(left) - completed, earlier)
