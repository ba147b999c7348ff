import pytest
import torch

from kernel_pytorch.errors import CompilationError
from kernel_pytorch.measure.graphs import compile_counts, error_on_recompile_limit


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_one_graph_then_nothing_then_a_recompilation():
    compiled = torch.compile(lambda x: x * 2, backend="eager")
    with compile_counts() as first:
        compiled(torch.ones(3))
    with compile_counts() as second:
        compiled(torch.ones(3))
    with compile_counts() as third:
        compiled(torch.ones(5))
    assert (first.graphs, first.graph_breaks, first.compilations, first.recompilations) == (1, 0, 1, 0)
    assert (second.graphs, second.graph_breaks, second.compilations, second.recompilations) == (0, 0, 0, 0)
    assert (third.graphs, third.graph_breaks, third.compilations, third.recompilations) == (1, 0, 1, 1)


def test_a_graph_break_makes_two_graphs():
    def broken(x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    with compile_counts() as counts:
        torch.compile(broken, backend="eager")(torch.ones(3))
    assert (counts.graphs, counts.graph_breaks, counts.recompilations) == (2, 1, 0)


def test_a_reset_inside_the_block_is_survived():
    with compile_counts() as counts:
        torch.compile(lambda x: x - 1, backend="eager")(torch.ones(3))
        torch._dynamo.reset()
    assert counts.graphs == 1


def recompile(times: int) -> None:
    compiled = torch.compile(lambda x, power: x**power, backend="eager", dynamic=False)
    for power in range(times):
        compiled(torch.ones(2), power + 2)


def test_the_limit_is_an_error_with_a_way_out():
    limit = torch._dynamo.config.recompile_limit
    with pytest.raises(CompilationError, match=r"compile\.dynamic=true"), error_on_recompile_limit():
        recompile(limit + 1)
    assert torch._dynamo.config.recompile_limit == limit
    assert torch._dynamo.config.fail_on_recompile_limit_hit is False


def test_each_arm_brings_its_own_limit():
    with error_on_recompile_limit(num_arms=2), compile_counts() as counts:
        recompile(torch._dynamo.config.recompile_limit)
    assert counts.graphs == 16


def test_the_guarded_block_compiles_nothing_again():
    compiled = torch.compile(lambda x: x + 3, backend="eager")
    compiled(torch.ones(3))
    with error_on_recompile_limit(4), compile_counts() as counts:
        compiled(torch.ones(3))
    assert counts.compilations == 0
