"""Which adapters are served under which names: gateways and trunks each keep a book and tell each other what is new.

So whoever starts later, or again, learns of what was added while the servers run, as long as one of them is left.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import replace

from moe_ray.core import AdapterEntry, AdapterRef


class AdapterBook:
    """Name → entry. From any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[str, AdapterEntry] = {}
        self.revision = 0
        """Grows with every change."""

    def find(self, name: str) -> AdapterEntry | None:
        """The adapter that is served under a name."""
        entry = self._entries.get(name)
        return None if entry is None or entry.removed else entry

    def served(self) -> list[AdapterEntry]:
        """The adapters that are served, by name."""
        with self._lock:
            entries = list(self._entries.values())
        return sorted((entry for entry in entries if not entry.removed), key=lambda entry: entry.name)

    def all(self) -> list[AdapterEntry]:
        """What another book has to know: what was removed, too."""
        with self._lock:
            return list(self._entries.values())

    def merge(self, entries: Iterable[AdapterEntry]) -> list[AdapterEntry]:
        """Take in what another book has; return the entries that were news."""
        news: list[AdapterEntry] = []
        with self._lock:
            for entry in entries:
                known = self._entries.get(entry.name)
                if known is None or known.version < entry.version:
                    self._entries[entry.name] = entry
                    news.append(entry)
            self.revision += bool(news)
        return news

    def put(self, name: str, adapter: AdapterRef) -> AdapterEntry:
        """Serve an adapter under a name, from now on; return its entry."""
        return self._write(AdapterEntry(name, adapter.adapter_id, adapter.source, time.time_ns()))

    def remove(self, entry: AdapterEntry) -> AdapterEntry:
        """Serve an adapter no longer; return the entry that says so."""
        return self._write(replace(entry, version=time.time_ns(), removed=True))

    def _write(self, entry: AdapterEntry) -> AdapterEntry:
        with self._lock:
            known = self._entries.get(entry.name)
            if known is not None:  # clocks differ: what is written last counts all the same
                entry = replace(entry, version=max(entry.version, known.version + 1))
            self._entries[entry.name] = entry
            self.revision += 1
        return entry
