from __future__ import annotations

from advisor.cli.options import state
from advisor.cli.progress import progress
from advisor.workflows import ProgressEvent


def run(*events):
    with progress() as callback:
        for event in events:
            callback(event)


EVENTS = (
    ProgressEvent("Calibrating", 0, 2),
    ProgressEvent("Calibrating", 1, 2),
    ProgressEvent("Calibrating", 2, 2),
    ProgressEvent("Searching", 1, 3, "best 0.1"),
    ProgressEvent("Searching", 3, 3, "best 0.05"),
)


def test_lines_when_stderr_is_no_terminal(capsys):
    run(*EVENTS)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "Calibrating ...",
        "Calibrating: 2 of 2 in 0 s",
        "Searching ...",
        "Searching: 3 of 3 in 0 s; best 0.05",
    ]


def test_a_long_stage_says_every_minute_how_much_is_left(capsys, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("advisor.cli.progress.time.monotonic", lambda: clock[0])
    with progress() as callback:
        for done in range(100, 481, 20):  # resumed at 100: what was done before took no time
            callback(ProgressEvent("Statistics", done, 480, "block 3" if done > 300 else ""))
            clock[0] += 25.0
    assert capsys.readouterr().err.splitlines() == [
        "Statistics ...",
        "Statistics: 160 of 480, about 6 min 40 s left",
        "Statistics: 220 of 480, about 5 min 25 s left",
        "Statistics: 280 of 480, about 4 min 10 s left",
        "Statistics: 340 of 480, about 2 min 55 s left; block 3",
        "Statistics: 400 of 480, about 1 min 40 s left; block 3",
        "Statistics: 460 of 480, about 25 s left; block 3",
        "Statistics: 480 of 480 in 475 s; block 3",
    ]


def test_what_is_only_said_takes_one_line_and_a_stage_starts_once(capsys):
    run(
        ProgressEvent("Memory", 1, 1, "about 2 GB"),
        ProgressEvent("Trials", 1, 9),
        ProgressEvent("Scores", 2, 2),
        ProgressEvent("Trials", 9, 9),
        ProgressEvent("Scores", 2, 2),
    )
    assert capsys.readouterr().err.splitlines() == [
        "Memory: about 2 GB",
        "Trials ...",
        "Scores ...",
        "Scores: 2 of 2 in 0 s",
        "Trials: 9 of 9 in 0 s",
        "Scores: 2 of 2 in 0 s",
    ]


def test_json_is_silent_unless_verbose(capsys):
    state.json = True
    run(*EVENTS)
    assert capsys.readouterr().err == ""
    state.verbose = True
    run(*EVENTS)
    assert "Searching: 3 of 3" in capsys.readouterr().err


def test_bars_on_a_terminal_show_stage_count_and_note(capsys, monkeypatch):
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    run(*EVENTS)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Searching" in captured.err
    assert "3/3" in captured.err
    assert "best 0.05" in captured.err


def test_long_notes_leave_the_bars_their_room(capsys, monkeypatch):
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "90")
    monkeypatch.setenv("TERM", "xterm")
    run(
        ProgressEvent("Memory", 1, 1, "about 0.63 GB of memory, of which " + "much is said " * 9),
        ProgressEvent("Scores: gptq, sym or asym, static groups, clip mse, all samples", 7, 120),
        ProgressEvent("Trials", 30, 60, "best mixed-4.47bpw, KL 0.0016, " + "and so on " * 6),
    )  # fmt: skip
    shown = capsys.readouterr().err
    assert "Memory: about 0.63 GB" in shown
    for count in ("7/120", "30/60"):
        line = next(line for line in reversed(shown.splitlines()) if count in line)
        assert line.count("\u2501") >= 14
    assert "best mixed" in shown
