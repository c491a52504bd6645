"""Whole runs with a process for every program, on this machine and as Ray actors."""

import os
import pathlib
import re
import select
import signal

import pytest
from run_process import RunProcess
from test_runs import LOSSES, SYNCHRONOUS, require_invariants

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


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def require_nothing_left(run: RunProcess) -> None:
    for name, pid in processes(run).items():
        assert not is_alive(pid), f"{name} is left behind"


@pytest.fixture(scope="module")
def synchronous(tmp_path_factory: pytest.TempPathFactory) -> RunProcess:
    """In one process."""
    return RunProcess(tmp_path_factory.mktemp("local"), *SYNCHRONOUS).expect(0)


@pytest.mark.parametrize("kind", ["processes", pytest.param("ray", marks=pytest.mark.ray)])
def test_several_processes_compute_what_one_does(
    tmp_path: pathlib.Path, synchronous: RunProcess, kind: str
):
    run = RunProcess(tmp_path, *SYNCHRONOUS, f"--config.runtime.kind={kind}").expect(0)
    require_invariants(run.records(), 12)
    for own, other in zip(run.records(), synchronous.records(), strict=True):
        assert {name: own[name] for name in LOSSES} == {name: other[name] for name in LOSSES}
    assert run.digests(12) == synchronous.digests(12)
    require_nothing_left(run)


@pytest.mark.parametrize("name", ["simulator_1", "server_0", "learner_0"])
def test_a_killed_process_is_survived(tmp_path: pathlib.Path, name: str):
    run = RunProcess(tmp_path, *SEVERAL)
    run.until(r"^update +3/")
    os.kill(processes(run)[name], signal.SIGKILL)
    run.until(rf"{name} ended \(signal 9\); restart in 0.05 s")
    run.expect(0)
    summary = run.summary()
    assert summary["outcome"] == "finished"
    assert summary["ledger_closes"]
    assert summary["max_staleness"] <= summary["staleness_bound"]
    role = {"simulator": "simulation", "server": "serving", "learner": "learning"}
    assert summary["last_record"][f"faults/restarts/{role[name.split('_')[0]]}"] == 1
    require_nothing_left(run)


def test_a_signal_stops_and_the_same_command_goes_on(tmp_path: pathlib.Path):
    run = RunProcess(tmp_path, *SEVERAL)
    run.until(r"^update +3/")
    run.send(signal.SIGTERM)
    run.expect(3)
    require_nothing_left(run)
    reached = run.summary()["update"]
    again = RunProcess(tmp_path, *SEVERAL).expect(0)
    assert any(f"after update {reached}" in line for line in again.lines)
    assert again.summary()["update"] == 40


def test_nothing_outlives_a_killed_supervisor(tmp_path: pathlib.Path):
    run = RunProcess(tmp_path, *SEVERAL, "--config.runtime.grace_s=3")
    run.until(r"^update +3/")
    run.send(signal.SIGKILL)
    run.finish()
    for pid in processes(run).values():
        _wait_for_end(pid)


def _wait_for_end(pid: int) -> None:
    """Of a process that is no child of this one."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], 30.0)[0], f"process {pid} lives on"
    finally:
        os.close(descriptor)
