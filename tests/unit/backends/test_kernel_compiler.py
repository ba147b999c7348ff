"""The kernel compilers without a GPU: what garbage says, what is cached where, and that a damaged file is never used."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import triton
import triton.language as tl

from kernel_pytorch.backends import code_objects
from kernel_pytorch.backends.compile_process import PROCESS, complaint
from kernel_pytorch.backends.kernel_compiler import CudaCompiler, ROCmCompiler, compiler_for, precompile
from kernel_pytorch.errors import CompilationError, ConfigError, UnsupportedOperationError
from kernel_pytorch.kernels.builds import Build
from kernel_pytorch.kernels.gpu_targets import GPU_TARGETS


@triton.jit
def double(x_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + at, tl.load(x_ptr + at, mask=at < n) * 2, mask=at < n)


@triton.jit
def undefined_name(x_ptr, n, BLOCK: tl.constexpr):
    tl.store(x_ptr, no_such_name + n)  # noqa: F821  # pyright: ignore[reportUndefinedVariable]


@triton.jit
def odd_range(x_ptr, n, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, 3), n)


@triton.jit
def bad_assembly(x_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    y = tl.inline_asm_elementwise("no.such.instruction $0, $1;", "=f,f", [tl.load(x_ptr + at)], dtype=tl.float32, is_pure=True, pack=1)
    tl.store(x_ptr + at, y)


@triton.jit
def ends_llvm_on_amd(x_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    y = tl.inline_asm_elementwise("add.f32 $0, $1, $1;", "=f,f", [tl.load(x_ptr + at)], dtype=tl.float32, is_pure=True, pack=1)
    tl.store(x_ptr + at, y)


def build(kernel=double, *, block: int = 64, **options) -> Build:
    return Build(kernel, {"x_ptr": "*fp32", "n": "i32"}, {"BLOCK": block}, ("x_ptr",), options)


@pytest.mark.parametrize(
    ("target", "kernel", "first_line"),
    [
        ("gfx942", undefined_name, "NameError('no_such_name is not defined')"),
        ("sm_90", undefined_name, "NameError('no_such_name is not defined')"),
        ("gfx950", odd_range, "arange's range must be a power of 2"),
        ("gfx942", ends_llvm_on_amd, "error: couldn't allocate output register for constraint 'f'"),
        ("sm_80", bad_assembly, "Unknown modifier '.such'"),
        ("sm_100", bad_assembly, "Unknown modifier '.such'"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_garbage_names_kernel_target_and_the_compilers_first_line(tmp_path, target, kernel, first_line):
    compiler = compiler_for(target, folder=tmp_path)
    with pytest.raises(CompilationError) as raised:
        compiler.compile(build(kernel))
    message = str(raised.value)
    assert message.startswith(f"test_kernel_compiler.{kernel.__name__} for {target}: ")
    assert message.endswith(first_line)
    assert "\n" not in message
    assert list(tmp_path.rglob("*")) == []
    # The next kernel compiles, whatever the last one did to the compiling process.
    assert compiler.compile(build()).binary[:4] == b"\x7fELF"
    assert (compiler.stats.compiled, compiler.stats.memory.size) == (1, 1)


def test_the_same_kernel_is_compiled_once_then_found_in_memory_then_on_disk(tmp_path):
    first = ROCmCompiler("gfx942", folder=tmp_path)
    made = first.compile(build())
    assert first.compile(build()) is made
    memory = first.stats.memory
    assert (first.stats.compiled, first.stats.from_disk, memory.hits, memory.misses) == (1, 0, 1, 1)
    second = ROCmCompiler("gfx942", folder=tmp_path)
    assert second.compile(build()) == made
    assert (second.stats.compiled, second.stats.from_disk, second.stats.damaged) == (0, 1, 0)
    assert made.path is not None
    assert made.path.read_bytes() == made.binary
    assert made.path.with_suffix(".amdgcn").read_text() == made.assembly
    assert {path.suffix for path in tmp_path.rglob("*.*")} == {".hsaco", ".amdgcn", ".json"}


def test_the_least_recently_used_code_object_leaves_memory_not_the_disk(tmp_path):
    compiler = CudaCompiler("sm_90", folder=tmp_path, max_in_memory=1)
    for block in (64, 128, 64):
        compiler.compile(build(block=block))
    stats = compiler.stats
    assert (stats.compiled, stats.from_disk, stats.memory.evictions, stats.memory.size) == (2, 1, 2, 1)


def test_the_key_covers_source_specialization_options_and_target(tmp_path):
    compiler = ROCmCompiler("gfx942", folder=tmp_path)
    plain = build()
    others = [
        build(undefined_name),
        build(block=128),
        build(num_warps=8),
        replace(plain, types={**plain.types, "x_ptr": "*fp16"}),
        replace(plain, aligned=()),
    ]
    keys = [compiler.key(one) for one in (plain, *others)] + [ROCmCompiler("gfx950").key(plain), CudaCompiler("sm_90").key(plain)]
    assert len(set(keys)) == len(keys) == 8
    assert compiler.key(build()) == keys[0]


def test_the_key_covers_the_compilers_own_switches_and_version(monkeypatch):
    compiler = ROCmCompiler("gfx942")
    before = compiler.key(build())
    monkeypatch.setenv("DISABLE_LLVM_OPT", "1")
    assert compiler.key(build()) != before
    monkeypatch.delenv("DISABLE_LLVM_OPT")
    assert compiler.key(build()) == before
    monkeypatch.setattr(triton, "__version__", "0.0.1")
    assert compiler.key(build()) != before


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("suffix", [".hsaco", ".amdgcn", ".json"])
@pytest.mark.parametrize(
    "damage", [flip_a_byte, cut, Path.unlink, lambda path: path.write_bytes(b"")], ids=["flip", "cut", "lose", "empty"]
)
def test_a_damaged_file_is_compiled_again(tmp_path, suffix, damage):
    made = ROCmCompiler("gfx942", folder=tmp_path).compile(build())
    assert made.path is not None
    damage(made.path.with_suffix(suffix))
    # The JSON file is written last: without it nothing was ever stored.
    damaged = int(made.path.with_suffix(".json").exists())
    again = ROCmCompiler("gfx942", folder=tmp_path)
    assert again.compile(build()) == made
    assert (again.stats.compiled, again.stats.from_disk, again.stats.damaged) == (1, 0, damaged)
    assert ROCmCompiler("gfx942", folder=tmp_path).compile(build()) == made


def test_another_targets_file_under_the_right_name_is_refused(tmp_path):
    made, other = (compiler_for(name, folder=tmp_path).compile(build()) for name in ("gfx942", "gfx950"))
    target = GPU_TARGETS["gfx942"]
    forged = replace(made, binary=other.binary)
    code_objects.store(tmp_path, forged, target)
    with pytest.raises(ValueError, match=r"an ELF file for architecture 0x4f; gfx942 is 0x4c"):
        code_objects.load(tmp_path, made.kernel, made.key, target)
    again = ROCmCompiler("gfx942", folder=tmp_path)
    assert again.compile(build()).binary == made.binary
    assert again.stats.damaged == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda elf: b"", "no 64-bit ELF file"),
        (lambda elf: b"MZ" + elf[2:], "no 64-bit ELF file"),
        (lambda elf: elf[:18] + b"\xbe\x00" + elf[20:], "machine 190; gfx942 is machine 224"),
        (lambda elf: elf[:48] + b"\x3f" + elf[49:], "architecture 0x3f; gfx942 is 0x4c"),
        (lambda elf: elf[:-1], "a cut ELF file"),
    ],
)
def test_a_binary_is_checked_to_be_elf_of_the_right_machine(tmp_path, change, says):
    binary = ROCmCompiler("gfx942", folder=tmp_path).compile(build()).binary
    code_objects.check_elf(binary, GPU_TARGETS["gfx942"])
    with pytest.raises(ValueError, match=says):
        code_objects.check_elf(change(binary), GPU_TARGETS["gfx942"])


def test_a_folder_that_cannot_be_written_leaves_the_code_object_without_a_path(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    made = ROCmCompiler("gfx942", folder=blocked).compile(build())
    assert made.path is None
    assert made.binary[:4] == b"\x7fELF"


def test_threads_share_one_compilation(tmp_path):
    compiler, found = ROCmCompiler("gfx942", folder=tmp_path), []
    threads = [threading.Thread(target=lambda: found.append(compiler.compile(build(block=256)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(code is found[0] for code in found)
    assert compiler.stats.compiled == 1


def test_names_that_are_not_there_are_refused_with_what_is_allowed():
    with pytest.raises(ConfigError, match=r"target: found 'gfx94' \(did you mean 'gfx942'\?\); allowed: gfx942, gfx950"):
        ROCmCompiler("gfx94")
    with pytest.raises(ConfigError, match="target: found 'gfx942'; allowed: sm_80, sm_90, sm_100"):
        CudaCompiler("gfx942")
    with pytest.raises(ConfigError, match="target: found 'metal'"):
        compiler_for("metal")
    with pytest.raises(ConfigError, match=r"kernel: found 'sum_splits'"):
        precompile(["gfx942"], ["sum_splits"])


def test_a_kernel_inside_a_function_is_refused():
    @triton.jit
    def local(x_ptr, n, BLOCK: tl.constexpr):
        tl.store(x_ptr, n)

    with pytest.raises(ValueError, match="must be at the top level of a module"):
        ROCmCompiler("gfx942").compile(build(local))


KERNEL_FILE = """
import triton
import triton.language as tl


@triton.jit
def add(x_ptr, n, BLOCK: tl.constexpr):
    tl.store(x_ptr, n + {number})
"""


def test_a_kernel_of_any_file_compiles_and_a_file_changed_since_its_import_does_not(tmp_path):
    file = tmp_path / "own_kernels.py"
    file.write_text(KERNEL_FILE.format(number=1))
    spec = importlib.util.spec_from_file_location("own_kernels", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = CudaCompiler("sm_80", folder=tmp_path / "one").compile(build(module.add))
    assert made.kernel == "own_kernels.add"
    file.write_text(KERNEL_FILE.format(number=2))
    with pytest.raises(CompilationError, match=r"own_kernels\.add for sm_80: its source file was changed after it was imported"):
        CudaCompiler("sm_80", folder=tmp_path / "two").compile(build(module.add))


def test_a_process_in_which_triton_interprets_says_so(tmp_path):
    code = """
from kernel_pytorch.backends.kernel_compiler import precompile
from kernel_pytorch.errors import UnsupportedOperationError
try:
    list(precompile(["gfx942"], ["split_k.sum_splits"]))
except UnsupportedOperationError as error:
    print(error)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "KERNEL_PYTORCH_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "Triton interprets kernels in this process: unset TRITON_INTERPRET to compile them\n"


def test_precompiling_writes_into_the_projects_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("KERNEL_PYTORCH_CACHE", str(tmp_path))
    made = list(precompile(["gfx942", "sm_80"], ["split_k.sum_splits"]))
    assert [(code.target, code.kernel) for code in made] == [("gfx942", "split_k.sum_splits"), ("sm_80", "split_k.sum_splits")]
    for code in made:
        assert code.path is not None
        assert code.path.parent == tmp_path / "code_objects" / code.target
        facts = json.loads(code.path.with_suffix(".json").read_text())
        assert (facts["kernel"], facts["target"], facts["entry"]) == (code.kernel, code.target, "sum_splits")
    assert list(tmp_path.rglob(".*")) == []


def test_the_compiling_process_starts_again_after_it_was_closed(tmp_path):
    PROCESS.close()
    PROCESS.close()
    assert ROCmCompiler("gfx942", folder=tmp_path).compile(build()).binary[:4] == b"\x7fELF"


def test_what_a_compiler_complains_of_first():
    assert complaint("note: x\n  a.ptx, line 4; error   : Unknown modifier\nmore\n") == "a.ptx, line 4; error   : Unknown modifier"
    assert complaint("PTXAS error: Internal Triton PTX codegen error\nptxas fatal   : no") == "ptxas fatal   : no"
    assert complaint("Traceback\n  code\nAssertionError: odd\n\n") == "AssertionError: odd"
    assert complaint(" \n", -9) == "the compiler ended with code -9 and said nothing"


def test_an_unsupported_compiler_is_an_unsupported_operation(monkeypatch):
    monkeypatch.setattr("triton.compiler.compiler.backends", {})
    with pytest.raises(UnsupportedOperationError, match=r"gfx942: this Triton, .*, has no compiler for amd"):
        ROCmCompiler("gfx942").key(build())
