"""What came of padding, call by call, in JSON types: it stands in the receipt, and fills while calls are made."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from kernel_pytorch.graph.buckets import FALLBACK_TILE, Buckets
from kernel_pytorch.graph.padding_check import Passed
from kernel_pytorch.schema import BucketingConfig


class BucketReport:
    """values: `strategy`; `tile`: rows of the device's matmul tile; `sizes`: every dynamic size's buckets of now; `buckets`:
    a row each, with counts of calls, elements and captures; `straight`: calls that went to the plain callable, by reason.

    A row's `waste` is elements of padding over real elements of the declared arguments. Its `captures` are graphs recorded
    while its calls ran, `compilations` graphs that torch.compile made meanwhile in this process."""

    def __init__(self, config: BucketingConfig, tile: int | None, buckets: Mapping[str, Buckets]) -> None:
        self._rows: dict[tuple[tuple[str, int], ...], dict[str, Any]] = {}
        self.values: dict[str, Any] = {
            "strategy": config.strategy.value,
            "tile": tile or f"unknown, taken as {FALLBACK_TILE}",
            "sizes": {name: list(found.sizes) for name, found in buckets.items()},
            "buckets": [],
            "straight": {},
        }

    @property
    def waste(self) -> float:
        """Elements of padding over real ones, over the calls of all buckets; 0 before the first."""
        real = sum(row["real_elements"] for row in self._rows.values())
        return sum(row["padding_elements"] for row in self._rows.values()) / real if real else 0.0

    def row(self, targets: Mapping[str, int]) -> dict[str, Any]:
        """The line of a bucket; calls that differ in other ways than their dynamic sizes share it."""
        found = self._rows.get(tuple(targets.items()))
        if found is None:
            counts = ("num_calls", "num_exact_calls", "real_elements", "padding_elements", "captures", "compilations", "buffer_bytes")
            found = self._rows[tuple(targets.items())] = {"sizes": dict(targets), **dict.fromkeys(counts, 0), "waste": 0.0}
            self.values["buckets"].append(found)
        return found

    def call(self, row: dict[str, Any], num_real: int, num_padded: int) -> None:
        """One call that was run in a bucket. num_real, num_padded: elements of its declared arguments, before and after."""
        row["num_calls"] += 1
        row["num_exact_calls"] += num_real == num_padded
        row["real_elements"] += num_real
        row["padding_elements"] += num_padded - num_real
        row["waste"] = row["padding_elements"] / row["real_elements"]

    def checked(self, row: dict[str, Any], passed: Passed) -> None:
        row["check"] = {
            "max_relative_l2": passed.max_relative_l2,
            "num_calls": passed.num_runs,
            "other_padding": passed.other_padding,
            "cut_dims": [{str(dim): name for dim, name in cut.items()} for cut in passed.cuts],
        }

    def straight(self, reason: str) -> None:
        """One call that was not padded."""
        counts = self.values["straight"]
        counts[reason] = counts.get(reason, 0) + 1


def num_compilations() -> int:
    """Graphs that torch.compile has made in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else dynamo.counters["stats"]["unique_graphs"]
