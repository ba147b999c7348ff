"""What of the TPU backend needs no torch_xla: it imports, plans for chips that are not here, and keeps programs by signature."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from kernel_pytorch.backends import tpu
from kernel_pytorch.backends.detect import BACKENDS, matches, plan_backend, resolve
from kernel_pytorch.backends.tpu import TpuBackend, architecture, is_installed
from kernel_pytorch.backends.xla_programs import XlaPrograms, signature
from kernel_pytorch.compile.inductor import InductorCompile
from kernel_pytorch.compile.options import CompileSettings, compile_keywords, describe
from kernel_pytorch.devices import DEVICES
from kernel_pytorch.errors import DeviceNotFoundError
from kernel_pytorch.optimizer import Level
from kernel_pytorch.precision.cast import Cast
from kernel_pytorch.precision.support import linear_support
from kernel_pytorch.schema import ActivationConfig, BackendConfig, CompileMode, OnMismatch

CHIPS = {name: row for name, row in DEVICES.items() if row.vendor == "tpu"}
without_xla = pytest.mark.skipif(is_installed(), reason="says what happens without torch_xla")


def planned(name: str = "tpu_v5e") -> TpuBackend:
    backend = plan_backend(name, BackendConfig(hardware=name))
    assert type(backend) is TpuBackend
    return backend


@without_xla
def test_without_torch_xla_there_is_no_tpu() -> None:
    backend = TpuBackend(hardware="any", on_mismatch=OnMismatch.error)
    assert not backend.available()
    assert tpu.num_chips() == 0
    assert tpu.memory_figures(torch.device("xla", 0)) is None
    with pytest.raises(DeviceNotFoundError, match="no TPU that torch can use"):
        _ = backend.facts
    resolution = resolve(BackendConfig(hardware="tpu_v5e"))
    assert not resolution.native
    assert resolution.reason.startswith("the recipe is for tpu_v5e (v5e), this is ")
    assert resolve(BackendConfig(_target_=BACKENDS["tpu"])).reason.startswith("backend tpu is not on this machine")


@pytest.mark.parametrize(
    ("name", "memory", "bandwidth"), [("tpu_v5e", 16e9, 0.819e12), ("tpu_v5p", 95e9, 2.765e12), ("tpu_v6e", 32e9, 1.6e12)]
)
def test_a_planned_chip_has_the_facts_of_its_row(name: str, memory: float, bandwidth: float) -> None:
    backend = planned(name)
    facts = backend.facts
    assert (facts.vendor, facts.arch, facts.present) == ("tpu", name.removeprefix("tpu_"), False)
    assert (facts.memory_bytes, facts.bandwidth_bytes_per_s) == (memory, bandwidth)
    assert (facts.has_triton, facts.has_cxx_compiler) == (False, False)
    assert backend.available_memory_bytes() == memory
    assert matches(BackendConfig(hardware=name), backend) == (True, f"hardware {name}: {name} ({facts.arch})")
    assert "Cloud TPU documentation" in DEVICES[name].source


def test_a_planned_chip_answers_for_each_kind_of_step() -> None:
    backend = planned()
    assert Cast(dtype="bfloat16").support(backend).level is Level.native
    quantized = linear_support(["int8"], ActivationConfig(), None, backend)
    assert (quantized.level, quantized.reason.endswith("use precision=bf16")) == (Level.emulated, True)
    compiled = {dynamic: InductorCompile(mode=CompileMode.default, fullgraph=False, dynamic=dynamic) for dynamic in (None, True)}
    assert compiled[None].support(backend).level is Level.native
    assert compiled[True].support(backend).level is Level.unsupported
    tuned = InductorCompile(mode=CompileMode.max_autotune, fullgraph=False, dynamic=None).support(backend)
    assert (tuned.level, tuned.reason) == (Level.native, "XLA has one mode: max_autotune is as default")
    keywords = compile_keywords(backend, CompileSettings(), isolate=True)
    assert (keywords, describe(keywords)) == ({"backend": "openxla"}, {})


def test_claims_are_what_every_tpu_compiles() -> None:
    claims = planned().claims()
    assert (claims.formats, claims.graphs, claims.pinned) == (("float32", "bfloat16"), False, False)


@pytest.mark.parametrize(
    ("accelerator", "arch"), [("v5litepod-8", "v5e"), ("v5p-16", "v5p"), ("v6e-4", "v6e"), ("v4-8", None), ("", None), (None, None)]
)
def test_the_version_of_a_chip_or_unknown(accelerator: str | None, arch: str | None) -> None:
    assert architecture(accelerator) == arch
    assert arch is None or f"tpu_{arch}" in CHIPS


def test_a_signature_tells_apart_what_a_program_is_compiled_for() -> None:
    x = torch.zeros(2, 3)
    different = [
        ((x,), {}),
        ((torch.zeros(3, 2),), {}),
        ((x.bfloat16(),), {}),
        ((torch.zeros(2, 3, requires_grad=True),), {}),
        ((x, None), {}),
        ((), {"x": x}),
        (([x],), {}),
        ((x, 1), {}),
        ((x, True), {}),
        ((x, 1.0), {}),
        ((x, "1"), {}),
    ]
    assert len({signature(args, kwargs) for args, kwargs in different}) == len(different)
    assert signature((x,), {"a": 1, "b": x}) == signature((torch.ones(2, 3),), {"b": x, "a": 1})
    with torch.no_grad():
        without_gradients = signature((x,), {})
    assert without_gradients != signature((x,), {})
    assert signature((object(),), {}) == signature((object(),), {})


class Compiled:
    """What a compiler returns: counts and lives as long as torch keeps it."""

    def __init__(self, graph: torch.fx.GraphModule) -> None:
        self.graph = graph

    def __call__(self, *args: torch.Tensor) -> list[torch.Tensor]:
        return self.graph.forward(*args)


class Compiler:
    """A torch.compile backend in XLA's place: what it made, weakly."""

    def __init__(self) -> None:
        self.made: list[weakref.ref[Compiled]] = []

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> Compiled:
        compiled = Compiled(graph)
        self.made.append(weakref.ref(compiled))
        return compiled

    @property
    def num_alive(self) -> int:
        gc.collect()
        return sum(one() is not None for one in self.made)


def test_each_shape_is_compiled_once_and_a_forgotten_program_is_freed() -> None:
    compiler = Compiler()
    programs = XlaPrograms(lambda x: x.sin() + 1, max_programs=2, backend=compiler)
    for rows in (1, 2, 1, 2):
        assert torch.equal(programs(torch.ones(rows)), torch.ones(rows).sin() + 1)
    assert (len(compiler.made), compiler.num_alive) == (2, 2)
    programs(torch.ones(3))
    assert (len(compiler.made), compiler.num_alive, programs.stats.evictions) == (3, 2, 1)
    # One row was the least recently used: it is compiled again.
    programs(torch.ones(1))
    assert (len(compiler.made), compiler.num_alive) == (4, 2)
    programs.clear()
    assert (compiler.num_alive, programs.stats.size) == (0, 0)


def test_more_shapes_than_torchs_recompile_limit_each_have_a_program() -> None:
    compiler = Compiler()
    programs = XlaPrograms(lambda x: x.cos() * 2, backend=compiler)
    num_shapes = torch._dynamo.config.recompile_limit + 4  # pyright: ignore[reportAttributeAccessIssue]
    for _ in range(2):
        for rows in range(1, num_shapes + 1):
            assert torch.equal(programs(torch.ones(rows)), torch.ones(rows).cos() * 2)
    assert len(compiler.made) == num_shapes
    assert (programs.stats.misses, programs.stats.hits) == (num_shapes, num_shapes)


def test_programs_of_two_functions_with_one_code_are_apart() -> None:
    def scaled(by: float) -> XlaPrograms:
        return XlaPrograms(lambda x: x * by, backend="eager")

    two, three = scaled(2.0), scaled(3.0)
    assert [float(one(torch.tensor(1.0))) for one in (two, three, two)] == [2.0, 3.0, 2.0]
    two.clear()
    assert float(three(torch.tensor(1.0))) == 3.0
