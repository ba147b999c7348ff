"""LRUCache: the one cache of results that cost a compiler or a device; least recently used entries leave first. Torch-free."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")
_ABSENT = object()


@dataclass(frozen=True)
class CacheStats:
    """Counts since the cache was made or `reset_stats` was called. size: entries held now. max_size: None is without limit."""

    hits: int
    misses: int
    evictions: int
    size: int
    max_size: int | None

    @property
    def hit_rate(self) -> float | None:
        """Share of look-ups that found their key; None before the first one."""
        lookups = self.hits + self.misses
        return self.hits / lookups if lookups else None


class LRUCache(Generic[K, V]):
    """Keeps the `max_size` entries used last; every method may be called from any thread.

    max_size: entries; 0 keeps none, None keeps all. on_evict: called with the key and value of an entry that had to make
    room, while the cache is locked for other threads. Raises ValueError for a negative size.
    `None` is a value like any other: `get` with a default of the caller's own, or `in`, tells it from an absent key.
    """

    def __init__(self, max_size: int | None, *, on_evict: Callable[[K, V], None] | None = None) -> None:
        if max_size is not None and max_size < 0:
            raise ValueError(f"max_size: found {max_size}; allowed 0 or more entries, or None for no limit")
        self.max_size = max_size
        self._on_evict = on_evict
        self._entries: OrderedDict[K, V] = OrderedDict()
        # Re-entrant: what `on_evict` or `make` does may look something up in the same cache.
        self._lock = threading.RLock()
        self._hits = self._misses = self._evictions = 0

    def get(self, key: K, default: V | None = None) -> V | None:
        """The value of `key`, which becomes the one used last; `default` when there is none. Counts a hit or a miss."""
        with self._lock:
            if key not in self._entries:
                self._misses += 1
                return default
            self._hits += 1
            self._entries.move_to_end(key)
            return self._entries[key]

    def set(self, key: K, value: V) -> None:
        """Stores `value` as the one used last, and evicts the least recently used entries beyond `max_size`.

        With a `max_size` of 0 nothing is stored, and nothing counts as evicted."""
        with self._lock:
            if self.max_size == 0:
                return
            self._entries[key] = value
            self._entries.move_to_end(key)
            while self.max_size is not None and len(self._entries) > self.max_size:
                self.evict()

    def get_or_make(self, key: K, make: Callable[[], V]) -> V:
        """The value of `key`; where there is none, that of `make()`, which is stored and called once whatever the threads.

        Other threads wait meanwhile. What `make` raises passes through, and nothing is stored."""
        with self._lock:
            found = self.get(key, _ABSENT)  # pyright: ignore[reportArgumentType]
            if found is not _ABSENT:
                return found  # pyright: ignore[reportReturnType]
            value = make()
            self.set(key, value)
            return value

    def evict(self) -> tuple[K, V] | None:
        """Takes out the least recently used entry and returns it; None when the cache is empty."""
        with self._lock:
            if not self._entries:
                return None
            key, value = self._entries.popitem(last=False)
            self._evictions += 1
            if self._on_evict is not None:
                self._on_evict(key, value)
            return key, value

    def pop(self, key: K, default: V | None = None) -> V | None:
        """Takes out `key` and returns its value, or `default`; neither a look-up nor an eviction."""
        with self._lock:
            return self._entries.pop(key, default)

    def clear(self) -> None:
        """Drops every entry without calling `on_evict`; counts stay."""
        with self._lock:
            self._entries.clear()

    def values(self) -> list[V]:
        """Values in the order of `keys`; not a look-up."""
        with self._lock:
            return list(self._entries.values())

    def keys(self) -> list[K]:
        """Keys as they would be evicted, the least recently used first."""
        with self._lock:
            return list(self._entries)

    @property
    def stats(self) -> CacheStats:
        with self._lock:
            return CacheStats(self._hits, self._misses, self._evictions, len(self._entries), self.max_size)

    def reset_stats(self) -> None:
        """Sets the counts to zero; entries stay."""
        with self._lock:
            self._hits = self._misses = self._evictions = 0

    def __contains__(self, key: object) -> bool:
        with self._lock:
            return key in self._entries

    def __len__(self) -> int:
        with self._lock:
            return len(self._entries)
