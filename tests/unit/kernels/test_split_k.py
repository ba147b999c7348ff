"""The kernel that adds what programs summed, in Triton's interpreter: factors, bias, and more rows than one grid has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from kernel_pytorch.kernels import split_k


def interpreted_cases() -> None:
    """Runs in a process with Triton's interpreter: prints one line a case."""
    rng = torch.Generator().manual_seed(0)
    split_k.MOST_ROWS = 3
    for m, n in ((1, 1), (3, 600), (8, 130)):
        partial = torch.randn(4, m, n, generator=rng)
        scale, bias = torch.randn(n, generator=rng), torch.randn(n, generator=rng)
        for row_scale, added in ((None, None), (torch.randn(m, 1, generator=rng), bias), (torch.randn(m, generator=rng), None)):
            out = torch.full((m, n), float("nan"), dtype=torch.float16)
            split_k.add(partial, scale, row_scale, added, out, overlap=False)
            exact = partial.sum(0) * scale
            exact = exact if row_scale is None else exact * row_scale.view(-1, 1)
            exact = exact if added is None else exact + added
            torch.testing.assert_close(out, exact.half(), rtol=1e-3, atol=1e-5)
            print("right", m, n)


def test_rows_beyond_one_grid_are_added_by_further_launches():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_split_k; test_split_k.interpreted_cases()"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("right") == 9
