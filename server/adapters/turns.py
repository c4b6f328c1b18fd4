"""Locks by name, so that what changes one adapter waits for what changes it already."""

from __future__ import annotations

import threading
from weakref import WeakValueDictionary


class Turns:
    """Safe from any thread. A name's lock lasts as long as somebody has it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._turns: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()

    def of(self, name: str) -> threading.Lock:
        with self._lock:
            return self._turns.setdefault(name, threading.Lock())
