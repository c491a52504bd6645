"""The bound in a whole run: what a violation does, and what the plan says of memory."""

import pathlib
from typing import Any

import pytest
from tiny_run import NO_EVALUATION, Run, make_blueprint, quick_jit

from jaxvla import config as c
from jaxvla.runtime.dry_run import _trajectory_bytes, plan_lines

fast_compilation = pytest.fixture(quick_jit, scope="module", autouse=True)


def make_run(workdir: pathlib.Path, **sections: Any) -> Run:
    return Run(workdir, make_blueprint(evaluation=NO_EVALUATION, **sections))


def hook_put(run: Run, note: Any) -> None:
    """Calls `note` with the keywords of every `put`, which it may change."""
    queue: Any = run.controller._queue
    put = queue.put

    def noted_put(ticket: Any, payload: Any, **known: Any) -> bool:
        note(known)
        return put(ticket, payload, **known)

    queue.put = noted_put


def test_a_sample_beyond_the_bound_stops_the_run_with_exit_code_4(tmp_path: pathlib.Path) -> None:
    """A server says that it has swapped, and goes on answering with version 0."""
    run = make_run(tmp_path)
    hook_put(run, lambda known: known.update(policy_version_min=0))
    run.expect(4)
    summary = run.summary()
    assert (summary["outcome"], summary["update"]) == ("unsafe", 2)
    assert "staleness 2 exceeds the bound 1" in summary["detail"]
    assert summary["ledger_closes"] is True
    assert summary["max_staleness"] == 1  # nothing that was trained on


def test_records_keep_what_the_plan_says_of_window_and_memory(tmp_path: pathlib.Path) -> None:
    """P = 2, S = 1: 1 + ceil((4 - 1) / 2) versions, and (1 + 1) * 2 trajectories."""
    sizes: set[int] = set()
    schedule = c.ScheduleConfig(max_staleness=1, window=4)
    run = make_run(tmp_path, schedule=schedule)
    hook_put(run, lambda known: sizes.add(known["nbytes"]))
    run.expect(0)
    assert {record["queue/staleness/bound"] for record in run.records()} == {3}
    assert run.summary()["staleness_bound"] == 3
    plan = list(plan_lines(make_blueprint(schedule=schedule)))
    assert "staleness  bound 3 (max_staleness 1, window 4), published every 1" in plan
    assert any(line.startswith("queue      at most 4 trajectories of ") for line in plan)
    assert sizes == {_trajectory_bytes(make_blueprint())}
