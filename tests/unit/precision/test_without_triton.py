"""Triton is not on every platform: nothing but the GPU kernels may need it."""

import subprocess
import sys

CODE = """
import sys
sys.modules["triton"] = None
sys.modules["triton.language"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.startswith("triton") else find(name, *rest)
import torch
from torch import nn
import kernel_pytorch
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
x = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
for option in ("int8_dynamic", "fp8_weight_only", "nvfp4"):
    done = kernel_pytorch.optimize(model, "eager", args=(x,), overrides=[f"precision={option}"], trained=False, measure=False)
    print(option, done.report.verdict)
"""


def test_the_layers_work_without_triton() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["int8_dynamic", "pass", "fp8_weight_only", "emulated", "nvfp4", "emulated"]
