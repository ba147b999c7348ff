"""Which backend a recipe gets on this machine, and whether the machine is of the vendor that the recipe is for."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from kernel_pytorch.backends.base import Backend
from kernel_pytorch.devices import Device
from kernel_pytorch.errors import AdapterError, ConfigError, UnsupportedOperationError
from kernel_pytorch.registry import BACKENDS_GROUP, Registered, device_names, find_device, find_target, installed, target_names
from kernel_pytorch.schema import BackendConfig, nearest

# By vendor, best first: with hardware `any`, the first that the machine has is taken. An installed package's backend is
# taken only where a device of its vendor, or its class, is named.
BACKENDS: dict[str, str] = {
    "nvidia": "kernel_pytorch.backends.nvidia.NvidiaBackend",
    "amd": "kernel_pytorch.backends.amd.AmdBackend",
    "tpu": "kernel_pytorch.backends.tpu.TpuBackend",
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
    """The vendor's backend, built from `config` and not yet asked for anything.

    Raises UnsupportedOperationError for a vendor without one, AdapterError for an installed package's that is none."""
    if vendor in BACKENDS:
        return _build(BACKENDS[vendor], config)
    one = installed(BACKENDS_GROUP).get(vendor)
    if one is None:
        raise UnsupportedOperationError(f"no backend here is for devices of {vendor}; there are {', '.join(BACKENDS)}")
    return _build(one.target, config)


def resolve(config: BackendConfig) -> Resolution:
    """Picks the backend for this machine. Without the asked-for vendor the machine's own backend is returned, not native."""
    own = next(backend for backend in (make(vendor, config) for vendor in BACKENDS) if backend.available())
    asked = None if config._target_ is None else _build(config._target_, config)
    if asked is not None and not asked.available():
        return Resolution(own, False, f"backend {asked.vendor} is not on this machine, which has {own.facts.name}")
    if config.hardware == "any":
        chosen = asked or own
        return Resolution(chosen, True, f"hardware any: {chosen.facts.name}")
    chosen = asked or _for_hardware(config) or own
    native, reason = matches(config, chosen)
    return Resolution(chosen, native, reason)


def _for_hardware(config: BackendConfig) -> Backend | None:
    """The backend of the vendor that the recipe is for, where this machine has one."""
    vendor = _device(config.hardware).vendor
    if vendor not in BACKENDS and vendor not in installed(BACKENDS_GROUP):
        return None
    backend = make(vendor, config)
    return backend if backend.available() else None


def matches(config: BackendConfig, backend: Backend) -> tuple[bool, str]:
    """Whether `backend` is of the vendor of `config.hardware`, and a sentence that says so."""
    facts = backend.facts
    shown = f"{facts.name} ({facts.arch})" if facts.arch else facts.name
    if config.hardware == "any":
        return True, f"hardware any: {shown}"
    wanted = _device(config.hardware)
    if wanted.vendor == backend.vendor:
        return True, f"hardware {wanted.name}: {shown}"
    return False, f"the recipe is for {wanted.name} ({wanted.arch or wanted.vendor}), this is {shown}"


def plan_backend(device_name: str, config: BackendConfig) -> Backend:
    """A backend that answers for a named device, which need not be here: for `explain --device a100`.

    The device `cpu` is the processor of this machine. Raises ConfigError for a name that nobody registers, and
    UnsupportedOperationError for a device of a vendor without a backend."""
    device = find_device(device_name)
    if device is None:
        allowed = device_names()
        raise ConfigError(f"--device: found {device_name!r}{nearest(device_name, allowed)}; allowed: {', '.join(allowed)}")
    backend = make(device.vendor, config)
    backend.plan_for(device)
    return backend


def _device(hardware: str) -> Device:
    device = find_device(hardware)
    if device is None:
        raise ConfigError(f"backend.hardware: found {hardware!r}; no installed package registers it any more")
    return device


def _build(target: str, config: BackendConfig) -> Backend:
    if find_target("backend", target) is None:
        allowed = target_names("backend")
        raise ConfigError(f"backend._target_: found {target!r}{nearest(target, allowed)}; allowed: {', '.join(allowed)}")
    if target in BACKENDS.values():
        module, _, name = target.rpartition(".")
        cls = getattr(importlib.import_module(module), name)
    else:
        cls = _adapter(next(one for one in installed(BACKENDS_GROUP).values() if one.target == target))
    return cls(hardware=config.hardware, on_mismatch=config.on_mismatch)


def _adapter(one: Registered) -> type[Backend]:
    """The class of an installed package, which must be what its entry point says that it is."""
    cls = one.load()
    if not isinstance(cls, type) or not issubclass(cls, Backend):
        raise AdapterError(f"{one.shown}: found {cls!r}; allowed a class that derives from {Backend.__module__}.Backend")
    if f"{cls.__module__}.{cls.__qualname__}" != one.target or cls.vendor != one.name:
        found = f"{cls.__module__}.{cls.__qualname__} of vendor {cls.vendor!r}"
        raise AdapterError(f"{one.shown}: found {found}; allowed a class under its own name whose vendor is the entry point's name")
    missing = sorted(cls.__abstractmethods__)
    if missing:
        raise AdapterError(f"{one.shown}: the class leaves out {', '.join(missing)}")
    return cls
