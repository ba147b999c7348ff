"""Every Triton kernel of this package with the types, constants and options of a real launch: what is compiled without a GPU.

A kernel that is launched belongs in KERNELS; a test finds those that are missing. Needs Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kernel_pytorch.kernels import (
    decode_attention,
    decode_attention_jit,
    expand,
    expand_jit,
    row_quant,
    row_quant_jit,
    skinny_w4a16,
    skinny_w4a16_fragment,
    skinny_w4a16_jit,
    skinny_w4a16_wgmma,
    skinny_w4a16_wgmma_jit,
    skinny_w8a16,
    skinny_w8a16_jit,
    split_k,
    split_k_jit,
)
from kernel_pytorch.kernels.gpu_targets import GpuTarget
from kernel_pytorch.kernels.skinny_w4a16_wgmma import WarpgroupConfig

Constant = bool | int | float | str
_FOUR_BITS = {"w_ptr": "*i32", "s_ptr": "*i8", "channel_ptr": "*fp32", "bias_ptr": "*fp32"}


@dataclass(frozen=True)
class Build:
    """One specialization of a kernel.

    kernel: a `triton.jit` function at the top level of a module. types: Triton's type of each argument that is
    passed at a launch (`*bf16`, `i32`). constants: each `constexpr` argument's value. aligned: arguments known to be multiples
    of 16 (of bytes, for a pointer). options: num_warps and the like. Raises ValueError when types and constants together are
    not exactly the kernel's arguments."""

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Constant]
    aligned: tuple[str, ...]
    options: dict[str, Constant]

    def __post_init__(self) -> None:
        known, given = set(self.kernel.arg_names), set(self.types) | set(self.constants)
        if known != given or set(self.types) & set(self.constants):
            odd = sorted((known ^ given) | (set(self.types) & set(self.constants)))
            raise ValueError(f"{self.name}: types and constants must name each argument once; wrong: {', '.join(odd)}")

    @property
    def name(self) -> str:
        """Module and function: skinny_w8a16.matrix."""
        return f"{self.kernel.__module__.rpartition('.')[2].removesuffix('_jit')}.{self.kernel.__name__}"


def _build(
    kernel: Any,
    constants: dict[str, Constant],
    options: dict[str, Constant],
    types: dict[str, str],
    pointers: str,
    aligned: tuple[str, ...] | None = None,
) -> Build:
    """Arguments that are no constants and not in `types` are of type `pointers` where they are called so, else i32. aligned: None
    for all that Triton specializes on and that are no floats."""
    kinds = {n: types.get(n, pointers if n.endswith("_ptr") else "i32") for n in kernel.arg_names if n not in constants}
    if aligned is None:
        loose = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
        aligned = tuple(n for n, kind in kinds.items() if n not in loose and not kind.startswith(("fp", "bf")))
    return Build(kernel, kinds, constants, aligned, options)


def attend(
    on: GpuTarget, config: decode_attention.Config, *, head_dim: int, rows: int, mask: str | None, shared: bool, partial: bool
) -> Build:
    """Query and keys bf16. rows: query rows of a key head. mask: `*bf16`, `*u8` for bool, or None. shared: all rows have one mask.
    partial: the keys of a head are shared by programs."""
    constants: dict[str, Constant] = {"HAS_MASK": mask is not None, "BOOL_MASK": mask == "*u8", "SHARED_MASK": shared, "PARTIAL": partial}
    constants |= {"SCAN": 512 // config.block_s if shared and mask else 0, "D": head_dim, "mask_key": 1}
    constants |= {"BLOCK_D": decode_attention.padded(head_dim), "BLOCK_R": decode_attention.padded(rows), "BLOCK_S": config.block_s}
    constants |= {"EARLY": config.overlap == "early", "LATE": config.overlap == "late"}
    types = {"mask_ptr": mask or "*bf16", "stats_ptr": "*fp32", "scale": "fp32", "out_ptr": "*fp32" if partial else "*bf16"}
    built = _build(decode_attention_jit.attend, constants, _options(config), types, "*bf16")
    # A mask of an odd number of keys has rows that start anywhere.
    return Build(**{**vars(built), "aligned": tuple(n for n in built.aligned if n != "mask_batch")})


def combine(on: GpuTarget, *, head_dim: int = 128, block: int = 64) -> Build:
    constants: dict[str, Constant] = {"D": head_dim, "BLOCK_D": decode_attention.padded(head_dim), "BLOCK": block}
    constants["PDL"] = on.gpu.dependent_launch
    return _build(decode_attention_jit.combine, constants, {}, {"out_ptr": "*bf16"}, "*fp32")


def quantized_rows(on: GpuTarget, kernel: Any, *, format: str, symmetric: bool = True, k: int = 4096) -> Build:
    """One of row_quant's three kernels, for bf16 rows of k columns."""
    config = row_quant.choose(k, on.gpu)
    constants: dict[str, Constant] = {"FORMAT": format, "SYMMETRIC": symmetric, "NATIVE": on.gpu.convert_fp8, "PDL": config.overlap}
    constants |= {"ROWS": config.rows, "BLOCK": config.block, "EVEN": k == config.block}
    if kernel is row_quant_jit.rms_norm:
        constants |= {"HAS_WEIGHT": True, "HAS_RESIDUAL": True, "KEEP_NORM": True}
    types = {"q_ptr": "*i8", "scale_ptr": "*fp32", "zero_ptr": "*fp32", "eps": "fp32"}
    options: dict[str, Constant] = {"num_warps": config.num_warps, "enable_fp_fusion": False}
    return _build(kernel, constants, options, types, "*bf16")


def eight_bits(on: GpuTarget, config: skinny_w8a16.Config, *, format: str, block_m: int = 64, dtype: str = "bf16") -> Build:
    """The kernel of skinny_w8a16 that the configuration asks for: `vector` for one row, else `matrix`."""
    fp8 = format != "int8"
    constants: dict[str, Constant] = {"FP8": fp8, "HAS_BIAS": True, "HAS_ROW_SCALE": True, "EVEN": True}
    constants |= {"BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "AHEAD": config.ahead}
    constants |= {"EARLY": config.overlap == "early", "LATE": config.overlap == "late"}
    types = {"w_ptr": "*i32", "scale_ptr": "*fp32", "row_scale_ptr": "*fp32", "bias_ptr": "*fp32"}
    if config.slices == 0:
        # The conversion that its assembly holds came with sm_89.
        constants |= {"STAGES": config.num_stages, "ASM": on.cuda and (on.gpu.convert_fp8 or not fp8)}
        return _build(skinny_w8a16_jit.vector, constants, _options(config), types, f"*{dtype}")
    constants |= {"PARTIAL": False, "BLOCK_M": block_m, "SLICES": config.slices, "ASM": on.cuda}
    return _build(skinny_w8a16_jit.matrix, constants, _options(config), types, f"*{dtype}")


def four_bits(on: GpuTarget, config: skinny_w4a16.Config, *, m: int = 8, k: int = 4096, dtype: str = "bf16") -> Build:
    """NVIDIA's kernel. m: rows of x. k: in features."""
    config = skinny_w4a16.runnable(config, on.gpu)
    steps, split, even = config.steps(k)
    programs = split if config.cluster else 1
    partial = split > programs
    constants: dict[str, Constant] = {"HAS_BIAS": True, "PARTIAL": partial, "EVEN": even, "HALF": dtype == "fp16", "STEPS": steps}
    constants |= {"ROWS": config.tiles, "COLUMNS": skinny_w4a16.groups(m), "WARPS": config.num_warps, "WARPS_N": config.warps_n}
    constants["DEPTH"], constants["DEPTH_X"] = config.ahead(k)
    constants |= {"OVERLAP": config.overlap, "CLUSTER": programs, "LOOP": config.loop}
    options: dict[str, Constant] = {"num_warps": config.num_warps, "num_ctas": programs}
    if config.registers:
        options["maxnreg"] = config.registers
    types = {"x_ptr": "*i32", **_FOUR_BITS, "out_ptr": "*fp32" if partial else f"*{dtype}"}
    return _build(skinny_w4a16_fragment.tile, constants, options, types, "*fp32")


def warpgroup_four_bits(on: GpuTarget, config: WarpgroupConfig, *, k: int = 4096, dtype: str = "bf16") -> Build:
    """Hopper's kernel. k: in features, whole steps of 128."""
    steps, split, even = config.steps(k)
    constants: dict[str, Constant] = {"HAS_BIAS": True, "PARTIAL": split > 1, "EVEN": even, "HALF": dtype == "fp16", "STEPS": steps}
    constants |= {"ROWS": config.tiles, "BLOCK_M": config.block_m, "WARPS": config.num_warps, "DEPTH": config.ahead(k)}
    constants |= {"PARTS": config.parts, "LEFT": config.left, "OVERLAP": config.overlap}
    types = {**_FOUR_BITS, "s_ptr": "*i32", "out_ptr": "*fp32" if split > 1 else f"*{dtype}"}
    return _build(skinny_w4a16_wgmma_jit.multiply, constants, {"num_warps": config.num_warps}, types, f"*{dtype}")


def portable_four_bits(on: GpuTarget, *, block_m: int = 16, dtype: str = "bf16") -> Build:
    """The kernel of the other GPUs. block_m: rows of x that a program computes."""
    constants: dict[str, Constant] = {"HAS_BIAS": True, "BLOCK_M": block_m, "ROWS": 8}
    return _build(skinny_w4a16_jit.tile, constants, {"num_warps": 4, "num_stages": 1}, _FOUR_BITS, f"*{dtype}")


def expanded_eight_bits(on: GpuTarget, *, format: str, dtype: str = "bf16") -> Build:
    constants: dict[str, Constant] = {"FP8": format != "int8", "ASM": on.cuda, "ROWS": expand.BLOCK_ROWS, "WORDS": expand.BLOCK_WORDS}
    types = {"w_ptr": "*i32", "scale_ptr": "*fp32"}
    return _build(expand_jit.eight_bits, constants, {"num_warps": 4}, types, f"*{dtype}")


def expanded_four_bits(on: GpuTarget, *, dtype: str = "bf16") -> Build:
    constants: dict[str, Constant] = {"PAIRS": expand.BLOCK_PAIRS}
    types = {name: kind for name, kind in _FOUR_BITS.items() if name != "bias_ptr"}
    return _build(expand_jit.four_bits, constants, {"num_warps": 4}, types, f"*{dtype}")


def summed_splits(on: GpuTarget, *, split: int = 4, dtype: str = "bf16") -> Build:
    constants: dict[str, Constant] = {
        "HAS_BIAS": True,
        "HAS_ROW_SCALE": True,
        "SPLIT": split,
        "BLOCK": split_k.BLOCK,
        "PDL": on.gpu.dependent_launch,
    }
    return _build(split_k_jit.sum_splits, constants, {}, {"out_ptr": f"*{dtype}"}, "*fp32")


def _options(config: Any) -> dict[str, Constant]:
    return {"num_warps": config.num_warps, "num_stages": config.num_stages}


def _attend(on: GpuTarget) -> Build:
    config = decode_attention.choose(8, 2048, 128, on.gpu)
    return attend(on, config, head_dim=128, rows=4, mask="*bf16", shared=True, partial=True)


def _four_bits(on: GpuTarget) -> Build:
    config = skinny_w4a16.choose(8, 4096, 4096, on.gpu)
    assert isinstance(config, skinny_w4a16.Config), "eight rows are not what warpgroups are for"
    return four_bits(on, config)


def _vector(on: GpuTarget, format: str) -> Build:
    overlap = "late" if on.gpu.dependent_launch else "none"
    return eight_bits(on, skinny_w8a16.Config(4, 1024, 0, 1, num_warps=2, num_stages=1, overlap=overlap), format=format)


@dataclass(frozen=True)
class Kernel:
    """build: for a target, as a Llama-3-8B layer at decode launches it. runs: whether the target's GPUs run it."""

    build: Callable[[GpuTarget], Build]
    runs: Callable[[GpuTarget], bool] = lambda on: True


# By module and function.
KERNELS: dict[str, Kernel] = {
    "decode_attention.attend": Kernel(_attend),
    "decode_attention.combine": Kernel(combine),
    "expand.eight_bits": Kernel(lambda on: expanded_eight_bits(on, format="float8_e4m3fn")),
    "expand.four_bits": Kernel(expanded_four_bits),
    "row_quant.quantize": Kernel(lambda on: quantized_rows(on, row_quant_jit.quantize, format="int8")),
    "row_quant.rms_norm": Kernel(lambda on: quantized_rows(on, row_quant_jit.rms_norm, format="float8_e4m3fn")),
    "row_quant.swiglu": Kernel(lambda on: quantized_rows(on, row_quant_jit.swiglu, format="float8_e4m3fnuz", k=14336)),
    "skinny_w4a16_fragment.tile": Kernel(_four_bits, runs=lambda on: on.cuda),
    "skinny_w4a16_wgmma.multiply": Kernel(
        lambda on: warpgroup_four_bits(on, skinny_w4a16_wgmma.choose(64, 28672, 4096, on.gpu)), runs=lambda on: on.gpu.warpgroups
    ),
    "skinny_w4a16.tile": Kernel(portable_four_bits),
    "skinny_w8a16.matrix": Kernel(lambda on: eight_bits(on, skinny_w8a16.choose(64, 28672, 4096, on.gpu), format="float8_e4m3fn")),
    "skinny_w8a16.vector": Kernel(lambda on: _vector(on, "float8_e4m3fn")),
    "split_k.sum_splits": Kernel(summed_splits),
}


def builds_for(target: GpuTarget) -> dict[str, Build]:
    """Every kernel that the target's GPUs run, by name."""
    return {name: kernel.build(target) for name, kernel in KERNELS.items() if kernel.runs(target)}
