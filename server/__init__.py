"""The OpenAI-compatible HTTP server and the command line, a folder a layer.

From below: ``http`` (sockets, TLS, CORS, error bodies), ``tenancy`` (keys, tenants, admission),
``observability`` (logs, metrics, traces); on them ``api`` (OpenAI's schema and
routes), ``adapters``, ``training``, ``console``; ``app`` puts them together, ``lifecycle`` loads a
model and serves it, and ``cli`` is the command line. ``bench`` is a client.
"""
