"""One decode step of a Llama-3-8B shape, our recipes against peers.

python bench_decode.py OUT.json [--batch 1,8] [--arms A,B] [--warm SECONDS]

Random weights, static KV cache, 2,048 tokens of context. Every arm gets the same treatment: Q, K, V and gate, up merged, each
block compiled by torch.compile, the whole step captured in one CUDA graph. Arms replay in turn in one process; the first is
timed twice (A/A). The error of an arm is its logits' SQNR against the bf16 arm's. An arm that cannot be built is reported with
its reason; a result of ours that is not near bf16, or another one in another replay, ends the
run (peers that add with atomics repeat no bits). --warm: before, peers compile one block each in processes of their own, which
fills the compilers' caches; their timings take turns on the GPU.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from alone import holding, time_alone
from time_limit import limit
from torch import nn
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    Int4WeightOnlyConfig,
    Int8WeightOnlyConfig,
    PerRow,
    quantize_,
)

from kernel_pytorch.attention.decode import DecodeAttention
from kernel_pytorch.backends.nvidia import NvidiaBackend
from kernel_pytorch.engine.clone import structural_clone
from kernel_pytorch.fusion.projections import FuseProjections
from kernel_pytorch.models.call import CallWorkload
from kernel_pytorch.models.llama import Llama, LlamaConfig, rotary
from kernel_pytorch.optimizer import Context
from kernel_pytorch.precision.quantize import QuantizeLinears
from kernel_pytorch.schema import ActivationConfig, ActivationMode, OnMismatch, WeightConfig

CONTEXT = 2048
ROUNDS, REPLAYS = 15, 4
DEVICE = torch.device("cuda")


Build = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Arm:
    """build: quantizes a model's linears. fuses_one_row: Inductor has a one-row kernel for it that reads 8-bit weights, and takes it when
    it may tune by coordinate descent."""

    build: Build
    fuses_one_row: bool = False

    def options(self, batch: int) -> dict[str, Any]:
        return {"coordinate_descent_tuning": True} if self.fuses_one_row and batch == 1 else {}


def torchao(config: Any) -> Build:
    def apply(model: nn.Module) -> nn.Module:
        quantize_(model, config(), filter_fn=lambda module, name: isinstance(module, nn.Linear) and "lm_head" not in name)
        return model

    return apply


def int4() -> Any:
    return Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d")


def gemlite(processor: str) -> Build:
    def apply(model: nn.Module) -> nn.Module:
        import gemlite.helper

        make = getattr(gemlite.helper, processor)(device="cuda", dtype=torch.bfloat16)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and "lm_head" not in name:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, make.from_linear(module, del_orig=False))
        return model

    return apply


def make_context(model: Llama) -> Context:
    """What a step is given: this GPU, and a short decode call, by which steps see what the model does."""
    shape = (1, model.config.num_kv_heads, 256, model.config.head_dim)
    caches = [tuple(torch.zeros(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)) for _ in model.layers]
    ids = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    call = (ids, caches, torch.full((1,), 200, dtype=torch.int64, device=DEVICE))
    return Context(NvidiaBackend(hardware="any", on_mismatch=OnMismatch.emulate), CallWorkload(call))


def ours(format: str | None, *, dynamic: bool = False, attention: bool = False) -> Build:
    activation = ActivationConfig(mode=ActivationMode.dynamic, format=format) if dynamic else ActivationConfig()
    step = QuantizeLinears(
        include=[], exclude=["*lm_head*"], dtype="bfloat16", weight=WeightConfig(format=format), activation=activation, min_features=16
    )

    def apply(model: nn.Module) -> nn.Module:
        context = make_context(model)
        model = model if format is None else step.apply(model, context).model
        if attention:
            applied = DecodeAttention().apply(model, context)
            assert len(applied.changes) == len(model.layers), applied
            model = applied.model
        return model

    return apply


ARMS: dict[str, Arm] = {
    "bf16": Arm(lambda model: model),
    "ours fp8": Arm(ours("float8_e4m3fn")),
    "ours fp8 dynamic": Arm(ours("float8_e4m3fn", dynamic=True)),
    "ours int8": Arm(ours("int8")),
    "ours nvfp4": Arm(ours("nvfp4")),
    "ours bf16 + attention": Arm(ours(None, attention=True)),
    "ours fp8 + attention": Arm(ours("float8_e4m3fn", attention=True)),
    "ours nvfp4 + attention": Arm(ours("nvfp4", attention=True)),
    "torchao fp8dq": Arm(torchao(functools.partial(Float8DynamicActivationFloat8WeightConfig, granularity=PerRow()))),
    "torchao int4": Arm(torchao(int4)),
    "gemlite fp8": Arm(gemlite("A16W8_FP8")),
    "torchao fp8wo": Arm(torchao(Float8WeightOnlyConfig), fuses_one_row=True),
    "torchao int8wo": Arm(torchao(Int8WeightOnlyConfig), fuses_one_row=True),
    "gemlite nvfp4": Arm(gemlite("A16W4_NVFP")),
    "gemlite mxfp4": Arm(gemlite("A16W4_MXFP")),
}
# An arm's name with it: the same with the Inductor options of --starred.
STAR = " *"
# The least SQNR of the logits against bf16 (dB) that an arm may have on these random weights before it counts as broken.
LEAST_DB = 5.0


class Step:
    """One decode step of a model as a CUDA graph. The blocks share one compiled code."""

    def __init__(self, model: Llama, options: dict[str, Any], caches: list[tuple[torch.Tensor, torch.Tensor]], ids: torch.Tensor) -> None:
        self.model, self.caches, self.ids = model, caches, ids
        self.position = torch.full((1,), CONTEXT, dtype=torch.int64, device=DEVICE)
        torch._dynamo.reset()
        self.before = torch.compile(self._before, dynamic=False)
        self.after = torch.compile(self._after, dynamic=False)
        for layer in model.layers:
            layer.compile(dynamic=False, options=options or None)
        for _ in range(3):
            self.eager()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self.eager()
        self.graph.replay()
        torch.cuda.synchronize()

    def repeats(self) -> bool:
        """Whether replays leave the same bits: kernels that start before they may would not, now and then."""
        self.graph.replay()
        first = self.logits.clone()
        for _ in range(20):
            self.graph.replay()
            if not torch.equal(self.logits, first):
                return False
        return True

    def _before(self, ids: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.model.embed_tokens(ids)
        keys = self.caches[0][0]
        future = torch.arange(keys.shape[2], device=DEVICE) > position
        mask = torch.zeros(1, 1, 1, keys.shape[2], dtype=keys.dtype, device=DEVICE).masked_fill(future, float("-inf"))
        cos, sin = rotary(position, self.model.config.head_dim, self.model.config.rope_theta, x.dtype)
        return x, cos, sin, mask

    def _after(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.lm_head(self.model.norm(x))

    def eager(self) -> torch.Tensor:
        x, cos, sin, mask = self.before(self.ids, self.position)
        for layer, cache in zip(self.model.layers, self.caches, strict=True):
            x = layer(x, cos, sin, cache, self.position, mask)
        return self.after(x)


def milliseconds(step: Step) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    step.graph.replay()
    start.record()
    for _ in range(REPLAYS):
        step.graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / REPLAYS


def sqnr(actual: torch.Tensor, expected: torch.Tensor) -> float:
    error = (actual.double() - expected.double()).square().sum()
    return 10 * torch.log10(expected.double().square().sum() / error).item()


def inputs(base: Llama, batch: int) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """A full cache of each layer, and one token a sequence."""
    generator = torch.Generator(DEVICE).manual_seed(batch)
    shape = (batch, base.config.num_kv_heads, CONTEXT + 1, base.config.head_dim)
    caches = [(random_like(shape, generator), random_like(shape, generator)) for _ in base.layers]
    return caches, torch.randint(base.config.vocab_size, (batch, 1), device=DEVICE, generator=generator)


def random_like(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, generator=generator)


def build(
    name: str, base: Llama, batch: int, caches: list[tuple[torch.Tensor, torch.Tensor]], ids: torch.Tensor, starred: dict[str, Any]
) -> Step:
    arm = ARMS[name.removesuffix(STAR)]
    model = FuseProjections(include=[], exclude=[]).apply(structural_clone(base), make_context(base)).model
    return Step(arm.build(model), arm.options(batch) | (starred if name.endswith(STAR) else {}), caches, ids)


def compile_beside(names: list[str], batch: int, options: argparse.Namespace) -> None:
    """One process a peer builds it with one layer; those that are not done in time are ended."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "-", "--layers", "1", "--batch", str(batch), "--warmer", str(Path(folder, "gpu"))]
        started = {name: subprocess.Popen([*command, "--arms", name]) for name in names if not name.startswith(("ours", "bf16"))}
        deadline = time.monotonic() + options.warm
        for name, process in started.items():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            print(f"batch {batch} {name:24s} compiled beside the others: {'yes' if process.returncode == 0 else 'no'}", flush=True)


def run(base: Llama, batch: int, names: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    caches, ids = inputs(base, batch)
    steps: dict[str, Step] = {}
    failed: list[dict[str, Any]] = []
    for name in names:
        began = time.time()
        if began - options.began > options.seconds and not name.startswith(("ours", "bf16")):
            failed.append({"arm": name, "batch": batch, "failed": "left out: the run's time was up"})
            continue
        try:
            with limit(options.limit):
                steps[name] = build(name, base, batch, caches, ids, options.starred)
        except (TimeoutError, RuntimeError, ValueError, TypeError, AttributeError, ImportError, AssertionError, KeyError) as error:
            # An arm that does not run here is a row of the table, not the end of it.
            failed.append({"arm": name, "batch": batch, "failed": f"{type(error).__name__}: {str(error)[:200]}"})
            print(f"batch {batch} {name:24s} failed: {failed[-1]['failed']}", flush=True)
            continue
        print(f"batch {batch} {name:24s} built in {time.time() - began:.0f} s", flush=True)
    errors = {name: sqnr(step.logits, steps["bf16"].logits) for name, step in steps.items() if name != "bf16"}
    broken = [name for name, found in errors.items() if not found >= LEAST_DB and name.startswith("ours")]
    if broken:
        raise SystemExit(f"wrong result: {', '.join(f'{name} {errors[name]:.1f} dB' for name in broken)}")
    repeats = {name: step.repeats() for name, step in steps.items()}
    unsteady = [name for name, same in repeats.items() if not same and name.startswith("ours")]
    if unsteady:
        raise SystemExit(f"two replays of one step differ: {', '.join(unsteady)}")
    times: dict[str, list[float]] = {name: [] for name in [*steps, "bf16 A/A"]}
    for _ in range(ROUNDS):
        for name in times:
            times[name].append(milliseconds(steps[name.removesuffix(" A/A")]))
    rows = []
    for name, samples in times.items():
        samples.sort()
        median = statistics.median(samples)
        row = {"arm": name, "batch": batch, "ms": median, "p10": samples[len(samples) // 10], "p90": samples[-1 - len(samples) // 10]}
        row |= {"tokens_per_s": batch * 1e3 / median, "sqnr_db": errors.get(name), "repeats": repeats.get(name)}
        rows.append(row)
        print(f"batch {batch} {name:24s} {median:7.3f} ms {row['tokens_per_s']:7.0f} tok/s {row['sqnr_db'] or 0:6.1f} dB", flush=True)
    return rows + failed


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--limit", type=int, default=90, help="seconds that one arm may take to build")
    parser.add_argument("--seconds", type=float, default=1e9, help="no further peer is built after this many seconds")
    parser.add_argument("--starred", type=json.loads, default={}, help="Inductor options as JSON, of arms whose name ends with ' *'")
    parser.add_argument("--warm", type=float, default=0.0, help="seconds in which peers compile beside one another before")
    parser.add_argument("--warmer", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.began = time.time()
    names = options.arms.split(",")
    config = LlamaConfig(options.layers, 4096, 32, 8, 14336, 128256, 128)
    base = Llama(config, dtype=torch.bfloat16, device=DEVICE)
    base.init_weights(0)
    facts = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "layers": options.layers}
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for batch in map(int, options.batch.split(",")):
            if options.warmer:
                time_alone(functools.partial(holding, options.warmer))
                build(names[0], base.eval(), batch, *inputs(base, batch), options.starred)
                continue
            if options.warm:
                compile_beside(names, batch, options)
            rows += run(base.eval(), batch, names, options)
            options.out.write_text(json.dumps({**facts, "context": CONTEXT, "rows": rows}, indent=1))
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
