"""Whether a call may be padded, tried on a real one: its result must be the same without padding, and whatever the padding
holds. A model that mixes positions (a mean, a batch norm in training, attention without a mask) fails here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from kernel_pytorch.graph.padding import BY_VALUE, Found
from kernel_pytorch.graph.unpadding import Cut, Outputs, cut_leaf, following, merged

# Relative L2 error of one position that rounding in another order explains, by the least precise type computed in.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Of a model whose own runs differ: how much more than that other padding may change, and runs that show it.
_NOISE_MARGIN, _NOISE_RUNS = 4.0, 3
# What a model may raise for a size that it does not take.
_ERRORS = (RuntimeError, AssertionError, LookupError, ValueError, TypeError, ArithmeticError, AttributeError)
Run = Callable[[Sequence[torch.Tensor]], Any]
# Positions with less than this part of the mean norm are judged by the mean: their own is rounding.
_SMALL_NORM = 0.1


def types_computed_in(model: nn.Module, device: torch.device) -> set[torch.dtype]:
    """Floating point types that a model's results are rounded to on the way. TF32 stands as float16, which has as many bits."""
    types = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if torch.is_autocast_enabled(device.type):
        types.add(torch.get_autocast_dtype(device.type))
    if device.type == "cuda":
        has_conv = any(isinstance(module, _ConvNd) for module in model.modules())
        conv = torch.backends.cudnn.conv.fp32_precision  # pyright: ignore[reportAttributeAccessIssue]
        if torch.backends.cuda.matmul.fp32_precision == "tf32" or (has_conv and conv != "ieee"):
            types.add(torch.float16)
    return types


def rounding(types: Iterable[torch.dtype]) -> float:
    """The relative L2 error that rounding in another order explains."""
    return max((_TOLERANCE.get(dtype, 0.0) for dtype in types), default=0.0)


@dataclass(frozen=True)
class Passed:
    """cuts: of each output leaf. shapes: of the padded outputs. max_relative_l2: largest error of a position against the call
    without padding. num_runs: of the model. other_padding: padding was varied; False where all of it is relied on. constant: no
    output varied from element to element, as behind a ReLU that lets nothing through, so that nothing was shown."""

    cuts: list[Cut]
    shapes: list[tuple[int, ...] | None]
    max_relative_l2: float
    num_runs: int
    other_padding: bool
    constant: bool


class _Unequal(Exception):
    """Why the check failed."""


def check_padding(
    run: Run, found: Found, result: Any, targets: Mapping[str, int], smallest: Mapping[str, int], types: Iterable[torch.dtype]
) -> Passed | str:
    """Tries a call that is not of its bucket's size; returns why calls like it must not be padded.

    run: calls the model, without side effects, with other declared tensors. result: what the call returned. targets: the
    bucket. smallest: least sizes that go there. types: what the model computes in, beside the types of its outputs.

    Sizes tried: the call's own; one less, which no block size that divides the former divides; the bucket's smallest."""
    check = _Check(run, targets, tuple(types))
    shorter = {name: max(size - 1, 1) for name, size in found.sizes.items()}
    least = {name: min(size, smallest[name]) for name, size in found.sizes.items()}
    # A size that is the bucket's own says nothing about the smaller ones that will come.
    base = {name: size if size < targets[name] or smallest[name] == size else size - 1 for name, size in found.sizes.items()}
    try:
        plain = Outputs(result)
        if base != found.sizes:
            found = found.shortened(base)
            plain = Outputs(check.run(found.tensors))
        boxes = plain.boxes()
        if boxes:
            return f"the output holds a {boxes[0]}, whose tensors cannot be cut"
        for index, leaf in enumerate(plain.leaves):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.numel() and not leaf.isfinite().any():
                return f"output {index} has no finite value: nothing can be compared"
        constant = not all(found.kept) and all(map(_is_constant, plain.leaves))
        cuts = check.cuts(found, plain)
        padded = check.equal(found, plain, cuts)
        tried = [base]
        for sizes in (shorter, least):
            if sizes not in tried:
                tried.append(sizes)
                part = found.shortened(sizes)
                check.equal(part, Outputs(check.run(part.tensors)), cuts)
    except _Unequal as why:
        return str(why)
    except _ERRORS as error:
        return f"a padded call failed: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return Passed(cuts, padded.shapes(), check.max_error, check.num_runs, check.other_padding, constant)


def _is_constant(leaf: Any) -> bool:
    """Whether a leaf says nothing of positions: not a tensor, or one value over and over."""
    return not isinstance(leaf, torch.Tensor) or (leaf.numel() > 1 and bool((leaf == leaf.reshape(-1)[0]).all()))


class _Check:
    """The steps of one check, with what they found out on the way."""

    def __init__(self, run: Run, targets: Mapping[str, int], types: tuple[torch.dtype, ...]) -> None:
        self._run, self._targets, self._types = run, targets, types
        self.max_error = 0.0
        self.num_runs = 1
        self.other_padding = False

    def run(self, tensors: Sequence[torch.Tensor]) -> Any:
        self.num_runs += 1
        return self._run(tensors)

    def cuts(self, found: Found, plain: Outputs) -> list[Cut]:
        """Pads one size at a time, so that a dim shows which it follows."""
        parts = []
        for name, size in found.sizes.items():
            target = self._targets[name]
            if size == target:
                continue
            alone = {**found.sizes, name: target}
            part = following(plain, Outputs(self.run(found.padded(alone))), name, size, target)
            parts.append(_or_raise(part))
        return _or_raise(merged(parts))

    def equal(self, found: Found, plain: Outputs, cuts: list[Cut]) -> Outputs:
        """The padded outputs, equal to the plain ones and independent of the padding; raises _Unequal otherwise."""
        padding = found.padded(self._targets)
        padded = Outputs(self.run(padding))
        shown = ", ".join(f"{name} {size}" for name, size in found.sizes.items())
        leaves = self._real(padded, plain, cuts, found.sizes)
        for index, (actual, expected) in enumerate(zip(leaves, plain.leaves, strict=True)):
            error = _difference(actual, expected, cuts[index])
            self.max_error = max(self.max_error, error)
            if not error <= self._tolerance(expected):
                raise _Unequal(
                    f"output {index} of a call of {shown} differs when it is padded: relative L2 error {error:.2g} at one position"
                )
        other = found.padded_otherwise(self._targets)
        if all(torch.equal(a, b) for a, b in zip(padding, other, strict=True)):
            return padded
        self.other_padding = True
        varied = self._real(Outputs(self.run(other)), plain, cuts, found.sizes)
        errors = [_difference(actual, expected, cut) for actual, expected, cut in zip(varied, leaves, cuts, strict=True)]
        if any(errors):
            # Of equal shapes, the same kernels: a position that does not see padding is the same to the last bit, unless two
            # runs differ anyway.
            noise = [0.0] * len(leaves)
            for _ in range(_NOISE_RUNS):
                again = self._real(Outputs(self.run(padding)), plain, cuts, found.sizes)
                noise = [max(a, _difference(b, c, cut)) for a, b, c, cut in zip(noise, again, leaves, cuts, strict=True)]
            for index, error in enumerate(errors):
                if error > _NOISE_MARGIN * noise[index]:
                    raise _Unequal(f"output {index} of a call of {shown} depends on what the padding holds: relative L2 error {error:.2g}")
        return padded

    def _real(self, padded: Outputs, plain: Outputs, cuts: list[Cut], sizes: Mapping[str, int]) -> list[Any]:
        """Padded outputs without their padding; raises _Unequal when they are not of the plain ones' shapes then."""
        if not plain.same_structure(padded):
            raise _Unequal("the structure of the output depends on the padding")
        leaves = [cut_leaf(leaf, cut, sizes) for leaf, cut in zip(padded.leaves, cuts, strict=True)]
        for index, (leaf, expected) in enumerate(zip(leaves, plain.leaves, strict=True)):
            if isinstance(leaf, torch.Tensor) and isinstance(expected, torch.Tensor) and leaf.shape != expected.shape:
                raise _Unequal(f"output {index} is of shape {tuple(leaf.shape)} when padded, and of {tuple(expected.shape)} when not")
        return leaves

    def _tolerance(self, expected: Any) -> float:
        if not isinstance(expected, torch.Tensor) or not expected.is_floating_point():
            return 0.0
        return rounding((*self._types, expected.dtype))


def _or_raise(cuts: list[Cut] | str) -> list[Cut]:
    if isinstance(cuts, str):
        raise _Unequal(cuts)
    return cuts


def _difference(actual: Any, expected: Any, cut: Cut) -> float:
    """Largest relative L2 error of a position: of the elements that share an index in dim 0 and in the dims cut. 0 for what
    is equal, infinite for integers, flags and other values that are not."""
    if not isinstance(actual, torch.Tensor) or not isinstance(expected, torch.Tensor):
        return 0.0 if type(actual) is type(expected) and _same(actual, expected) else float("inf")
    if actual.dtype != expected.dtype:
        return float("inf")
    if torch.equal(actual, expected):
        return 0.0
    if not expected.is_floating_point() and not expected.is_complex():
        return float("inf")
    wide = torch.complex128 if expected.is_complex() else torch.float64
    a, b = actual.to(wide), expected.to(wide)
    same = (a == b) | (a.isnan() & b.isnan())
    error, size = (a - b).abs().masked_fill(same, 0.0), b.abs().nan_to_num(0.0, 0.0, 0.0)
    inner = [dim for dim in range(b.dim()) if dim != 0 and dim not in cut]
    if b.dim() == 0:
        error, size = error[None], size[None]
    if inner:
        error, size = error.square().sum(inner).sqrt(), size.square().sum(inner).sqrt()
    relative = error / size.clamp(min=max(float(size.mean()) * _SMALL_NORM, torch.finfo(torch.float64).tiny))
    largest = float(relative.max())
    return float("inf") if largest != largest else largest


def _same(actual: Any, expected: Any) -> bool:
    """Of values that compare as what they are; another object may hold anything."""
    return actual is expected or (isinstance(expected, BY_VALUE) and bool(actual == expected))
