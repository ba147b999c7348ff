"""What a GraphDeploymentStrategy asks of a graph before it replays in place of the plain call."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kernel_pytorch.choices import GraphDeploymentStrategy


@dataclass(frozen=True)
class Terms:
    """min_speedup: plain time over replay time, at least. first_call: the call of a kind that is the first to be captured (1: its
    first). waits_for_reuse: every graph that has not been used since it was made puts the next capture off by a call.
    payback_calls: replays within which the time saved must have repaid the seconds of capture; None: any number.
    tries_eager: of a compiled model, eager code is recorded too, and the faster graph is kept."""

    min_speedup: float
    first_call: int
    waits_for_reuse: bool
    payback_calls: int | None
    tries_eager: bool = True

    def calls_needed(self, num_unused: int) -> int:
        """Calls of one kind before it is captured. num_unused: graphs that no later call has used so far."""
        return self.first_call + (num_unused if self.waits_for_reuse else 0)

    def repays(self, capture_s: float, saved_ms: float) -> bool:
        return self.payback_calls is None or saved_ms * 1e-3 * self.payback_calls >= capture_s


_TERMS = {
    GraphDeploymentStrategy.conservative: Terms(
        min_speedup=1.10, first_call=5, waits_for_reuse=True, payback_calls=20_000, tries_eager=False
    ),
    GraphDeploymentStrategy.balanced: Terms(min_speedup=1.02, first_call=1, waits_for_reuse=True, payback_calls=1_000_000),
    GraphDeploymentStrategy.aggressive: Terms(min_speedup=1.0, first_call=1, waits_for_reuse=False, payback_calls=None),
}


def terms(strategy: GraphDeploymentStrategy, min_speedup: float | None = None) -> Terms:
    """The strategy's terms; `min_speedup`, where given, stands in for the strategy's own."""
    own = _TERMS[strategy]
    return own if min_speedup is None else replace(own, min_speedup=min_speedup)
