"""`tune`: measures the kernels for few rows on this GPU and writes the table that they read."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from kernel_pytorch.cli.arguments import near, shown
from kernel_pytorch.errors import ConfigError, UnsupportedOperationError

# Llama-3-8B's decode linears, (out features, in features).
LAYERS = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
FLAGS = ("--kernel", "--layer", "--out", "--seconds")
SECONDS = 150.0
_LAYER = re.compile(r"([1-9]\d{0,6})x([1-9]\d{0,6})")


@dataclass(frozen=True)
class Request:
    """layers: (N, K). out: a file, or a folder; None for the user's cache folder. seconds: of one kernel's search."""

    kernels: tuple[str, ...]
    layers: tuple[tuple[int, int], ...]
    out: Path | None
    seconds: float


def kernels() -> tuple[str, ...]:
    """The kernels that have a search space here."""
    known = ("skinny_w8a16", "skinny_w4a16")
    return tuple(name for name in known if importlib.util.find_spec(f"kernel_pytorch.kernels.{name}_space") is not None)


def parse(words: list[str]) -> Request:
    """Raises ConfigError, all mistakes at once."""
    errors, given, rest = list[str](), {flag: list[str]() for flag in FLAGS}, list(words)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if flag not in FLAGS:
            errors.append(f"tune: found {shown(flag)}{near(flag, FLAGS)}; allowed {', '.join(FLAGS)}")
        elif equals or (rest and not rest[0].startswith("--")):
            given[flag].append(value if equals else rest.pop(0))
        else:
            errors.append(f"tune: {flag} needs a value")
    errors += [
        f"tune: {flag} is given {len(given[flag])} times; allowed once" for flag in FLAGS if flag != "--layer" and len(given[flag]) > 1
    ]
    allowed = (*kernels(), "all")
    kernel = (given["--kernel"] or ["all"])[0]
    if kernel not in allowed:
        errors.append(f"tune: --kernel: found {shown(kernel)}{near(kernel, allowed)}; allowed {', '.join(allowed)}")
    layers = []
    for text in given["--layer"]:
        match = _LAYER.fullmatch(text)
        if match:
            layers.append((int(match[1]), int(match[2])))
        else:
            errors.append(f"tune: --layer: found {shown(text)}; allowed OUTxIN features, such as 4096x14336")
    seconds = SECONDS
    for text in given["--seconds"][:1]:
        try:
            seconds = float(text)
        except ValueError:
            seconds = 0.0
        if not 1 <= seconds <= 86400:
            errors.append(f"tune: --seconds: found {shown(text)}; allowed 1 to 86400")
    chosen = kernels() if kernel == "all" else (kernel,)
    out = Path(given["--out"][0]).expanduser() if given["--out"] else None
    if out is not None and len(chosen) > 1 and not out.is_dir():
        errors.append(
            f"tune: --out: {shown(str(out))} is no folder, and {len(chosen)} kernels write {len(chosen)} files; choose one with --kernel"
        )
    if errors:
        raise ConfigError(errors)
    return Request(chosen, tuple(dict.fromkeys(layers)) or LAYERS, out, seconds)


def tune(words: list[str]) -> int:
    """Raises UnsupportedOperationError without a GPU, ConfigError for a mistake in the words."""
    request = parse(words)

    import torch

    if not torch.cuda.is_available():
        raise UnsupportedOperationError("tune: needs a GPU that runs Triton kernels, and torch finds none here")
    if importlib.util.find_spec("triton") is None:
        raise UnsupportedOperationError("tune: needs Triton, and it is not installed")

    from kernel_pytorch.kernels import tables
    from kernel_pytorch.kernels.tune import measured

    gpu = torch.cuda.get_device_name()
    for kernel in request.kernels:
        path = tables.user_file(kernel, gpu) if request.out is None else request.out
        path = path / tables.file_name(kernel, gpu) if path.is_dir() else path
        print(f"{kernel} on {gpu}: {len(request.layers)} layers, {request.seconds:g} s", flush=True)
        for table in measured(kernel, request.layers, request.seconds, lambda line: print(line, flush=True)):
            tables.write(path, table)
        print(f"{path} written", flush=True)
    return 0
