"""report.html of runs of every kind."""

import json
import logging
import math
import re

import numpy as np
import pytest
from read_page import charts, facts, read
from run_dirs import AFTER, SUMMARY, record, write_run

from jaxvla.telemetry.report import try_to_write_report, write_report
from jaxvla.telemetry.tracing import Tracer


def report(workdir):
    text = write_report(workdir).read_text(encoding="utf-8")
    read(text)  # well-formed
    return text


def test_the_headline_of_a_finished_run(tmp_path):
    text = report(write_run(tmp_path))
    assert facts(text) == {
        "outcome": "finished",
        "updates": "10 of 10",
        "wall time": "2m05s",
        "success before": "0.25 [0.10, 0.50] of 16",
        "success after": "0.75 [0.10, 0.50] of 16",
        "env steps/s": "6.50k",
        "staleness": "max 2, bound 2",
    }
    assert "Bottleneck: simulation 70% busy; learning waits for trajectories 60%." in text


def test_curves_show_the_records(tmp_path):
    found = charts(report(write_run(tmp_path)))
    training, evaluation = found["Success"].lines()
    assert training[4] == pytest.approx([5, 0.25], abs=0.05)
    assert evaluation == pytest.approx(np.array([[0, 0.25], [10, 0.75]]), abs=0.05)
    (speed,) = found["Env steps"].lines()  # useful ones are the same
    assert "all = useful" not in found["Env steps"].texts() and len(speed) == 10
    assert {"total", "policy"} <= set(found["Loss"].texts())
    assert {"Approximate KL", "Staleness", "Latency of a chunk query", "Busy"} <= set(found)
    assert "Samples" not in found and "Return" not in found  # nothing to show


def test_histograms_count_what_was_consumed(tmp_path):
    chart = charts(report(write_run(tmp_path)))["Staleness of what was trained on"]
    assert [t for t in chart.tips() if ": " in t] == [
        "-0.5 to 0.5: 3",
        "0.5 to 1.5: 10",
        "1.5 to 2.5: 7",
    ]
    assert "bound 2" in chart.texts()
    older = {name: x for name, x in SUMMARY.items() if name != "staleness_counts"}
    found = charts(report(write_run(tmp_path, summary=older)))
    assert "1.5 to 2.5: 10" in found["Mean staleness of the updates"].tips()


def test_utilisation_comes_from_summary_and_trace(tmp_path):
    write_run(tmp_path)
    tracer = Tracer()
    tracer.name_thread("learning", "learner")
    tracer.add("wait", 0.0, 3.0, on="trajectories")
    tracer.add("train", 3.0, 4.0)
    tracer.write(tmp_path / "trace.json")
    text = report(tmp_path)
    found = charts(text)
    assert {"simulation, busy: 70%", "learning, waiting for trajectories: 60%"} <= set(
        found["Busy and waiting"].tips()
    )
    assert "learning / learner, wait for trajectories: 3" in found["Time of each thread"].tips()
    assert 'href="trace.json"' in text


def test_success_by_task_before_after_and_by_the_judge(tmp_path):
    write_run(tmp_path)
    judged = {"env": "libero_host", **AFTER, "eval/success_rate/reach": None}
    stored = {"update": 10, **AFTER, "judge": judged}
    (tmp_path / "eval.json").write_text(json.dumps(stored))
    text = report(tmp_path)
    rows = re.findall(r"<tr>(.*?)</tr>", text)
    cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in rows]
    assert ["task", "before", "after", "evaluate job, update 10", "judge libero_host"] in cells
    assert ["reach", "0.38", "0.88", "0.88", "-"] in cells
    assert ["push &lt;it&gt;", "0.12", "0.12", "0.12", "0.12"] in cells
    assert "push <it> before: 12.5%" in charts(text)["Success by task"].tips()


def test_faults_and_lost_data_are_named(tmp_path):
    totals = {"faults/nan_worlds": 3, "queue/dropped/lease": 2, "faults/none": 0}
    text = report(write_run(tmp_path, summary=SUMMARY | {"totals": totals, "ledger_closes": False}))
    assert '<td>faults/nan_worlds</td><td class="number">3</td>' in text
    assert "queue/dropped/lease" in text and "faults/none" not in text
    assert "data was lost" in text
    assert "None." in report(write_run(tmp_path))


def test_videos_are_linked_relatively(tmp_path):
    write_run(tmp_path)
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "push <it>_0.mp4").touch()
    assert 'href="videos/push%20%3Cit%3E_0.mp4"' in report(tmp_path)


def test_a_killed_run_has_a_report_too(tmp_path):
    write_run(tmp_path, summary=None, config=None)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    found = facts(report(tmp_path))
    assert found["outcome"] == "no summary yet"
    assert (found["updates"], found["wall time"]) == ("9", "1m58s")
    assert found["success before"] == "not evaluated"


def test_a_run_without_updates_has_one(tmp_path):
    detail = "learning: ValueError: <no>"
    summary = {"outcome": "failed", "detail": detail, "update": 0, "evaluation_after": None}
    text = report(write_run(tmp_path, records=[], summary=summary))
    assert facts(text)["outcome"] == "failed"
    assert "learning: ValueError: &lt;no&gt;" in text
    assert "Bottleneck: unknown: no program ran." in text


def test_a_supervised_run_has_samples_instead_of_episodes(tmp_path):
    records = [
        {"update": i, "time_s": float(i), "rate/samples_per_s": 40.0, "learner/loss/actions": 1.0}
        for i in range(1, 5)
    ]
    config = {"name": "ft", "finetune": {"num_steps": 4}}
    text = report(write_run(tmp_path, records=records, summary=None, config=config))
    found = facts(text)
    assert found["samples/s"] == "40.0" and found["updates"] == "4 of 4"
    assert "env steps/s" not in found and "staleness" not in found
    assert {"Samples", "Loss"} == set(charts(text))


def test_the_same_files_give_the_same_report(tmp_path):
    write_run(tmp_path)
    assert report(tmp_path) == report(tmp_path)


def test_values_that_are_not_finite_are_shown_as_missing(tmp_path):
    records = [record(i, learner__approx_kl=math.nan if i == 5 else 0.1) for i in range(1, 11)]
    before = dict.fromkeys(SUMMARY["evaluation_before"], None)
    text = report(
        write_run(
            tmp_path,
            records=records,
            summary=SUMMARY | {"evaluation_before": before, "time_s": None},
        )
    )
    assert [len(line) for line in charts(text)["Approximate KL"].lines()] == [4, 5]
    assert facts(text)["wall time"] == "2m00s"


def test_a_report_that_cannot_be_written_fails_nothing(tmp_path, caplog):
    with pytest.raises(ValueError, match=r"has no metrics\.jsonl"):
        write_report(tmp_path)
    with caplog.at_level(logging.WARNING):
        try_to_write_report(tmp_path)
    (entry,) = caplog.records
    assert "report.html was not written" in entry.getMessage() and entry.exc_info
    write_run(tmp_path)
    (tmp_path / "report.html").mkdir()
    try_to_write_report(tmp_path)
