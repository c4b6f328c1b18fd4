"""From a start to an end: load behind an open port, serve, stop."""
