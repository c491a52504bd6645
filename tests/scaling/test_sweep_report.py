"""report.html of a sweep: what it says and shows."""

import html.parser
import re
from typing import Any

import pytest
from sweep_parts import make_result

from jaxvla.scaling.sweep_report import scaling_curves, sweep_page
from jaxvla.scaling.sweep_results import TrialResult, rank

_BUSY = {"simulation": 0.9, "serving": 0.6, "learning": 0.3}


def _result(layout: str, *speeds: float, staleness: float = 1.0) -> TrialResult:
    result = make_result(layout, *speeds, **_BUSY)
    for run in result.repeats:
        run |= {
            "staleness_mean": staleness,
            "staleness_max": staleness,
            "chunk_latency_ms_p50": 5.0,
            "chunk_latency_ms_p99": 50.0,
            "useful_env_steps_per_s": run["env_steps_per_s"],
            "peak_rss_mib": 700.0,
            "compile_s": 12.0,
            "measured_s": 30.0,
        }
    return result


def _results() -> list[TrialResult]:
    failed = make_result("colocated=8")
    failed.failed = "exit code 1: <no> memory"
    return [
        _result("colocated=2", 100.0, 110.0, 90.0),
        _result("colocated=4", 150.0, 151.0, 152.0),
        _result("simulation=1 serving=1 learning=2", 180.0, 190.0, 200.0, staleness=0.5),
        _result("simulation+serving=1 learning=1", 80.0, 81.0, 82.0),
        failed,
    ]


def _page(results: list[TrialResult], **about: Any) -> str:
    return sweep_page(results, title="Sweep of x", about=about, command="python -m jaxvla.main")


class _Text(html.parser.HTMLParser):
    """All text of a page, and its tags."""

    def __init__(self, page: str):
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del attrs
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_it_says_who_wins_and_why():
    text = " ".join(_Text(_page(_results())).words)
    assert "Of all trials, simulation=1 serving=1 learning=2 is fastest: 190 [180, 200]" in text
    assert "It is 26% faster than colocated=4, 18% in the closest pair of runs." in text
    assert "simulation limits it, 90% busy; serving waits 40% for requests" in text
    assert "Of 2 devices, colocated=2 is fastest" in text
    assert "exit code 1: <no> memory" in text


def test_it_needs_nothing_from_elsewhere():
    page = _page(_results())
    assert "script" not in _Text(page).tags
    assert not re.search(r'(src|href)="', page)


def test_charts():
    page = _page(_results())
    assert _Text(page).tags.count("svg") == 8
    for title in ("Throughput by layout", "Speed-up", "Efficiency", "Staleness against throughput"):
        assert title in page
    without = _page([x for x in _results() if x.num_devices == 4])
    assert _Text(without).tags.count("svg") == 6 and "Speed-up" not in without
    alike = _page(_results()[:1])
    assert _Text(alike).tags.count("svg") == 5 and "Staleness against" not in alike


def test_shares_of_the_time_fill_their_bars():
    """Also where medians of the repeats add up to more."""
    result = _result("colocated=2", 1.0, 2.0, 3.0)
    waiting = "utilisation/serving/waiting_on/requests_fraction"
    for run, busy, waits in zip(result.repeats, (0.6, 0.61, 0.2), (0.4, 0.39, 0.8), strict=True):
        run |= {"utilisation/serving/busy_fraction": busy, waiting: waits}
    page = _page([result])
    assert "100%" in page and "120%" not in page
    assert "serving" in page and "busy: 60%" in page


def test_what_was_not_measured():
    about = {
        "pruned": {"8": {"the same parts in another order": 12}},
        "impossible": {"colocated=4 seed=-1": "config.seed = -1: must be"},
    }
    text = " ".join(_Text(_page(_results(), **about)).words)
    for part in ("the same parts in another order", "colocated=4 seed=-1", "must be"):
        assert part in text


def test_a_sweep_in_which_all_failed():
    page = _page(_results()[-1:])
    assert "none gave numbers" in page and "svg" not in _Text(page).tags


def test_curves_are_of_the_fastest_of_each_number_of_devices():
    more = [*_results(), _result("colocated=4:fsdp2", 10.0, 10.0, 10.0)]
    curves = scaling_curves(rank(more))
    assert set(curves) == {"best of all", "colocated"}
    assert [(n, x.layout) for n, x in curves["colocated"]] == [
        (2, "colocated=2"),
        (4, "colocated=4"),
    ]
    assert [(n, x.median("env_steps_per_s")) for n, x in curves["best of all"]] == [
        (2, pytest.approx(100.0)),
        (4, pytest.approx(190.0)),
    ]
