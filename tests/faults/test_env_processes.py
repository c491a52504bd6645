"""Processes of a host env that die, hang or answer with nonsense, in a whole run."""

import dataclasses
import pathlib
from typing import Any

import pytest
from fault_rows import FaultRow
from faulty_env import EXIT, FAULTS, HANG, NAN, SEGFAULT, SHAPE, FaultyEnvs
from runtime.tiny_run import (
    NO_EVALUATION,
    keeps_bound,
    make_blueprint,
    quick_jit,
    require_invariants,
)
from simulation.counter_env import CounterEnv
from tiny_faults import TimedRun, lost

from jaxvla import config as c

fast_compilation = pytest.fixture(quick_jit, scope="module", autouse=True)

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

STEP_TIMEOUT_S = 5.0
"""Far above what a chunk takes, so that only the env that hangs misses it."""


def make_run(workdir: pathlib.Path, *, num_updates: int, **env: Any) -> TimedRun:
    blueprint = make_blueprint(
        evaluation=NO_EVALUATION,
        learning=c.LearningConfig(num_updates=num_updates, trajectories_per_update=2),
    )
    marks = workdir / "marks"
    marks.mkdir(parents=True)
    env_of_processes: Any = FaultyEnvs(CounterEnv.spec, marks, step_timeout_s=STEP_TIMEOUT_S, **env)
    return TimedRun(workdir, dataclasses.replace(blueprint, env=env_of_processes))


@pytest.mark.slow
@pytest.mark.fault(1, 2, 3, 5, 6)
def test_env_processes_break_in_every_way(tmp_path: pathlib.Path, fault_row: FaultRow) -> None:
    """Each costs the chunk that it answered to, and nothing else."""
    run = make_run(tmp_path, num_updates=12, faults=FAULTS).expect(0)
    require_invariants(run.records(), 12)
    totals = run.summary()["totals"]
    causes = {"exit": 1, "signal": 1, "deadline": 1, "exception": 2}
    restarts = "faults/simulator_restarts/"
    assert {
        k.removeprefix(restarts): v for k, v in totals.items() if k.startswith(restarts)
    } == causes
    # All were invalid, and all samples but these went into updates.
    assert totals["faults/invalid_samples"] == len(FAULTS)
    assert lost(run) == 0
    log = "".join(path.read_text() for path in (tmp_path / "logs").glob("*/env-*.log"))
    assert "Segmentation fault" in log  # where it was, by faulthandler
    assert "images: expected uint8 [1, 2, 2, 3], got uint8 [1, 1, 2, 3]" in log
    for number, name in ((1, EXIT), (2, SEGFAULT), (3, HANG), (5, SHAPE), (6, NAN)):
        happened_s = float((tmp_path / "marks" / name).read_text())
        fault_row(
            fault=number,
            survived=True,
            lost=0,
            recovery_s=run.recovery_s(happened_s),
            bound_kept=keeps_bound(run),
            exit_code=0,
        )


@pytest.mark.fault(5)
def test_an_env_that_is_always_wrong_is_set_aside(
    tmp_path: pathlib.Path, fault_row: FaultRow
) -> None:
    """One of each group: the run goes on with the others."""
    run = make_run(tmp_path, num_updates=4, broken_task=1, max_failures=2).expect(0)
    require_invariants(run.records(), 4)
    totals = run.summary()["totals"]
    assert totals["faults/quarantined_envs"] == 2
    assert totals["faults/simulator_restarts/exception"] == 4
    assert totals["faults/invalid_samples"] > 4
    told = (tmp_path / "logs" / "simulation.log").read_text()
    assert "is set aside: 2 failures in a row; the last: env 1, step_chunk: ValueError" in told
    fault_row(
        survived=True, lost=lost(run), bound_kept=keeps_bound(run), exit_code=0, note="quarantine"
    )
