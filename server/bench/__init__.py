"""``nybble bench``: sends load to any OpenAI-compatible server, and reports what it measured."""
