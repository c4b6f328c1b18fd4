"""Batches as a part of the server: their routes, and what runs them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress

from aiohttp import web
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from nybble.server.api.model_names import ModelNames
from nybble.server.batches.answers import Answers
from nybble.server.batches.batches import Batches
from nybble.server.batches.routes import BatchRoutes
from nybble.server.batches.runner import Runner
from nybble.server.files.access import Access, is_tenants
from nybble.server.files.storage import Storage
from nybble.server.http.errors import ApiError
from nybble.server.tenancy.tenants import Tenant, Tenants


class BatchService(Collector):
    """Also the collector of its metrics."""

    def __init__(
        self,
        storage: Storage,
        answers: Answers,
        access: Access,
        names: ModelNames,
        tenants: Tenants | None,
        places: int,
    ) -> None:
        """places: lines that are prepared or answered at a time."""
        self._batches = Batches(storage.database)
        self._tenants = tenants
        self._runner = Runner(
            self._batches,
            storage.files,
            storage.folder / "batches",
            answers,
            names,
            self._tenant,
            places,
        )
        self._routes = BatchRoutes(self._batches, storage.files, self._runner, access)

    def routes(self) -> list[web.RouteDef]:
        return self._routes.routes()

    async def lifespan(self, _: web.Application) -> AsyncIterator[None]:
        """Run batches until the application ends."""
        running = asyncio.create_task(self._runner.run())
        yield
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running

    def user_of(self, file: str) -> str | None:
        """The unfinished batch that reads a file, in words."""
        for batch in self._batches.unfinished():
            if batch.input_file == file:
                return f"batch {batch.id}, which is {batch.status}"
        return None

    def collect(self) -> Iterator[Metric]:
        batches = GaugeMetricFamily("nybble_batches", "Batches by status.", labels=["status"])
        for status, count in self._batches.counts().items():
            batches.add_metric([status], count)
        yield batches

    def _tenant(self, owner: str) -> Tenant | None:
        if not is_tenants(owner):
            return None
        tenant = None if self._tenants is None else self._tenants.named(owner)
        if tenant is None:
            # As its keys get it.
            raise ApiError(401, f"the tenant {owner!r} is no longer known", code="invalid_api_key")
        return tenant
