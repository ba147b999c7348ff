"""The structured config: one dataclass a group. The only home of fields, defaults, ranges and units.

Rules that OmegaConf 2.3 sets: constraints stand in `Annotated`, never in `= Field(...)`; choices are Enums whose names
equal their values, never Literal; no unions of classes. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Dict, List, Optional

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from kernel_pytorch.choices import (
    ActivationGranularity,
    ActivationMode,
    AllocationStrategy,
    BucketStrategy,
    CompileMode,
    GraphDeploymentStrategy,
    OnMismatch,
    Phase,
    ScaleSearch,
    SdpaBackend,
    WeightGranularity,
)
from kernel_pytorch.formats import FORMATS
from kernel_pytorch.values import KEEP as KEEP
from kernel_pytorch.values import ActivationFormat, Assignment, DtypeName, DynamicDimName, FormatName, HardwareName, one_of_numbers
from kernel_pytorch.values import nearest as nearest

# Raised only when the meaning of an existing value changes; a new field with a default leaves it alone.
SCHEMA_VERSION = 1

# The fixed order in which optimizers change a model, and the groups that a recipe is about.
OPTIMIZER_GROUPS = ("attention", "fusion", "precision", "memory", "compile", "graph")
RECIPE_GROUPS = ("backend", *OPTIMIZER_GROUPS)
RUN_GROUPS = ("model", "data", "verify", "measure")


@dataclass
class BackendConfig:
    """The vendor layer, and the hardware that the recipe is for."""

    _target_: Annotated[Optional[str], Field(description="backend class; null picks the vendor of the hardware or machine")] = None
    hardware: Annotated[HardwareName, Field(description="device the recipe is written for; `any` is the machine it runs on")] = "any"
    on_mismatch: Annotated[OnMismatch, Field(description="on a machine that is not that hardware: run plain-torch references, or stop")] = (
        OnMismatch.emulate
    )


@dataclass
class GroupConfig:
    """What all optimizer groups share. `_target_` null means the group does nothing."""

    _target_: Annotated[Optional[str], Field(description="optimizer class; null leaves this axis alone")] = None
    include: Annotated[List[str], Field(description="fnmatch patterns on module names; empty means every eligible module")] = field(
        default_factory=list
    )
    exclude: Annotated[List[str], Field(description="fnmatch patterns on module names that stay as they are")] = field(default_factory=list)


@dataclass
class AttentionConfig(GroupConfig):
    """Which implementation computes attention."""

    backend: Annotated[SdpaBackend, Field(description="implementation that scaled_dot_product_attention must use")] = SdpaBackend.auto


@dataclass
class FusionConfig(GroupConfig):
    """Which neighbouring modules become one."""


@dataclass
class WeightConfig:
    """How weights are stored."""

    format: Annotated[Optional[FormatName], Field(description="stored number format; null keeps the weights")] = None
    granularity: Annotated[WeightGranularity, Field(description="what shares one scale in formats without blocks of their own")] = (
        WeightGranularity.channel
    )
    group_size: Annotated[
        int, one_of_numbers((32, 64, 128)), Field(description="int4: values that share a scale and a zero (32, 64, 128)")
    ] = 64
    scale_search: Annotated[ScaleSearch, Field(description="nvfp4: how block scales are picked, offline; free when the model runs")] = (
        ScaleSearch.search
    )
    assign: Annotated[
        List[Assignment], Field(description="PATTERN=FORMAT for single modules, first match wins; FORMAT `keep` leaves a module as it is")
    ] = field(default_factory=list)


@dataclass
class AllocationConfig:
    """Mixed formats under a budget: which modules are stored in which of `formats`."""

    strategy: Annotated[Optional[AllocationStrategy], Field(description="what scores the modules; null stores all in weight.format")] = None
    effective_bits: Annotated[
        Optional[float], Field(gt=0, le=32, description="most stored bits a weight, scales included, over the chosen modules (bits)")
    ] = None
    formats: Annotated[List[FormatName], Field(description="formats to choose from")] = field(default_factory=list)
    num_calibration_calls: Annotated[int, Field(ge=1, le=4096, description="calibration samples that scores are measured on")] = 32
    sensitivity_share: Annotated[
        float, Field(gt=0, le=1, description="part of the modules whose sensitivity is measured; the others' is predicted from the prior")
    ] = 1.0
    grouped: Annotated[
        bool,
        Field(description="modules that read the very same tensor in calibration get one format: only then can they become one matmul"),
    ] = False


@dataclass
class ActivationConfig:
    """How inputs of a linear layer are quantized before the matmul."""

    mode: Annotated[
        ActivationMode, Field(description="none computes in the model's dtype; dynamic scales each call; static by calibration, once")
    ] = ActivationMode.none
    format: Annotated[Optional[ActivationFormat], Field(description="number format of the activations; null with mode none")] = None
    granularity: Annotated[ActivationGranularity, Field(description="what shares one scale")] = ActivationGranularity.token
    symmetric: Annotated[bool, Field(description="false gives int8 a zero point beside each scale: one-sided values use all 256 codes")] = (
        True
    )
    fast_accumulation: Annotated[
        bool,
        Field(
            description="float8_e4m3fn on Ada and Hopper: sums stay in the matrix unit, less exact than float32; the product's relative L2"
            " error grows from 1.7e-3 to 2.1e-3 over 4,096 inputs and to 3.3e-3 over 14,336"
        ),
    ] = False


@dataclass
class QualityFloor:
    """The least agreement with the baseline that the scheme promises on trained weights."""

    cosine_min: Annotated[Optional[float], Field(ge=-1, le=1, description="least cosine similarity over the rows (dimensionless)")] = None
    sqnr_db: Annotated[Optional[float], Field(ge=0, le=400, description="least signal-to-quantization-noise ratio (dB)")] = None


@dataclass
class PrecisionConfig(GroupConfig):
    """What weights are stored in, what activations are quantized to, what is computed in."""

    dtype: Annotated[Optional[DtypeName], Field(description="element type computed in; null keeps the model's")] = None
    weight: WeightConfig = field(default_factory=WeightConfig)
    activation: ActivationConfig = field(default_factory=ActivationConfig)
    min_features: Annotated[int, Field(ge=1, le=65536, description="linear layers with fewer inputs or outputs stay as they are")] = 16
    allocation: AllocationConfig = field(default_factory=AllocationConfig)
    num_calibration_calls: Annotated[int, Field(ge=1, le=4096, description="samples that static activation scales are calibrated on")] = 32
    quality: QualityFloor = field(default_factory=QualityFloor)

    @model_validator(mode="after")
    def _activation_format_matches_mode(self) -> PrecisionConfig:
        if (self.activation.mode is ActivationMode.none) != (self.activation.format is None):
            raise ValueError(
                f"activation.mode={self.activation.mode.value} contradicts activation.format={self.activation.format or 'null'};"
                " mode none goes with format null, the others with a number format"
            )
        if self.activation.format is not None and self.activation.format != self.weight.format:
            raise ValueError(
                f"activation.format={self.activation.format} with weight.format={self.weight.format or 'null'}:"
                " a matmul needs one format for both; set them alike"
            )
        if not self.activation.symmetric and self.activation.format != "int8":
            raise ValueError(
                f"activation.symmetric=false with activation.format={self.activation.format or 'null'}: only int8 has a zero point"
            )
        if self.activation.fast_accumulation and self.activation.format != "float8_e4m3fn":
            raise ValueError(
                f"activation.fast_accumulation=true with activation.format={self.activation.format or 'null'}: only the matmul of two"
                " float8_e4m3fn matrices has it; use precision=fp8_dynamic, or leave it out"
            )
        if self.activation.mode is ActivationMode.static and self.activation.granularity is not ActivationGranularity.tensor:
            raise ValueError("activation.mode=static with activation.granularity=token: a token's scale is known in its call; use tensor")
        found = (self.activation.mode, self.activation.granularity)
        if self.activation.format == "nvfp4" and found != (ActivationMode.dynamic, ActivationGranularity.tensor):
            raise ValueError(
                f"activation.format=nvfp4 with mode={found[0].value} and granularity={found[1].value}: beside its blocks' scales it"
                " has one of the tensor, from each call; use mode dynamic and granularity tensor"
            )
        return self

    @model_validator(mode="after")
    def _mixed_formats_are_weight_only(self) -> PrecisionConfig:
        mixed = "weight.assign" if self.weight.assign else "allocation.strategy" if self.allocation.strategy is not None else None
        if mixed is not None and self.activation.mode is not ActivationMode.none:
            raise ValueError(
                f"{mixed} with activation.mode={self.activation.mode.value}: formats are mixed where activations are not quantized"
            )
        if self.weight.assign and self.allocation.strategy is not None:
            raise ValueError("weight.assign with allocation.strategy: the one is the other's result; leave one out")
        return self

    @model_validator(mode="after")
    def _allocation_is_whole(self) -> PrecisionConfig:
        found = self.allocation
        if found.strategy is None and (found.effective_bits is not None or found.formats or found.grouped):
            raise ValueError("allocation.effective_bits, allocation.formats and allocation.grouped need allocation.strategy")
        if found.strategy is not None and (found.effective_bits is None or len(set(found.formats)) < 2):
            raise ValueError("allocation.strategy needs allocation.effective_bits and two or more allocation.formats")
        return self

    @model_validator(mode="after")
    def _blocks_have_their_own_scales(self) -> PrecisionConfig:
        block = FORMATS[self.weight.format].block if self.weight.format is not None else 0
        if block and self.weight.granularity is not WeightGranularity.channel:
            raise ValueError(f"weight.granularity=tensor with weight.format={self.weight.format}: its scales belong to blocks of {block}")
        return self


@dataclass
class MemoryConfig(GroupConfig):
    """Where tensors live."""

    prefetch_depth: Annotated[
        int, Field(ge=1, le=64, description="blocks copied to the device while one computes; the device holds one block more than this")
    ] = 1
    num_resident_blocks: Annotated[int, Field(ge=0, le=65536, description="blocks, evenly spaced, that stay on the device")] = 0


@dataclass
class CompileConfig(GroupConfig):
    """How torch.compile is used. Never turns CUDA graphs on: that is the group `graph`."""

    mode: Annotated[CompileMode, Field(description="how long Inductor searches for a faster kernel")] = CompileMode.default
    fullgraph: Annotated[bool, Field(description="a graph break is an error")] = False
    dynamic: Annotated[Optional[bool], Field(description="compile for changing shapes; null lets torch decide")] = None
    combo_kernels: Annotated[bool, Field(description="small kernels that do not need one another's results become one")] = False
    programmatic_dependent_launch: Annotated[
        bool, Field(description="a kernel starts before the one before it ends, and waits for its results (NVIDIA sm_90 and later)")
    ] = False


@dataclass
class BucketingConfig:
    """Which padded sizes the declared dims of a call have."""

    strategy: Annotated[BucketStrategy, Field(description="how the padded sizes are chosen")] = BucketStrategy.geometric
    min_size: Annotated[int, Field(ge=1, le=1048576, description="least padded size (elements along the dim)")] = 1
    max_size: Annotated[
        int, Field(ge=1, le=1048576, description="largest padded size; larger calls are not padded (elements along the dim)")
    ] = 2048
    growth: Annotated[
        float, Field(gt=1, le=16, description="geometric, hardware_aware, and what fitted ladders start from: a bucket over the one before")
    ] = 2.0
    step: Annotated[int, Field(ge=1, le=1048576, description="linear: elements between buckets")] = 64
    num_buckets: Annotated[int, Field(ge=1, le=64, description="adaptive, memory_optimal: most buckets of one size")] = 6
    max_waste: Annotated[float, Field(ge=0, le=16, description="memory_optimal: padding over real elements that is allowed (ratio)")] = 0.25
    fit_after: Annotated[
        int, Field(ge=1, le=1048576, description="adaptive, memory_optimal: calls before the first fit; later ones when calls have doubled")
    ] = 256

    @model_validator(mode="after")
    def _range_is_not_empty(self) -> BucketingConfig:
        if self.min_size > self.max_size:
            raise ValueError(f"min_size={self.min_size} is above max_size={self.max_size}")
        return self


@dataclass
class GraphConfig(GroupConfig):
    """CUDA graph capture of the call."""

    strategy: Annotated[
        GraphDeploymentStrategy, Field(description="gain that a replay must measure, and calls that must repay its capture")
    ] = GraphDeploymentStrategy.balanced
    num_warmup_calls: Annotated[int, Field(ge=1, le=1000, description="calls on a side stream before capture")] = 3
    min_speedup: Annotated[
        Optional[float],
        Field(ge=1, le=100, description="replay is kept when this many times as fast as the call without it; null: the strategy's"),
    ] = None
    memory_budget_bytes: Annotated[
        Optional[int], Field(ge=1, description="device memory for graphs; null is a quarter of what is free at the first capture")
    ] = None
    dynamic_dims: Annotated[
        List[DynamicDimName],
        Field(description="ARGUMENT:DIM[@SIZE][=VALUE] of the dims that are padded; those without @SIZE are one size; empty pads nothing"),
    ] = field(default_factory=list)
    bucketing: BucketingConfig = field(default_factory=BucketingConfig)


@dataclass
class ModelConfig:
    """Where the module and its workload come from."""

    _target_: Annotated[Optional[str], Field(description="model source class")] = None
    preset: Annotated[Optional[str], Field(description="named size of a built-in architecture")] = None
    path: Annotated[Optional[str], Field(description="local folder with a transformers checkpoint")] = None
    factory: Annotated[Optional[str], Field(description="`module:function` that returns an nn.Module")] = None
    dtype: Annotated[Optional[DtypeName], Field(description="element type of the baseline; null is the source's own")] = None
    phase: Annotated[Optional[Phase], Field(description="what one call is; null is the source's own")] = None


@dataclass
class DataConfig:
    """What the model is fed."""

    _target_: Annotated[Optional[str], Field(description="data source class; null is the model source's own")] = None
    path: Annotated[Optional[str], Field(description="text file, UTF-8, one sample a line")] = None
    batch: Annotated[Optional[int], Field(ge=1, le=65536, description="samples a call; null is the model source's own")] = None
    length: Annotated[
        Optional[int],
        Field(ge=1, le=1048576, description="tokens a sample, or the context of a decode step; null is the model source's own"),
    ] = None


@dataclass
class VerifyConfig:
    """The two gates: is it implemented right, and is it still the same model."""

    enabled: Annotated[bool, Field(description="false gives the verdict `unverified`")] = True
    num_rows: Annotated[int, Field(ge=256, le=65536, description="output rows compared, none of which calibration or timing saw")] = 256
    cosine_min: Annotated[Optional[float], Field(ge=-1, le=1, description="raises the scheme's floor (dimensionless)")] = None
    sqnr_db: Annotated[Optional[float], Field(ge=0, le=400, description="raises the scheme's floor (dB)")] = None
    max_abs: Annotated[Optional[float], Field(ge=0, description="largest absolute difference of an output allowed (the output's unit)")] = (
        None
    )
    top1_agreement: Annotated[Optional[float], Field(ge=0, le=1, description="least share of rows with the same largest logit")] = None
    budget: Annotated[
        float, Field(ge=1, le=2, description="implementation gate: our error over the plain reference's error that is allowed")
    ] = 2.0


@dataclass
class MeasureConfig:
    """How the ladder is timed, and what fails the run."""

    enabled: Annotated[bool, Field(description="false measures nothing")] = True
    num_rounds: Annotated[int, Field(ge=3, le=10000, description="interleaved rounds; the median over them is reported")] = 20
    min_round_ms: Annotated[float, Field(ge=0, le=60000, description="calls are repeated until an arm's round takes this long (ms)")] = 50.0
    ablate: Annotated[bool, Field(description="also time the recipe less one step each")] = False
    require_gain: Annotated[bool, Field(description="fail a result that is slower than eager and no smaller")] = True
    min_speedup: Annotated[Optional[float], Field(ge=0, le=1000, description="least eager latency over the recipe's latency")] = None
    max_memory_ratio: Annotated[Optional[float], Field(gt=0, le=1000, description="most model bytes of the recipe over the baseline's")] = (
        None
    )


@dataclass
class ProvenOn:
    """One machine on which the recipe was measured: the figures of a result.json."""

    device: str = ""
    date: str = ""
    torch: str = ""
    model: str = ""
    ratio_to_eager: Annotated[Optional[float], Field(gt=0, description="eager latency over the recipe's latency")] = None
    cosine_min: Annotated[Optional[float], Field(ge=-1, le=1, description="least cosine similarity over the rows")] = None


@dataclass
class InfoConfig:
    """What the author says of the recipe; not part of the digest, not inherited."""

    name: Annotated[str, Field(max_length=100, description="the recipe's name")] = ""
    description: Annotated[str, Field(max_length=1000, description="one line for `list`")] = ""
    hardware: Annotated[List[str], Field(description="hardware that the author claims it runs on")] = field(default_factory=list)
    proven_on: Annotated[List[ProvenOn], Field(description="measurements, one a machine")] = field(default_factory=list)


@dataclass
class RootConfig:
    """A whole run."""

    backend: BackendConfig = field(default_factory=BackendConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    graph: GraphConfig = field(default_factory=GraphConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    info: InfoConfig = field(default_factory=InfoConfig)
    sweep: Annotated[Dict[str, List[str]], Field(description="options or values to sweep under -m, by group or key")] = field(
        default_factory=dict
    )
    seed: Annotated[int, Field(ge=0, le=2**31 - 1, description="seed of random weights and inputs")] = 0
