"""Measured configurations, one JSON file a kernel and GPU: what `tune` wrote in the user's cache folder, then what the package ships."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

from kernel_pytorch.kernels.native import cache_folder

# Rows up to which a kernel for few rows is used where nobody measured the crossover: one pass over the weight, and two against a road
# that writes the weight in 16 bits and reads it again: at 128 rows that takes 1.3 to 2.3 times what the kernels take on the four
# Llama-3-8B layers, and no crossover measured there is lower (H200, docs/kernels.md).
UNKNOWN_CROSSOVER, UNKNOWN_AGAINST_EXPAND = 64, 128
# One chip with different memory: what was measured on one serves the other until that one is measured.
SAME_CHIP = (frozenset({"NVIDIA H100 80GB HBM3", "NVIDIA H200"}),)
# What names a row of each list.
KEYS = {"configs": ("n", "k", "m"), "crossover": ("n", "k", "against")}


def file_name(kernel: str, gpu: str) -> str:
    """gpu: what `torch.cuda.get_device_name` says."""
    return f"{kernel}.{gpu.replace(' ', '_').replace('/', '_')}.json"


def shipped_file(kernel: str, gpu: str) -> Path:
    return Path(__file__).with_name("tuned") / file_name(kernel, gpu)


def user_file(kernel: str, gpu: str) -> Path:
    return cache_folder() / "tuned" / file_name(kernel, gpu)


def read(path: Path) -> dict[str, Any]:
    """{"configs": [...], "crossover": [...]}, empty lists where there is no such file."""
    table = json.loads(path.read_text()) if path.is_file() else {}
    return {"configs": [], "crossover": []} | table


def write(path: Path, table: dict[str, Any]) -> None:
    """The table over what the file holds: rows of other layers stay, the rest is the new table's. Nobody sees half a file."""
    before = read(path)
    rows = {name: {**_by_key(name, before), **_by_key(name, table)} for name in KEYS}
    head = {name: value for name, value in table.items() if name not in rows}
    lists = [f"{json.dumps(name)}: [\n" + ",\n".join(json.dumps(row) for row in rows[name].values()) + "\n]" for name in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text("{" + ", ".join([*(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()), *lists]) + "}\n")
    part.replace(path)


def _by_key(name: str, table: dict[str, Any]) -> dict[tuple[Any, ...], dict[str, Any]]:
    return {tuple(row[part] for part in KEYS[name]): row for row in table[name]}


@functools.cache
def load(kernel: str, gpu: str) -> dict[str, dict[tuple[Any, ...], dict[str, Any]]]:
    """configs by (n, k, m), crossover by (n, k, against); the user's rows win over the package's, and those over another GPU's of
    the same chip. Read once a process."""
    others = sorted(other for chip in SAME_CHIP if gpu in chip for other in chip - {gpu})
    read_in_turn = [*(read(shipped_file(kernel, other)) for other in others), read(shipped_file(kernel, gpu)), read(user_file(kernel, gpu))]
    return {
        "configs": {key: row["config"] for table in read_in_turn for key, row in _by_key("configs", table).items()},
        "crossover": {key: row for table in read_in_turn for key, row in _by_key("crossover", table).items()},
    }


def crossover(kernel: str, n: int, k: int, gpu: str, against: str) -> int:
    """The most rows at which the kernel was measured no slower than the road named `against`, 0 if never; where nobody measured, 64, and
    128 against "expand"."""
    row = load(kernel, gpu)["crossover"].get((n, k, against))
    if row is None:
        return UNKNOWN_AGAINST_EXPAND if against == "expand" else UNKNOWN_CROSSOVER
    return row["m"]
