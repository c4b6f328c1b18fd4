"""The OpenAI-compatible HTTP server and the command line; every folder is a layer.

From the bottom: ``http`` (sockets, TLS, CORS, error bodies), ``tenancy`` (keys, tenants, admission)
and ``observability`` (logs, metrics, traces). Above them ``api`` (OpenAI's schema and routes),
``adapters``, ``training`` and ``console``. ``app`` puts these together, ``lifecycle`` loads a model
and serves it, and ``cli`` is the command line. ``bench`` is a load-generating client.
"""
