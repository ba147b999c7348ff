"""Calls of many sizes as calls of few: padded to a bucket, run by one inner callable, and cut back to their own size."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from kernel_pytorch.cache import LRUCache
from kernel_pytorch.graph.bucket_report import BucketReport, num_compilations
from kernel_pytorch.graph.buckets import make_buckets
from kernel_pytorch.graph.padding import Declarations, Found, StaticInputs, form, signature
from kernel_pytorch.graph.padding_check import Passed, check_padding, types_computed_in
from kernel_pytorch.graph.state import ModuleGuard, python_state
from kernel_pytorch.graph.unpadding import Cut, Outputs, cut_leaf
from kernel_pytorch.graph.watched_call import watched_call
from kernel_pytorch.schema import BucketingConfig
from kernel_pytorch.stance import eager_code

# Kinds of calls that differ in more than the declared dims; the least recently used one is forgotten with its buffers.
_MAX_FAMILIES = 64
# Forms of calls, sizes included, whose way is remembered.
_MAX_ROUTES = 1024
# A check costs up to a dozen calls: a model that changed is left alone until it was the same for as many.
_CALLS_OF_A_CHECK = 12
_MAX_TRIES = 2
_version = attrgetter("_version")


@dataclass
class _Bucket:
    """passed: how outputs are cut; None before the first padded call. takes_copies: a call may be made on copies of its arguments,
    since it writes to none; None before that is known. row: its line in the report."""

    targets: dict[str, int]
    row: dict[str, Any]
    passed: Passed | None = None
    takes_copies: bool | None = None
    inputs: StaticInputs | None = None


@dataclass
class _Family:
    """Calls that differ in their declared dims only. num_tries: checks that Python state of the model got in the way of."""

    buckets: dict[tuple[int, ...], _Bucket] = field(default_factory=dict)
    refusal: str | None = None
    num_tries: int = 0

    def forget_checks(self, is_there: Callable[[_Bucket], bool]) -> None:
        """Makes all calls be checked again. Buckets that are no more leave with their memory."""
        self.refusal, self.num_tries = None, 0
        for bucket in self.buckets.values():
            bucket.passed = bucket.takes_copies = None
            if bucket.inputs is not None and not is_there(bucket):
                bucket.row["buffer_bytes"] -= bucket.inputs.num_bytes
        self.buckets = {sizes: bucket for sizes, bucket in self.buckets.items() if is_there(bucket)}


@dataclass
class _Route:
    """Where calls of one form go. found: the declared tensors of the first of them. num_real, num_padded: their elements."""

    found: Found
    family: _Family
    bucket: _Bucket
    exact: bool
    num_real: int
    num_padded: int


class BucketedCall:
    """Pads the declared dims of a call to a bucket's sizes, calls `inner`, and cuts every output dim that follows a declared
    one. With graphs inside, that is one graph a bucket instead of one a size.

    The first padded call of every bucket is checked on its own arguments (see check_padding) and answered by the plain call;
    where the check fails, no call of its kind is padded any more, and `report` says why. Calls go to `straight` as they are
    when they cannot be padded: sizes beyond the last bucket, gradients enabled, another thread inside, arguments that are written
    to or that are objects (a KV cache). A call of exactly a bucket's sizes is not padded and needs no check.

    An output that is an argument comes back as that argument. Cut outputs are contiguous where the plain ones are. The check
    holds for the model as it was: parameters or buffers that are replaced or written to (but for `.data`, which leaves no
    trace) and modes that change make it run again.

    inner: what runs padded calls. plain: the same function, of any size, without state of its own; None is `inner`. straight: runs
    calls that are not padded; None is `plain`. replay: as GraphedCall.replay, of `inner`. checking: entered while a call is
    checked. model: whose signature the declarations are of. tile: see make_buckets. static_inputs: padded arguments are always
    in the same memory, as graphs want them; `hold` is told of it, for a replay may read it when it is let go. num_captures:
    graphs recorded by `inner` so far. busy: someone else captures now."""

    def __init__(
        self,
        model: nn.Module,
        inner: Callable[..., Any],
        dynamic_dims: Sequence[str],
        bucketing: BucketingConfig,
        *,
        plain: Callable[..., Any] | None = None,
        straight: Callable[..., Any] | None = None,
        replay: Callable[[tuple[Any, ...], dict[str, Any]], tuple[bool, Any]] | None = None,
        checking: Callable[[], AbstractContextManager[Any]] = nullcontext,
        tile: int | None = None,
        static_inputs: bool = False,
        num_captures: Callable[[], int] = lambda: 0,
        busy: Callable[[], bool] = lambda: False,
        hold: Callable[[Iterable[torch.Tensor]], None] = lambda _: None,
    ) -> None:
        self._model, self._inner, self._plain = model, inner, plain or inner
        self._unpadded, self._replay, self._checking = straight or self._plain, replay, checking
        self._static_inputs, self._num_captures, self._busy, self._hold = static_inputs, num_captures, busy, hold
        self._declarations = Declarations(model.forward, dynamic_dims)
        self._buckets = {name: make_buckets(bucketing, tile) for name in self._declarations.size_names}
        self._families: LRUCache[Hashable, _Family] = LRUCache(_MAX_FAMILIES)
        self._routes: dict[Hashable, _Route | str] = {}
        self._lock = threading.Lock()
        self._watch_model()
        self._num_calls_unchanged, self._settling = _CALLS_OF_A_CHECK, False
        self._report = BucketReport(bucketing, tile, self._buckets)
        self.report = self._report.values

    @property
    def waste(self) -> float:
        """Elements of padding over real elements of the declared arguments, over the calls of all buckets; 0 before the first."""
        return self._report.waste

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not self._lock.acquire(blocking=False):
            return self._plain(*args, **kwargs)
        try:
            return self._call(args, kwargs)
        finally:
            self._lock.release()

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, counted: bool = False) -> Any:
        """counted: this call was begun before, and then found to have to go another way."""
        key = form(args, kwargs)
        route = None if key is None else self._routes.get(key)
        if isinstance(route, _Route) and not counted and self._is_known(route):
            counted = True
            if not self._observe(route.found):
                done, result = self._replayed(route, args, kwargs)
                if done:
                    return result
        why = self._straight_through()
        if why is not None:
            return self._straight(why, args, kwargs)
        # Looking at the model, or counting, may have emptied the routes.
        route = None if key is None else self._routes.get(key)
        if route is None:
            route = self._route(args, kwargs)
            if key is not None:
                if len(self._routes) >= _MAX_ROUTES:
                    self._routes.clear()
                self._routes[key] = route
        if isinstance(route, str):
            return self._straight(route, args, kwargs)
        if not counted and self._observe(route.found):
            return self._call(args, kwargs, counted=True)
        if route.family.refusal is not None and not route.exact:
            return self._straight(route.family.refusal, args, kwargs)
        found = route.found.again(args, kwargs)
        if route.bucket.passed is None and not route.exact and not found.shows_padding(route.bucket.targets):
            return self._straight("all declared elements are what padding holds: a check would not see it", args, kwargs)
        if route.bucket.passed is None and (not route.exact or (self._static_inputs and route.bucket.takes_copies is None)):
            return self._first(route, found, args, kwargs)
        return self._run(route, found, args, kwargs)

    def _is_known(self, route: _Route) -> bool:
        known = route.bucket.takes_copies if route.exact else route.bucket.passed is not None
        return self._replay is not None and bool(known) and not self._settling and not torch.is_grad_enabled()

    def _route(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Route | str:
        """Where a call goes; or why it goes straight through."""
        found = self._declarations.find(args, kwargs, first=not self._families)
        if isinstance(found, str):
            return found
        targets: dict[str, int] = {}
        for name, size in found.sizes.items():
            bucket_size = self._buckets[name].bucket_of(size)
            if bucket_size is None:
                return "larger than the last bucket"
            targets[name] = bucket_size
        key = signature(args, kwargs, found)
        if key is None:
            return "an argument is an object, what a padded call does to which could not be undone"
        family = self._families.get_or_make(key, _Family)
        bucket = family.buckets.get(tuple(targets.values()))
        if bucket is None:
            bucket = family.buckets[tuple(targets.values())] = _Bucket(targets, self._report.row(targets))
        real, padded = found.num_elements(found.sizes), found.num_elements(targets)
        # Kept for the places alone: a tensor would stay as long.
        places = Found([], found.where, found.dims, found.values, found.kept, found.sizes)
        return _Route(places, family, bucket, targets == found.sizes, real, padded)

    def _observe(self, found: Found) -> bool:
        """Counts a call for buckets that are fitted; whether they are others now."""
        changed = [name for name, size in found.sizes.items() if self._buckets[name].observe(size)]
        for name in changed:
            self.report["sizes"][name] = list(self._buckets[name].sizes)
            # Smaller sizes than were checked may go to a bucket now.
            self._forget_checks()
        return bool(changed)

    def _straight_through(self) -> str | None:
        if torch.is_grad_enabled():
            return "gradients are enabled"
        if self._busy():
            return "the call is being captured by someone else"
        if self._guard.has_hooks():
            return "a module has a forward hook, which would see padding"
        if self._guard.other_code() is not None or (self._settling and self._other_tensors()):
            self._model_changed()
        self._num_calls_unchanged += 1
        self._settling = self._settling and self._num_calls_unchanged < _CALLS_OF_A_CHECK
        return "the model changes from call to call" if self._settling else None

    def _model_changed(self) -> None:
        self._watch_model()
        self._forget_checks()
        self._settling = self._num_calls_unchanged < _CALLS_OF_A_CHECK
        self._num_calls_unchanged = 0

    def _forget_checks(self) -> None:
        """Buckets that are still there keep their memory, whose addresses graphs know."""
        self._routes.clear()
        for family in self._families.values():
            family.forget_checks(self._is_there)

    def _is_there(self, bucket: _Bucket) -> bool:
        return all(target in self._buckets[name].sizes for name, target in bucket.targets.items())

    def _watch_model(self) -> None:
        self._guard = ModuleGuard(self._model)
        self._tensors = [t for t in (*self._model.parameters(), *self._model.buffers()) if not t.is_inference()]
        self._writes = self._num_writes()

    def _other_tensors(self) -> bool:
        return self._num_writes() != self._writes or self._guard.other_tensors() is not None

    def _num_writes(self) -> int:
        return sum(map(_version, self._tensors))

    def _first(self, route: _Route, found: Found, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answers with the plain call, and finds out beside it whether calls like this one may be padded, or, where nothing has
        to be padded, may be made on copies of their arguments."""
        family, bucket = route.family, route.bucket
        if self._other_tensors():
            self._model_changed()
        with eager_code(), self._checking():
            seen = watched_call(self._model, self._plain, found.tensors[0].device, args, kwargs)
            if route.exact:
                bucket.takes_copies = not (seen.writes or seen.changed or Outputs(seen.result).boxes())
            elif seen.refusal is None and not seen.changed:
                state = python_state(self._model)
                self._check(family, bucket, found, seen.result, args, kwargs)
                seen.changed = python_state(self._model) != state
        if not route.exact:
            if seen.changed:
                # A model may fill a cache of its own: for the call's size, then for the bucket's.
                family.num_tries += 1
                bucket.passed = None
            if family.num_tries > _MAX_TRIES:
                seen.refusal = "the call changes Python attributes of the model"
            family.refusal = family.refusal or seen.refusal
            if family.refusal is not None:
                bucket.row["refused"] = family.refusal
        if not seen.ran:
            return self._straight(seen.refusal or "", args, kwargs)
        self._report.straight((None if route.exact else family.refusal) or "answered by the plain call, to watch it")
        return seen.result

    def _check(self, family: _Family, bucket: _Bucket, found: Found, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        def run(tensors: Sequence[torch.Tensor]) -> Any:
            new_args, new_kwargs = found.replace(args, kwargs, tensors)
            return self._plain(*new_args, **new_kwargs)

        types = types_computed_in(self._model, found.tensors[0].device)
        smallest = {name: self._buckets[name].smallest_of(target) for name, target in bucket.targets.items()}
        outcome = check_padding(run, found, result, bucket.targets, smallest, types)
        if isinstance(outcome, str):
            family.refusal = outcome
            return
        if outcome.constant or (not outcome.other_padding and not all(found.kept)):
            # What was left of the arguments at the sizes tried, or came out of them, showed nothing: another call may.
            family.num_tries += outcome.constant
            if family.num_tries > _MAX_TRIES:
                family.refusal = "outputs are one value over and over: nothing can be compared"
            return
        bucket.passed, bucket.takes_copies = outcome, True
        bucket.row.pop("refused", None)
        self._report.checked(bucket.row, outcome)

    def _replayed(self, route: _Route, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, Any]:
        """The road of nearly all calls with graphs: what replays looks at the model itself, while the device works. It looks at the
        model of the last call that went another way, which this object looked at too."""
        found = route.found.again(args, kwargs)
        tensors = self._inputs(route.bucket, found, route.exact)
        assert self._replay is not None
        new_args, new_kwargs = found.replace(args, kwargs, tensors)
        done, result = self._replay(tuple(new_args), new_kwargs)
        if not done or (not route.exact and self._num_writes() != self._writes):
            return False, None
        outputs = Outputs(result)
        if not route.exact and not self._is_as_checked(route.bucket, outputs):
            return False, None
        self._num_calls_unchanged += 1
        return True, self._answer(route, outputs, found, tensors)

    def _run(self, route: _Route, found: Found, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bucket, row = route.bucket, route.bucket.row
        tensors = self._inputs(bucket, found, route.exact)
        captures, compilations = self._num_captures(), num_compilations()
        new_args, new_kwargs = (args, kwargs) if tensors is found.tensors else found.replace(args, kwargs, tensors)
        result = self._inner(*new_args, **new_kwargs)
        row["captures"] += self._num_captures() - captures
        row["compilations"] += num_compilations() - compilations
        if tensors is found.tensors:
            self._report.call(row, route.num_real, route.num_padded)
            return result
        # Looked at here, while a device may still compute: other weights do no harm to a call that writes to nothing.
        if not route.exact and self._other_tensors():
            self._model_changed()
            return self._call(args, kwargs, counted=True)
        outputs = Outputs(result)
        if not route.exact and not self._is_as_checked(bucket, outputs):
            # Python attributes decide on the output, and are not watched: what was checked is another function.
            bucket.passed = None
            return self._straight("the output is not shaped as it was when padding was checked", args, kwargs)
        return self._answer(route, outputs, found, tensors)

    def _is_as_checked(self, bucket: _Bucket, outputs: Outputs) -> bool:
        return bucket.passed is not None and outputs.shapes() == bucket.passed.shapes

    def _answer(self, route: _Route, outputs: Outputs, found: Found, tensors: list[torch.Tensor]) -> Any:
        self._report.call(route.bucket.row, route.num_real, route.num_padded)
        return self._cut(outputs, None if route.exact or route.bucket.passed is None else route.bucket.passed.cuts, found, tensors)

    def _cut(self, outputs: Outputs, cuts: list[Cut] | None, found: Found, tensors: list[torch.Tensor]) -> Any:
        """The caller's outputs. cuts: None where nothing was padded."""
        cuts = [{} for _ in outputs.leaves] if cuts is None else cuts
        static = {tensor.untyped_storage()._cdata for tensor in tensors} if self._static_inputs else set()
        leaves = []
        for leaf, cut in zip(outputs.leaves, cuts, strict=True):
            given = next((mine for mine, padded in zip(found.tensors, tensors, strict=True) if leaf is padded), None)
            if given is not None or not isinstance(leaf, torch.Tensor):
                leaves.append(leaf if given is None else given)
                continue
            part = cut_leaf(leaf, cut, found.sizes)
            # What the next call writes to, or is not laid out as the call without padding lays it out, is copied.
            copied = leaf.untyped_storage()._cdata in static or (cut and not part.is_contiguous())
            leaves.append(part.clone() if copied else part)
        return outputs.rebuilt(leaves)

    def _inputs(self, bucket: _Bucket, found: Found, exact: bool) -> list[torch.Tensor]:
        """The caller's own tensors where they fit; where a graph wants them always in the same memory, copies."""
        if exact and not (self._static_inputs and bucket.takes_copies):
            return found.tensors
        if not self._static_inputs:
            return found.padded(bucket.targets)
        if bucket.inputs is None:
            bucket.inputs = StaticInputs(found, bucket.targets)
            self._hold(bucket.inputs.tensors)
            bucket.row["buffer_bytes"] += bucket.inputs.num_bytes
        bucket.inputs.load(found)
        return bucket.inputs.tensors

    def _straight(self, reason: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._report.straight(reason)
        return self._unpadded(*args, **kwargs)
