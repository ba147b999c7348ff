import pytest
import torch
from torch import nn

from kernel_pytorch.measure.memory import max_running_sum, peak_memory_bytes

SIDE = 1024
BYTES = SIDE * SIDE * 4


class Chain(nn.Module):
    """Three matmuls of 4 MB each: at the last line a, b, c and the sum are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(SIDE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = x @ x
        b = a @ x
        c = b @ a
        return c + b


def no_wait() -> None:
    return None


def peak(model: nn.Module, call) -> int:
    return peak_memory_bytes(model, call, synchronize=no_wait, cuda=False)


def test_running_sum():
    assert max_running_sum([]) == 0
    assert max_running_sum([10, 20, -20, 5, -15]) == 30
    assert max_running_sum([-10, 4]) == 0


def test_three_tensors_to_the_byte():
    def call() -> None:
        tensors = [torch.empty(SIDE, SIDE) for _ in range(3)]
        tensors.clear()

    assert peak(nn.Identity(), call) == 3 * BYTES


def test_freed_tensors_do_not_add_up():
    def call() -> None:
        for _ in range(5):
            torch.empty(SIDE, SIDE)

    # The next tensor is allocated after the last one was freed.
    assert peak(nn.Identity(), call) == BYTES


def test_eager_model_counts_its_tensors_and_its_peak():
    x = torch.ones(SIDE, SIDE)
    model = Chain()
    with torch.inference_mode():
        assert peak(model, lambda: model(x)) == 4 * SIDE + 4 * BYTES


def test_compiled_model_is_seen_by_the_allocator():
    x = torch.ones(SIDE, SIDE)
    model = Chain()
    model.compile()
    with torch.inference_mode():
        for _ in range(2):
            model(x)
        # Inductor writes the sum into c, so three buffers are enough.
        assert peak(model, lambda: model(x)) == 4 * SIDE + 3 * BYTES


def test_context_is_entered_and_the_output_counts():
    entered: list[str] = []

    class Enter:
        def __enter__(self) -> None:
            entered.append("in")

        def __exit__(self, *_: object) -> None:
            entered.append("out")

    figure = peak_memory_bytes(nn.Linear(4, 4), lambda: torch.empty(SIDE, SIDE), context=Enter, synchronize=no_wait, cuda=False)
    assert figure == (16 + 4) * 4 + BYTES
    assert entered == ["in", "out"]


def test_nothing_on_stderr(capfd):
    peak(nn.Identity(), lambda: torch.empty(8))
    assert capfd.readouterr().err == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_leaves_other_models_out():
    resident = torch.empty(SIDE, SIDE, device="cuda")
    model = nn.Linear(SIDE, SIDE, bias=False, device="cuda")

    def call() -> list[torch.Tensor]:
        return [torch.empty(SIDE, SIDE, device="cuda") for _ in range(3)]

    assert peak_memory_bytes(model, call, synchronize=torch.cuda.synchronize, cuda=True) == 4 * BYTES
    assert resident.numel() == SIDE * SIDE
