"""Whole runs with a learner of two processes, 4 devices each."""

import math
import os
import pathlib
import signal

import pytest
from integration.run_process import RunProcess
from test_cluster_runs import PROCESSES, SHORT, processes, require_nothing_left
from test_runs import LOSSES, require_invariants

pytestmark = [pytest.mark.timeout(1800), pytest.mark.slow]

LAYOUT = "--config.meshes.layout=simulation=1@0 serving=1@0 learning=8@0:data2,fsdp4"
GANG = (*PROCESSES, LAYOUT, "--config.runtime.learner_processes=2")
SYNCHRONOUS = (
    *SHORT,
    "--config.schedule.overlap_training=False",
    "--config.schedule.overlap_rollout=False",
)
UPDATES = "--config.learning.num_updates"
PATIENT = "--config.runtime.grace_s=120"
"""An update on few cores takes seconds, and must end before it can be saved."""
# Other meshes round in another way, which Adam makes larger: as in test_runs.py.
TOLERANCE = 1e-5


def _largest_difference(run: RunProcess, other: RunProcess) -> float:
    """Of any loss of any update."""
    pairs = zip(run.records(), other.records(), strict=True)
    return max(abs(own[name] - its[name]) for own, its in pairs for name in LOSSES)


def test_two_processes_learn_what_one_does_and_one_goes_on(tmp_path: pathlib.Path):
    gang = RunProcess(tmp_path / "gang", *SYNCHRONOUS, *GANG, f"{UPDATES}=4", num_devices=4)
    gang.expect(0)
    require_invariants(gang.records(), 4)
    require_nothing_left(gang)
    assert {"learner_0", "learner_1"} < processes(gang).keys()
    local = RunProcess(tmp_path / "local", *SYNCHRONOUS, LAYOUT, f"{UPDATES}=4", num_devices=8)
    local.expect(0)
    largest = _largest_difference(gang, local)
    print(f"losses differ by {largest:.2g} at most")  # noqa: T201
    assert largest < TOLERANCE
    for own, its in zip(gang.records(), local.records(), strict=True):
        assert math.isclose(own["learner/grad_norm"], its["learner/grad_norm"], rel_tol=1e-3)
    # Both go on in one process, which cannot tell how many wrote the checkpoint.
    for run in (gang, local):
        again = RunProcess(run.workdir, *SYNCHRONOUS, LAYOUT, f"{UPDATES}=6", num_devices=8)
        again.expect(0)
        assert any("after update 4" in line for line in again.lines)
        require_invariants(again.records(), 6)
    assert _largest_difference(gang, local) < TOLERANCE


def test_a_killed_follower_is_survived(tmp_path: pathlib.Path):
    run = RunProcess(tmp_path, *SHORT, *GANG, f"{UPDATES}=12", num_devices=4)
    run.until(r"^update +3/")
    before = processes(run)
    os.kill(before["learner_1"], signal.SIGKILL)
    run.until(r"learner_1 ended \(signal 9\); restart of all 2 of its kind in 0.05 s")
    run.expect(0)
    after = processes(run)
    assert all(after[name] != before[name] for name in ("learner_0", "learner_1"))
    assert after["simulator_0"] == before["simulator_0"]
    summary = run.summary()
    assert summary["outcome"] == "finished"
    assert summary["ledger_closes"]
    assert summary["max_staleness"] <= summary["staleness_bound"]
    assert summary["last_record"]["faults/restarts/learning"] == 1
    require_nothing_left(run)


def test_a_follower_that_gets_a_signal_stops_the_run(tmp_path: pathlib.Path):
    run = RunProcess(tmp_path, *SHORT, *GANG, PATIENT, f"{UPDATES}=40", num_devices=4)
    run.until(r"^update +3/")
    os.kill(processes(run)["learner_1"], signal.SIGTERM)
    run.expect(3)
    require_nothing_left(run)
    reached = run.summary()["update"]
    assert 3 <= reached < 40
    again = RunProcess(tmp_path, *SHORT, *GANG, f"{UPDATES}={reached + 2}", num_devices=4)
    again.expect(0)
    assert any(f"after update {reached}" in line for line in again.lines)
    assert again.summary()["update"] == reached + 2
