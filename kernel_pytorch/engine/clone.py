"""Structural clones: new modules, the same parameters, copied buffers."""

from __future__ import annotations

import copy

from torch import nn

from kernel_pytorch.errors import UnsupportedOperationError


def structural_clone(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode whose modules are new and whose Parameter objects are the caller's own.

    Replacing a module of the clone leaves `model` alone; parameters cost no memory twice. A compiled call
    (`model.compile()`) is not carried over. Raises UnsupportedOperationError when the model cannot be copied.
    """
    memo = {id(parameter): parameter for parameter in model.parameters()}
    try:
        clone = copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise UnsupportedOperationError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); give it a __deepcopy__:"
            " the result is compared with an untouched copy"
        ) from error
    return clone.eval()
