"""The simulation against the real programs on emulated stages, at the same exact costs."""

import sys
import threading
from typing import Any

import pytest

from jaxvla.config import ScheduleConfig
from jaxvla.runtime.local import LocalRuntime
from jaxvla.scaling.emulated_run import Batching, EmulatedRun, RunPlan, RunResult
from jaxvla.scaling.emulated_system import samples_of_plan, system_of_plan
from jaxvla.scaling.emulated_time import IdleTime
from jaxvla.scaling.profiles import (
    COLOCATED,
    DEVICE_SIMULATOR,
    HOST_SIMULATOR,
    STAGES,
    StageCosts,
    Workload,
)
from jaxvla.scaling.simulate import simulate

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="emulated time reads /proc")

_WORKLOAD = Workload(
    num_envs=16,
    episode_steps=12,
    num_executed=2,
    num_rollout_epochs=2,
    num_update_epochs=2,
    num_minibatches=3,
)


def _plan(switches: str, **changes: Any) -> RunPlan:
    values: dict[str, Any] = {
        "workload": _WORKLOAD,
        "num_envs": 16,
        "costs": StageCosts(simulation_s=600.0, inference_s=420.0, training_s=480.0),
        "placement": HOST_SIMULATOR,
        "is_vectorised": False,
        "num_groups": 4,
        "envs_per_group": 4,
        "schedule": ScheduleConfig(
            overlap_training="t" in switches,
            overlap_rollout="r" in switches,
            stream_microbatches="s" in switches,
        ),
        "num_warmup": 2,
        "num_updates": 12,
        "variation": dict.fromkeys(STAGES, 0.0),
    }
    return RunPlan(**values | changes)


def _emulate(plan: RunPlan) -> RunResult:
    clock = IdleTime()
    run = EmulatedRun(plan, clock)
    try:
        with clock:
            LocalRuntime(threading.Event()).run(run.programs, run.meters, run.learner, 60.0)
    finally:
        run.close()
    return run.result()


_TRAINING_BOUND = StageCosts(simulation_s=400.0, inference_s=420.0, training_s=1500.0)
_SERVER_BOUND = StageCosts(simulation_s=300.0, inference_s=600.0, training_s=200.0)


@pytest.mark.parametrize(
    ("switches", "changes"),
    [
        ("", {}),
        ("", {"placement": COLOCATED, "num_groups": 1, "envs_per_group": 16}),
        ("t", {}),
        ("t", {"costs": _TRAINING_BOUND}),
        ("tr", {}),
        ("trs", {}),
        ("trs", {"costs": _TRAINING_BOUND}),
        ("tr", {"costs": _SERVER_BOUND, "batching": Batching(trigger_groups=2, max_wait_s=5.0)}),
        (
            "tr",
            {
                "placement": DEVICE_SIMULATOR,
                "is_vectorised": True,
                "num_groups": 2,
                "envs_per_group": 16,
            },
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else ",".join(map(str, x)) or "plain",
)
def test_the_simulation_agrees_with_the_real_programs(switches: str, changes: dict[str, Any]):
    plan = _plan(switches, **changes)
    emulated = _emulate(plan)
    simulated = simulate(system_of_plan(plan), samples_of_plan(plan))
    # Where events fall on the same instant the real threads' order is any, and the window may
    # begin and end one chunk step, of 12 in each of 12 updates, earlier or later: 2 / 144.
    tolerance = 1e-6 if "r" not in switches else 0.015
    assert simulated.update_s == pytest.approx(emulated.step_s, rel=tolerance)
    assert simulated.env_steps_per_s == pytest.approx(emulated.env_steps_per_s, rel=tolerance)
    assert simulated.staleness_max == emulated.staleness_max
    assert simulated.staleness_bound == emulated.staleness_bound
    for role, activity in emulated.activities.items():
        assert simulated.busy[role] == pytest.approx(activity.busy_fraction, abs=0.02)
