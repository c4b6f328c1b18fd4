"""What an operator sees: logs, metrics, traces, a record of each request."""
