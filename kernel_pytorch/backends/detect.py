"""Which backend a recipe gets on this machine, and whether the machine is of the vendor that the recipe is for."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from kernel_pytorch.backends.base import Backend
from kernel_pytorch.devices import DEVICES
from kernel_pytorch.errors import ConfigError
from kernel_pytorch.schema import BackendConfig, nearest
from kernel_pytorch.targets import TARGETS

# By vendor, best first: with hardware `any`, the first that the machine has is taken.
BACKENDS: dict[str, str] = {
    "nvidia": "kernel_pytorch.backends.nvidia.NvidiaBackend",
    "amd": "kernel_pytorch.backends.amd.AmdBackend",
    "cpu": "kernel_pytorch.backends.cpu.CpuBackend",
}


@dataclass(frozen=True)
class Resolution:
    """backend: where the steps run. native: the machine is of the vendor that the recipe asks for; whether it has every
    capability is each step's own answer. reason: why not native, or which choice was made."""

    backend: Backend
    native: bool
    reason: str


def make(vendor: str, config: BackendConfig) -> Backend:
    """The vendor's backend, built from `config` and not yet asked for anything."""
    return _build(BACKENDS[vendor], config)


def resolve(config: BackendConfig) -> Resolution:
    """Picks the backend for this machine. Without the asked-for vendor the machine's own backend is returned, not native."""
    backends = {vendor: make(vendor, config) for vendor in BACKENDS}
    own = next(backend for backend in backends.values() if backend.available())
    asked = None if config._target_ is None else _build(config._target_, config)
    if asked is not None and not asked.available():
        return Resolution(own, False, f"backend {asked.vendor} is not on this machine, which has {own.facts.name}")
    if config.hardware == "any":
        chosen = asked or own
        return Resolution(chosen, True, f"hardware any: {chosen.facts.name}")
    wanted = backends.get(DEVICES[config.hardware].vendor)
    chosen = asked or (wanted if wanted is not None and wanted.available() else own)
    native, reason = matches(config, chosen)
    return Resolution(chosen, native, reason)


def matches(config: BackendConfig, backend: Backend) -> tuple[bool, str]:
    """Whether `backend` is of the vendor of `config.hardware`, and a sentence that says so."""
    facts = backend.facts
    shown = f"{facts.name} ({facts.arch})" if facts.arch else facts.name
    if config.hardware == "any":
        return True, f"hardware any: {shown}"
    wanted = DEVICES[config.hardware]
    if wanted.vendor == backend.vendor:
        return True, f"hardware {wanted.name}: {shown}"
    return False, f"the recipe is for {wanted.name} ({wanted.arch or wanted.vendor}), this is {shown}"


def plan_backend(device_name: str, config: BackendConfig) -> Backend:
    """A backend that answers for a named device, which need not be here: for `explain --device a100`.

    The device `cpu` is the processor of this machine. Raises ConfigError for a name that is not in the table."""
    if device_name not in DEVICES:
        raise ConfigError(f"--device: found {device_name!r}{nearest(device_name, list(DEVICES))}; allowed: {', '.join(DEVICES)}")
    device = DEVICES[device_name]
    backend = make(device.vendor, config)
    backend.plan_for(device)
    return backend


def _build(target: str, config: BackendConfig) -> Backend:
    if target not in TARGETS or TARGETS[target].group != "backend":
        allowed = [name for name, entry in TARGETS.items() if entry.group == "backend"]
        raise ConfigError(f"backend._target_: found {target!r}{nearest(target, allowed)}; allowed: {', '.join(allowed)}")
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)(hardware=config.hardware, on_mismatch=config.on_mismatch)
