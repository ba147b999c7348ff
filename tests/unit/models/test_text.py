from pathlib import Path

import pytest
import torch

from kernel_pytorch.errors import ConfigError
from kernel_pytorch.models.text import BuiltinSentences, DataSource, Parts, RandomTokens, TextFile, Tokens, Vocabulary


def _encode(sentences, length):
    """One id a sentence in the first place, so that a row tells which sentence it was."""
    ids = torch.zeros(len(sentences), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sentence in enumerate(sentences):
        ids[row, 0] = hash(sentence) % 2**60
        mask[row, : min(length, len(sentence.split()))] = 1
    return Tokens(ids, mask, len(sentences))


WORDS = Vocabulary(100, _encode)


def _write(folder: Path, lines: int) -> str:
    file = folder / "lines.txt"
    file.write_text("\n".join(f"sentence number {n}" for n in range(lines)), encoding="utf-8")
    return str(file)


def _rows(parts: Parts) -> tuple[set[int], set[int], set[int]]:
    held = [row for tokens in parts.held_out() for row in tokens.ids[: tokens.num_valid, 0].tolist()]
    assert len(held) == len(set(held))
    calibration = {row for tokens in parts.calibration(100) for row in tokens.ids[:, 0].tolist()}
    return set(parts.timing().ids[:, 0].tolist()), set(held), calibration


def test_builtin_sentences_split_into_disjoint_parts():
    timing, held, calibration = _rows(BuiltinSentences(batch=64).parts(WORDS, batch=8, length=32, seed=0))
    assert (len(timing), len(held), len(calibration)) == (64, 532, 88)
    assert not timing & held
    assert not timing & calibration
    assert not held & calibration


def test_builtin_sentences_are_distinct_and_of_natural_length():
    text = (Path(__file__).parents[3] / "kernel_pytorch" / "models" / "sentences.txt").read_text(encoding="utf-8")
    sentences = text.splitlines()
    lengths = sorted(len(sentence.split()) for sentence in sentences)
    assert len(sentences) == len({sentence.lower() for sentence in sentences}) == 708
    assert (lengths[0], lengths[len(lengths) // 2], lengths[-1]) == (5, 14, 34)
    assert text.isprintable() or set(text) - set(filter(str.isprintable, text)) == {"\n"}


@pytest.mark.parametrize(("batch", "length", "shape"), [(None, None, (8, 32)), (3, None, (3, 32)), (None, 7, (8, 7)), (5, 9, (5, 9))])
@pytest.mark.parametrize("source", [BuiltinSentences, RandomTokens])
def test_the_users_batch_and_length_win(source: type[DataSource], batch, length, shape):
    parts = source(batch=batch, length=length).parts(WORDS, batch=8, length=32, seed=0)
    assert (parts.batch, parts.length) == shape
    assert parts.timing().ids.shape == parts.timing().mask.shape == shape


def test_every_batch_has_one_shape_and_only_real_rows_are_valid(tmp_path):
    parts = TextFile(path=_write(tmp_path, 80), batch=7).parts(WORDS, batch=8, length=4, seed=0)
    batches = list(parts.held_out())
    assert {tuple(tokens.ids.shape) for tokens in batches} == {(7, 4)}
    assert [tokens.num_valid for tokens in batches] == [7] * 8 + [4]


def test_repeated_and_empty_lines_are_dropped(tmp_path):
    file = tmp_path / "lines.txt"
    file.write_text("\n\n".join(f"line {n % 16}  " for n in range(64)), encoding="utf-8")
    timing, held, calibration = _rows(TextFile(path=str(file), batch=2).parts(WORDS, batch=8, length=4, seed=0))
    assert (len(timing), len(held), len(calibration)) == (2, 12, 2)


def test_random_tokens_follow_the_seed_and_differ_between_parts():
    def draw(seed: int) -> list[list[int]]:
        parts = RandomTokens(batch=2, length=5).parts(Vocabulary(1000), batch=8, length=32, seed=seed)
        return [t.ids.flatten().tolist() for t in (parts.timing(), next(parts.held_out()), *parts.calibration(1))]

    assert draw(1) == draw(1)
    drawn = [tuple(row) for seed in range(4) for row in draw(seed)]
    assert len(set(drawn)) == 12
    assert all(0 <= token < 1000 for row in drawn for token in row)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "data.path: data=text needs the path"),
        (lambda folder: str(folder / "absent.txt"), "is not there"),
        (lambda folder: str(folder), "is a folder"),
        (lambda folder: _write(folder, 7), "7 distinct sentences; at least 8"),
    ],
)
def test_a_text_file_that_cannot_be_used_is_one_line(tmp_path, make, message):
    with pytest.raises(ConfigError, match=message) as caught:
        TextFile(path=make(tmp_path)).parts(WORDS, batch=8, length=4, seed=0)
    assert len(caught.value.lines) == 1
    assert "\n" not in str(caught.value)


def test_a_text_file_that_is_not_utf8_names_the_byte(tmp_path):
    file = tmp_path / "latin.txt"
    file.write_bytes(b"caf\xe9\n")
    with pytest.raises(ConfigError, match="not UTF-8: byte 3"):
        TextFile(path=str(file)).parts(WORDS, batch=8, length=4, seed=0)


def test_sentences_need_a_tokenizer():
    with pytest.raises(ConfigError, match=r"has no tokenizer.*use data=random"):
        BuiltinSentences().parts(Vocabulary(100), batch=8, length=4, seed=0)
