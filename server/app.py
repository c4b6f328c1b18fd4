"""The aiohttp application: routes behind request ids, error bodies, keys and the gate."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from uuid import uuid4

from aiohttp import web
from aiohttp.typedefs import Middleware

from nybble.engine import Engine
from nybble.loaders.templates import TemplateRenderer
from nybble.server.adapters.admin import AdapterAdmin
from nybble.server.adapters.disk_cache import AdapterDiskCache
from nybble.server.adapters.owners import AdapterOwners
from nybble.server.adapters.paths import ADMIN_PATHS
from nybble.server.adapters.resolver import AdapterResolver
from nybble.server.adapters.state import AdapterState
from nybble.server.api.model_names import ModelNames
from nybble.server.api.parse import LARGE_BODIES, UNKNOWN_FIELDS, LargeBodies, UnknownFields
from nybble.server.api.respond import json_response
from nybble.server.api.response_store import ResponseStore
from nybble.server.api.routes import Api
from nybble.server.api.running import RUNNING, RunningRequests
from nybble.server.batches.answers import Answers
from nybble.server.batches.batches import PURPOSE
from nybble.server.batches.service import BatchService
from nybble.server.console.page import Console
from nybble.server.files.access import Access, takes_admin_key
from nybble.server.files.files import Check
from nybble.server.files.routes import FileRoutes
from nybble.server.files.storage import FilesCollector, Storage
from nybble.server.http.browsers import BrowserGuard, require_json
from nybble.server.http.cors import WARNING
from nybble.server.http.errors import ApiError
from nybble.server.http.gate import Gate
from nybble.server.http.paths import OtherSpellings, matched_path
from nybble.server.lifecycle.settings import ServerSettings
from nybble.server.observability.logs import LogEvent
from nybble.server.observability.metrics import Metrics
from nybble.server.observability.request_record import RECORD, RequestRecord
from nybble.server.tenancy.admission import Admission, Capacity
from nybble.server.tenancy.keys import Keys, bearer
from nybble.server.tenancy.limits import Limiter, Limits
from nybble.server.tenancy.tenants import TENANT, Tenants
from nybble.server.tenancy.usage import UsageLedger

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 16 << 20

_REQUEST_ID = "X-Request-Id"
_ACCEPTABLE_ID = re.compile(r"[\x21-\x7e]{1,128}")
# nginx's status for a client that disconnected before its answer.
_CLIENT_CLOSED = 499
# Load balancers and Prometheus request these without a key.
_PROBES = ("/health", "/ping", "/metrics", "/version")
# The console's files need no key either; the page asks its user for one.
_OPEN_PATHS = frozenset((*_PROBES, "/", "/console/{name}"))

_USAGE = "/v1/usage"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(
    engine: Engine, settings: ServerSettings, gate: Gate, templates: TemplateRenderer
) -> web.Application:
    """The application over a started engine."""
    models, tenants = settings.models, settings.tenants
    capacity = Capacity(
        settings.max_sequences,
        engine.max_num_seqs,
        engine.kv_cache_tokens,
        settings.max_queue_seconds,
    )
    admission = Admission(capacity, lambda: engine.stats().computed_tokens)
    metrics = Metrics(engine, admission, models[0] if settings.vllm_metrics else None)
    limits, ledger = settings.quotas or Limiter(tenants), UsageLedger()
    cors = settings.cors
    owners = AdapterOwners()
    resolver = _resolver(engine, settings)
    names = ModelNames(engine, models, owners, resolver)
    tracing = settings.tracing
    ended = None if tracing is None else tracing.sequence
    api = Api(
        engine,
        metrics,
        names,
        admission,
        gate,
        limits,
        ledger,
        templates,
        ended,
        trust_chat_templates=settings.trust_chat_templates,
        dialects=settings.dialects,
        response_store=settings.response_store and ResponseStore(*settings.response_store),
        matryoshka=settings.matryoshka,
        root_path=settings.root_path,
    )
    admin_keys = Keys(settings.admin_keys, kind="admin key")
    middlewares: list[Middleware] = [_observe(metrics)]
    if tracing is not None:
        middlewares.append(tracing.middleware())
    middlewares.append(_report_errors)
    keyless = not settings.api_keys and tenants is None
    if keyless:
        guard = BrowserGuard(() if cors is None else cors.origins, settings.allowed_hosts)
        middlewares.append(guard.middleware())
    if cors is not None:
        middlewares.append(cors.middleware())
    if not keyless:
        keys = Keys(settings.api_keys, kind="API key")
        middlewares.append(_authenticate(keys, tenants, admin_keys, settings.root_path))
    middlewares += [require_json, _enter(gate)]
    if resolver is not None:
        metrics.add(resolver.metrics.families)
        middlewares.append(resolver.middleware())
    app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=middlewares)
    app[LARGE_BODIES] = LargeBodies()
    app[RUNNING] = RunningRequests()
    app[UNKNOWN_FIELDS] = UnknownFields(settings.unknown_fields)
    app.add_routes(api.routes())
    app.router.add_get(_USAGE, _usage(ledger, admin_keys, keyless=keyless))
    app.cleanup_ctx.append(api.responses.lifespan)
    state = None if settings.adapter_state is None else AdapterState(settings.adapter_state)
    admin = AdapterAdmin(engine, models, admin_keys, settings.adapter_roots, state, resolver)
    app.add_routes(admin.routes())
    if resolver is not None:
        app.cleanup_ctx.append(resolver.lifespan)
    if settings.quotas is not None:
        metrics.add(settings.quotas.families)
        app.cleanup_ctx.append(settings.quotas.lifespan)
    if settings.console:
        app.add_routes(Console(settings.root_path).routes())
    if settings.storage is not None:
        access = Access(admin_keys)
        checks: dict[str, Check] = {}
        if settings.batches:
            checks[PURPOSE] = lambda _: (0, 0)  # a batch looks at its lines
        if settings.training is not None:
            # Imported only if needed: the training code takes seconds and memory to import.
            from nybble.server.training.examples import count_examples
            from nybble.server.training.service import Training

            checks["fine-tune"] = count_examples
        storage = Storage(settings.storage, checks)
        metrics.register(FilesCollector(storage.files))
        app.cleanup_ctx.append(storage.lifespan)
        services: list[BatchService | Training] = []
        if settings.training is not None:
            assert settings.model_folder is not None
            training = Training(
                engine,
                settings.training,
                storage,
                base=settings.model_folder,
                models=models,
                owners=owners,
                access=access,
            )
            metrics.register(training.collector)
            services.append(training)
        if settings.batches:
            answers = Answers(api.endpoints, api.generation, app[UNKNOWN_FIELDS], background=True)
            batches = BatchService(
                storage, answers, access, names, tenants, places=engine.max_num_seqs
            )
            metrics.register(batches)
            services.append(batches)
        users = [service.user_of for service in services]
        app.add_routes(FileRoutes(storage.files, access, users).routes())
        for service in services:
            app.add_routes(service.routes())
            app.cleanup_ctx.append(service.lifespan)
    for path, options in _switched_off(settings).items():
        for pattern in (path, path + "/{rest:.*}"):
            app.router.add_route("*", pattern, _tell_of(options))
    app.router.register_resource(OtherSpellings(app.router, settings.root_path))
    app.on_response_prepare.append(_send_record)
    if cors is not None:
        app.on_response_prepare.append(cors.send)
    app.on_response_prepare.append(_send_limits(limits))
    return app


def _switched_off(settings: ServerSettings) -> dict[str, str]:
    """Paths that this server lacks, with the options that give it them."""
    training = settings.storage is not None and settings.training is not None
    batches = settings.storage is not None and settings.batches
    missing = {}
    if not training:
        missing["/v1/fine_tuning/jobs"] = "--fine-tuning"
    if not batches:
        missing["/v1/batches"] = "--batches"
    if not training and not batches:
        missing["/v1/files"] = "--batches or --fine-tuning"
    return missing


def _tell_of(options: str) -> Handler:
    async def refuse(request: web.Request) -> web.StreamResponse:
        raise ApiError(404, f"this server was started without {options}", code="not_found")

    return refuse


def _resolver(engine: Engine, settings: ServerSettings) -> AdapterResolver | None:
    shared = settings.shared_adapters
    if shared is None:
        return None
    return AdapterResolver(
        engine,
        settings.models,
        shared.sources,
        shared.registry,
        AdapterDiskCache(*shared.cache),
        refresh_seconds=shared.refresh_seconds,
    )


def _observe(metrics: Metrics) -> Middleware:
    """Gives each request its id, counts it, and logs it without its content."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get(_REQUEST_ID, "")
        record = RequestRecord(given if _ACCEPTABLE_ID.fullmatch(given) else uuid4().hex)
        request[RECORD] = record
        started = time.monotonic()
        status = _CLIENT_CLOSED
        try:
            response = await handler(request)
            status = response.status
            return response
        except ConnectionError:
            # The client has disconnected. Handle it like aiohttp's cancellation of the handler.
            raise asyncio.CancelledError from None
        finally:
            resource = request.match_info.route.resource
            route = resource.canonical if resource is not None else "unknown"
            if status == _CLIENT_CLOSED and record.cause is None:  # else it was cancelled by its id
                record.cause = "client_closed"
            seconds = time.monotonic() - started
            metrics.answered(request.method, route, status, seconds, record.cause)
            tenant = request.get(TENANT)
            fields = {
                "request_id": record.id,
                "method": request.method,
                "route": route,
                "status": status,
                "seconds": round(seconds, 6),
                "error": record.cause,
                "trace_id": record.trace_id,
                "tenant": None if tenant is None else tenant.name,
                **record.usage_fields(),
                **record.warning_fields(),
            }
            # Load balancers and routers ask many times a second, and rarely is the answer news.
            quiet = route in _PROBES and status == HTTPStatus.OK
            logger.log(logging.DEBUG if quiet else logging.INFO, LogEvent("request", fields))

    return middleware


def _usage(ledger: UsageLedger, admin_keys: Keys, *, keyless: bool) -> Handler:
    """What was used: a tenant sees its own, and an admin key shows all."""

    async def handler(request: web.Request) -> web.StreamResponse:
        tenant, key = request.get(TENANT), bearer(request)
        owner = "" if tenant is None else tenant.name
        sees_all = keyless or (key is not None and admin_keys.hold(key))
        rows = ledger.rows(None if sees_all else owner)
        return json_response({"object": "list", "since": ledger.since, "data": rows})

    return handler


def _takes_admin_key(request: web.Request) -> bool:
    return takes_admin_key(request) or matched_path(request) == _USAGE


async def _send_record(request: web.Request, response: web.StreamResponse) -> None:
    if RECORD in request:
        record = request[RECORD]
        response.headers[_REQUEST_ID] = record.id
        if (warning := record.warning()) is not None:
            response.headers[WARNING] = warning


def _send_limits(limits: Limits) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    async def send(request: web.Request, response: web.StreamResponse) -> None:
        if TENANT in request:
            response.headers.update(limits.headers(request[TENANT]))

    return send


@web.middleware
async def _report_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ConnectionError:
        raise
    except Exception as error:
        anthropic = matched_path(request).startswith("/v1/messages")
        return request[RECORD].failed(error).response(anthropic=anthropic)


def _authenticate(
    keys: Keys, tenants: Tenants | None, admin_keys: Keys, root_path: str
) -> Middleware:
    open_paths = _OPEN_PATHS | {root_path}  # it leads to the page

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        path = matched_path(request)
        # Administration paths check an admin key themselves.
        if path not in open_paths and path not in ADMIN_PATHS:
            key = bearer(request)
            tenant = tenants.find(key) if tenants is not None and key is not None else None
            if tenant is not None:
                request[TENANT] = tenant
            elif key is None or not (
                keys.hold(key) or (_takes_admin_key(request) and admin_keys.hold(key))
            ):
                raise keys.refusal()
        return await handler(request)

    return middleware


def _enter(gate: Gate) -> Middleware:
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.method != "POST":
            return await handler(request)
        with gate.passed():
            return await handler(request)

    return middleware
