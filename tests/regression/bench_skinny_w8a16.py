"""Benchmark of kernels/skinny_w8a16 against cuBLAS, torchao and gemlite on one CUDA device.

python bench_skinny_w8a16.py OUT.json [SECONDS] [PEERS] [LAYERS]

SECONDS: for all of it, 140. PEERS: names of PEERS below, comma-separated; all without it, none for an empty string. LAYERS: of qkv, o,
gate_up, down; all without it. What does not compile in its share of the time is dropped and named.

Each arm is a CUDA graph over copies of its weight that exceed L2 together; arms replay in turn, medians are reported, and ours runs
twice (A/A). One process a layer measures, one at a time; others fill the compilers' caches for it before. A wrong result of ours ends
the run.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.multiprocessing as mp
from alone import holding, time_alone
from torch.nn.functional import linear

from kernel_pytorch.kernels import skinny_w8a16 as op
from kernel_pytorch.kernels import tune
from kernel_pytorch.precision.quantized_linear import QuantizedLinear
from kernel_pytorch.schema import ActivationConfig, ActivationMode, WeightConfig

DEVICE, DTYPE = "cuda", torch.bfloat16
SECONDS = 140.0
# Shares of the time at which the caches must be full and the last arm is built.
WARM, BUILT = 0.6, 0.8
FAILED = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)
NAMES = dict(zip(op.LLAMA, ("qkv", "o", "gate_up", "down"), strict=True))
FP8 = "float8_e4m3fn"

Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Arm:
    """prepare: bf16 weight -> what is kept of it. calls: (kept, x) -> a call for each. rows: values of M.
    warm: values of M that another process compiles first, a tuple for each process; without one it compiles where it is measured."""

    prepare: Callable[[torch.Tensor], Any]
    calls: Callable[[list[Any], torch.Tensor], list[Call]]
    rows: tuple[int, ...] = op.ROWS
    warm: tuple[tuple[int, ...], ...] = ()


def quantize(fmt: str, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = w.float().abs().amax(1) / (127 if fmt == "int8" else 448)
    scaled = w.float() / scale[:, None]
    return (scaled.round() if fmt == "int8" else scaled).to(op.DTYPES[fmt]), scale


def pack(fmt: str, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scale = quantize(fmt, w)
    return op.pack(codes), scale


def ours(fmt: str, kept: list[Any], x: torch.Tensor) -> list[Call]:
    return [functools.partial(op.linear, x, packed, scale, format=fmt) for packed, scale in kept]


def dynamic_layer(w: torch.Tensor) -> QuantizedLinear:
    codes, scale = quantize(FP8, w)
    scheme = WeightConfig(format=FP8), ActivationConfig(mode=ActivationMode.dynamic, format=FP8)
    return QuantizedLinear.from_stored({"weight": codes, "weight_scale": scale}, None, (w.shape[0], w.shape[1]), *scheme)


def ours_dynamic(kept: list[Any], x: torch.Tensor) -> list[Call]:
    """The library's layer of the dynamic scheme, compiled: it chooses its road, and quantizes x."""
    compiled = torch.compile(lambda layer, x: layer(x), dynamic=False)
    return [functools.partial(compiled, layer, x) for layer in kept]


def cublas(kept: list[Any], x: torch.Tensor) -> list[Call]:
    return [functools.partial(linear, x, w) for w in kept]


def torchao_weight(config: str, w: torch.Tensor) -> torch.Tensor:
    ao = importlib.import_module("torchao.quantization")
    options = {"granularity": ao.PerRow()} if "Dynamic" in config else {}
    module = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta", dtype=w.dtype)
    module.weight = torch.nn.Parameter(w.clone(), requires_grad=False)
    ao.quantize_(module, getattr(ao, config)(**options))
    return module.weight


def compiled_linear(kept: list[Any], x: torch.Tensor) -> list[Call]:
    compiled = torch.compile(lambda x, w: linear(x, w), dynamic=False)
    return [functools.partial(compiled, x, w) for w in kept]


def weight_only(kept: list[Any], x: torch.Tensor) -> list[Call]:
    """One row is a product of matrix and vector that only the autotuning mode fuses; more rows dequantize first in any mode."""
    mode = "max-autotune-no-cudagraphs" if x.shape[0] == 1 else None
    compiled = torch.compile(lambda x, w: linear(x, w), mode=mode, dynamic=False)
    return [functools.partial(compiled, x, w) for w in kept]


def gemlite_layer(w: torch.Tensor) -> Any:
    return importlib.import_module("gemlite").helper.A16W8_FP8(device=f"{DEVICE}:0", dtype=DTYPE).from_weights(w.clone())


def gemlite(kept: list[Any], x: torch.Tensor) -> list[Call]:
    """Tuned as by default, "fast": 12 configurations for one row, 22 above."""
    return [functools.partial(layer, x) for layer in kept]


_PACK_FP8 = functools.partial(pack, FP8)
OURS = {
    "ours fp8": Arm(_PACK_FP8, functools.partial(ours, FP8), warm=(op.ROWS,)),
    "ours fp8 A/A": Arm(_PACK_FP8, functools.partial(ours, FP8)),
    "ours int8": Arm(functools.partial(pack, "int8"), functools.partial(ours, "int8"), warm=(op.ROWS,)),
    "bf16 cuBLAS": Arm(lambda w: w, cublas),
}
PEERS = {
    "torchao fp8 dynamic": Arm(functools.partial(torchao_weight, "Float8DynamicActivationFloat8WeightConfig"), compiled_linear),
    "torchao fp8wo": Arm(functools.partial(torchao_weight, "Float8WeightOnlyConfig"), weight_only, (1, 8), ((1, 8),)),
    "torchao int8wo": Arm(functools.partial(torchao_weight, "Int8WeightOnlyConfig"), weight_only, (1,), ((1,),)),
    "gemlite fp8": Arm(gemlite_layer, gemlite, (1, 8, 32), ((1,), (8,), (32,))),
    "ours fp8 dynamic": Arm(dynamic_layer, ours_dynamic, (8, 32, 64)),
}
ARMS = OURS | PEERS


@dataclass(frozen=True)
class Shared:
    """What the processes share. began, deadline: as time.time() says. folder: of the caches. warmed: by (layer, arm, M), an empty
    string or what went wrong."""

    began: float
    deadline: float
    folder: str
    built: Any
    warmed: Any
    rows: Any
    dropped: Any

    def at(self, share: float) -> float:
        return self.began + share * (self.deadline - self.began)

    def gpu(self) -> AbstractContextManager[None]:
        return holding(os.path.join(self.folder, "gpu"))

    def drop(self, shape: tuple[int, int], m: int, arm: str, why: object) -> None:
        reason = f"{type(why).__name__} {str(why)[:200]}" if isinstance(why, Exception) else str(why)
        self.dropped.append({"layer": NAMES[shape], "m": m, "arm": arm, "why": reason})

    def say(self, text: str) -> None:
        print(f"[{time.time() - self.began:4.0f}] {text}", flush=True)


def start(shared: Shared, only_compile: bool) -> None:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 32
    time_alone(shared.gpu, only_compile)


def warm(shape: tuple[int, int], wanted: list[tuple[str, tuple[int, ...]]], shared: Shared) -> None:
    start(shared, only_compile=True)
    n, k = shape
    w = torch.randn(n, k, device=DEVICE, dtype=DTYPE) * 0.02
    for name, rows in wanted:
        for m in rows:
            error = ""
            try:
                ARMS[name].calls([ARMS[name].prepare(w)], torch.randn(m, k, device=DEVICE, dtype=DTYPE))[0]()
            except FAILED as wrong:
                error = f"{type(wrong).__name__} {str(wrong)[:200]}"
            shared.warmed[NAMES[shape], name, m] = error


def checked(x: torch.Tensor, w: torch.Tensor, fmt: str) -> float:
    """Relative L2 error of ours against float64."""
    codes, scale = quantize(fmt, w)
    exact = op.reference(x.double(), codes, scale)
    error = tune.relative_error(op.linear(x, op.pack(codes), scale, format=fmt), exact)
    low = tune.relative_error(op.reference(x, codes, scale), exact)
    if not error <= 2 * low:
        raise SystemExit(f"wrong result: {fmt} {tuple(w.shape)} M={x.shape[0]}: error {error:.2e}, reference {low:.2e}")
    return error


def build(shape: tuple[int, int], dense: list[torch.Tensor], wanted: list[str], shared: Shared) -> dict[int, dict[str, list[Call]]]:
    """Arms by M, those first that no other process compiles."""
    layer = NAMES[shape]
    rows = {m: torch.randn(m, shape[1], device=DEVICE, dtype=DTYPE) for m in op.ROWS}
    arms: dict[int, dict[str, list[Call]]] = {m: {} for m in op.ROWS}
    kept: dict[Any, list[Any]] = {}
    for name in sorted(wanted, key=lambda name: bool(ARMS[name].warm)):
        arm = ARMS[name]
        for m in arm.rows:
            key = (layer, name, m)
            while arm.warm and key not in shared.warmed and time.time() < shared.at(WARM):
                time.sleep(0.1)
            why = shared.warmed.get(key, "not compiled in time") if arm.warm else ""
            if why or time.time() > shared.at(BUILT):
                shared.drop(shape, m, name, why or "no time left to build it")
                continue
            try:
                if arm.prepare not in kept:
                    kept[arm.prepare] = [arm.prepare(w) for w in dense]
                calls = arm.calls(kept[arm.prepare], rows[m])
                for call in calls[:2]:
                    call()
                arms[m][name] = calls
            except FAILED as wrong:
                shared.drop(shape, m, name, wrong)
    return arms


def measure(arms: dict[str, list[Call]], drop: Callable[[str, object], None]) -> dict[str, float]:
    """Microseconds a call, medians over rounds in which the arms take turns."""
    graphs = {}
    for name, calls in arms.items():
        try:
            graphs[name] = tune.graph_of(calls)
        except FAILED as wrong:
            drop(name, wrong)
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(tune.FINAL_ROUNDS):
        for name, graph in graphs.items():
            times[name].append(tune.replay_us(graph) / tune.launches(arms[name]))
    return {name: round(statistics.median(us), 2) for name, us in times.items()}


def report(shape: tuple[int, int], m: int, us: dict[str, float]) -> dict[str, Any]:
    """One row of the result. best: the fastest that is not ours. noise: between the two arms of ours."""
    peers = {name: value for name, value in us.items() if not name.startswith("ours")}
    best = min(peers, key=peers.__getitem__)
    mine = us["ours fp8"]
    row = {"layer": NAMES[shape], "n": shape[0], "k": shape[1], "m": m, "us": us, "best_peer": best}
    row["ours_over_best"] = round(mine / us[best], 3)
    row["noise"] = round(us["ours fp8 A/A"] / mine - 1, 3)
    row["terabytes_per_s"] = round(shape[0] * shape[1] / mine / 1e6, 2)
    return row


def line(row: dict[str, Any]) -> str:
    us = row["us"]
    shown = f"{row['layer']:8} M={row['m']:2d} ours {us['ours fp8']:6.2f} (A/A {row['noise']:+.1%}) {row['terabytes_per_s']:.2f} TB/s"
    shown += f", best {us[row['best_peer']]:6.2f} {row['best_peer']}, ratio {row['ours_over_best']:.2f}"
    rest = {name: value for name, value in us.items() if name not in ("ours fp8", "ours fp8 A/A", row["best_peer"])}
    return shown + " | " + ", ".join(f"{name} {value:.2f}" for name, value in rest.items())


def layer(shape: tuple[int, int], wanted: list[str], shared: Shared) -> None:
    start(shared, only_compile=False)
    n, k = shape
    copies = max(3, -(-tune.ROTATED_BYTES // (n * k)))
    dense = [torch.randn(n, k, device=DEVICE, dtype=DTYPE) * 0.02 for _ in range(copies)]
    arms = build(shape, dense, wanted, shared)
    torch.cuda.synchronize()
    shared.say(f"{NAMES[shape]} built")
    with contextlib.suppress(threading.BrokenBarrierError):
        # A process that died, or one that is late: nobody waits for it longer.
        shared.built.wait(max(1.0, shared.at(BUILT) + 5 - time.time()))
    with shared.gpu():
        for m in op.ROWS:
            if time.time() > shared.deadline:
                shared.drop(shape, m, "all", "no time left to measure it")
                continue
            x = torch.randn(m, k, device=DEVICE, dtype=DTYPE)
            errors = {fmt: checked(x, dense[0], fmt) for fmt in op.DTYPES}
            us = measure(arms[m], functools.partial(shared.drop, shape, m))
            row = report(shape, m, us) | {"error": errors}
            shared.rows.append(row)
            shared.say(line(row))


def main(path: str, seconds: float, peers: list[str], names: list[str]) -> None:
    # One compiling thread a process: there are more processes than cores.
    os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    began, shapes = time.time(), [shape for shape in op.LLAMA if NAMES[shape] in names]
    context = mp.get_context("spawn")
    with context.Manager() as manager, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        # One folder for both of Triton's users.
        os.environ |= {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        shared = Shared(began, began + seconds, folder, manager.Barrier(len(shapes)), manager.dict(), manager.list(), manager.list())
        layers = [context.Process(target=layer, args=(shape, [*OURS, *peers], shared)) for shape in shapes]
        jobs = [[(name, rows) for name in OURS for rows in ARMS[name].warm]]
        jobs += [[(name, rows)] for name in peers for rows in ARMS[name].warm]
        warming = [context.Process(target=warm, args=(shape, job, shared)) for job in jobs for shape in shapes]
        for process in (*layers, *warming):
            process.start()
        for process in warming:
            process.join(max(0.0, shared.at(WARM) - time.time()))
            if process.is_alive():
                process.terminate()
        shared.say(f"caches filled by {len(warming)} processes")
        for process in layers:
            process.join(max(1.0, shared.deadline + 20 - time.time()))
            if process.is_alive():
                process.terminate()
                process.join()
        order = list(NAMES.values())
        result = sorted(shared.rows, key=lambda row: (order.index(row["layer"]), row["m"]))
        dropped = list(shared.dropped)
    facts = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "seconds": round(time.time() - began, 1)}
    with open(path, "w") as file:
        json.dump(facts | {"dropped": dropped, "rows": result}, file, indent=1)
    print("\n".join(map(line, result)))
    print(f"{facts['seconds']} s, {len(result)} rows")
    places: dict[tuple[str, str], list[str]] = {}
    for one in dropped:
        places.setdefault((one["arm"], one["why"]), []).append(f"{one['layer']} M={one['m']}")
    for (arm, why), where in places.items():
        print(f"dropped {arm}, {why}: {', '.join(sorted(where))}")
    failed = [NAMES[shape] for shape, process in zip(shapes, layers, strict=True) if process.exitcode]
    if failed:
        raise SystemExit(f"layers failed: {failed}")


if __name__ == "__main__":
    given = sys.argv[1:]
    chosen = list(PEERS) if len(given) < 3 else [name for name in given[2].split(",") if name]
    main(given[0], float(given[1]) if len(given) > 1 else SECONDS, chosen, given[3].split(",") if len(given) > 3 else list(NAMES.values()))
