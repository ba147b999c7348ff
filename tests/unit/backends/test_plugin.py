"""The plugin road, with the package that docs/backends.md shows: names without imports, resolve, plan, explain, run, and every refusal."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from kernel_pytorch import registry
from kernel_pytorch.backends.detect import BACKENDS, make, matches, plan_backend, resolve
from kernel_pytorch.engine.explain import explain_plan
from kernel_pytorch.errors import AdapterError, ConfigError, RecipeError, UnsupportedOperationError
from kernel_pytorch.recipe.compose import compose
from kernel_pytorch.recipe.load import load_recipe
from kernel_pytorch.schema import BackendConfig
from kernel_pytorch.verify.hardware import HardwareValidator

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^```\w+\n# (\S+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
TARGET = "acme_kernels.backend.AcmeBackend"

Install = Callable[..., Path]


def write_package(folder: Path, name: str, entry_points: str, files: dict[str, str]) -> Path:
    """A package as an installer leaves it: modules, and a dist-info with its metadata."""
    for path, text in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.parent != folder:
            (target.parent / "__init__.py").touch()
        target.write_text(text, encoding="utf-8")
    info = folder / f"{name.replace('-', '_')}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(entry_points, encoding="utf-8")
    return folder


def as_ini(toml: str) -> str:
    """pyproject's tables of entry points as an installer writes them."""
    lines = toml.partition("[project.entry-points")[2]
    text = re.sub(r'\[?(?:project\.entry-points)?\."([\w.]+)"\]', r"[\1]", lines)
    return text.replace('"', "")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    before = set(sys.modules)

    def put(entry_points: str, files: dict[str, str] | None = None, name: str = "acme-kernels") -> Path:
        folder = write_package(tmp_path / name, name, entry_points, files or {})
        monkeypatch.syspath_prepend(str(folder))
        return folder

    yield put
    for name in set(sys.modules) - before:
        if name.startswith("acme_"):
            del sys.modules[name]


@pytest.fixture
def acme(install: Install) -> Path:
    files = {path: text for path, text in FILES.items() if path.endswith(".py")}
    return install(as_ini(FILES["pyproject.toml"]), files)


def imported() -> bool:
    return any(name.startswith("acme_kernels") for name in sys.modules)


def test_the_page_shows_a_whole_package() -> None:
    assert set(FILES) == {"pyproject.toml", "acme_kernels/devices.py", "acme_kernels/backend.py"}
    assert as_ini(FILES["pyproject.toml"]).split() == [
        "[kernel_pytorch.backends]",
        "acme",
        "=",
        "acme_kernels.backend:AcmeBackend",
        "[kernel_pytorch.devices]",
        "acme1",
        "=",
        "acme_kernels.devices:ACME1",
    ]


def test_without_the_package_its_names_are_unknown() -> None:
    assert registry.find_device("acme1") is None
    with pytest.raises(ConfigError, match=r"backend\.hardware: found 'acme1'"):
        compose(["backend.hardware=acme1"])
    with pytest.raises(ConfigError, match=r"backend\._target_: found 'acme_kernels\.backend\.AcmeBackend'"):
        resolve(BackendConfig(_target_=TARGET))
    with pytest.raises(UnsupportedOperationError, match="no backend here is for devices of acme"):
        make("acme", BackendConfig())


def test_names_are_read_and_nothing_is_imported(acme: Path) -> None:
    assert registry.hardware_names()[-1] == registry.device_names()[-1] == "acme1"
    assert registry.find_target("backend", TARGET) is not None
    assert registry.target_names("backend")[-1] == TARGET
    assert compose(["backend.hardware=acme1"]).config.backend.hardware == "acme1"
    assert not imported()


def test_a_recipe_that_names_the_device_imports_nothing(acme: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "acme1_fast.yaml"
    text = (
        "# @package _global_\ndefaults:\n  - override /compile: default\n  - _self_\nbackend: {hardware: acme1}\ninfo: {name: acme1_fast}\n"
    )
    recipe.write_text(text, encoding="utf-8")
    assert load_recipe(str(recipe)).config.backend.hardware == "acme1"
    recipe.write_text(text.replace("/compile: default", "/backend: nvidia"), encoding="utf-8")
    assert load_recipe(str(recipe)).choices["backend"] == "nvidia"
    assert not imported()
    recipe.write_text(text.replace("{hardware: acme1}", f"{{_target_: {TARGET}}}"), encoding="utf-8")
    with pytest.raises(RecipeError, match="_target_"):
        load_recipe(str(recipe))
    assert not imported()


def test_the_hardware_resolves_where_the_device_is(acme: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    away = resolve(BackendConfig(hardware="acme1"))
    assert not away.native
    assert away.reason.startswith("the recipe is for acme1 (a1), this is ")
    monkeypatch.setenv("ACME_DEVICES", "1")
    here = resolve(BackendConfig(hardware="acme1"))
    assert (type(here.backend).__name__, here.native, here.reason) == ("AcmeBackend", True, "hardware acme1: Acme 1 (a1)")
    assert resolve(BackendConfig(hardware="any")).backend.vendor != "acme"


def test_the_target_resolves_and_only_that_target(acme: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(BackendConfig(_target_=TARGET)).reason.startswith("backend acme is not on this machine")
    monkeypatch.setenv("ACME_DEVICES", "1")
    assert resolve(BackendConfig(_target_=TARGET)).backend.vendor == "acme"
    for other in (
        "acme_kernels.backend.AcmeMemory",
        "acme_kernels.backend:AcmeBackend",
        "acme_kernels.backend",
        f"{TARGET}.vendor",
        "os.system",
    ):
        with pytest.raises(ConfigError, match=r"backend\._target_: found"):
            resolve(BackendConfig(_target_=other))


def test_it_plans_and_explains(acme: Path) -> None:
    backend = plan_backend("acme1", BackendConfig(hardware="acme1"))
    assert (backend.facts.arch, backend.facts.memory_bytes, backend.facts.present) == ("a1", 32 * 10**9, False)
    assert backend.available_memory_bytes() == 32 * 10**9
    assert matches(BackendConfig(hardware="acme1"), backend) == (True, "hardware acme1: acme1 (a1)")
    composed = compose(["recipe=cpu_fp32_compile", "backend.hardware=acme1"])
    steps, outcome = explain_plan(composed.config, composed.choices, composed.ignored, "acme1")
    assert outcome == "native: hardware acme1: acme1 (a1)"
    assert next(step.support for step in steps if step.group == "compile") == "native"
    composed = compose(["recipe=a100_fp8"])
    steps, outcome = explain_plan(composed.config, composed.choices, composed.ignored, "acme1")
    assert outcome.startswith("emulated: the recipe is for a100 (sm_80), this is acme1 (a1)")
    assert "not known here" in next(step.reason for step in steps if step.group == "precision")


def test_what_it_claims_is_tried(acme: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACME_DEVICES", "1")
    found = HardwareValidator(make("acme", BackendConfig())).validate()
    assert {check.claim: check.passed for check in found} == {"allocation": True, "matmul float32": True}


def command(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", "kernel_pytorch", *words],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )


def test_the_command_line_explains_it_and_doctor_lists_it(acme: Path) -> None:
    done = command(acme, "explain", "+recipe=cpu_fp32_compile", "backend.hardware=acme1", "--device", "acme1")
    assert done.returncode == 0, done.stderr
    assert "native  hardware acme1: acme1 (a1)" in done.stdout
    done = command(acme, "explain", "+recipe=cpu_fp32_compile", "--device", "acme2")
    assert done.returncode == 2
    assert "did you mean 'acme1'?" in done.stderr
    done = command(acme, "doctor")
    assert done.returncode == 0, done.stderr
    assert re.search(r"installed device +acme1 +acme_kernels\.devices\.ACME1 of", done.stdout)


def test_a_whole_run_on_it_goes_through_its_hooks(acme: Path) -> None:
    out = acme / "run"
    words = ["backend.hardware=acme1", "precision=bf16", "model=decoder", "data.length=8", "measure=off", f"hydra.run.dir={out}"]
    done = command(acme, *words, ACME_DEVICES="1")
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert (result["environment"]["vendor"], result["environment"]["device"]) == ("acme", "Acme 1")
    hooks = {hook["name"]: hook for hook in result["hooks"]}
    assert list(hooks) == ["mode", "fans", "conv_layout", "release_memory"]
    assert (hooks["fans"]["before"], hooks["fans"]["after"], hooks["fans"]["skipped"]) == ({"fan_percent": 20}, {"fan_percent": 80}, "")


BAD_BACKENDS = {
    "takes our vendor": ("nvidia = acme_bad:AcmeBad", "", "'nvidia' is built in"),
    "is no object": ("acme = acme_bad", "", "allowed module:object"),
    "is a nested object": ("acme = acme_bad:Outer.Inner", "", "allowed module:object"),
    "has no module": ("acme = acme_missing:AcmeBad", "", "cannot be imported (ModuleNotFoundError"),
    "has no such class": ("acme = acme_bad:AcmeBad", "", "cannot be imported (AttributeError"),
    "is a function": ("acme = acme_bad:AcmeBad", "def AcmeBad(**kwargs): ...", "allowed a class that derives from"),
    "is another class": ("acme = acme_bad:AcmeBad", "class AcmeBad: ...", "allowed a class that derives from"),
    "is our class under another name": (
        "acme = acme_bad:AcmeBad",
        "from kernel_pytorch.backends.cpu import CpuBackend as AcmeBad",
        "found kernel_pytorch.backends.cpu.CpuBackend of vendor 'cpu'",
    ),
    "has another vendor": (
        "acme = acme_bad:AcmeBad",
        "from kernel_pytorch.backends.cpu import CpuBackend\nclass AcmeBad(CpuBackend):\n    vendor = 'cpu'",
        "found acme_bad.AcmeBad of vendor 'cpu'",
    ),
    "leaves methods out": (
        "acme = acme_bad:AcmeBad",
        "from kernel_pytorch.backends.base import Backend\nclass AcmeBad(Backend):\n    vendor = 'acme'",
        "the class leaves out available, device, make_memory, read_facts, synchronize",
    ),
}


@pytest.mark.parametrize("case", BAD_BACKENDS)
def test_a_bad_backend_is_one_line_that_names_the_package(case: str, install: Install) -> None:
    line, source, says = BAD_BACKENDS[case]
    install(f"[kernel_pytorch.backends]\n{line}\n", {"acme_bad.py": source})
    with pytest.raises(AdapterError) as caught:
        make("acme", BackendConfig())
    assert str(caught.value).startswith("acme-kernels 1.2, entry point ")
    assert says in str(caught.value)
    assert (len(caught.value.lines), caught.value.exit_code) == (1, 2)


BAD_DEVICES = {
    "takes our device": ("a100 = acme_bad:A", "A = 1", "'a100' is built in"),
    "is a number": ("acme1 = acme_bad:A", "A = 1", "found 1; allowed a kernel_pytorch.devices.Device named 'acme1'"),
    "has another name": (
        "acme1 = acme_bad:A",
        "from kernel_pytorch.devices import DEVICES\nA = DEVICES['a100']",
        "allowed a kernel_pytorch.devices.Device named 'acme1'",
    ),
    "has a vendor without a backend": (
        "acme1 = acme_bad:A",
        "from kernel_pytorch.devices import Device\nA = Device('acme1', 'acme', None, None, None, 'none')",
        "found vendor 'acme', for which no installed package has a backend",
    ),
}


@pytest.mark.parametrize("case", BAD_DEVICES)
def test_a_bad_device_is_one_line_that_names_the_package(case: str, install: Install) -> None:
    line, source, says = BAD_DEVICES[case]
    install(f"[kernel_pytorch.devices]\n{line}\n", {"acme_bad.py": source})
    with pytest.raises(AdapterError) as caught:
        plan_backend("acme1", BackendConfig())
    assert says in str(caught.value)
    assert str(caught.value).startswith("acme-kernels 1.2, entry point ")


def test_a_package_can_add_a_card_of_our_vendor(install: Install) -> None:
    source = "from kernel_pytorch.devices import Device\nA = Device('acme_h20', 'nvidia', 'sm_90', 96 * 2**30, 4.0e12, 'a datasheet')"
    install("[kernel_pytorch.devices]\nacme_h20 = acme_bad:A\n", {"acme_bad.py": source})
    backend = plan_backend("acme_h20", BackendConfig())
    assert (backend.vendor, backend.facts.memory_bytes) == ("nvidia", 96 * 2**30)


def test_two_packages_with_one_name_are_an_error_and_one_found_twice_is_not(install: Install, acme: Path) -> None:
    install(as_ini(FILES["pyproject.toml"]), name="acme-twin")
    assert registry.find_target("backend", TARGET) is not None
    install("[kernel_pytorch.backends]\nacme = other:Backend\n", name="acme-rival")
    with pytest.raises(AdapterError, match=r"registers 'acme' too; uninstall one"):
        make("acme", BackendConfig())
    # Built-in names need no look at packages.
    assert resolve(BackendConfig(_target_=BACKENDS["cpu"])).backend.device == torch.device("cpu")
