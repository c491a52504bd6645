"""The screen, rendered to strings."""

import io
import math
import pathlib
import re
import threading
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from jaxvla.telemetry import progress
from jaxvla.telemetry.activity import Activity
from jaxvla.telemetry.progress import (
    MAX_COLUMNS,
    RunSummary,
    Screen,
    bottleneck,
    format_duration,
    format_rate,
    update_line,
)

RECORD = {
    "update": 12,
    "time_s": 240.0,
    "train/success_rate": 0.412,
    "rate/env_steps_per_s": 812.3,
    "rate/chunk_queries_per_s": 101.0,
    "rate/episodes_per_s": 2.53,
    "rate/updates_per_s": 0.05,
    "utilisation/simulation/busy_fraction": 0.83,
    "utilisation/simulation/waiting_on/learner_fraction": 0.12,
    "utilisation/simulation/waiting_on/inference_fraction": 0.05,
    "utilisation/serving/busy_fraction": 0.3,
    "utilisation/serving/waiting_on/requests_fraction": 0.7,
    "queue/staleness/mean": 0.5,
    "queue/staleness/max": 1,
    "queue/staleness/bound": 1,
    "learner/loss/total": 0.12345,
    "faults/restarts": 2,
    "faults/invalid_samples": 0,
}
BEFORE = {
    "eval/success_rate": 0.125,
    "eval/ci95_low": 0.078,
    "eval/ci95_high": 0.193,
    "eval/episodes": 128,
}
AFTER = BEFORE | {"eval/success_rate": 0.75, "eval/ci95_low": 0.668, "eval/ci95_high": 0.817}
SUMMARY = RunSummary(
    before=BEFORE,
    after=AFTER,
    env_steps_per_s=812.3,
    activities={
        "simulation": Activity(busy_s={"simulate": 4.0}, waiting_s={"inference": 6.0}),
        "serving": Activity(busy_s={"infer": 1.0}, waiting_s={"requests": 8.0, "weights": 1.0}),
        "learning": Activity(busy_s={"train": 9.0}, waiting_s={"trajectories": 1.0}),
    },
    max_staleness=1,
    staleness_bound=2,
    workdir=pathlib.Path("runs") / ("a folder " * 12).strip(),
    next_command="python -m jaxvla.main --config=configs/quickstart.py " + "--config.seed=1 " * 6,
)


class FakeTerminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    return FakeTerminal()


def visible(text):
    """Terminal output without escape sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def has_control_characters(text):
    return any(unicodedata.category(c) == "Cc" for c in text.replace("\n", ""))


def run_through(stream):
    now_s = [0.0]
    with Screen(stream, num_updates=60, clock=lambda: now_s[0]) as screen:
        screen.message("a [bold]note[/bold] with \x1b[31mcolour\x07\r\nand a second line")
        with screen.phase("warm start"):
            now_s[0] = 12.34
        screen.evaluated(BEFORE, update=0)
        screen.update(RECORD)
        screen.update(RECORD | {"update": 13, "time_s": 244.0})
    screen.final_summary(SUMMARY)


def test_plain_lines_without_a_terminal():
    stream = io.StringIO()
    run_through(stream)
    assert not has_control_characters(stream.getvalue())
    lines = stream.getvalue().splitlines()
    assert lines[:7] == [
        "a [bold]note[/bold] with  [31mcolour ",
        "and a second line",
        "warm start ...",
        "warm start took 12s",
        "evaluation at update 0: success 0.12 [0.08, 0.19] of 128 episodes",
        "update 12/60 | success 0.41 | 812 env steps/s | staleness 1/1 | "
        "sim 83% busy, waits learner 12% | loss 0.123 | eta -",
        "update 13/60 | success 0.41 | 812 env steps/s | staleness 1/1 | "
        "sim 83% busy, waits learner 12% | loss 0.123 | eta 3m08s",
    ]
    assert lines[7:] == SUMMARY.lines()


def test_panel_on_a_terminal(terminal):
    run_through(terminal)
    shown = visible(terminal.getvalue())
    for line in ("warm start took 12s", "a [bold]note[/bold] with  [31mcolour ", *SUMMARY.lines()):
        assert f"{line}\n" in shown  # whole, though some are wider than the terminal
    assert "| loss" not in shown  # the panel replaces the lines of updates
    panel = shown[shown.rindex("╭") :]
    assert re.search(r"update .*13/60 +eta 3m08s", panel)
    assert "before 0.12 [0.08, 0.19] of 128 episodes" in panel
    assert "in training 0.41" in panel
    assert "812 env steps, 101 chunk queries, 2.53 episodes, 0.05 updates" in panel
    assert re.search(r"simulation .*83% busy +waits learner 12%, waits inference 5%", panel)
    assert re.search(r"serving .*30% busy +waits requests 70%", panel)
    assert "mean 0.5, max 1, bound 1" in panel
    assert "restarts 2" in panel and "invalid_samples" not in panel


def test_bars_are_as_long_as_the_numbers_say():
    view = progress._View(num_updates=60, record=RECORD | {"update": 30})
    console = Console(record=True, width=100, file=io.StringIO(), force_terminal=True)
    console.print(progress._panel(view, 0.0))
    html = console.export_html(inline_styles=True)
    pieces = re.findall(r"color: (#[0-9a-f]{6})[^>]*>([━╸╺]+)<", html)
    filled = [len(bar) for color, bar in pieces if color == pieces[0][0]]
    # Half of 40 cells; then 30 % (serving) and 83 % (simulation) of 20 cells.
    assert filled == [20, 6, 17]


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = FakeTerminal()
    run_through(stream)
    assert not has_control_characters(stream.getvalue())


def test_a_phase_is_shown_while_it_lasts_and_says_when_it_failed():
    stream = io.StringIO()
    now_s = iter([5.0, 8.25])
    screen = Screen(stream, num_updates=1, clock=lambda: next(now_s))
    with pytest.raises(KeyError), screen, screen.phase("compile"):
        assert stream.getvalue() == "compile ...\n"
        raise KeyError
    assert stream.getvalue().splitlines()[1] == "compile failed after 3.2s"
    view = progress._View(num_updates=1, phase="compile", phase_start_s=2.0)
    console = Console(width=80, file=io.StringIO())
    console.print(progress._panel(view, 65.0))
    assert "compile ... 1m03s" in console.file.getvalue()


def test_the_first_evaluation_stays_the_one_before(terminal):
    with Screen(terminal, num_updates=60) as screen:
        screen.evaluated(BEFORE, update=0)
        screen.evaluated(AFTER, update=10)
    panel = visible(terminal.getvalue())
    panel = panel[panel.rindex("╭") :]
    assert "before 0.12 " in panel and "now 0.75 [0.67, 0.82] of 128" in panel


names = st.sampled_from([name for name in RECORD if name not in ("update", "time_s")])
values = st.one_of(st.floats(), st.integers(-(10**15), 10**15))


@settings(deadline=None)  # no timed assertions
@given(
    update=st.integers(0, 10**7),
    values=st.dictionaries(names, values),
    reason=st.text("abcdefghij_", min_size=1, max_size=60),
    eta_s=st.floats(0, 1e9) | st.just(math.nan),
)
def test_update_lines_are_short_and_plain_whatever_the_record_holds(update, values, reason, eta_s):
    name = f"utilisation/simulation/waiting_on/{reason}_fraction"
    line = update_line({"update": update, **values, name: 0.5}, num_updates=10**7, eta_s=eta_s)
    assert len(line) <= MAX_COLUMNS
    assert not has_control_characters(line)
    assert line.startswith("update ") and " | eta " in line
    assert "nan" not in line and "inf |" not in line


def test_remaining_time_follows_the_recent_updates():
    stream = io.StringIO()
    screen = Screen(stream, num_updates=100)
    # A first update of 1000 s (compilation), then 2 s each.
    for update in range(1, 41):
        screen.update({"update": update, "time_s": 1000.0 + 2.0 * update if update > 1 else 0.0})
    lines = stream.getvalue().splitlines()
    assert lines[0].endswith("eta -")
    assert lines[-1].endswith("eta 2m00s")


DURATIONS = {
    0: "0.0s",
    9.94: "9.9s",
    9.96: "10s",
    59.4: "59s",
    59.6: "1m00s",
    190: "3m10s",
    3599.6: "1h00m",
    7380: "2h03m",
    math.inf: "-",
    math.nan: "-",
}


@pytest.mark.parametrize(("seconds", "text"), DURATIONS.items())
def test_durations(seconds, text):
    assert format_duration(seconds) == text


RATES = {
    0: "0.00",
    0.524: "0.52",
    9.994: "9.99",
    9.996: "10.0",
    99.94: "99.9",
    99.96: "100",
    812.3: "812",
    999.4: "999",
    999.6: "1.00k",
    12_345: "12.3k",
    2.5e9: "2.50G",
    1e13: "10000G",
    math.nan: "-",
}


@pytest.mark.parametrize(("value", "text"), RATES.items())
def test_rates(value, text):
    assert format_rate(value) == text


def test_the_last_lines_state_what_the_contract_asks_for():
    assert SUMMARY.lines() == [
        "success     before 0.12 [0.08, 0.19] of 128 episodes, "
        "after 0.75 [0.67, 0.82] of 128 episodes",
        "speed       812 env steps/s",
        "bottleneck  learning 90% busy; simulation waits for inference 60%; "
        "serving waits for requests 80%",
        "staleness   max 1, bound 2",
        f"workdir     {SUMMARY.workdir}",
        f"next        {SUMMARY.next_command}",
    ]


def test_bottleneck_leaves_out_programs_that_never_ran():
    never = Activity(busy_s={}, waiting_s={})
    assert bottleneck({"learning": never}) == "unknown: no program ran"
    ran = Activity(busy_s={"simulate": 1.0}, waiting_s={"slot": 0.0})
    assert bottleneck({"learning": never, "simulation": ran}) == "simulation 100% busy"


def test_threads_share_the_screen_with_the_drawing_thread(terminal):
    num_threads, num_lines = 3, 30
    start = threading.Barrier(num_threads)
    with Screen(terminal, num_updates=1000) as screen:

        def talk(thread):
            start.wait(timeout=30)
            for index in range(num_lines):
                screen.message(f"line {thread} {index} ends")
                screen.update(RECORD | {"update": thread * num_lines + index})

        threads = [
            threading.Thread(target=talk, args=(i,), daemon=True) for i in range(num_threads)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
            assert not thread.is_alive()
    found = re.findall(r"line (\d) (\d+) ends\n", visible(terminal.getvalue()))
    assert len(set(found)) == len(found) == num_threads * num_lines
