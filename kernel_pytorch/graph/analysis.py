"""WorkloadAnalysis: what was measured of one kind of call. Nothing in it is assumed; None is what was not measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kernel_pytorch.graph.timing import Comparison

_OF_TWO_CODES = ("code", "code_reason", "compiled_replay_ms", "eager_replay_ms", "eager_relative_l2")


@dataclass
class WorkloadAnalysis:
    """One kind of call, by its inputs and modes.

    inputs: types and shapes of the tensors. num_calls: calls seen when this was written. plain_ms, replay_ms: medians from an
    idle device. plain_row_ms, replay_row_ms: a call, of several made without waiting. copied_bytes: copied in for each replay,
    copy_ms: how long that takes. pool_bytes: most that the call had allocated at once while it was recorded. held_bytes:
    what stays allocated between replays. capture_s: recording, warm-up and timing together. num_written: storages that the
    call writes in place. num_operations: operations of one call, in eager mode.
    placement_relative_l2: of its outputs against the plain call's, where something was put on the device for it.

    Of a compiled model, whose plain_ms and replay_ms are the compiled code's: code: that the graph kept was recorded of, compiled
    or eager; code_reason. compiled_replay_ms, eager_replay_ms: replays of both, in turns. eager_relative_l2: of the eager
    code's outputs against the compiled code's."""

    inputs: str
    num_calls: int
    plain_ms: float
    replay_ms: float
    num_samples: int
    plain_row_ms: float | None = None
    replay_row_ms: float | None = None
    copied_bytes: int = 0
    copy_ms: float | None = None
    pool_bytes: int = 0
    held_bytes: int = 0
    capture_s: float = 0.0
    num_written: int = 0
    num_operations: int = 0
    placement_relative_l2: float | None = None
    code: str | None = None
    code_reason: str | None = None
    compiled_replay_ms: float | None = None
    eager_replay_ms: float | None = None
    eager_relative_l2: float | None = None

    @classmethod
    def of(cls, inputs: str, num_calls: int, timed: Comparison) -> WorkloadAnalysis:
        return cls(inputs, num_calls, timed.plain_ms, timed.replay_ms, timed.num_samples, timed.plain_row_ms, timed.replay_row_ms)

    @property
    def launch_overhead_ms(self) -> float:
        """What the plain call takes beyond the replay of the same kernels; negative where copies cost more than launches."""
        return self.plain_ms - self.replay_ms

    @property
    def saved_ms(self) -> float:
        """The better of the two styles of calling, each plain less replay."""
        row = self.plain_row_ms - self.replay_row_ms if self.plain_row_ms is not None and self.replay_row_ms is not None else None
        return self.launch_overhead_ms if row is None else max(self.launch_overhead_ms, row)

    @property
    def speedup(self) -> float:
        return self.plain_ms / self.replay_ms

    def row(self) -> dict[str, Any]:
        """As the receipt shows it: JSON types. What compares two codes is only there where there are two."""
        measured = {name: value for name, value in asdict(self).items() if self.code is not None or name not in _OF_TWO_CODES}
        return {**measured, "launch_overhead_ms": self.launch_overhead_ms, "speedup": self.speedup}
