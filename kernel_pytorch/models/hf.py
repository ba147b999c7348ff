"""A transformers checkpoint in a local folder. No network, no code from the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kernel_pytorch.errors import ConfigError
from kernel_pytorch.models.offline import import_transformers, quiet, tokenizer_from
from kernel_pytorch.models.source import Loaded, ModelSource, check_length
from kernel_pytorch.models.text import BuiltinSentences, DataSource, RandomTokens, Vocabulary
from kernel_pytorch.models.tokens import TokenWorkload, by_keyword
from kernel_pytorch.models.views import token_rows
from kernel_pytorch.schema import Phase, nearest

_TOKENIZER = "tokenizer.json"
_CAUSAL = ("ForCausalLM", "LMHeadModel")


class LocalFolder(ModelSource):
    """AutoModelForCausalLM where the checkpoint is one, else AutoModel; SDPA where the architecture has it.

    Sentences when the folder has a tokenizer.json, else random tokens; one row of the output view is one token.
    prefill is a causal model's whole prompt without keeping a cache.
    """

    def __init__(self, *, path: str | None = None, dtype: str | None = None, phase: Phase | None = None) -> None:
        self.path = path
        self.dtype = dtype
        self.phase = Phase(phase or Phase.forward)

    def default_data(self, *, batch: int | None = None, length: int | None = None) -> DataSource:
        source = BuiltinSentences if self.path and (Path(self.path).expanduser() / _TOKENIZER).is_file() else RandomTokens
        return source(batch=batch, length=length)

    def load(self, *, data: DataSource | None, seed: int, device: torch.device, model_device: torch.device | None = None) -> Loaded:
        if self.phase is Phase.decode:
            raise ConfigError(
                "model.phase: found 'decode'; model=hf allows forward and prefill (model=decoder decodes with a static cache)"
            )
        folder = _folder(self.path)
        settings = _settings(folder)
        model = _load(import_transformers("hf"), folder, self.dtype, settings)
        name = type(model).__name__
        is_causal = name.endswith(_CAUSAL)
        if self.phase is Phase.prefill and not is_causal:
            raise ConfigError(f"model.phase: found 'prefill', but {folder} holds {name}, which is not a causal language model")
        embedding = model.get_input_embeddings()
        if not isinstance(embedding, nn.Embedding):
            raise ConfigError(f"model.path: {folder} holds {name}, which does not read token ids; use model=factory")
        pad_id = settings.get("pad_token_id")
        file = folder / _TOKENIZER
        encode = tokenizer_from(file, pad_id if isinstance(pad_id, int) else 0) if file.is_file() else None
        data = data or self.default_data()
        parts = data.parts(Vocabulary(embedding.num_embeddings, encode), batch=8, length=32, seed=seed)
        check_length(parts, getattr(model.config, "max_position_embeddings", None))
        invoke = _without_cache if is_causal else by_keyword
        workload = TokenWorkload(parts, token_rows, phase=self.phase.value, trained=True, device=device, invoke=invoke, logits=is_causal)
        return Loaded(model.to(model_device or device).eval(), workload, f"{name} of {folder.name}")


def _without_cache(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> Any:
    return model(input_ids=ids, attention_mask=mask, use_cache=False)


def _folder(path: str | None) -> Path:
    if path is None:
        raise ConfigError("model.path: model=hf needs the folder of a checkpoint, such as model.path=./my_checkpoint")
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"model.path: {path} is {'a file' if folder.exists() else 'not there'}; the folder of a checkpoint is needed")
    return folder


def _settings(folder: Path) -> dict[str, Any]:
    """config.json, checked for what transformers would only tell in many lines."""
    file = folder / "config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"model.path: {folder} has no config.json; a transformers checkpoint is needed") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"model.path: {file} cannot be read: {_first_line(error)}") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("model_type"), str):
        raise ConfigError(f"model.path: {file} names no model_type")
    return settings


def _load(transformers: Any, folder: Path, dtype: str | None, settings: dict[str, Any]) -> Any:
    if settings["model_type"] not in transformers.CONFIG_MAPPING:
        raise ConfigError(
            f"model.path: {folder} has model_type {settings['model_type']!r}, which transformers {transformers.__version__} does not know"
            f"{nearest(settings['model_type'], list(transformers.CONFIG_MAPPING.keys()))}; code from the folder is never run"
        )
    if settings.get("is_encoder_decoder"):
        raise ConfigError(f"model.path: {folder} holds an encoder-decoder; model=hf runs encoders and causal language models")
    names = settings.get("architectures") or [""]
    auto = transformers.AutoModelForCausalLM if names[0].endswith(_CAUSAL) else transformers.AutoModel
    options = {"local_files_only": True, "trust_remote_code": False, "dtype": dtype or "auto"}
    try:
        with quiet(transformers):
            return auto.from_pretrained(str(folder), **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(f"model.path: {folder} cannot be loaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
