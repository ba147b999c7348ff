"""Weights offloaded to the host, prefill and decode of a Llama-3-8B shape: python bench_offload.py OUT.json [--layers 32] [--seconds 100]

Random weights, bf16, uncompiled. Arms: everything on the device; ours with one and two blocks copied ahead, and with every fourth
block resident; each block copied when it is called and freed after, from pageable and from pinned memory; accelerate's cpu_offload as
it comes, and with whole blocks from pinned memory. Every arm must give the resident model's logits bit for bit. Arms take turns in
one process; the first of ours is timed twice (A/A). The floor of an arm is its streamed bytes over the pinned copy bandwidth that
is measured in the same run. Peak memory: the arm's own tensors on the device and the most that one call allocates.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kernel_pytorch.backends.base import Backend
from kernel_pytorch.backends.detect import resolve
from kernel_pytorch.engine.clone import structural_clone
from kernel_pytorch.measure.memory import peak_memory_bytes
from kernel_pytorch.memory.offload import OffloadWeights, pinned_bytes
from kernel_pytorch.models.call import CallWorkload
from kernel_pytorch.models.llama import Llama, LlamaConfig
from kernel_pytorch.optimizer import Context
from kernel_pytorch.schema import BackendConfig

AGAIN = " A/A"
MIN_ROUNDS, MAX_ROUNDS = 3, 15
GB = 1e9


@dataclass
class Arm:
    """streamed_bytes: what one call brings to the device. details: facts for the table's JSON."""

    model: nn.Module
    streamed_bytes: int
    details: dict[str, Any]


@dataclass
class Models:
    """The same weights on the device, in pageable and in pinned host memory."""

    resident: Llama
    host: Llama
    pinned: Llama
    backend: Backend


def block_bytes(model: Llama) -> int:
    return sum(parameter.nbytes for parameter in model.layers.parameters())


def step(depth: int = 1, num_resident: int = 0) -> OffloadWeights:
    return OffloadWeights(include=[], exclude=[], prefetch_depth=depth, num_resident_blocks=num_resident)


def ours(depth: int, resident_share: float = 0.0) -> Callable[[Models], Arm]:
    def build(models: Models) -> Arm:
        num_resident = int(len(models.host.layers) * resident_share)
        offload, ids = step(depth, num_resident), torch.zeros(1, 1, dtype=torch.int64, device=models.backend.device)
        model = structural_clone(models.host)
        offload.stage(model, models.backend.device)
        applied = offload.apply(model, Context(models.backend, CallWorkload((ids,))))
        assert applied.not_applicable is None, applied.not_applicable
        streamed = block_bytes(models.host) * applied.details["num_blocks"] // len(models.host.layers)
        return Arm(applied.model, streamed, {**applied.details, "pinned_bytes": pinned_bytes(applied.model)})

    return build


def fetched(pinned: bool) -> Callable[[Models], Arm]:
    def build(models: Models) -> Arm:
        model = structural_clone(models.pinned if pinned else models.host)
        step().stage(model, models.backend.device)
        return Arm(model, block_bytes(models.host), {})

    return build


def accelerate(pinned_blocks: bool) -> Callable[[Models], Arm]:
    def build(models: Models) -> Arm:
        import accelerate

        options: dict[str, Any] = {}
        if pinned_blocks:
            options = {"state_dict": dict(models.pinned.state_dict()), "preload_module_classes": ["Layer"]}
        model = accelerate.cpu_offload(structural_clone(models.host), execution_device=models.backend.device, **options)
        everything = sum(parameter.nbytes for parameter in models.host.parameters())
        return Arm(model, everything, {"accelerate": accelerate.__version__})

    return build


FIRST = "ours, 1 ahead"
ARMS: dict[str, Callable[[Models], Arm]] = {
    "resident": lambda models: Arm(models.resident, 0, {}),
    FIRST: ours(1),
    "ours, 2 ahead": ours(2),
    "ours, 1 ahead, a quarter resident": ours(1, 0.25),
    "copied when called, pageable": fetched(False),
    "copied when called, pinned": fetched(True),
    "accelerate cpu_offload": accelerate(False),
    "accelerate, pinned whole blocks": accelerate(True),
}


def make_models(num_layers: int, backend: Backend) -> Models:
    config = LlamaConfig(num_layers, 4096, 32, 8, 14336, 128256, 128)
    resident = Llama(config, dtype=torch.bfloat16, device=backend.device)
    # Drawn on the device, where it takes seconds.
    resident.init_weights(0)
    host = structural_clone(resident)
    pinned = structural_clone(resident)
    for model, pin in ((host, False), (pinned, True)):
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    moved = parameter.detach().cpu()
                    module._parameters[name] = nn.Parameter(moved.pin_memory() if pin else moved)
    return Models(resident.eval(), host, pinned, backend)


def bandwidth(num_bytes: int, backend: Backend) -> float:
    """Bytes a second from pinned host memory to the device, in copies of one block."""
    source = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(num_bytes, dtype=torch.uint8, device=backend.device)
    rates = []
    for _ in range(6):
        backend.synchronize()
        began = time.perf_counter()
        for _ in range(4):
            target.copy_(source, non_blocking=True)
        backend.synchronize()
        rates.append(4 * num_bytes / (time.perf_counter() - began))
    return statistics.median(rates[1:])


def calls_of(models: Models, options: argparse.Namespace) -> dict[str, tuple[int, Callable[[nn.Module], torch.Tensor]]]:
    """By phase, tokens a call and the call."""
    device, config = models.backend.device, models.host.config
    generator = torch.Generator(device).manual_seed(0)
    shape = (options.batch, config.num_kv_heads, options.context + 8, config.head_dim)
    caches = [
        tuple(torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator) for _ in range(2))
        for _ in range(config.num_layers)
    ]
    token = torch.randint(config.vocab_size, (options.batch, 1), device=device, generator=generator)
    position = torch.full((1,), options.context, dtype=torch.int64, device=device)
    prompt = torch.randint(config.vocab_size, (options.batch, options.prompt), device=device, generator=generator)
    phases: dict[str, tuple[int, Callable[[nn.Module], torch.Tensor]]] = {
        "decode": (options.batch, lambda model: model(token, caches, position)),
        "prefill": (options.batch * options.prompt, lambda model: model(prompt)),
    }
    return {name: phases[name] for name in options.phases.split(",")}


def require_equal(arms: dict[str, Arm], call: Callable[[nn.Module], torch.Tensor], phase: str) -> None:
    expected = call(arms["resident"].model)
    for name, arm in arms.items():
        # The second call finds the slots as the first one left them.
        for _ in range(2 if name.startswith("ours") else 1):
            if not torch.equal(call(arm.model), expected):
                raise SystemExit(f"wrong result: {phase} of {name} is not the resident model's")


def measure(arms: dict[str, Arm], phase: str, tokens: int, call: Any, rate: float, until: float, backend: Backend) -> list[dict[str, Any]]:
    require_equal(arms, call, phase)
    samples: dict[str, list[float]] = {name: [] for name in [*arms, FIRST + AGAIN]}
    for number in range(MAX_ROUNDS):
        if number >= MIN_ROUNDS and time.time() > until:
            break
        for name, into in samples.items():
            model = arms[name.removesuffix(AGAIN)].model
            backend.synchronize()
            began = time.perf_counter()
            call(model)
            backend.synchronize()
            into.append((time.perf_counter() - began) * 1e3)
    rows = []
    for name, values in samples.items():
        arm, median = arms[name.removesuffix(AGAIN)], statistics.median(values)
        floor_ms = arm.streamed_bytes / rate * 1e3
        row: dict[str, Any] = {"phase": phase, "arm": name, "ms": median, "least_ms": min(values), "most_ms": max(values)}
        row |= {"rounds": len(values), "tokens_per_s": tokens * 1e3 / median, "floor_ms": floor_ms}
        row["times_floor"] = median / floor_ms if floor_ms else None
        if not name.endswith(AGAIN):
            synchronize = backend.synchronize
            row["peak_memory_bytes"] = peak_memory_bytes(arm.model, lambda model=arm.model: call(model), synchronize=synchronize, cuda=True)
        row |= arm.details if not name.endswith(AGAIN) else {}
        rows.append(json.loads(json.dumps(row)))
        show(rows[-1])
    return rows


def show(row: dict[str, Any]) -> None:
    peak = f"{row['peak_memory_bytes'] / GB:6.2f} GB" if "peak_memory_bytes" in row else " " * 9
    floor = f"{row['times_floor']:5.2f} x floor" if row["times_floor"] else ""
    spread = f"({row['least_ms']:.1f} to {row['most_ms']:.1f})"
    print(f"{row['phase']:8s}{row['arm']:36s}{row['ms']:9.1f} ms {spread:22s}{row['tokens_per_s']:9.1f} tok/s {peak} {floor}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of a prefill")
    parser.add_argument("--context", type=int, default=2048, help="tokens in the cache of a decode step")
    parser.add_argument("--phases", default="decode,prefill")
    parser.add_argument("--arms", default=";".join(ARMS), help="names, with semicolons between")
    parser.add_argument("--seconds", type=float, default=100, help="after these no round begins that is not needed for a median")
    options = parser.parse_args()
    began = time.time()
    run(options, began, resolve(BackendConfig()).backend)


@torch.no_grad()
def run(options: argparse.Namespace, began: float, backend: Backend) -> None:
    models = make_models(options.layers, backend)
    rate = bandwidth(block_bytes(models.host) // options.layers, backend)
    print(f"{backend.facts.name}: {rate / GB:.1f} GB/s from pinned memory; models made in {time.time() - began:.0f} s", flush=True)
    arms: dict[str, Arm] = {}
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(["resident", FIRST, *options.arms.split(";")]):
        try:
            arms[name] = ARMS[name](models)
            print(f"{name:44s}built after {time.time() - began:.0f} s", flush=True)
        except ImportError as error:
            rows.append({"arm": name, "absent": str(error)})
            print(f"{name:44s}absent: {error}", flush=True)
    facts = {"gpu": backend.facts.name, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "pinned_bytes_per_s": rate}
    facts |= {name: getattr(options, name) for name in ("layers", "batch", "prompt", "context")}
    phases = calls_of(models, options)
    left = options.seconds - (time.time() - began)
    for index, (phase, (tokens, call)) in enumerate(phases.items()):
        until = began + options.seconds - left * (len(phases) - 1 - index) / len(phases)
        with torch.inference_mode():
            rows += measure(arms, phase, tokens, call, rate, until, backend)
        options.out.write_text(json.dumps({**facts, "rows": rows}, indent=1))
    print(f"done after {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
