"""``python -m nybble.server.replicas.one …``: one server, which ends with the process above it."""

from __future__ import annotations

from nybble.server.cli.main import serve_main
from nybble.server.replicas.last_words import fork_keeper
from nybble.server.replicas.parent import end_with_parent


def main() -> None:
    """Serve until a signal, or until the supervisor is gone."""
    fork_keeper()
    end_with_parent()
    serve_main()


if __name__ == "__main__":
    main()
