import subprocess
import sys
import threading

import pytest

from kernel_pytorch.cache import CacheStats, LRUCache


def test_the_least_recently_used_entry_leaves_first():
    cache = LRUCache[str, int](2)
    cache.set("a", 1)
    cache.set("b", 2)
    assert cache.get("a") == 1
    cache.set("c", 3)
    assert cache.keys() == ["a", "c"]
    assert "b" not in cache
    assert cache.stats == CacheStats(hits=1, misses=0, evictions=1, size=2, max_size=2)


def test_setting_a_key_again_replaces_its_value_and_renews_it_without_an_eviction():
    cache = LRUCache[str, int](2)
    cache.set("a", 1)
    cache.set("b", 2)
    cache.set("a", 10)
    assert cache.keys() == ["b", "a"]
    assert cache.stats.evictions == 0
    cache.set("c", 3)
    assert cache.keys() == ["a", "c"]
    assert cache.get("a") == 10


def test_counts_and_hit_rate():
    cache = LRUCache[int, int](4)
    assert cache.stats.hit_rate is None
    cache.set(1, 1)
    for key in (1, 1, 1, 2):
        cache.get(key)
    assert (cache.stats.hits, cache.stats.misses) == (3, 1)
    assert cache.stats.hit_rate == 0.75
    cache.reset_stats()
    assert cache.stats == CacheStats(0, 0, 0, size=1, max_size=4)
    assert cache.get(1) == 1


def test_none_is_a_value():
    cache = LRUCache[str, None](2)
    cache.set("a", None)
    other = object()
    assert cache.get("a", other) is None
    assert cache.get("b", other) is other
    assert "a" in cache
    assert cache.stats.hits == 1
    calls = []
    assert cache.get_or_make("a", lambda: calls.append(1)) is None
    assert calls == []


def test_size_zero_keeps_nothing_and_none_keeps_all():
    cache = LRUCache[int, int](0)
    cache.set(1, 1)
    assert cache.get(1) is None
    assert cache.stats == CacheStats(hits=0, misses=1, evictions=0, size=0, max_size=0)
    assert [cache.get_or_make(1, lambda: 7) for _ in range(2)] == [7, 7]
    endless = LRUCache[int, int](None)
    for key in range(1000):
        endless.set(key, key)
    assert len(endless) == 1000
    assert endless.stats.evictions == 0


def test_a_negative_size_is_refused():
    with pytest.raises(ValueError, match="max_size: found -1"):
        LRUCache(-1)


def test_clear_and_pop_are_no_evictions():
    evicted = []
    cache = LRUCache[str, int](2, on_evict=lambda key, value: evicted.append((key, value)))
    cache.set("a", 1)
    cache.set("b", 2)
    assert cache.pop("a") == 1
    assert cache.pop("a", 5) == 5
    cache.clear()
    assert len(cache) == 0
    assert cache.stats == CacheStats(0, 0, 0, size=0, max_size=2)
    assert evicted == []


def test_what_makes_room_is_handed_over_oldest_first():
    evicted = []
    cache = LRUCache[str, int](1, on_evict=lambda key, value: evicted.append((key, value)))
    for key, value in (("a", 1), ("b", 2), ("c", 3)):
        cache.set(key, value)
    assert evicted == [("a", 1), ("b", 2)]
    assert cache.evict() == ("c", 3)
    assert cache.evict() is None
    assert evicted[-1] == ("c", 3)
    assert cache.stats.evictions == 3


def test_an_error_in_make_stores_nothing():
    cache = LRUCache[str, int](2)
    with pytest.raises(ZeroDivisionError):
        cache.get_or_make("a", lambda: 1 // 0)
    assert "a" not in cache
    assert cache.get_or_make("a", lambda: 4) == 4
    assert (cache.stats.hits, cache.stats.misses) == (0, 2)


def test_threads_lose_no_count_and_make_each_value_once():
    cache = LRUCache[int, int](8)
    made: list[int] = []
    num_threads, num_rounds = 8, 2000
    barrier = threading.Barrier(num_threads)

    def make(key: int) -> int:
        made.append(key)
        return key * key

    def work(seed: int) -> None:
        barrier.wait()
        for step in range(num_rounds):
            key = (seed * 7 + step) % 8
            assert cache.get_or_make(key, lambda key=key: make(key)) == key * key

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == list(range(8))
    assert cache.stats == CacheStats(hits=num_threads * num_rounds - 8, misses=8, evictions=0, size=8, max_size=8)


def test_threads_never_see_more_than_max_size_entries():
    cache = LRUCache[int, int](3)
    num_threads, num_rounds = 6, 1500
    sizes: list[int] = []

    def work(seed: int) -> None:
        for step in range(num_rounds):
            cache.set(seed * num_rounds + step, step)
            sizes.append(len(cache))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(sizes) == 3
    assert cache.stats.evictions == num_threads * num_rounds - 3


def test_it_needs_no_torch():
    code = "import sys, kernel_pytorch.cache; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
