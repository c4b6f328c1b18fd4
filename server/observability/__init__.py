"""For operators: logs, metrics, traces, and a record of each request."""
