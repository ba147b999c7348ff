"""Search for the fastest configuration of a kernel for few rows on this GPU: candidates, then neighbours of the best, then a final.

Processes compile, one process times; each timing is a CUDA graph over copies of the weight that exceed L2 together.

N out features, K in features, M rows.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib
import itertools
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.compiler.errors import CompilationError as TritonCompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from kernel_pytorch.errors import CompilationError

# What Triton or the GPU says of a configuration it cannot run; a failed pass of its compiler is a plain RuntimeError.
REFUSED = (OutOfResources, PTXASError, TritonCompilationError, RuntimeError)
ROTATED_BYTES = 240_000_000
LAUNCHES = 32
FINAL_ROUNDS = 11
# Shares of the time at which the first and the second compilation end.
FIRST, SECOND = 0.5, 0.8
CROSSOVER_ROWS = (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)

Key = tuple[int, int, int]
Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Space:
    """What the search has to know of one kernel. A config is a frozen dataclass; `stored` is what the kernel reads of one weight.

    candidates: (m, n, k, device) -> configs to begin with, first the one in use. neighbours: (config, m, n, k, device) -> near ones.
    variant: (config, m, n, k) -> equal for calls that run the same compiled code. store: weight [N, K] on the GPU -> stored, a
    tuple of tensors. launch: (x, stored, config) -> y. reference: (x, stored) -> y in x's dtype, float64 too.
    against: name -> stored -> x -> y, the roads that take over at many rows."""

    candidates: Callable[[int, int, int, torch.device], list[Any]]
    neighbours: Callable[[Any, int, int, int, torch.device], list[Any]]
    variant: Callable[[Any, int, int, int], Hashable]
    store: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
    launch: Callable[[torch.Tensor, tuple[torch.Tensor, ...], Any], torch.Tensor]
    reference: Callable[[torch.Tensor, tuple[torch.Tensor, ...]], torch.Tensor]
    against: Mapping[str, Callable[[tuple[torch.Tensor, ...]], Callable[[torch.Tensor], torch.Tensor]]]
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Result:
    """us, before: median of one launch, of the chosen configuration and of the one in use so far.
    error, low: relative L2 error against float64, of the kernel and of the reference in x's dtype."""

    n: int
    k: int
    m: int
    config: Any
    us: float
    before: float
    error: float
    low: float


def space(name: str) -> Space:
    """ "skinny_w8a16:SPACE" -> SPACE of kernels/skinny_w8a16_space.py."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(f"kernel_pytorch.kernels.{module}_space"), attribute or "SPACE")


def launches(calls: Sequence[Call]) -> int:
    return max(LAUNCHES, len(calls))


@functools.cache
def _capture_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def graph_of(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """The calls in turn, LAUNCHES of them at least; each kernel must be compiled. torch.cuda.graph would empty the allocator's cache,
    which takes longer than a measurement."""
    graph, stream = torch.cuda.CUDAGraph(), _capture_stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for call in itertools.islice(itertools.cycle(calls), launches(calls)):
                call()
        finally:
            graph.capture_end()
    return graph


def replay_us(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds of one replay; a replay goes before it, so that the GPU does not wait for the host."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def coarse_us(calls: Sequence[Call], rounds: int = 3) -> float:
    """Least of a few replays, microseconds a launch."""
    calls[0]()
    graph = graph_of(calls)
    return min(replay_us(graph) for _ in range(rounds)) / launches(calls)


def interleaved_us(arms: Mapping[Any, Sequence[Call]], rounds: int = FINAL_ROUNDS) -> dict[Any, list[float]]:
    """Microseconds a launch, each round of each arm, arms in turn."""
    for calls in arms.values():
        calls[0]()
    graphs = {name: graph_of(calls) for name, calls in arms.items()}
    times: dict[Any, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, graph in graphs.items():
            times[name].append(replay_us(graph) / launches(arms[name]))
    return times


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


def compile_pool(processes: int | None = None) -> ProcessPoolExecutor:
    """Processes that compile; they share Triton's cache on disk with this one."""
    count = processes or max(1, min(14, (os.cpu_count() or 2) - 2))
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


@functools.cache
def _small(name: str, n: int, k: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    return space(name).store(torch.zeros(n, k, device=device, dtype=torch.bfloat16))


def _compile(name: str, config: Any, m: int, n: int, k: int, device: torch.device) -> bool:
    """In a process of the pool: few rows of the weight, N of the same divisibility."""
    chosen = space(name)
    x = torch.zeros(m, k, device=device, dtype=chosen.dtype)
    try:
        # The copy waits for the kernel: a fault shows here.
        chosen.launch(x, _small(name, min(n, 256 + n % 16), k, device), config).cpu()
    except REFUSED:
        return False
    return True


class Search:
    """One search over (N, K, M) keys within `seconds`; what was not compiled in time is not tried.

    name: of the space, by which processes of the pool find it. searched: another space for this process alone."""

    def __init__(
        self,
        name: str,
        keys: Iterable[Key],
        seconds: float,
        pool: ProcessPoolExecutor,
        say: Callable[[str], None],
        searched: Space | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.name, self.space, self.keys, self.pool, self.say = name, searched or space(name), list(keys), pool, say
        self.began, self.seconds = time.monotonic(), seconds
        self.device = device or torch.device("cuda", torch.cuda.current_device())
        self.times: dict[Key, dict[Any, float]] = {key: {} for key in self.keys}
        self.compiled: dict[Hashable, bool] = {}
        self._weights: tuple[tuple[int, int], list[tuple[torch.Tensor, ...]]] | None = None

    def run(self, meanwhile: Callable[[], None] = lambda: None) -> list[Result]:
        """meanwhile: called once while the first configurations compile. Raises CompilationError where none is right."""
        first = {(n, k, m): self.space.candidates(m, n, k, self.device) for n, k, m in self.keys}
        self._compile(first, FIRST, meanwhile)
        self._time(first)
        near = {key: self._near(*key) for key in self.keys}
        if any(near.values()):
            self._compile(near, SECOND)
            self._time(near)
        return [self._final(*key) for key in self.keys]

    def _near(self, n: int, k: int, m: int) -> list[Any]:
        times = self.times[n, k, m]
        best = sorted(times, key=times.__getitem__)[:3]
        found = (config for good in best for config in self.space.neighbours(good, m, n, k, self.device))
        return [config for config in dict.fromkeys(found) if config not in times]

    def _compile(self, wanted: dict[Key, list[Any]], share: float, meanwhile: Callable[[], None] = lambda: None) -> None:
        futures = {}
        # Configurations of all keys in turn: where time ends early, each key has its first ones.
        for row in itertools.zip_longest(*([(key, config) for config in configs] for key, configs in wanted.items())):
            for (n, k, m), config in filter(None, row):
                variant = self.space.variant(config, m, n, k)
                if variant not in self.compiled and variant not in futures:
                    futures[variant] = self.pool.submit(_compile, self.name, config, m, n, k, self.device)
        meanwhile()
        done, late = wait(futures.values(), max(1.0, self.began + share * self.seconds - time.monotonic()))
        for future in late:
            future.cancel()
        self.compiled |= {variant: future.result() for variant, future in futures.items() if future in done}
        refused = sum(not self.compiled[variant] for variant in futures if variant in self.compiled)
        self.say(f"{time.monotonic() - self.began:4.0f} s  {len(done)} kernels compiled, {refused} refused, {len(late)} left out")

    def _time(self, wanted: dict[Key, list[Any]]) -> None:
        for n, k, m in sorted(wanted):
            weights, x = self.weights(n, k), torch.randn(m, k, device=self.device, dtype=self.space.dtype)
            for config in wanted[n, k, m]:
                if self.compiled.get(self.space.variant(config, m, n, k)) and config not in self.times[n, k, m]:
                    self.times[n, k, m][config] = coarse_us(self.calls(x, weights, config))
        self.say(f"{time.monotonic() - self.began:4.0f} s  {sum(map(len, self.times.values()))} timings")

    def weights(self, n: int, k: int) -> list[tuple[torch.Tensor, ...]]:
        """Enough stored weights that a rotation does not fit L2. Those of one layer are kept."""
        if self._weights is None or self._weights[0] != (n, k):
            self._weights = None
            torch.manual_seed(0)
            first = self.space.store(torch.randn(n, k, device=self.device, dtype=torch.bfloat16) * 0.02)
            copies = max(3, -(-ROTATED_BYTES // sum(part.nbytes for part in first)))
            self._weights = (n, k), [first, *(tuple(part.clone() for part in first) for _ in range(copies - 1))]
        return self._weights[1]

    def calls(self, x: torch.Tensor, weights: Sequence[tuple[torch.Tensor, ...]], config: Any) -> list[Call]:
        return [functools.partial(self.space.launch, x, stored, config) for stored in weights]

    def _final(self, n: int, k: int, m: int) -> Result:
        """The best few and the one in use, interleaved: the fastest that is right."""
        times, before = self.times[n, k, m], self.space.candidates(m, n, k, self.device)[0]
        # The one in use may come from another version, which ran what this one does not.
        best = dict.fromkeys([*([before] if before in times else []), *sorted(times, key=times.__getitem__)[:4]])
        weights, x = self.weights(n, k), torch.randn(m, k, device=self.device, dtype=self.space.dtype)
        exact = self.space.reference(x.double(), weights[0])
        low = relative_error(self.space.reference(x, weights[0]), exact)
        rounds = interleaved_us({config: self.calls(x, weights, config) for config in best})
        medians = {config: statistics.median(us) for config, us in rounds.items()}
        for config in sorted(medians, key=medians.__getitem__):
            error = relative_error(self.space.launch(x, weights[0], config), exact)
            if error <= 2 * low:
                return Result(n, k, m, config, medians[config], medians.get(before, math.nan), error, low)
            self.say(f"{n}x{k} M={m}: {config} is wrong, error {error:.2e}, reference {low:.2e}")
        raise CompilationError(f"{self.name}: no configuration computes {n}x{k} at M={m} right")

    def crossovers(self, n: int, k: int, configs: Mapping[int, Any]) -> list[dict[str, Any]]:
        """For each road of `against`: the most rows at which the kernel is no slower, up to the last of CROSSOVER_ROWS.

        configs: by M; above the last M its configuration serves. Raises ValueError without one."""
        if not configs:
            raise ValueError("crossovers: no configuration given")
        weights, found = self.weights(n, k), []
        for against, make in self.space.against.items():
            roads, most, rows = [make(stored) for stored in weights], 0, {}
            for m in CROSSOVER_ROWS:
                x = torch.randn(m, k, device=self.device, dtype=self.space.dtype)
                config = configs[min((known for known in configs if known >= m), default=max(configs))]
                arms = {"ours": self.calls(x, weights, config), "other": [functools.partial(road, x) for road in roads]}
                ours, other = (statistics.median(us) for us in interleaved_us(arms, 5).values())
                rows[m] = (round(ours, 2), round(other, 2))
                if ours > other:
                    break
                most = m
            found.append({"n": n, "k": k, "against": against, "m": most, "us": rows})
        return found


def measured(kernel: str, layers: Sequence[tuple[int, int]], seconds: float, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """The table of one kernel for layers (N, K) on the current GPU, as `tables.read` gives it, with what it was measured on: once
    its configurations are found, and again with the crossovers.

    seconds: of the search; the crossovers come after it, about five seconds a layer. Raises CompilationError where nothing is right."""
    rows = importlib.import_module(f"kernel_pytorch.kernels.{kernel}").TUNED_ROWS
    with compile_pool() as pool:
        search = Search(kernel, [(n, k, m) for n, k in layers for m in rows], seconds, pool, say)
        results = search.run()
    for r in results:
        say(f"{r.n}x{r.k} M={r.m}: {r.us:.2f} us, before {r.before:.2f}")
    configs = [{"n": r.n, "k": r.k, "m": r.m, "us": round(r.us, 2), "config": dataclasses.asdict(r.config)} for r in results]
    gpu, date = torch.cuda.get_device_name(), str(datetime.date.today())
    table = {"kernel": kernel, "gpu": gpu, "torch": torch.__version__, "triton": triton.__version__, "date": date, "configs": configs}
    yield table | {"crossover": []}
    crossover = []
    for n, k in layers:
        found = search.crossovers(n, k, {r.m: r.config for r in results if (r.n, r.k) == (n, k)})
        crossover += found
        say(f"{n}x{k} no slower up to M: " + ", ".join(f"{row['m']} than {row['against']}" for row in found))
    yield table | {"crossover": crossover}
