"""Which option each group gets when their costs must fit a budget: the multiple-choice knapsack, solved exactly.

Groups are joined one at a time. Of the partial choices only those survive that no cheaper one beats and whose lower bound,
the Lagrangian one at the multiplier of the linear relaxation, is not above the best whole choice known.
Source: Nemhauser and Ullmann, Management Science 15(9), 1969; Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, ch. 11.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Table = Sequence[Sequence[float]]
Costs = Sequence[Sequence[int]]
# Sums of floats differ in their order: a bound this much (relative) above the best known loss may still be equal to it.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class _Step:
    """Moving `group` from one option of its convex hull to the next: `gain` less loss for `cost` more."""

    rate: float
    group: int
    option: int
    cost: int
    gain: float


@dataclass(frozen=True)
class _Partial:
    """A choice for the first groups. reduced: the sum of loss + multiplier * cost. chosen: the options, last group first."""

    cost: int
    loss: float
    reduced: float
    chosen: tuple[int, _Partial] | None


def solve(losses: Table, costs: Costs, capacity: int) -> list[int]:
    """The option of each group with the least sum of losses whose costs sum to at most `capacity`.

    losses[g][o] finite, costs[g][o] >= 0. Exact up to float rounding of the sums. Raises ValueError when no choice fits."""
    least = sum(min(row) for row in costs)
    if least > capacity:
        raise ValueError(f"the cheapest choice costs {least}, more than {capacity}")
    rate = multiplier(losses, costs, capacity)
    best = _greedy(losses, costs, capacity)
    best_loss = sum(losses[group][option] for group, option in enumerate(best))
    # Clear decisions first: they leave one option, so that partial choices multiply only at the end.
    order = sorted(range(len(costs)), key=lambda group: -_clearness(_reduced(losses, costs, group, rate)))
    rest_cost, rest_reduced = [0], [0.0]
    for group in reversed(order):
        rest_cost.append(rest_cost[-1] + min(costs[group]))
        rest_reduced.append(rest_reduced[-1] + min(_reduced(losses, costs, group, rate)))
    limit = best_loss + _ROUNDING * (abs(best_loss) + math.fsum(max(map(abs, row)) for row in losses))
    states = [_Partial(0, 0.0, 0.0, None)]
    for done, group in enumerate(order, 1):
        room = capacity - rest_cost[len(order) - done]
        most = limit + rate * capacity - rest_reduced[len(order) - done]
        reduced = _reduced(losses, costs, group, rate)
        grown = [
            (state.cost + costs[group][option], state.loss + losses[group][option], state.reduced + reduced[option], index, option)
            for index, state in enumerate(states)
            for option in range(len(reduced))
            if state.cost + costs[group][option] <= room and state.reduced + reduced[option] <= most
        ]
        states = _undominated(grown, states)
    if states and min(state.loss for state in states) < best_loss:
        return _options(min(states, key=lambda state: state.loss), order)
    return best


def multiplier(losses: Table, costs: Costs, capacity: int) -> float:
    """Loss that one more unit of cost saves at the budget, in the linear relaxation; 0 where everything fits."""
    room = capacity - sum(min(row) for row in costs)
    for step in _steps(losses, costs):
        room -= step.cost
        if room < 0:
            return step.rate
    return 0.0


def _reduced(losses: Table, costs: Costs, group: int, rate: float) -> list[float]:
    return [loss + rate * cost for loss, cost in zip(losses[group], costs[group], strict=True)]


def _clearness(reduced: list[float]) -> float:
    """By how much the second option is worse than the best one."""
    first, *others = sorted(reduced)
    return others[0] - first if others else math.inf


def _cheapest(losses: Table, costs: Costs, group: int) -> int:
    return min(range(len(costs[group])), key=lambda option: (costs[group][option], losses[group][option]))


def _steps(losses: Table, costs: Costs) -> list[_Step]:
    """All steps along the groups' convex hulls, those that save most for their cost first."""
    steps: list[_Step] = []
    for group in range(len(costs)):
        at = _cheapest(losses, costs, group)
        while True:
            better = [
                _Step(
                    (losses[group][at] - losses[group][option]) / (costs[group][option] - costs[group][at]),
                    group,
                    option,
                    costs[group][option] - costs[group][at],
                    losses[group][at] - losses[group][option],
                )
                for option in range(len(costs[group]))
                if costs[group][option] > costs[group][at] and losses[group][option] < losses[group][at]
            ]
            if not better:
                break
            # Of equally steep ones the shorter, so that the hull keeps every point.
            step = max(better, key=lambda step: (step.rate, -step.cost))
            steps.append(step)
            at = step.option
    # Stable: a group's own steps grow flatter, so they stay in order.
    return sorted(steps, key=lambda step: -step.rate)


def _greedy(losses: Table, costs: Costs, capacity: int) -> list[int]:
    """Steps that still fit, steepest first: a whole choice that fits, to measure others against."""
    chosen = [_cheapest(losses, costs, group) for group in range(len(costs))]
    room = capacity - sum(costs[group][option] for group, option in enumerate(chosen))
    for step in _steps(losses, costs):
        extra = costs[step.group][step.option] - costs[step.group][chosen[step.group]]
        if extra <= room:
            chosen[step.group] = step.option
            room -= extra
    return chosen


def _undominated(grown: list[tuple[int, float, float, int, int]], parents: list[_Partial]) -> list[_Partial]:
    """Partial choices by rising cost and falling loss: of equal or greater cost only those with less loss."""
    kept: list[_Partial] = []
    least = math.inf
    for cost, loss, reduced, index, option in sorted(grown):
        if loss < least:
            least = loss
            kept.append(_Partial(cost, loss, reduced, (option, parents[index])))
    return kept


def _options(state: _Partial, order: Sequence[int]) -> list[int]:
    chosen = [0] * len(order)
    for group in reversed(order):
        assert state.chosen is not None
        chosen[group], state = state.chosen
    return chosen
