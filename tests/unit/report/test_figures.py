import pytest

from kernel_pytorch.report import figures
from kernel_pytorch.report.plain import plain, shorten


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "—"), (0, "0"), (0.012345, "0.0123"), (3.514, "3.51"), (9.996, "10.0"), (35.14, "35.1"), (351.4, "351"), (3514.2, "3514"),
     (1e-7, "1.00e-07"), (-2.5, "-2.50"), (float("inf"), "inf")],
)  # fmt: skip
def test_significant(value, text):
    assert figures.significant(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "—"),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_999, "1.00 MB"),
        (85_140_000, "85.1 MB"),
        (16_060_000_000, "16.1 GB"),
    ],
)
def test_nbytes_is_decimal(value, text):
    assert figures.nbytes(value) == text


def test_figures_that_are_missing_are_dashes():
    assert [figures.ms(None), figures.ratio(None), figures.count(None), figures.seconds(None), figures.quality("sqnr_db", None)] == [
        "—"
    ] * 5
    assert figures.before_after(None, 5) == "—"
    assert figures.before_after(0, 0) == "—"
    assert figures.before_after(4_000_000, None) == "4.00 MB"


def test_figures_with_units():
    assert figures.before_after(42_500_000, 10_700_000) == "42.5 MB → 10.7 MB (0.25x)"
    assert [figures.seconds(0.0612), figures.seconds(14.23), figures.count(30431.6)] == ["0.061 s", "14.2 s", "30,432"]
    assert figures.quality("cosine_min", 0.996214) == "0.99621"
    assert figures.quality("sqnr_db", "inf") == "inf"
    assert figures.quality("top1_agreement", 0.9961) == "99.61 %"
    assert [figures.floor("sqnr_db", 20.0), figures.floor("cosine_min", 0.995)] == ["20 dB", "0.995"]


def test_number_reads_what_json_cannot_say():
    assert figures.number("inf") == float("inf")
    assert [figures.number(True), figures.number("word"), figures.number([1])] == [None, None, None]


@pytest.mark.parametrize(
    ("raw", "safe"),
    [("a\x1b[31mb", "a\\x1b[31mb"), ("a\nb\r", "a\\nb\\r"), ("a\u202eb", "a\\u202eb"), ("\ud800", "\\ud800"), ("[red]é漢", "[red]é漢"),
     ("\x9b31m", "\\x9b31m"), ("a\u2028b", "a\\u2028b")],
)  # fmt: skip
def test_plain(raw, safe):
    assert plain(raw) == safe


def test_shorten_keeps_both_ends():
    assert shorten("abcdefghij", 10) == "abcdefghij"
    assert shorten("abcdefghijkl", 10) == "abc...ijkl"
    assert shorten("abcdef", 3) == "abc"


def test_small_ratios_keep_their_digits():
    assert [figures.ratio(2.7817), figures.ratio(0.1), figures.ratio(0.00123)] == ["2.78x", "0.10x", "0.0012x"]


def test_quality_is_rounded_down():
    assert figures.quality("cosine_min", 0.994999) == "0.99499"
    assert figures.quality("cosine_min", 1.0) == "1.00000"
    assert figures.quality("sqnr_db", 19.96) == "19.9 dB"
    assert figures.quality("sqnr_db", 0.3) == "0.3 dB"
