"""Fused projections compute what the separate ones did, whoever is called with what, when, and how often."""

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kernel_pytorch.backends.cpu import CpuBackend
from kernel_pytorch.engine.clone import structural_clone
from kernel_pytorch.fusion.projections import FusedProjections, FuseProjections, ProjectionPart
from kernel_pytorch.optimizer import Applied, Context, Workload, tensor_bytes
from kernel_pytorch.schema import OnMismatch


class Attention(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(32, 32, bias), nn.Linear(32, 16, bias), nn.Linear(32, 16, bias)
        self.out = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.query(x).view(*x.shape[:-1], 4, 8).transpose(1, 2)
        k, v = (part(x).view(*x.shape[:-1], 2, 8).transpose(1, 2) for part in (self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Attention, then a gated MLP; the branch sees another tensor, and `twice` is called on two."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.gate, self.up, self.down = nn.Linear(32, 48, False), nn.Linear(32, 48, False), nn.Linear(48, 32)
        self.branch, self.twice = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x)
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return self.twice(self.branch(x.clone())) + self.twice(x)


class Rows(Workload):
    def call(self, model: nn.Module) -> Any:
        return model(torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)))

    probe = call

    def held_out(self, model: nn.Module, num_rows: int) -> Iterator[torch.Tensor]:
        yield self.call(model).flatten(0, 1)


def fuse(model: nn.Module, **patterns: list[str]) -> Applied:
    backend = CpuBackend(hardware="cpu", on_mismatch=OnMismatch.emulate)
    settings: dict[str, list[str]] = {"include": [], "exclude": [], **patterns}
    return FuseProjections(**settings).apply(structural_clone(model), Context(backend, Rows()))


def holders(model: nn.Module) -> list[FusedProjections]:
    return [module for module in model.modules() if isinstance(module, FusedProjections)]


def test_projections_of_one_tensor_become_one_linear() -> None:
    torch.manual_seed(0)
    model = Block().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    applied = fuse(model)
    assert [change.name for change in applied.changes] == ["attention.query", "attention.key", "attention.value", "gate", "up"]
    linears = {name: module.out_features for name, module in applied.model.named_modules() if isinstance(module, nn.Linear)}
    assert linears == {"attention.query.fused": 64, "attention.out": 32, "gate.fused": 96, "down": 32, "branch": 32, "twice": 32}
    assert tensor_bytes(applied.model) == tensor_bytes(model)
    torch.testing.assert_close(Rows().call(applied.model), Rows().call(model), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_retained_after_the_last_sibling(mode: Any) -> None:
    applied = fuse(Block())
    with mode():
        Rows().call(applied.model)
    assert [holder._shared for holder in holders(applied.model)] == [None, None]


def test_other_inputs_orders_and_repeats_are_right() -> None:
    model = Attention()
    fused = fuse(model).model
    x, y = torch.randn(3, 32), torch.randn(3, 32)
    order = [("key", x), ("query", y), ("value", x), ("key", x), ("key", x), ("value", y), ("query", x), ("query", x), ("value", x)]
    for name, argument in order:
        torch.testing.assert_close(getattr(fused, name)(argument), getattr(model, name)(argument), rtol=1e-5, atol=1e-6)


def test_an_input_changed_in_place_is_computed_anew() -> None:
    model = Attention()
    fused = fuse(model).model
    x = torch.randn(3, 32)
    with torch.no_grad():
        fused.query(x)
        x.mul_(2)
        torch.testing.assert_close(fused.key(x), model.key(x), rtol=1e-5, atol=1e-6)


def test_siblings_between_which_the_input_changes_are_not_fused() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 16), nn.Linear(32, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = self.a(x)
            x.mul_(2)
            return first + self.b(x)

    applied = fuse(InPlace())
    assert applied.changes == ()
    assert applied.not_applicable == "no linear layers of one parent read the same tensor"


def test_copies_share_nothing_with_the_original() -> None:
    fused = fuse(Attention()).model
    twin = copy.deepcopy(fused)
    assert twin.key._holder[0] is twin.query
    assert twin.query is not fused.query
    assert isinstance(twin.value, ProjectionPart)
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(twin(x), fused(x))


def test_replacing_the_fused_linear_reaches_every_sibling() -> None:
    fused = fuse(Attention()).model
    fused.query.fused = nn.Linear(32, 64)
    x = torch.randn(3, 32)
    expected = fused.query.fused(x).split((32, 16, 16), dim=-1)
    assert torch.equal(fused.value(x), expected[2])


def test_threads_do_not_mix_answers() -> None:
    model = Attention().eval()
    fused = fuse(model).model
    failures: list[float] = []

    def work(seed: int) -> None:
        x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(seed))
        expected = model(x)
        with torch.no_grad():
            failures.extend(e for e in ((fused(x) - expected).abs().max().item() for _ in range(50)) if not e < 1e-5)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_the_compiled_graph_has_one_matmul() -> None:
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = Attention(bias=False).eval()
    fused = fuse(model).model
    x = torch.randn(2, 5, 32)
    compiled = torch.compile(fused, fullgraph=True, backend=count)
    with torch.inference_mode():
        first, second = compiled(x), compiled(x)
    torch.testing.assert_close(first, model(x), rtol=1e-5, atol=1e-6)
    assert torch.equal(first, second)
    assert len(graphs) == 1
    assert sum(node.target is torch._C._nn.linear for node in graphs[0].graph.nodes) == 2
    assert fused.query._shared is None


def test_gradients_reach_the_fused_weight() -> None:
    model = Attention()
    fused = fuse(model).model
    x = torch.randn(2, 5, 32)
    fused(x).sum().backward()
    model(x).sum().backward()
    expected = torch.cat([model.query.weight.grad, model.key.weight.grad, model.value.weight.grad])
    torch.testing.assert_close(fused.query.fused.weight.grad, expected, rtol=1e-4, atol=1e-5)


def test_shared_hooked_and_unequal_siblings_are_skipped_with_a_reason() -> None:
    model = Attention()
    model.value = nn.Linear(32, 16, bias=False)
    unequal = fuse(model)
    assert {skipped.module: skipped.reason for skipped in unequal.skipped} == {"value": "its siblings differ in having a bias"}
    assert [change.name for change in unequal.changes] == ["query", "key"]
    tied = Attention()
    tied.value.weight = tied.key.weight
    shared = "its parameters are shared with another module"
    assert {skipped.module: skipped.reason for skipped in fuse(tied).skipped} == {
        "key": shared,
        "value": shared,
        "query": "no sibling on the same input can join it",
    }
    assert [change.name for change in fuse(Attention(), exclude=["value"]).changes] == ["query", "key"]


def test_outputs_that_callers_flatten_with_view_still_work() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 16), nn.Linear(32, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x).view(x.shape[0], -1) + self.b(x).view(x.shape[0], -1)

    model = Flat()
    applied = fuse(model)
    assert len(applied.changes) == 2
    torch.testing.assert_close(Rows().call(applied.model), Rows().call(model), rtol=1e-5, atol=1e-6)


def test_called_by_the_name_that_linear_gives_its_input() -> None:
    model = Attention()
    fused = fuse(model).model
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    modules = [(getattr(model, name), getattr(fused, name)) for name in ("query", "key", "value")]
    assert [type(after) for _, after in modules] == [FusedProjections, ProjectionPart, ProjectionPart]
    for before, after in modules:
        torch.testing.assert_close(after(input=x), before(input=x))
