"""Facts read from the system, on texts as systems write them."""

from __future__ import annotations

import pytest
import torch

from kernel_pytorch.backends import host
from kernel_pytorch.backends.detect import plan_backend
from kernel_pytorch.schema import BackendConfig

XEON = "model name\t: Intel(R) Xeon(R) Processor\n" + (
    "flags\t\t: fpu avx2 avx512f avx_vnni avx512_bf16 avx512_vnni amx_bf16 amx_tile amx_int8 avx512_fp16\n"
)
GRAVITON = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm bf16 sve\n"


def test_flags_of_a_xeon() -> None:
    assert host.cpu_name(XEON) == "Intel(R) Xeon(R) Processor"
    assert host.isa_flags(XEON) == (
        "amx_bf16",
        "amx_int8",
        "amx_tile",
        "avx2",
        "avx512_bf16",
        "avx512_fp16",
        "avx512_vnni",
        "avx512f",
        "avx_vnni",
    )


def test_flags_of_an_arm_server_have_torchs_names() -> None:
    assert host.isa_flags(GRAVITON) == ("bf16", "dotprod", "i8mm", "neon", "sve")


def test_no_text_claims_nothing() -> None:
    assert host.isa_flags("") == ()


@pytest.mark.parametrize(
    ("value", "cap"),
    [("AVX512_CORE_VNNI", "AVX512_CORE_VNNI"), ("avx512_core_vnni", "AVX512_CORE_VNNI"), ("", None), ("DEFAULT", None), ("nonsense", None)],
)
def test_onednn_cap_is_read_as_onednn_reads_it(monkeypatch: pytest.MonkeyPatch, value: str, cap: str | None) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", value)
    assert host.onednn_cap() == cap


def test_a_cap_takes_amx_away() -> None:
    flags = host.isa_flags(XEON)
    assert host.usable_isa(flags, "AVX512_CORE_VNNI") == ("avx2", "avx512_vnni", "avx512f")
    assert host.usable_isa(flags, "AVX2") == ("avx2",)


def test_a_cap_leaves_arm_flags_alone() -> None:
    assert host.usable_isa(host.isa_flags(GRAVITON), "AVX2") == ("bf16", "dotprod", "i8mm", "neon", "sve")


@pytest.mark.parametrize(("text", "size"), [("32K\n", 32768), ("480M", 503316480), ("2048K", 2097152)])
def test_cache_sizes(text: str, size: int) -> None:
    assert host._size(text) == size


@pytest.mark.parametrize(("online", "nodes"), [("0\n", 1), ("0-1", 2), ("0-3,8,10-11\n", 7), ("", None)])
def test_numa_nodes_are_counted_or_unknown(online: str, nodes: int | None) -> None:
    assert host.num_numa_nodes(online) == nodes


def test_a_cpus_facts_name_isa_threads_and_nodes() -> None:
    facts = plan_backend("cpu", BackendConfig()).facts
    assert facts.isa == host.usable_isa(host.isa_flags(), host.onednn_cap())
    assert facts.num_threads == torch.get_num_threads()
    assert facts.num_numa_nodes == host.num_numa_nodes()
    assert facts.num_numa_nodes is None or facts.num_numa_nodes >= 1


def test_available_memory_is_at_most_the_total() -> None:
    total, available = host.total_memory_bytes(), host.available_memory_bytes()
    assert total is not None
    assert available is None or 0 < available <= total
