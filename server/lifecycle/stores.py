"""What a server keeps on disk, tried before the model is loaded."""

from __future__ import annotations

from nybble.server.adapters.disk_cache import AdapterDiskCache
from nybble.server.api.response_store import ResponseStore
from nybble.server.files.database import Database
from nybble.server.lifecycle.settings import ServerSettings


def require_stores(settings: ServerSettings) -> None:
    """Open and close each. Raises OSError and ValueError for one that cannot be used.

    It may be another server's, of a newer format, or in a folder that cannot be written.
    """
    if settings.response_store is not None:
        ResponseStore(*settings.response_store).close()
    if settings.shared_adapters is not None:
        AdapterDiskCache(*settings.shared_adapters.cache).close()
    if settings.storage is not None:
        Database(settings.storage.state).close()
