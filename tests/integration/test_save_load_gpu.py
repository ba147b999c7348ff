"""Saved files between a GPU and a CPU. By hand on a GPU machine: python -m pytest -n 0 tests/integration/test_save_load_gpu.py"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kernel_pytorch as kp

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SCHEMES = ["int8_weight_only", "int8_dynamic", "fp8_weight_only", "fp8_dynamic", "nvfp4", "mxfp4", "int4_weight_only", "bf16"]


def mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(256, 256), nn.GELU())]).to(torch.bfloat16)


def optimized(*overrides: str, device: str = "cuda") -> tuple[kp.Optimized, torch.Tensor]:
    model = mlp(0).to(device)
    x = torch.randn(8, 256, dtype=torch.bfloat16, device=device)
    return kp.optimize(model, "eager", args=(x,), overrides=list(overrides), trained=False, measure=False), x


def alike(first: torch.Tensor, second: torch.Tensor, scheme: str = "") -> bool:
    """Kernels round in other places. Where activations are quantized in each of the layers, that moves values to the next code, and
    the results differ by as much as the scheme errs: 3 bits of mantissa are 4 % a value."""
    first, second = first.float().cpu(), second.float().cpu()
    return bool((first - second).norm() / first.norm() < (0.06 if "fp8_dynamic" in scheme else 0.02))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_gpu_gives_its_own_bits_back(tmp_path, scheme):
    done, x = optimized(f"precision={scheme}", *(["precision.dtype=float16"] if scheme == "bf16" else []))
    done.save(tmp_path / "s")
    loaded = kp.load(tmp_path / "s", mlp(1).cuda())
    assert loaded.report.verification.message == "the saved call gives the saved output, bit for bit"
    assert all(tensor.is_cuda for tensor in loaded.model.state_dict().values())
    assert torch.equal(loaded.model(x), done.model(x))


@pytest.mark.parametrize("scheme", SCHEMES[:-1])
@pytest.mark.parametrize(("saved_on", "loaded_on"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_file_moves_between_a_gpu_and_a_cpu(tmp_path, scheme, saved_on, loaded_on):
    done, x = optimized(f"precision={scheme}", device=saved_on)
    done.save(tmp_path / "s")
    loaded = kp.load(tmp_path / "s", mlp(1).to(loaded_on))
    assert {tensor.device.type for tensor in loaded.model.state_dict().values()} == {loaded_on}
    assert "not compared bit for bit: it was saved with" in loaded.report.verification.message
    assert alike(done.model(x), loaded.model(x.to(loaded_on)), scheme)


def test_a_captured_model_is_captured_again(tmp_path):
    done, x = optimized("precision=fp8_weight_only", "graph=auto", "graph.min_speedup=1")
    done.save(tmp_path / "s")
    assert list(done.model.state_dict()) == list(kp.load(tmp_path / "s", mlp(1).cuda(), overrides=["graph=none"]).model.state_dict())
    loaded = kp.load(tmp_path / "s", mlp(1).cuda())
    row = next(row for row in loaded.report.steps if row.group == "graph")
    assert [decision["captured"] for decision in row.details["decisions"]], "no decision was made"
    assert alike(done.model(x), loaded.model(x))


def test_compiled_and_captured_from_a_plain_file(tmp_path):
    done, x = optimized("precision=fp8_weight_only")
    done.save(tmp_path / "s")
    loaded = kp.load(tmp_path / "s", mlp(1).cuda(), overrides=["compile=default", "graph=auto"])
    assert alike(done.model(x), loaded.model(x))
