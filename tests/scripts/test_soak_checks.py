"""The soak's judgement of runs that are made up: a good one passes, every flaw is found."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from run_watch import SUPERVISOR, Memory
from soak_checks import (
    Kill,
    files_check,
    memory_checks,
    record_checks,
    success_check,
    summary_rows,
)


def record(update: int, /, **changed: Any) -> dict[str, Any]:
    return {
        "update": update,
        "queue/admitted": 2 * update + 6,
        "queue/consumed": 2 * update,
        "queue/dropped": 3,
        "queue/in_flight": 2,
        "queue/depth": 1,
        "queue/staleness/max": 1,
        "queue/staleness/bound": 1,
        "learner/loss/total": 0.5,
    } | changed


SUMMARY = {"ledger_closes": True, "max_staleness": 1, "staleness_bound": 1}


def failed(records: list[dict[str, Any]], **summary: Any) -> list[str]:
    return [x.what for x in record_checks(records, SUMMARY | summary) if not x.holds]


def test_a_run_without_flaws_passes():
    assert failed([record(1), record(2), record(3)]) == []


@pytest.mark.parametrize(
    ("changed", "summary", "what"),
    [
        ({"update": 4}, {}, "every update has one record"),
        ({"queue/in_flight": 3}, {}, "ledger closes in every record, and in the end"),
        ({}, {"ledger_closes": False}, "ledger closes in every record, and in the end"),
        ({"queue/staleness/max": 2}, {}, "staleness is within the bound"),
        ({}, {"max_staleness": 2}, "staleness is within the bound"),
        ({"learner/loss/total": None}, {}, "losses are finite"),
    ],
)
def test_every_flaw_of_the_records_is_found(
    changed: dict[str, Any], summary: dict[str, Any], what: str
):
    assert failed([record(1), record(2, **changed), record(3)], **summary) == [what]


def test_a_run_without_records_is_no_good_run():
    assert len(failed([])) == 3


def test_the_slope_is_that_of_the_trend_whatever_the_peaks():
    times_s, random = np.arange(0.0, 900.0, 2.0), np.random.default_rng(0)
    rss_mib = 300 + 3.0 * times_s / 60 + random.normal(0, 1, len(times_s))
    rss_mib[::50] += 400  # a checkpoint is written
    rss_mib[:60] -= np.linspace(200, 0, 60)  # the start
    memory = Memory(name="learner_0", times_s=list(times_s), rss_mib=list(rss_mib))
    assert memory.slope_mib_per_min(0.3) == pytest.approx(3.0, abs=0.1)


def growing(name: str, slope_mib_per_min: float, span_s: float = 600.0) -> Memory:
    times_s = np.arange(0.0, span_s, 2.0)
    rss_mib = 100 + slope_mib_per_min * times_s / 60
    return Memory(name=name, times_s=list(times_s), rss_mib=list(rss_mib))


def test_growth_is_judged_of_processes_that_lived_long():
    steady = growing(SUPERVISOR, 0.1)
    assert all(x.holds for x in memory_checks([steady, growing("server_0", 0.5)], 1.0))
    young = growing("server_0", 50.0, span_s=60.0)
    assert all(x.holds for x in memory_checks([steady, young], 1.0))
    leaking = memory_checks([steady, growing("server_0", 2.0)], 1.0)
    assert [x.holds for x in leaking] == [True, False]
    assert [x.holds for x in memory_checks([growing(SUPERVISOR, 2.0)], 1.0)] == [False, True]


def test_open_files_may_come_and_go_but_not_stay():
    assert files_check([30, 31, 34, 40, 30, 38, 32]).holds
    assert not files_check([30, 31, 30, 34, 36, 38, 40]).holds


def test_success_may_fall_within_its_interval_alone():
    before = {"eval/success_rate": 0.8, "eval/ci95_low": 0.7}
    assert success_check(before, {"eval/success_rate": 0.7}).holds
    assert not success_check(before, {"eval/success_rate": 0.65}).holds


def test_kills_are_summed_up_by_kind_and_signal():
    kill = Kill(name="server_0", signal="SIGKILL", at_s=1.0, update=3)
    kills = [
        dataclasses.replace(kill, next_update_s=1.0, recovered_s=5.0, tickets_lost=1),
        dataclasses.replace(kill, name="server_1", next_update_s=3.0, recovered_s=9.0),
        dataclasses.replace(kill, signal="SIGSTOP", next_update_s=2.0, recovered_s=20.0),
    ]
    rows = summary_rows(kills)
    assert list(rows) == ["server SIGKILL", "server SIGSTOP"]
    expected = {"kills": 2, "next_update_s": 2.0, "recovered_s": 7.0, "recovered_max_s": 9.0}
    assert expected.items() <= rows["server SIGKILL"].items()
    assert rows["server SIGKILL"]["tickets_lost"] == 0.5
