import io
import threading
import time

import pytest

from kernel_pytorch.report.progress import Progress

ERASE = "\r\x1b[2K"


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class BrokenTerminal(FakeTerminal):
    def write(self, text: str) -> int:
        raise OSError("gone")


def wait_for(condition) -> None:
    """Until the ticker got there; a ticker that never does fails the test after a long while."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def tickers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "progress"]


@pytest.fixture(autouse=True)
def _terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    yield
    assert tickers() == []


def test_a_pipe_gets_nothing():
    stream = io.StringIO()
    with Progress(stream, quiet_s=0, tick_s=0.001).stage("compile"):
        assert tickers() == []
    assert stream.getvalue() == ""


def test_no_stream_and_a_dumb_terminal_get_nothing(monkeypatch):
    with Progress(None, quiet_s=0, tick_s=0.001).stage("compile"):
        assert tickers() == []
    monkeypatch.setenv("TERM", "dumb")
    with Progress(FakeTerminal(), quiet_s=0, tick_s=0.001).stage("compile"):
        assert tickers() == []


def test_a_stage_shows_and_is_erased():
    stream = FakeTerminal()
    with Progress(stream, quiet_s=0, tick_s=0.001).stage("compile"):
        wait_for(lambda: "compile" in stream.getvalue())
    assert stream.getvalue().startswith(f"{ERASE}compile 0 s")
    assert stream.getvalue().endswith(ERASE)


def test_a_short_stage_shows_nothing():
    stream = FakeTerminal()
    with Progress(stream, quiet_s=60, tick_s=0.001).stage("compile"):
        time.sleep(0.02)
    assert stream.getvalue() == ""


def test_the_ticker_stops_when_the_stage_raises():
    stream = FakeTerminal()

    def interrupted() -> None:
        with Progress(stream, quiet_s=0, tick_s=0.001).stage("measure"):
            wait_for(lambda: "measure" in stream.getvalue())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert stream.getvalue().endswith(ERASE)


def test_the_inner_stage_and_its_note_show_then_the_outer_again():
    stream = FakeTerminal()
    progress = Progress(stream, quiet_s=0, tick_s=0.001)
    with progress.stage("run"):
        with progress.stage("measure") as inner:
            inner.note("round 3/20")
            wait_for(lambda: "measure 0 s round 3/20" in stream.getvalue())
        inner_length = len(stream.getvalue())
        wait_for(lambda: "run 0 s" in stream.getvalue()[inner_length:])
        assert "round 3/20" not in stream.getvalue()[inner_length:]
    progress.close()


def test_a_name_cannot_move_the_cursor():
    stream = FakeTerminal()
    with Progress(stream, quiet_s=0, tick_s=0.001).stage("a\x1b[5A\n"):
        wait_for(lambda: "a\\x1b[5A\\n" in stream.getvalue())
    assert stream.getvalue().replace(ERASE, "").count("\x1b") == 0


def test_a_terminal_that_goes_away_does_not_fail_the_run():
    progress = Progress(BrokenTerminal(), quiet_s=0, tick_s=0.001)
    with progress.stage("compile"):
        wait_for(lambda: progress._stream is None)
    with progress.stage("measure"):
        assert tickers() == []


def test_one_progress_serves_stages_one_after_another():
    stream = FakeTerminal()
    progress = Progress(stream, quiet_s=0, tick_s=0.001)
    for name in ("load", "apply"):
        with progress.stage(name):
            wait_for(lambda name=name: f"{name} 0 s" in stream.getvalue())
    assert tickers() == []
