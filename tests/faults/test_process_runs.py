"""Faults in whole runs with a process for every program; those of killed ones are in
tests/integration/test_cluster_runs.py."""

import json
import os
import pathlib
import re
import signal
import time

import pytest
from fault_rows import FaultRow
from integration.run_process import RunProcess, lost, require_nothing_left, wait_for_end
from integration.test_cluster_runs import SEVERAL, SHORT, processes

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]

INJECTIONS = pathlib.Path(__file__).parent / "injections"
UPDATE = r"^update +\d+/"


@pytest.mark.fault(10, 31)
def test_a_server_that_raises_and_a_simulator_that_stands_still(
    tmp_path: pathlib.Path, fault_row: FaultRow
) -> None:
    """The server's process ends and is replaced. The simulator is stopped by SIGSTOP: to the others
    that is a machine which the network has lost, until the supervisor kills it."""
    environment = {
        "FAULT_DIRECTORY": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(INJECTIONS), os.environ.get("PYTHONPATH", "")]),
    }
    workdir = tmp_path / "run"
    run = RunProcess(workdir, *SEVERAL, "--config.runtime.silence_s=15", environment=environment)
    line = run.until(r"^server_\d ended .*restart in")
    assert "ArithmeticError: injected into the policy server" in line
    run.until(UPDATE)
    raised_s = time.monotonic() - float((tmp_path / "raised").read_text().split()[0])
    stopped_s = time.monotonic()
    os.kill(processes(run)["simulator_1"], signal.SIGSTOP)
    run.until(r"^simulator_1 ended \(signal 9\)")
    run.until(UPDATE)
    stopped_s = time.monotonic() - stopped_s
    run.expect(0)
    summary = run.summary()
    assert summary["outcome"] == "finished" and summary["ledger_closes"]
    kept = summary["max_staleness"] <= summary["staleness_bound"]
    assert kept
    restarts = {k: v for k, v in summary["last_record"].items() if k.startswith("faults/restarts")}
    assert restarts["faults/restarts/serving"] == 1 and restarts["faults/restarts/simulation"] == 1
    assert summary["totals"]["queue/dropped/simulator_lost"] >= 1
    require_nothing_left(run)
    shared = {"survived": True, "bound_kept": kept, "exit_code": 0}
    fault_row(fault=10, lost=0, recovery_s=raised_s, **shared)
    fault_row(fault=31, lost=lost(summary), recovery_s=stopped_s, **shared)


@pytest.mark.ray
@pytest.mark.fault(30)
def test_a_run_whose_ray_head_is_killed_ends_and_goes_on(
    tmp_path: pathlib.Path, fault_row: FaultRow
) -> None:
    """Its own Ray cluster: without the head nobody can be started any more."""
    settings = (*SHORT, "--config.learning.num_updates=400", "--config.checkpoint.interval=2")
    run = RunProcess(tmp_path, *settings, "--config.runtime.kind=ray")
    run.until(r"^update +4/")
    killed_s = time.monotonic()
    for name in ("gcs_server", "raylet"):
        for pid in run.descendants(name):
            os.kill(pid, signal.SIGKILL)
    code = run.finish()
    noticed_s = time.monotonic() - killed_s
    assert code == 1 and noticed_s < 180.0, "\n".join(run.lines)  # Ray's own end, after a minute
    for pid in run.descendants():  # they notice in their turn
        wait_for_end(pid)
    require_nothing_left(run)
    steps = [int(path.name) for path in (tmp_path / "checkpoints").iterdir()]
    record = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert max(steps) >= 4
    last = f"--config.learning.num_updates={max(record['update'], max(steps)) + 2}"
    again = RunProcess(tmp_path, *SHORT, last, "--config.checkpoint.interval=2").expect(0)
    assert any(re.search(rf"after update {max(steps)}$", line) for line in again.lines)
    summary = again.summary()
    kept = summary["max_staleness"] <= summary["staleness_bound"]
    assert kept and summary["ledger_closes"]
    fault_row(survived=True, recovery_s=noticed_s, bound_kept=kept, exit_code=code)
