import pytest
import torch
from torch import nn

from kernel_pytorch.errors import CompilationError
from kernel_pytorch.measure.ladder import Arm, allowance, judge, measure_ladder
from kernel_pytorch.report.result import ModelResult, Report, Rung, StepResult
from kernel_pytorch.schema import MeasureConfig

FAST = MeasureConfig(num_rounds=3, min_round_ms=0)


def no_wait() -> None:
    return None


def arm(name: str, **facts) -> Arm:
    model = nn.Linear(8, 8, bias=False)
    return Arm(name, model, lambda: model(torch.ones(1, 8)), **facts)


def measure(arms: list[Arm], tokens: int | None = None):
    with torch.inference_mode():
        return measure_ladder(arms, FAST, synchronize=no_wait, cuda=False, tokens_per_call=tokens)


def test_ratios_follow_from_the_medians():
    ladder = measure([arm("eager"), arm("compiled"), arm("recipe")], tokens=256)
    assert [rung.name for rung in ladder.rungs] == ["eager", "compiled", "recipe"]
    eager, compiled, recipe = (rung.latency_ms for rung in ladder.rungs)
    assert [len(rung.latency_ms_samples) for rung in ladder.rungs] == [3, 3, 3]
    assert eager == sorted(ladder.rungs[0].latency_ms_samples)[1]
    assert [rung.ratio_to_eager for rung in ladder.rungs] == [1.0, eager / compiled, eager / recipe]
    assert [rung.ratio_to_compiled for rung in ladder.rungs] == [compiled / eager, 1.0, compiled / recipe]
    assert ladder.rungs[2].tokens_per_s == 256 / recipe * 1e3
    assert ladder.noise == pytest.approx(1, abs=0.999)


def test_what_is_not_known_is_none():
    ladder = measure([arm("recipe")])
    assert ladder.noise is None
    rung = ladder.rungs[0]
    assert (rung.ratio_to_eager, rung.ratio_to_compiled, rung.tokens_per_s, rung.first_call_s, rung.graphs) == (None,) * 5


def test_facts_of_an_arm_pass_through():
    rungs = measure([arm("eager"), arm("recipe", first_call_s=12.5, graphs=2, graph_breaks=1, held_bytes=1000)]).rungs
    # The 8 x 8 weight, the input of 8 and the output of 8; the input is made inside the call.
    assert rungs[0].peak_memory_bytes == 4 * (64 + 8 + 8)
    assert rungs[1].peak_memory_bytes == 4 * (64 + 8 + 8) + 1000
    assert (rungs[1].first_call_s, rungs[1].graphs, rungs[1].graph_breaks) == (12.5, 2, 1)


def test_compiling_while_timed_is_an_error():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    sizes = iter(range(2, 100))
    growing = Arm("recipe", nn.Identity(), lambda: compiled(torch.ones(next(sizes))))
    with pytest.raises(CompilationError, match="while the ladder was timed"):
        measure([growing])
    torch._dynamo.reset()


def test_names_must_differ():
    with pytest.raises(ValueError, match="distinct names"):
        measure([arm("eager"), arm("eager")])


def report(speedup: float | None, *, before=100, after=100, noise=1.0, changed=1, samples=()) -> Report:
    ladder = [
        Rung("eager", latency_ms=10.0, latency_ms_samples=list(samples), ratio_to_eager=1.0),
        Rung("recipe", latency_ms=5.0, latency_ms_samples=list(samples), ratio_to_eager=speedup),
    ]
    step = StepResult("precision", "int8_dynamic", None, "native", changed=changed)
    return Report(steps=[step], model=ModelResult(bytes_before=before, bytes_after=after), ladder=ladder, noise=noise)


@pytest.mark.parametrize(
    ("given", "config", "expected"),
    [
        (report(1.2), {}, None),
        (report(1.0), {}, None),
        (report(0.98, noise=1.03), {}, None),
        (report(0.98, noise=0.97), {}, None),
        (report(0.5, after=99), {}, None),
        (report(0.5), {"require_gain": False}, None),
        (report(0.5, changed=0), {"min_speedup": 2.0}, None),
        (
            report(0.9, noise=1.01),
            {},
            "no gain: 0.900x eager (noise of 1.0% allowed) and model bytes are 1.000x (measure.require_gain=false accepts it)",
        ),
        (
            report(0.9, before=None, after=None),
            {},
            "no gain: 0.900x eager (noise of 0.0% allowed) and its bytes are unknown (measure.require_gain=false accepts it)",
        ),
        (report(1.5), {"min_speedup": 1.5}, None),
        (report(1.49, noise=1.01), {"min_speedup": 1.5}, None),
        (report(1.4, noise=1.01), {"min_speedup": 1.5}, "1.400x eager is below measure.min_speedup=1.5 (noise of 1.0% allowed)"),
        (report(2.0, after=50), {"max_memory_ratio": 0.5}, None),
        (report(2.0, after=51), {"max_memory_ratio": 0.5}, "model bytes are 0.510x the baseline's, above measure.max_memory_ratio=0.5"),
        (report(None, after=51), {"max_memory_ratio": 0.5, "min_speedup": 3}, "model bytes are 0.510x the baseline's, above"
         " measure.max_memory_ratio=0.5"),
        (report(None), {"min_speedup": 3}, None),
    ],
)  # fmt: skip
def test_judge(given: Report, config: dict, expected: str | None):
    assert judge(given, MeasureConfig(**config)) == expected


def test_two_reasons_are_both_given():
    reason = judge(report(0.5), MeasureConfig(min_speedup=2.0))
    assert reason is not None
    assert [part.split(" ")[0] for part in reason.split("; ")] == ["0.500x", "no"]


def test_allowance_is_the_larger_of_drift_and_spread():
    # IQR 0.2 around 10 over 5 samples: 1.2533 / 1.349 / sqrt(5) / 10 each, two arms in quadrature, twice.
    samples = [9.8, 9.9, 10.0, 10.1, 10.2]
    expected = 2 * 2**0.5 * 1.2533 / 1.349 / 5**0.5 / 50
    assert allowance(report(1.0, samples=samples)) == pytest.approx(expected)
    assert allowance(report(1.0, samples=samples, noise=1.04)) == pytest.approx(0.04)
    # A noisier machine excuses no more than this.
    assert allowance(report(1.0, samples=samples, noise=1.5)) == 0.05
    assert allowance(report(1.0, noise=None)) == 0.0
