"""HAProxy's configuration for the replicas of one machine.

Needs HAProxy 2.6 or newer. The directives: https://docs.haproxy.org/2.6/configuration.html.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from nybble.server.adapters.paths import ADMIN_PATHS

# A server takes bodies of 16 MiB, but every connection may hold two buffers of this size.
_BUFFER_BYTES = 1 << 20

_TLS = "ssl-min-ver TLSv1.2 alpn h2,http/1.1"

_TEMPLATE = """\
# HAProxy 2.6 or newer in front of several servers of one model on this machine.
# Written by `nybble replicas --print-config`; run with: haproxy -db -f haproxy.cfg

global
    # A connection takes two; as many as the system allows, up to this.
    fd-hard-limit 20000
    # A request's body must fit, or it is neither sent by its adapter nor tried again.
    tune.bufsize {buffer}
    hard-stop-after 10m
{control}
defaults
    mode http
    # Without this, the chunks of a stream wait for each other.
    option http-no-delay
    option redispatch 1
    retries 3
    timeout connect 2s
    timeout http-request 60s
    timeout http-keep-alive 60s
    timeout queue 60s
    timeout check 3s
    # A long answer may take this long before its first byte, or between two.
    timeout client 1h
    timeout server 1h
    http-error status 503 content-type application/json {unavailable} hdr Retry-After 5

frontend api
    bind {bind}{tls}
    option http-buffer-request
    # Is any server up? No server is asked, so that where they are scaled to none, probes wake none.
    acl asks_health path /health /ping
    acl any_is_up nbsrv(servers) gt 0
    http-request return status 200 content-type application/json {ok} if asks_health any_is_up
    http-request return status 503 content-type application/json {unavailable} \
hdr Retry-After 5 if asks_health
    # This speaks of one server, and would reach any.
    acl scrapes path /metrics
    http-request return status 404 content-type application/json {metrics} if scrapes
{alive}{administration}    default_backend servers

backend servers
    # An adapter's requests meet at one server, where it is in a slot, until that server has 25 %
    # more requests than the mean; then the next one on the circle helps. Requests without an
    # adapter are spread in the same way by the model's name.
    acl names_adapter req.body,json_query('$.adapter') -m found
    acl sends_adapter req.hdr(X-LoRA-Adapter) -m found
    http-request set-var(txn.key) req.body,json_query('$.model')
    http-request set-var(txn.key) req.body,json_query('$.adapter') if names_adapter
    http-request set-var(txn.key) req.hdr(X-LoRA-Adapter) if sends_adapter
    balance hash var(txn.key)
    hash-type consistent sdbm avalanche
    hash-balance-factor 125
    # A server that is stopping or starting answers 503. One that was killed answers nothing.
    # Neither has sent a byte to the client, so that another server can take the request.
    retry-on conn-failure empty-response 503
    option httpchk GET /health
    http-check expect status 200
    # A server that was killed refuses connections, and one that is stopping says so: down within a
    # second. A busy one may take longer to answer. Streams go on to their end.
    default-server check inter 500ms fastinter 200ms fall 2 rise 1
    # The first connection that fails counts as well: the bounded hash would send the next try to
    # the same server, if all others have more than their bound.
    default-server observe layer4 error-limit 1 on-error mark-down
{servers}
"""

_ALIVE = """\
    acl asks_if_alive path {path}
    http-request return status 200 content-type text/plain string success if asks_if_alive
"""

_ADMINISTRATION = """\
    acl administers path {paths}
    acl administers path_beg {every_adapter}/
    http-request return status 501 content-type application/json {error} if administers
"""


def configuration(
    bind: str,
    servers: Sequence[str | None],
    control: str | None = None,
    *,
    shared_registry: bool = False,
    certificate: Path | None = None,
    alive_path: str | None = None,
) -> str:
    """HAProxy's configuration file.

    bind: ``address:port`` for clients.
    servers: ``address:port`` of each server; None for a place which gets one later, by a command.
    control: address of a socket on which HAProxy takes commands.
    shared_registry: whether an adapter loaded at one server is known to all.
    certificate: PEM file for https, with the key or with another file of the same name and
        ``.key`` beside it.
    alive_path: where HAProxy says that it lives, whether or not there are servers.
    """
    # The number is its place on the circle of adapters, whatever its address.
    lines = [
        f"    server replica{i} {server or '127.0.0.1:1'} id {i}{'' if server else ' disabled'}"
        for i, server in enumerate(servers, 1)
    ]
    addresses = ", ".join(f"http://{server}/metrics" for server in servers if server is not None)
    return _TEMPLATE.format(
        buffer=_BUFFER_BYTES,
        bind=bind,
        tls="" if certificate is None else f" ssl crt '{certificate}' {_TLS}",
        control="" if control is None else f"    stats socket {control} mode 600 level admin\n",
        unavailable=_error("no server is ready: try again in 5 s", "unavailable"),
        ok=_string({"status": "ok"}),
        metrics=_error(
            f"each replica has metrics of its own: ask {addresses or 'its own port'}", "not_found"
        ),
        alive="" if alive_path is None else _ALIVE.format(path=alive_path),
        administration="" if shared_registry else _administration_refused(),
        servers="\n".join(lines),
    )


def _administration_refused() -> str:
    load, unload, every_adapter, *_ = ADMIN_PATHS
    error = _error(
        "an adapter loaded at one replica would be unknown to the others: start them with "
        "--lora-registry, a shared place which all of them read",
        "not_supported",
    )
    paths = " ".join((load, unload, every_adapter))
    return _ADMINISTRATION.format(paths=paths, every_adapter=every_adapter, error=error)


def _error(message: str, code: str) -> str:
    kind = "server_error" if code == "unavailable" else "invalid_request_error"
    error = {"message": message, "type": kind, "param": None, "code": code}
    return _string({"error": error})


def _string(body: object) -> str:
    return f"string '{json.dumps(body)}'"
