"""Where the shipped `conf/` and `recipes/` are: inside the wheel, or at the top of a checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def data_folder(kind: str) -> Path:
    """The folder `conf` or `recipes`. Raises FileNotFoundError when neither a wheel's copy nor a checkout's is there."""
    packed = _PACKAGE / "_data" / kind
    if packed.is_dir():
        return packed
    checkout = _PACKAGE.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / kind).is_dir():
        return checkout / kind
    raise FileNotFoundError(f"kernel_pytorch was installed without its {kind}/ folder: {packed} is missing")
