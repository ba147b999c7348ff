"""What a model is fed: token ids and attention masks in three parts that share no sample: timing, held-out, calibration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from pathlib import Path

import torch

from kernel_pytorch.errors import ConfigError

# Of every eight sentences one is timed, one calibrates and six are held out.
_SHARES = 8
_MAX_FILE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Tokens:
    """ids, mask: [B, T] int64 on the CPU; mask is 0 on padding. num_valid: the first rows that count, the rest fill the batch."""

    ids: torch.Tensor
    mask: torch.Tensor
    num_valid: int


@dataclass(frozen=True)
class Vocabulary:
    """size: token ids are below it. encode(sentences, length): exactly `length` tokens each, None when there is no tokenizer."""

    size: int
    encode: Callable[[Sequence[str], int], Tokens] | None = None


class Parts(ABC):
    """Batches of one shape [batch, length] in three parts that share no sample."""

    def __init__(self, batch: int, length: int) -> None:
        self.batch = batch
        self.length = length

    @abstractmethod
    def timing(self) -> Tokens:
        """The one batch that is timed."""

    @abstractmethod
    def held_out(self) -> Iterator[Tokens]:
        """All batches that verification may use, in a fixed order; without end where samples are drawn."""

    def shortage(self) -> str:
        """Where the held-out samples come from and how many there are, for the message that they are too few."""
        return "the data"

    @abstractmethod
    def calibration(self, num_batches: int) -> Iterator[Tokens]:
        """Up to `num_batches` batches for steps that watch the model work: as many as there are."""


class DataSource(ABC):
    """Constructors take the schema's fields by keyword and do no work. None leaves `batch` and `length` to the model source."""

    def __init__(self, *, batch: int | None = None, length: int | None = None) -> None:
        self.batch = batch
        self.length = length

    @abstractmethod
    def parts(self, vocabulary: Vocabulary, *, batch: int, length: int, seed: int) -> Parts:
        """`batch` and `length` are what to use where the source has none of its own."""


class RandomTokens(DataSource):
    """Uniform token ids without padding. The three parts draw from generators of their own."""

    def parts(self, vocabulary: Vocabulary, *, batch: int, length: int, seed: int) -> Parts:
        return _RandomParts(vocabulary.size, self.batch or batch, self.length or length, seed)


class BuiltinSentences(DataSource):
    """English sentences that come with the package."""

    def parts(self, vocabulary: Vocabulary, *, batch: int, length: int, seed: int) -> Parts:
        text = files("kernel_pytorch.models").joinpath("sentences.txt").read_text(encoding="utf-8")
        return _sentence_parts("data=sentences", text, vocabulary, self.batch or batch, self.length or length)


class TextFile(DataSource):
    """A UTF-8 text file, one sample a line; empty and repeated lines are dropped."""

    def __init__(self, *, path: str | None = None, batch: int | None = None, length: int | None = None) -> None:
        super().__init__(batch=batch, length=length)
        self.path = path

    def parts(self, vocabulary: Vocabulary, *, batch: int, length: int, seed: int) -> Parts:
        text = _read(self.path)
        return _sentence_parts(f"data.path: {self.path}", text, vocabulary, self.batch or batch, self.length or length)


def _read(name: str | None) -> str:
    if name is None:
        raise ConfigError("data.path: data=text needs the path of a text file, such as data.path=sentences.txt")
    path = Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(f"data.path: {name} is {'a folder' if path.is_dir() else 'not there'}; a UTF-8 text file is needed")
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ConfigError(f"data.path: {name} has {path.stat().st_size:,} bytes; at most {_MAX_FILE_BYTES:,} are read")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"data.path: {name} is not UTF-8: byte {error.start} cannot be decoded") from error
    except OSError as error:
        raise ConfigError(f"data.path: {name} cannot be read: {error.strerror}") from error


def _sentence_parts(origin: str, text: str, vocabulary: Vocabulary, batch: int, length: int) -> Parts:
    if vocabulary.encode is None:
        raise ConfigError(f"{origin}: this model has no tokenizer, so it takes no sentences; use data=random")
    sentences = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if len(sentences) < _SHARES:
        raise ConfigError(f"{origin}: {len(sentences)} distinct sentences; at least {_SHARES} are needed to time, calibrate and verify")
    return _SentenceParts(origin, sentences, vocabulary.encode, batch, length)


class _SentenceParts(Parts):
    def __init__(self, origin: str, sentences: list[str], encode: Callable[[Sequence[str], int], Tokens], batch: int, length: int) -> None:
        super().__init__(batch, length)
        share = len(sentences) // _SHARES
        self._origin = origin
        self._encode = encode
        self._total = len(sentences)
        self._timing = sentences[:share]
        self._calibration = sentences[share : 2 * share]
        self._held_out = sentences[2 * share :]

    def _batch(self, pool: list[str], start: int, num_valid: int) -> Tokens:
        # Rows beyond the pool repeat it, so that every call has one shape.
        tokens = self._encode([pool[(start + row) % len(pool)] for row in range(self.batch)], self.length)
        return Tokens(tokens.ids, tokens.mask, num_valid)

    def timing(self) -> Tokens:
        return self._batch(self._timing, 0, self.batch)

    def held_out(self) -> Iterator[Tokens]:
        available = len(self._held_out)
        for start in range(0, available, self.batch):
            yield self._batch(self._held_out, start, min(self.batch, available - start))

    def shortage(self) -> str:
        return f"{self._origin} ({len(self._held_out)} of its {self._total} distinct sentences are held out)"

    def calibration(self, num_batches: int) -> Iterator[Tokens]:
        # A sentence twice shows nothing new.
        for index in range(min(num_batches, -(-len(self._calibration) // self.batch))):
            yield self._batch(self._calibration, index * self.batch, self.batch)


class _RandomParts(Parts):
    def __init__(self, vocabulary_size: int, batch: int, length: int, seed: int) -> None:
        super().__init__(batch, length)
        self._size = vocabulary_size
        self._seed = seed

    def _stream(self, part: int) -> Iterator[Tokens]:
        generator = torch.Generator().manual_seed(3 * self._seed + part)
        while True:
            ids = torch.randint(self._size, (self.batch, self.length), generator=generator)
            yield Tokens(ids, torch.ones_like(ids), self.batch)

    def timing(self) -> Tokens:
        return next(self._stream(0))

    def held_out(self) -> Iterator[Tokens]:
        return self._stream(1)

    def calibration(self, num_batches: int) -> Iterator[Tokens]:
        return islice(self._stream(2), num_batches)
