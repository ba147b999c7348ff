"""A recipe and its parents, and the rule that verify, measure and quality floors are only ever tightened."""

from __future__ import annotations

import math
from typing import Any

from kernel_pytorch.errors import RecipeError
from kernel_pytorch.recipe.guard import GATES, RecipeBody, read_recipe
from kernel_pytorch.recipe.keys import coerce, default, owner, quoted
from kernel_pytorch.recipe.options import default_choices, option_values
from kernel_pytorch.recipe.sources import RecipeFile, RecipeSources, shown

MAX_PARENTS = 16

# +1: a recipe may raise it, -1: lower it; null is the loosest either way.
_DIRECTION = {
    "verify.enabled": 1,
    "verify.num_rows": 1,
    "verify.cosine_min": 1,
    "verify.sqnr_db": 1,
    "verify.top1_agreement": 1,
    "verify.max_abs": -1,
    "verify.budget": -1,
    "measure.enabled": 1,
    "measure.num_rounds": 1,
    "measure.min_round_ms": 1,
    "measure.ablate": 1,
    "measure.require_gain": 1,
    "measure.min_speedup": 1,
    "measure.max_memory_ratio": -1,
    "precision.quality.cosine_min": 1,
    "precision.quality.sqnr_db": 1,
}


def read_chain(file: RecipeFile, sources: RecipeSources) -> list[RecipeBody]:
    """The recipe, then its parents. Raises RecipeError for mistakes in any of the files, missing parents and cycles."""
    chain: list[RecipeBody] = []
    while True:
        body = read_recipe(file, sources)
        chain.append(body)
        if body.parent is None:
            break
        where = shown(body.file.path)
        try:
            file = sources.parent(body.file, body.parent)
        except RecipeError as error:
            raise RecipeError([f"{where}: defaults: {line}" for line in error.lines]) from error
        names = [link.file.name for link in chain]
        if any(file.path.resolve() == link.file.path.resolve() for link in chain):
            raise RecipeError(f"{where}: defaults: found a cycle, {' -> '.join([*names, file.name])}; allowed parents that end")
        if len(chain) > MAX_PARENTS:
            raise RecipeError(f"{where}: defaults: found more than {MAX_PARENTS} parents; allowed at most {MAX_PARENTS}")
    errors = [line for index in range(len(chain)) for line in _loosened(chain[index], chain[index + 1 :])]
    if errors:
        raise RecipeError(errors)
    return chain


def inherited_sweep(chain: list[RecipeBody]) -> dict[str, list[Any]]:
    """The sweep block of a chain: the child's lists replace its parents', key by key."""
    return {key: values for body in reversed(chain) for key, values in body.sweep.items()}


def looser(key: str, value: Any, than: Any) -> bool:
    """Whether `value` asks for less than `than` at a gate."""
    return _strictness(key, value) < _strictness(key, than)


def is_gate(key: str) -> bool:
    return key in _DIRECTION


def _strictness(key: str, value: Any) -> float:
    return -math.inf if value is None else _DIRECTION[key] * float(value)


def _loosened(body: RecipeBody, parents: list[RecipeBody]) -> list[str]:
    """Gates that `body` leaves looser than they are without it."""
    below = choices_of(parents)
    chosen = below | body.choices
    errors: list[str] = []
    for key in _DIRECTION:
        group = key.split(".")[0]
        if group in GATES:
            floor, found = _effective(key, below, parents), _effective(key, chosen, [body, *parents])
        elif key in body.values:
            # A scheme states its own floor; another scheme's does not bind this one, a parent recipe's does.
            floors = [_effective(key, chosen, []), *(coerce(key, parent.values[key])[0] for parent in parents if key in parent.values)]
            floor, found = max(floors, key=lambda value: _strictness(key, value)), coerce(key, body.values[key])[0]
        else:
            continue
        if looser(key, found, floor):
            where = key if key in body.values else f"defaults: override /{group}: {body.choices[group]}: {key}"
            bound = quoted(floor) if isinstance(floor, bool) else f"at {'least' if _DIRECTION[key] > 0 else 'most'} {quoted(floor)}"
            errors.append(f"{shown(body.file.path)}: {where}: found {quoted(found)}; allowed {bound}: a recipe may only tighten it")
    return errors


def _effective(key: str, choices: dict[str, str], chain: list[RecipeBody]) -> Any:
    """A gate's value with these options and this chain."""
    group = key.split(".")[0]
    found = next(
        (body.values[key] for body in chain if key in body.values), option_values(group, choices[group]).get(key, default_value(key))
    )
    return coerce(key, found)[0]


def choices_of(chain: list[RecipeBody]) -> dict[str, str]:
    """Group -> option of a chain over config.yaml."""
    return default_choices() | {group: option for body in reversed(chain) for group, option in body.choices.items()}


def default_value(key: str) -> Any:
    """The schema's default of a dotted leaf."""
    place = owner(key)
    assert place is not None
    return default(*place)
