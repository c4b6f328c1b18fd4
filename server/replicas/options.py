"""Options of `nybble serve` that servers behind one HAProxy cannot have."""

from __future__ import annotations

# Which would be different for each server, or whose state servers cannot share; what to do instead.
NOT_FOR_REPLICAS = {
    "uds": "the servers listen on ports, for HAProxy",
    "ssl-certfile": "HAProxy ends TLS, by --ssl-certfile on the command line of `nybble replicas`, "
    "or by ssl_certfile of Ray's balancer",
    "root-path": "let HAProxy remove the prefix (`http-request replace-path`)",
    "fine-tuning": "run jobs on one server by itself (`nybble serve --fine-tuning`)",
    "batches": "run batches on one server by itself (`nybble serve --batches`)",
    "state-dir": "run jobs on one server by itself (`nybble serve --state-dir`)",
    "response-store": "keep responses on one server by itself (`nybble serve --response-store`)",
    "lora-state": "the servers share what --lora-registry or --lora-watch has",
    "lora-cache-dir": "each server has one of its own, below XDG_CACHE_HOME",
}
