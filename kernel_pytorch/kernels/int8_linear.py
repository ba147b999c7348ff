"""Linear with int8 weights, inputs quantized row by row in the kernel: x86-64 with AVX512-VNNI or AMX.

`reference` says what it computes; `available` builds the C++ kernel once for this torch and compiler and says why not
when it cannot. `int8_linear.cpp` beside this file is the kernel; `torch.ops.kernel_pytorch.int8_linear` the operator.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from pathlib import Path

import torch

from kernel_pytorch.errors import UnsupportedOperationError
from kernel_pytorch.kernels.native import NativeLibrary, build

# (M, K, N) that tests and benchmarks share: MiniLM's layers, one row, odd widths, no rows.
SHAPES = ((256, 384, 1152), (256, 384, 384), (256, 384, 1536), (256, 1536, 384), (1, 384, 384), (3, 33, 17), (37, 130, 70), (0, 64, 64))

BLOCK_N, BLOCK_K, GROUP = 16, 64, 4
# Position of `gelu` among the operator's arguments.
_GELU_ARGUMENT = 7
# 255 * 127 * K must fit the int32 sums.
MAX_K = 65536

_FLAGS = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni", "avx2", "fma", "f16c", "amx-tile", "amx-int8")


def reference(
    x: torch.Tensor, q: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None, *, symmetric: bool, gelu: bool = False
) -> torch.Tensor:
    """x [M, K] floating, q [N, K] int8, weight_scale [N], bias [N] -> [M, N] in x.dtype; sums in float64.

    Row codes are 0..255 over [min(x, 0), max(x, 0)], or -127..127 over [-max|x|, max|x|] when symmetric."""
    values = x.float()
    if symmetric:
        width = values.abs().amax(1, keepdim=True).clamp_min(1e-30)
        codes, step = torch.round(values * (127 / width)), width / 127
    else:
        low, high = values.amin(1, keepdim=True).clamp_max(0), values.amax(1, keepdim=True).clamp_min(0)
        width = (high - low).clamp_min(1e-30)
        zero = torch.round(-low * (255 / width))
        codes, step = (torch.round(values * (255 / width)) + zero).clamp(0, 255) - zero, width / 255
    y = (codes.double() @ q.double().t()) * step.double() * weight_scale.double()
    y = y if bias is None else y + bias.double()
    return (torch.nn.functional.gelu(y) if gelu else y).to(x.dtype)


def pack(q: torch.Tensor) -> torch.Tensor:
    """int8 [N, K] -> [N/16, K/4, 16, 4], N and K padded with zeros to 16 and 64."""
    n, k = q.shape
    padded = q.new_zeros((-(-n // BLOCK_N) * BLOCK_N, -(-k // BLOCK_K) * BLOCK_K))
    padded[:n, :k] = q
    return padded.view(-1, BLOCK_N, padded.shape[1] // GROUP, GROUP).permute(0, 2, 1, 3).contiguous()


def unpack(packed: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """The int8 [n, k] that `pack` was given."""
    return packed.permute(0, 2, 1, 3).reshape(packed.shape[0] * BLOCK_N, -1)[:n, :k]


def pad_outputs(values: torch.Tensor) -> torch.Tensor:
    """[N] padded with zeros to the packed weight's N."""
    return torch.nn.functional.pad(values, (0, -values.shape[0] % BLOCK_N))


@functools.cache
def _library() -> NativeLibrary:
    library = build(Path(__file__).with_name("int8_linear.cpp"), flags=tuple(f"-m{flag}" for flag in _FLAGS))
    if library.path is not None:
        torch.ops.load_library(str(library.path))
        torch.library.register_fake("kernel_pytorch::int8_linear", _fake)
    return library


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_sum: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    symmetric: bool,
    gelu: bool,
    amx: bool,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def choose(isa: Collection[str]) -> tuple[str | None, str]:
    """The kernel for a machine with these instruction sets, `int8_amx` or `int8_avx512_vnni`, or None; and why not."""
    if "avx512_vnni" not in isa:
        return None, "the int8 kernel needs avx512_vnni"
    library = _library()
    if library.path is None:
        return None, library.reason
    if "amx_int8" in isa and torch.cpu._init_amx():
        return "int8_amx", ""
    return "int8_avx512_vnni", ""


def require(kernel: str) -> None:
    """Loads the operator for a kernel that `choose` named elsewhere. Raises UnsupportedOperationError when this machine cannot run it."""
    has_amx = kernel != "int8_amx" or torch.cpu._init_amx()
    if not torch.cpu._is_vnni_supported() or not has_amx:
        raise UnsupportedOperationError(f"{kernel} was chosen on another machine; this processor cannot run it: quantize the model here")
    library = _library()
    if library.path is None:
        raise UnsupportedOperationError(f"{kernel}: {library.reason}")


def run(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_sum: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    *,
    symmetric: bool,
    amx: bool,
    gelu: bool = False,
) -> torch.Tensor:
    """x [..., K] float32 or bfloat16 -> [..., N] in x.dtype. weight: from `pack`; weight_scale, weight_sum (float32 and int32,
    the sum of a row's codes): padded; bias: float32 [N]; gelu: the erf form, on the
    output. Raises ValueError when shapes do not fit. `choose` must have
    named a kernel first: it loads the operator."""
    return torch.ops.kernel_pytorch.int8_linear.default(x, weight, weight_scale, weight_sum, bias, out_features, symmetric, gelu, amx)


def absorb_gelu(graph: torch.fx.Graph) -> int:
    """Moves F.gelu (erf form) into the int8 linear whose output only it reads; returns how many. For graphs as Dynamo makes them."""
    namespace = torch.ops.kernel_pytorch
    if not hasattr(namespace, "int8_linear"):
        return 0
    count = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not torch.nn.functional.gelu or len(node.args) != 1:
            continue
        source = node.args[0]
        erf = node.kwargs.get("approximate", "none") == "none" and set(node.kwargs) <= {"approximate"}
        if not erf or not isinstance(source, torch.fx.Node) or source.target is not namespace.int8_linear.default or len(source.users) != 1:
            continue
        source.update_arg(_GELU_ARGUMENT, True)
        node.replace_all_uses_with(source)
        graph.erase_node(node)
        count += 1
    return count
