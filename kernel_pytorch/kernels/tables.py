"""Measured configurations, one JSON file a kernel and GPU: what `tune` wrote in the user's cache folder, then what the package ships."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from kernel_pytorch.kernels.native import cache_folder

# Rows up to which a kernel for few rows is used where nobody measured the crossover.
UNKNOWN_CROSSOVER = 64


def file_name(kernel: str, gpu: str) -> str:
    """gpu: what `torch.cuda.get_device_name` says."""
    return f"{kernel}.{gpu.replace(' ', '_').replace('/', '_')}.json"


def user_file(kernel: str, gpu: str) -> Path:
    return cache_folder() / "tuned" / file_name(kernel, gpu)


def read(path: Path) -> dict[str, Any]:
    """{"configs": [...], "crossover": [...]}, empty lists where there is no such file."""
    table = json.loads(path.read_text()) if path.is_file() else {}
    return {"configs": [], "crossover": []} | table


@functools.cache
def load(kernel: str, gpu: str) -> dict[str, dict[tuple[Any, ...], dict[str, Any]]]:
    """configs by (n, k, m), crossover by (n, k, against); the user's rows win over the package's. Read once a process."""
    shipped, own = read(Path(__file__).with_name("tuned") / file_name(kernel, gpu)), read(user_file(kernel, gpu))
    return {
        "configs": {(row["n"], row["k"], row["m"]): row["config"] for table in (shipped, own) for row in table["configs"]},
        "crossover": {(row["n"], row["k"], row["against"]): row for table in (shipped, own) for row in table["crossover"]},
    }


def crossover(kernel: str, n: int, k: int, gpu: str, against: str) -> int:
    """The most rows at which the kernel was measured no slower than the road named `against`, 0 if never; 64 where nobody measured."""
    row = load(kernel, gpu)["crossover"].get((n, k, against))
    return UNKNOWN_CROSSOVER if row is None else row["m"]
