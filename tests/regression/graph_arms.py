"""One workload of bench_graphs.py in its own process: its arms are built, checked against eager, and timed in turns."""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import random
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from statistics import median
from typing import Any

import torch
from graph_workloads import WORKLOADS, Args, Workload
from time_limit import limit
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

import kernel_pytorch
from kernel_pytorch.choices import GraphDeploymentStrategy
from kernel_pytorch.errors import KernelPyTorchError
from kernel_pytorch.graph import GraphedTrainStep
from kernel_pytorch.schema import GraphConfig
from kernel_pytorch.verify.rows import relative_l2

# May be slower than the best arm by this, beyond the A/A difference, which one repeated arm measures to about NOISE_FLOOR.
ALLOWED_REGRET, NOISE_FLOOR = 0.03, 0.005
# Beside ours: arms whose outputs the next call leaves alone.
KEEPING = ("eager", "compile", "manual, fresh outputs")
STRATEGIES = [strategy.value for strategy in GraphDeploymentStrategy]
# Passes over the ring before an arm counts as settled: compile and record; a strategy that waits for reuse needs its calls.
PEER_PASSES, OUR_PASSES = 4, 24
LATENCY_CALLS, THROUGHPUT_CALLS = 4, 20
MOST_ROUNDS, LEAST_ROUNDS = 200, 5
MIB = 2**20
# Of each of the first losses of a training step to eager's, relative: rounding, amplified by training.
NUM_LOSSES, LOSS_CURVE_TOLERANCE = 16, 2e-2
# What an arm that does not run here may raise; it is then a row of the table.
FAILURES = (KernelPyTorchError, RuntimeError, ValueError, TypeError, AttributeError, ImportError, AssertionError, KeyError, TimeoutError)


@dataclass
class Arm:
    """call: takes the arguments of one call. ring: what it is called with, its own where calls write to it. train: the model that a
    training step trains."""

    name: str
    call: Callable[..., Any]
    ring: list[Args]
    row: dict[str, Any]
    train: nn.Module | None = None
    samples: dict[str, list[float]] = field(default_factory=lambda: {"latency": [], "throughput": []})

    @property
    def ours(self) -> bool:
        return self.name.startswith("ours")


class Captured:
    """A call captured by hand: one graph, or one a shape when `dynamic`, with static copies of all arguments but those `in_place`.

    fresh: outputs are copies; otherwise the next call overwrites them, as a caller who keeps one finds out."""

    def __init__(
        self, call: Callable[..., Any], device: torch.device, workload: Workload, num_warmups: int = 3, fresh: bool = False
    ) -> None:
        self.fresh = fresh
        self.call, self.device, self.workload, self.num_warmups = call, device, workload, num_warmups
        self.pool = torch.cuda.graph_pool_handle()
        # Not on the stream that records: a cuBLAS workspace from there would lie outside the pool, and reduce-overhead gives those back.
        self.warm_up, self.stream = torch.cuda.Stream(), torch.cuda.Stream()
        self.graphs: dict[Any, tuple[torch.cuda.CUDAGraph, list[tuple[int, torch.Tensor]], Any]] = {}

    def __call__(self, *args: Any) -> Any:
        key = tuple(arg.shape for arg in args) if self.workload.dynamic else None
        found = self.graphs.get(key)
        if found is None:
            found = self.graphs[key] = self.capture(args)
        graph, copies, output = found
        for index, static in copies:
            static.copy_(args[index], non_blocking=True)
        graph.replay()
        return tree_map_only(torch.Tensor, torch.Tensor.clone, output) if self.fresh else output

    def capture(self, args: Args) -> tuple[torch.cuda.CUDAGraph, list[tuple[int, torch.Tensor]], Any]:
        fixed = self.workload.in_place
        static = [arg if index in fixed else arg.to(self.device, copy=True) for index, arg in enumerate(args)]
        self.warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.warm_up):
            for _ in range(self.num_warmups):
                self.call(*static)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                output = self.call(*static)
            except RuntimeError:
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                heal()
                raise
            graph.capture_end()
        return graph, [(i, static[i]) for i in range(len(args)) if i not in fixed], output


def heal() -> None:
    """A failed capture leaves the random generator believing that it is captured; one that succeeds sets it free."""
    healing = torch.cuda.CUDAGraph()
    healing.capture_begin(capture_error_mode="thread_local")
    torch.zeros(1, device="cuda")
    healing.capture_end()


_names = itertools.count()


def compiled(model: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
    """torch.compile of a function of its own, so that no arm's guards stand before another's."""

    def forward(*args: Any) -> Any:
        return model(*args)

    own = types.FunctionType(forward.__code__.replace(co_name=f"forward_{next(_names)}"), globals(), None, None, forward.__closure__)
    return torch.compile(own, mode=mode)


class Bench:
    """The arms of one workload. A training step has another set of them, made by `trained`."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.name = options, options.worker
        self.device = torch.device(options.device)
        self.cuda = self.device.type == "cuda"
        torch.manual_seed(0)
        self.workload = WORKLOADS[self.name](self.device, options.tiny)
        self.shared = self.ring(0)
        self.arms: list[Arm] = []
        self.rows: list[dict[str, Any]] = []
        self.num_captures = 0
        facts = {"device": torch.cuda.get_device_name() if self.cuda else "cpu", "torch": torch.__version__, "tiny": options.tiny}
        what = (WORKLOADS[self.name].__doc__ or self.name).split("\n")[0]
        facts["peers_compiled_at_the_same_time"] = options.jobs
        self.record: dict[str, Any] = {"workload": self.name, "what": what, **facts, **self.workload.notes, "arms": self.rows}
        self.count_captures()

    def count_captures(self) -> None:
        """Counts every capture of this process, whoever makes it."""
        if not self.cuda:
            return
        begin = torch.cuda.CUDAGraph.capture_begin

        def counted(graph: Any, *args: Any, **kwargs: Any) -> None:
            self.num_captures += 1
            begin(graph, *args, **kwargs)

        torch.cuda.CUDAGraph.capture_begin = counted

    def ring(self, seed: int) -> list[Args]:
        return self.workload.ring(torch.Generator(self.device).manual_seed(seed))

    def refresh(self, ring: list[Args], seed: int) -> None:
        """Fresh numbers at the same addresses: whoever kept old inputs is found out."""
        for old, new in zip(tree_leaves(ring), tree_leaves(self.ring(seed)), strict=True):
            old.copy_(new)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def write(self) -> None:
        path = self.options.out / f"graphs_{self.name}.json"
        path.write_text(json.dumps(self.record, indent=1, default=str) + "\n", encoding="utf-8")

    def add(self, name: str, build: Callable[[list[Args]], tuple[Callable[..., Any], nn.Module | None]]) -> None:
        """Builds an arm and calls it until it is settled; measures what that takes, in seconds and in memory."""
        words = [word for word in self.options.arms.split(",") if word]
        if words and name not in ("eager", "compile") and not any(word in name for word in words):
            return
        row: dict[str, Any] = {"arm": name}
        self.rows.append(row)
        ring = self.ring(0) if self.workload.mutates else self.shared
        self.refresh(ring, 0)
        passes = OUR_PASSES if name.startswith("ours") else PEER_PASSES
        captures, before = self.num_captures, self.memory()
        began = time.perf_counter()
        try:
            with limit(self.options.arm_seconds):
                call, train = build(ring)
                losses = []
                for args in ring * passes:
                    result = call(*args)
                    if train is not None and len(losses) < NUM_LOSSES:
                        losses.append(float(result))
                    if "first_call_s" not in row:
                        self.wait()
                        row["first_call_s"] = time.perf_counter() - began
                self.wait()
        except FAILURES as error:
            row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self.write()
            return
        row["build_s"] = time.perf_counter() - began
        row["num_captures"] = self.num_captures - captures
        if train is not None:
            row["losses"] = losses
        arm = Arm(name, call, ring, row, train)
        self.arms.append(arm)
        self.measure_memory(arm, before)
        self.write()

    def memory(self) -> dict[str, int]:
        if not self.cuda:
            return {"allocated": 0, "reserved": 0}
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}

    def measure_memory(self, arm: Arm, before: dict[str, int]) -> None:
        """kept: reserved between calls, graphs' pools and static inputs included. max: reserved at most in one pass over the ring."""
        if not self.cuda:
            return
        built = {"peak_allocated": torch.cuda.max_memory_allocated(), "peak_reserved": torch.cuda.max_memory_reserved()}
        after = self.memory()
        for args in arm.ring:
            arm.call(*args)
        self.wait()
        figures = {
            "kept": after["reserved"] - before["reserved"],
            "kept_allocated": after["allocated"] - before["allocated"],
            "max": torch.cuda.max_memory_reserved() - before["reserved"],
            "max_allocated": torch.cuda.max_memory_allocated() - before["allocated"],
            "build_max": built["peak_reserved"] - before["reserved"],
            "build_max_allocated": built["peak_allocated"] - before["allocated"],
        }
        eager = self.rows[0]
        for key, value in figures.items():
            arm.row[f"{key}_mb"] = value / MIB
            arm.row[f"{key}_mb_beyond_eager"] = (value / MIB) - eager[f"{key}_mb"]

    def peers(self) -> None:
        workload = self.workload
        if workload.train_model is not None:
            self.trained()
            return
        model = workload.model
        assert model is not None
        placed = workload.by_hand(model)
        with torch.inference_mode():
            self.add("eager", lambda _: (model, None))
            self.add("compile", lambda _: (compiled(model), None))
            if self.cuda:
                self.add("reduce-overhead", lambda _: (compiled(model, "reduce-overhead"), None))
                self.add("manual eager", lambda _: (Captured(placed, self.device, workload), None))
                self.add("manual compiled", lambda _: (Captured(compiled(placed), self.device, workload), None))
                self.add("manual, fresh outputs", lambda _: (Captured(compiled(placed), self.device, workload, fresh=True), None))

    def optimized(self, args: Args, overrides: list[str]) -> kernel_pytorch.Optimized:
        overrides = ["compile=default", "verify=off", *overrides]
        return kernel_pytorch.optimize(self.workload.model, "eager", args=args, overrides=overrides, measure=False, trained=False)

    def warm_ours(self) -> None:
        """Compiles what ours will compile, into the cache."""
        if self.workload.train_model is None:
            for extra in [[], *self.workload.extra.values()]:
                overrides = [word for word in extra if not word.startswith("graph.")]
                with contextlib.suppress(*FAILURES), limit(self.options.arm_seconds):
                    model = self.optimized(self.shared[0], ["graph=none", *overrides]).model
                    for args in self.ring(0)[:2]:
                        model(*args)

    def ours(self) -> None:
        if self.workload.train_model is not None:
            self.trained_by_us()
            return
        has_strategy = "strategy" in {item.name for item in fields(GraphConfig)}
        arms = {f"ours {name}": [f"graph.strategy={name}"] for name in STRATEGIES} if has_strategy else {"ours": []}
        arms |= {f"ours {name}": extra for name, extra in self.workload.extra.items()}
        for name, overrides in arms.items():
            receipts: list[dict[str, Any]] = []

            def build(ring: list[Args], overrides: list[str] = overrides, receipts: list[Any] = receipts) -> tuple[nn.Module, None]:
                optimized = self.optimized(ring[0], ["graph=auto", *overrides])
                details = [step.details for step in optimized.report.steps if step.group == "graph"]
                receipts += [{key: value for key, value in row.items() if key != "decisions"} for row in details]
                return optimized.model, None

            self.add(name, build)
            if receipts and self.arms[-1].name == name:
                # The receipt's own list has no times: nothing was verified. Its other entries are live.
                self.arms[-1].row |= {"receipt": receipts[0], "decisions": decisions_of(self.arms[-1].call)}
        self.write()

    def stepper(self, model: nn.Module, forward: Callable[..., Any], *, capturable: bool) -> Callable[..., torch.Tensor]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True, capturable=capturable)
        loss_fn = self.workload.loss
        assert loss_fn is not None

        def step(*args: torch.Tensor) -> torch.Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = loss_fn(forward, *args)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    def trained(self) -> None:
        make = self.workload.train_model
        assert make is not None

        def plain(model: nn.Module, mode: str | None = None, *, compile: bool = True) -> tuple[Callable[..., Any], nn.Module]:
            return self.stepper(model, compiled(model, mode) if compile else model, capturable=False), model

        def captured(ring: list[Args], model: nn.Module, *, compile: bool) -> tuple[Callable[..., Any], nn.Module]:
            # The optimizer's state is made in steps before the capture, whose training is then undone.
            step = self.stepper(model, compiled(model) if compile else model, capturable=True)
            return TrainingByHand(step, self.device, self.workload), model

        self.add("eager", lambda _: plain(make(), compile=False))
        self.add("compile", lambda _: plain(make()))
        if self.cuda:
            self.add("reduce-overhead", lambda _: plain(make(), "reduce-overhead"))
            self.add("manual eager", lambda ring: captured(ring, make(), compile=False))
            self.add("manual compiled", lambda ring: captured(ring, make(), compile=True))

    def trained_by_us(self) -> None:
        make, loss_fn = self.workload.train_model, self.workload.loss
        assert make is not None
        assert loss_fn is not None

        def build(compile: bool, strategy: str) -> tuple[Callable[..., Any], nn.Module]:
            model = make()
            forward = compiled(model) if compile else model
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True, capturable=self.cuda)
            step = GraphedTrainStep(model, optimizer, lambda _, *args: loss_fn(forward, *args), strategy=GraphDeploymentStrategy(strategy))
            return step, model

        for strategy in STRATEGIES:
            self.add(f"ours {strategy}", lambda _, strategy=strategy: build(True, strategy))
        self.add("ours eager", lambda _: build(False, "balanced"))
        for arm in self.arms:
            if arm.ours:
                arm.row["decisions"] = getattr(arm.call, "decisions", [])

    def expected(self, arm: Arm, index: int) -> Any:
        """What eager makes of the arm's arguments; of a training step, the loss of the arm's own model before it."""
        if arm.train is None:
            return self.arms[0].call(*self.arms[0].ring[index])
        assert self.workload.loss is not None
        buffers = [(buffer, buffer.clone()) for buffer in arm.train.buffers()]
        with torch.no_grad():
            loss = self.workload.loss(arm.train, *arm.ring[index])
            for buffer, value in buffers:
                buffer.copy_(value)
        return loss

    def check(self, seed: int, *, moved: bool) -> None:
        """Every arm on fresh numbers; moved: at new addresses, which a graph captured by hand around its caches does not serve."""
        first = self.ring(seed) if moved else None
        spread: list[torch.Tensor] = []
        for arm in self.arms:
            if moved and self.workload.in_place and arm.name.startswith("manual"):
                continue
            ring = arm.ring
            if moved:
                arm.ring = self.ring(seed) if self.workload.mutates else first or []
                self.arms[0].ring, kept = (self.ring(seed) if self.workload.mutates else arm.ring), self.arms[0].ring
            else:
                kept = self.arms[0].ring
                self.refresh(arm.ring, seed)
                self.refresh(self.arms[0].ring, seed)
            error = 0.0
            for index in range(len(arm.ring)):
                wanted = [leaf.clone() for leaf in tree_leaves(self.expected(arm, index))]
                if arm is self.arms[0]:
                    spread.append(wanted[0].float())
                try:
                    actual = tree_leaves(arm.call(*arm.ring[index]))
                    self.wait()
                except RuntimeError as failure:
                    # A fault of the device ends the process: say whose it was.
                    where = f"{arm.name}, call {index} on {'moved' if moved else 'fresh'} inputs"
                    raise RuntimeError(f"{where}: {failure}") from failure
                error = max([error, *(relative_l2(a, w) for a, w in zip(actual, wanted, strict=True))])
            for index in self.workload.mutates:
                pairs = zip(tree_leaves(arm.ring[0][index]), tree_leaves(self.arms[0].ring[0][index]), strict=True)
                error = max([error, *(relative_l2(a, w) for a, w in pairs)])
            self.arms[0].ring = kept
            arm.ring = ring
            arm.row["error"] = max(arm.row.get("error", 0.0), error)
            if not error <= self.workload.tolerance:
                arm.row["wrong"] = f"off by {error:.1e} on {'moved' if moved else 'fresh'} inputs, {self.workload.tolerance:.0e} allowed"
        alike = [relative_l2(a, b) for a, b in itertools.pairwise(spread) if a.shape == b.shape]
        assert max(alike, default=1.0) > 3 * self.workload.tolerance, f"outputs are too alike to tell stale ones: {alike}"

    def check_training(self) -> None:
        """The losses of the first steps, all from one start, follow eager's."""
        for arm in self.arms:
            if arm.train is None:
                return
            wanted = self.rows[0]["losses"]
            pairs = zip(arm.row["losses"], wanted, strict=False)
            error = max(abs(actual - expected) / max(abs(expected), 0.1) for actual, expected in pairs)
            arm.row["loss_curve_error"] = error
            if not error <= LOSS_CURVE_TOLERANCE:
                arm.row["wrong"] = f"its losses leave eager's by {error:.1e}"

    def run_calls(self, arm: Arm, num_calls: int, *, wait_each: bool) -> float:
        """Seconds a call, from an idle device."""
        calls = arm.ring * (num_calls // len(arm.ring))
        self.wait()
        began = time.perf_counter()
        for args in calls:
            arm.call(*args)
            if wait_each:
                self.wait()
        self.wait()
        return (time.perf_counter() - began) / len(calls)

    def time(self) -> None:
        arms = list(self.arms)
        compile_arm = next((arm for arm in arms if arm.name == "compile"), arms[0])
        again = Arm("compile A/A", compile_arm.call, compile_arm.ring, {"arm": "compile A/A"}, compile_arm.train)
        arms.append(again)
        self.rows.append(again.row)
        few, many = (-(-calls // len(self.shared)) * len(self.shared) for calls in (LATENCY_CALLS, THROUGHPUT_CALLS))
        order = random.Random(0)
        gc.collect()
        gc.disable()
        deadline, rounds = time.monotonic() + self.options.seconds * len(arms), 0
        while rounds < MOST_ROUNDS and (rounds < LEAST_ROUNDS or time.monotonic() < deadline):
            # Not the same neighbour in every round, and caches as an arm of its own would find them.
            for arm in order.sample(arms, len(arms)):
                self.run_calls(arm, few, wait_each=True)
                arm.samples["latency"].append(self.run_calls(arm, few, wait_each=True))
                arm.samples["throughput"].append(self.run_calls(arm, many, wait_each=False))
            rounds += 1
        gc.enable()
        self.record["rounds"] = rounds
        for arm in arms:
            for kind, samples in arm.samples.items():
                ordered = sorted(value * 1e6 for value in samples)
                arm.row[f"{kind}_us"] = median(ordered)
                arm.row[f"{kind}_range_us"] = [ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]]
        self.record["noise"] = {kind: again.row[f"{kind}_us"] / compile_arm.row[f"{kind}_us"] for kind in again.samples}
        self.write()

    def judge(self) -> None:
        """Regret: over the fastest arm that is right, and over the fastest whose outputs stay. conservative is held to torch.compile, the
        others to the best arm."""
        timed = [row for row in self.rows if "latency_us" in row]
        for row in timed:
            if "wrong" in row:
                row["verdict"] = f"WRONG: {row['wrong']}"
        right = [row for row in timed if "wrong" not in row and row["arm"] != "compile A/A"]
        compile_row = next((row for row in right if row["arm"] == "compile"), None)
        for kind in ("latency", "throughput"):
            best = min(right, key=lambda row, kind=kind: row[f"{kind}_us"], default=None)
            if best is None:
                return
            self.record[f"best_{kind}"] = best["arm"]
            # Of arms whose outputs the next call leaves alone, as ours.
            keeping = [row for row in right if row["arm"] in KEEPING or row["arm"].startswith("ours")]
            least = min(row[f"{kind}_us"] for row in keeping) if keeping else best[f"{kind}_us"]
            for row in timed:
                row[f"{kind}_regret"] = row[f"{kind}_us"] / best[f"{kind}_us"]
                row[f"{kind}_regret_keeping"] = row[f"{kind}_us"] / least
        noise = {kind: max(NOISE_FLOOR, abs(value - 1)) for kind, value in self.record["noise"].items()}
        for row in right:
            if not row["arm"].startswith("ours"):
                continue
            missed = []
            for kind in ("latency", "throughput"):
                if row["arm"] == "ours conservative" and compile_row is not None:
                    lost = row[f"{kind}_us"] / compile_row[f"{kind}_us"] - 1
                    allowed = noise[kind]
                else:
                    lost, allowed = row[f"{kind}_regret"] - 1, ALLOWED_REGRET + noise[kind]
                if lost > allowed:
                    missed.append(f"{kind} {lost:+.1%} of {allowed:.1%}")
            row["verdict"] = f"missed: {', '.join(missed)}" if missed else "held"


class TrainingByHand(Captured):
    """Captures a whole training step, after as many plain steps as its calls before the capture: training is as it would be."""

    def __init__(self, step: Callable[..., Any], device: torch.device, workload: Workload) -> None:
        super().__init__(step, device, workload, num_warmups=0)
        self.num_plain = 0

    def __call__(self, *args: Any) -> Any:
        if self.num_plain < 4:
            self.num_plain += 1
            self.warm_up.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.warm_up):
                loss = self.call(*args)
            torch.cuda.current_stream().wait_stream(self.warm_up)
            return loss
        return super().__call__(*args)


def decisions_of(call: Any) -> Any:
    """The graph step's live list of decisions, wherever the optimized model keeps it."""
    seen: set[int] = set()
    queue = [getattr(call, "_compiled_call_impl", None)]
    while queue:
        item = queue.pop(0)
        if item is None or id(item) in seen or len(seen) > 500:
            continue
        seen.add(id(item))
        found = getattr(item, "decisions", None)
        if isinstance(found, list):
            return found
        queue += [cell.cell_contents for cell in getattr(item, "__closure__", None) or ()]
        if type(item).__module__.startswith("kernel_pytorch.graph"):
            queue += list(getattr(item, "__dict__", {}).values())
    return []


def work(options: argparse.Namespace) -> None:
    torch._dynamo.config.recompile_limit = 64
    bench = Bench(options)
    bench.write()
    bench.peers()
    if options.warm or bench.cuda:
        bench.warm_ours()
    (options.out / f"{options.worker}.ready").write_text("", encoding="utf-8")
    if options.warm or not sys.stdin.readline():
        return
    bench.ours()
    with contextlib.nullcontext() if bench.workload.train_model else torch.inference_mode():
        bench.check_training()
        bench.check(1, moved=False)
        bench.time()
        bench.check(2, moved=False)
        bench.check(3, moved=True)
    bench.judge()
    bench.record["complete"] = True
    bench.write()
