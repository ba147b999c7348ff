"""C++ libraries that are built for this machine: where they cannot be kept, that is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernel_pytorch.kernels import native


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("KERNEL_PYTORCH_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(native, "_compiler", lambda: "c++")
    path = tmp_path / "one.cpp"
    path.write_text("int one = 1;")
    return path


def test_a_user_without_a_home_folder(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    assert native.build(source) == native.NativeLibrary(None, "there is no cache folder: Could not determine home directory.")


def test_a_cache_folder_that_may_not_be_looked_into(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_file(_: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", is_file)
    library = native.build(source)
    assert library.path is None
    assert "Permission denied" in library.reason
