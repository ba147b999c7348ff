"""Rewrites of the traced graph that Inductor cannot make: operators of our own that can do what follows them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

from kernel_pytorch.kernels import int8_linear


class FuseEpilogues(CustomGraphPass):
    """A GELU that is all that reads an int8 linear becomes that kernel's epilogue."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        int8_linear.absorb_gelu(graph)

    def uuid(self) -> str:
        """Of the sources: a cached graph of other rewrites is not this one's."""
        sources = (__file__, int8_linear.__file__)
        return hashlib.sha256(b"".join(Path(source).read_bytes() for source in sources)).hexdigest()

    # Equal, so that blocks compiled with equal options share what the first one compiled.
    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    def __hash__(self) -> int:
        return hash(type(self))
