"""Whole runs with a process for every program, on this machine and as Ray actors."""

import os
import pathlib
import re
import signal
import time

import pytest
from fault_rows import FaultRow
from integration.run_process import RunProcess, lost, require_nothing_left, wait_for_end
from integration.test_runs import LOSSES, SYNCHRONOUS, require_invariants

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]

SHORT = (
    "--config.warm_start.num_steps=0",
    "--config.warm_start.num_grounding_steps=0",
    "--config.evaluation.num_episodes=0",
)
PROCESSES = ("--config.runtime.kind=processes", "--config.runtime.restart_backoff_s=0.05")
SEVERAL = (
    *SHORT,
    *PROCESSES,
    "--config.simulation.num_simulators=2",
    "--config.serving.num_servers=2",
    "--config.learning.num_updates=40",
)


def processes(run: RunProcess) -> dict[str, int]:
    """Name -> process id, of the latest start."""
    text = (run.workdir / "logs" / "runtime.log").read_text()
    return {name: int(pid) for name, pid in re.findall(r"(\w+_\d+) is process (\d+)", text)}


@pytest.fixture(scope="module")
def synchronous(tmp_path_factory: pytest.TempPathFactory) -> RunProcess:
    """In one process."""
    return RunProcess(tmp_path_factory.mktemp("local"), *SYNCHRONOUS).expect(0)


KINDS = ["processes", pytest.param("ray", marks=pytest.mark.ray)]


@pytest.mark.parametrize("kind", KINDS)
def test_several_processes_compute_what_one_does(
    tmp_path: pathlib.Path, synchronous: RunProcess, kind: str
):
    run = RunProcess(tmp_path, *SYNCHRONOUS, f"--config.runtime.kind={kind}").expect(0)
    require_invariants(run.records(), 12)
    for own, other in zip(run.records(), synchronous.records(), strict=True):
        assert {name: own[name] for name in LOSSES} == {name: other[name] for name in LOSSES}
    assert run.digests(12) == synchronous.digests(12)
    require_nothing_left(run)


@pytest.mark.fault(35)
@pytest.mark.parametrize(
    "name",
    [
        "simulator_1",
        pytest.param("server_0", marks=pytest.mark.fault(11)),
        pytest.param("learner_0", marks=pytest.mark.fault(12)),
    ],
)
def test_a_killed_process_is_survived(tmp_path: pathlib.Path, name: str, fault_row: FaultRow):
    run = RunProcess(tmp_path, *SEVERAL)
    run.until(r"^update +3/")
    killed_s = time.monotonic()
    os.kill(processes(run)[name], signal.SIGKILL)
    run.until(rf"{name} ended \(signal 9\); restart in 0.05 s")
    run.until(r"^update +\d+/")
    recovery_s = time.monotonic() - killed_s
    run.expect(0)
    summary = run.summary()
    assert summary["outcome"] == "finished"
    assert summary["ledger_closes"]
    assert summary["max_staleness"] <= summary["staleness_bound"]
    role = {"simulator": "simulation", "server": "serving", "learner": "learning"}
    assert summary["last_record"][f"faults/restarts/{role[name.split('_')[0]]}"] == 1
    require_nothing_left(run)
    figures = {"lost": lost(summary), "recovery_s": recovery_s, "bound_kept": True, "exit_code": 0}
    number = {"server_0": 11, "learner_0": 12}.get(name, 35)
    fault_row(fault=number, survived=True, **figures)


@pytest.mark.fault(17)
@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_stops_and_the_same_command_goes_on(
    tmp_path: pathlib.Path, kind: str, fault_row: FaultRow
):
    several = (*SEVERAL, f"--config.runtime.kind={kind}")
    run = RunProcess(tmp_path, *several)
    run.until(r"^update +3/")
    asked_s = time.monotonic()
    run.send(signal.SIGTERM)
    run.expect(3)
    note = f"stopped after {time.monotonic() - asked_s:.1f} s"
    summary = run.summary()
    kept = summary["max_staleness"] <= summary["staleness_bound"] and summary["ledger_closes"]
    assert kept
    fault_row(survived=True, lost=lost(summary), bound_kept=kept, exit_code=3, note=note)
    require_nothing_left(run)
    reached = run.summary()["update"]
    again = RunProcess(tmp_path, *several).expect(0)
    assert any(f"after update {reached}" in line for line in again.lines)
    assert again.summary()["update"] == 40


@pytest.mark.fault(35)
def test_nothing_outlives_a_killed_supervisor(tmp_path: pathlib.Path, fault_row: FaultRow):
    run = RunProcess(tmp_path, *SEVERAL, "--config.runtime.grace_s=3")
    run.until(r"^update +3/")
    run.send(signal.SIGKILL)
    run.finish()
    for pid in processes(run).values():
        wait_for_end(pid)
    require_nothing_left(run)
    fault_row(survived=True)


def test_a_killed_parent_leaves_its_child_to_the_learner(tmp_path: pathlib.Path):
    """Weights go learner -> server_0 -> server_1 -> server_2, until the middle dies."""
    chain = ("--config.serving.num_servers=3", "--config.runtime.weights_fanout=1")
    groups = ("--config.simulation.num_groups=4", "--config.learning.num_updates=60")
    run = RunProcess(tmp_path, *SEVERAL, *groups, *chain)
    run.until(r"^update +3/")
    os.kill(processes(run)["server_1"], signal.SIGKILL)
    run.until(r"server_1 ended \(signal 9\); restart in 0.05 s")
    run.expect(0)
    summary = run.summary()
    assert summary["outcome"] == "finished" and summary["ledger_closes"]
    assert summary["max_staleness"] <= summary["staleness_bound"]
    assert summary["last_record"]["faults/restarts/serving"] == 1
    words = (tmp_path / "logs" / "server_2.out").read_text()
    turned = re.findall(r"the parent is lost; weights come from the learner, after (\d+)", words)
    assert [int(version) < 50 for version in turned] == [True], words  # not at the end of the run
    require_nothing_left(run)
