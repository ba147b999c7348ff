from html.parser import HTMLParser

from kernel_pytorch.report.html import page
from kernel_pytorch.report.result import Report


class Reader(HTMLParser):
    """Collects tags, their links, and the text of the body; fails on tags that do not nest."""

    VOID = ("meta", "br")

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data + " "


def read(result) -> Reader:
    reader = Reader()
    reader.feed(page(result))
    reader.close()
    assert reader.open == []
    return reader


def test_the_page_stands_alone(full_report):
    found = read(full_report().to_dict())
    assert found.links == []
    assert {"script", "img", "link", "iframe"} & set(found.tags) == set()
    assert "url(" not in page(full_report().to_dict())


def test_same_figures_as_the_terminal(full_report):
    text = " ".join(read(full_report().to_dict()).text.split())
    assert "PASS exit 0 speed 2.78x eager, 2.34x compiled, 0.65x the model bytes, least cosine 0.99621" in text
    assert "recipe 8.41 8.29–8.68 2.78x 2.34x 30,432 61.8 MB 41.7 s" in text
    assert "precision int8_dynamic native 36/37 42.5 MB → 10.7 MB (0.25x) onednn_int8_linear" in text


def test_bars_share_one_scale_from_zero(full_report):
    drawn = page(full_report().to_dict())
    # 72 % is the longest; 72 * 19.71 / 23.4 and 72 * 8.4123 / 23.4 follow.
    assert [part.split('"')[0] for part in drawn.split('style="width:')[1:]] == ["72.00%", "60.65%", "25.88%"]


def test_an_emulated_page_has_no_bars_and_no_speed(full_report):
    report = full_report()
    report.verdict = "emulated"
    drawn = page(report.to_dict())
    assert 'class="bars"' not in drawn
    assert [word for word in ("8.41", "2.78x", "tokens/s") if word in drawn] == []


def test_hostile_text_is_escaped(full_report):
    report = full_report()
    evil = "</title><script>alert(1)</script>\"'&\x1b[31m\u202e"
    report.recipe["name"] = report.error = report.environment["device"] = evil
    report.recipe["digest"] = "<b>"
    report.ladder[0].name = evil
    report.steps[2].option = "<i>"
    report.warnings = [evil]
    drawn = page(report.to_dict())
    assert "<script" not in drawn
    assert "&lt;/title&gt;&lt;script&gt;alert(1)&lt;/script&gt;&quot;&#x27;&amp;\\x1b[31m\\u202e" in drawn
    assert "script" not in read(report.to_dict()).tags


def test_an_empty_report_has_a_page():
    text = " ".join(read(Report().to_dict()).text.split())
    assert "ERROR exit 1 the run ended without a word" in text
