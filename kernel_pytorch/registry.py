"""Backends and devices by name: ours, which stand in tables, and those of installed packages, which name theirs in their metadata.

An entry point is trusted: whoever installs a package runs its code. A recipe is not: it can only pick names that are
registered, and reading it imports nothing of a package; that happens when the named device is planned for. Torch-free.

    [project.entry-points."kernel_pytorch.backends"]     # vendor = class
    acme = "acme_kernels.backend:AcmeBackend"
    [project.entry-points."kernel_pytorch.devices"]      # what backend.hardware and --device may name = a Device
    acme1 = "acme_kernels.devices:ACME1"
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from typing import Any

from kernel_pytorch.devices import DEVICES, HARDWARE, VENDORS, Device
from kernel_pytorch.errors import AdapterError
from kernel_pytorch.targets import TARGETS, Target

BACKENDS_GROUP = "kernel_pytorch.backends"
DEVICES_GROUP = "kernel_pytorch.devices"
# What every backend's constructor takes.
_BACKEND = Target("backend", ("hardware", "on_mismatch"))


@dataclass(frozen=True)
class Registered:
    """One name of an installed package. target: `module.Class`, as in `_target_`. package: its name and version."""

    name: str
    target: str
    package: str
    entry: metadata.EntryPoint

    def load(self) -> Any:
        """The object that the entry point names; imports the package. Raises AdapterError when there is none."""
        try:
            return self.entry.load()
        except (ImportError, AttributeError) as error:
            raise AdapterError(f"{self.shown}: cannot be imported ({type(error).__name__}: {error})") from error

    @property
    def shown(self) -> str:
        return f"{self.package}, entry point {self.name} = {self.entry.value} of {self.entry.group}"


def installed(group: str) -> dict[str, Registered]:
    """Entry points of a group by name, with nothing imported.

    Raises AdapterError for one that takes a built-in name, for two packages that take the same one, and for one that is not
    of the form module:object."""
    reserved = VENDORS if group == BACKENDS_GROUP else HARDWARE
    found: dict[str, Registered] = {}
    for entry in metadata.entry_points(group=group):
        package = "an unknown package" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"
        one = Registered(entry.name, f"{entry.module}.{entry.attr}", package, entry)
        before = found.get(entry.name)
        if entry.name in reserved:
            raise AdapterError(f"{one.shown}: {entry.name!r} is built in; allowed other names than {', '.join(reserved)}")
        if not entry.attr or "." in entry.attr:
            raise AdapterError(f"{one.shown}: found {entry.value!r}; allowed module:object")
        # A package that is found twice on the path registers the same thing twice.
        if before is not None and before.entry.value != entry.value:
            raise AdapterError(f"{one.shown}: {before.package} registers {entry.name!r} too; uninstall one")
        found[entry.name] = one
    return found


def backend_targets() -> dict[str, Target]:
    """Every `backend._target_` that may be named: an exact list, ours first."""
    own = {name: target for name, target in TARGETS.items() if target.group == "backend"}
    return {**own, **{one.target: _BACKEND for one in installed(BACKENDS_GROUP).values()}}


def find_target(group: str, name: Any) -> Target | None:
    """The registered class of a group with that full dotted name, or None: no prefix, no alias."""
    target = TARGETS.get(name) if isinstance(name, str) else None
    if target is None and group == "backend" and isinstance(name, str):
        target = backend_targets().get(name)
    return target if target is not None and target.group == group else None


def target_names(group: str) -> tuple[str, ...]:
    """What a group's `_target_` may be."""
    return tuple(backend_targets() if group == "backend" else [name for name, target in TARGETS.items() if target.group == group])


def device_names() -> tuple[str, ...]:
    """Devices that a recipe can be planned for, with those of installed packages."""
    return (*DEVICES, *installed(DEVICES_GROUP))


def hardware_names() -> tuple[str, ...]:
    """What `backend.hardware` accepts: a device, or `any`."""
    return (*HARDWARE, *installed(DEVICES_GROUP))


def is_hardware(name: str) -> bool:
    """Whether `backend.hardware` accepts a name; looks at installed packages only for one that is not built in."""
    return name in HARDWARE or name in installed(DEVICES_GROUP)


def find_device(name: str) -> Device | None:
    """The row of a device; of an installed package's, by importing it. None for a name that nobody registers.

    Raises AdapterError when the package registers something else under that name."""
    if name in DEVICES:
        return DEVICES[name]
    one = installed(DEVICES_GROUP).get(name)
    if one is None:
        return None
    device = one.load()
    if not isinstance(device, Device) or device.name != name:
        raise AdapterError(f"{one.shown}: found {device!r}; allowed a kernel_pytorch.devices.Device named {name!r}")
    if device.vendor not in VENDORS and device.vendor not in installed(BACKENDS_GROUP):
        raise AdapterError(f"{one.shown}: found vendor {device.vendor!r}, for which no installed package has a backend")
    return device
