"""A server's life: load behind an open port, serve, stop."""
