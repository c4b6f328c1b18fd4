"""``nybble bench``: load on any OpenAI-compatible server, and what came of it."""
