"""The real programs on emulated stages: how long an update takes under every schedule.

Time passes only while all programs wait, so the figures do not depend on the machine.
"""

import dataclasses
import sys
import threading
from typing import Any

import pytest

from jaxvla.config import ScheduleConfig
from jaxvla.runtime.local import LocalRuntime
from jaxvla.scaling.emulated_run import (
    FORWARD_S,
    ROLES,
    Batching,
    EmulatedRun,
    RunPlan,
    RunResult,
)
from jaxvla.scaling.emulated_time import IdleTime
from jaxvla.scaling.profiles import (
    COLOCATED,
    DEVICE_SIMULATOR,
    HOST_SIMULATOR,
    STAGES,
    StageCosts,
    Workload,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="emulated time reads /proc")

_WORKLOAD = Workload(
    num_envs=16,
    episode_steps=12,
    num_executed=2,
    num_rollout_epochs=2,
    num_update_epochs=2,
    num_minibatches=3,
)
_COSTS = StageCosts(simulation_s=600.0, inference_s=420.0, training_s=480.0)
_LOCKSTEP_S = 600.0 + 420.0
_EXACT = dict.fromkeys(STAGES, 0.0)


def _plan(**changes: Any) -> RunPlan:
    settings: dict[str, Any] = {
        "workload": _WORKLOAD,
        "num_envs": 16,
        "costs": _COSTS,
        "placement": HOST_SIMULATOR,
        "is_vectorised": False,
        "num_groups": 1,
        "envs_per_group": 16,
        "schedule": _schedule(),
        "num_warmup": 1,
        "num_updates": 2,
        "variation": _EXACT,
    }
    return RunPlan(**settings | changes)


def _schedule(*, training: bool = False, rollout: bool = False, stream: bool = False, s: int = 1):
    return ScheduleConfig(
        overlap_training=training,
        overlap_rollout=rollout,
        stream_microbatches=stream,
        max_staleness=s,
    )


def _run(**changes: Any) -> RunResult:
    clock = IdleTime()
    run = EmulatedRun(_plan(**changes), clock)
    try:
        with clock:
            LocalRuntime(threading.Event()).run(run.programs, run.meters, run.learner, 60.0)
    finally:
        run.close()
    result = run.result()
    assert result.staleness_max <= result.staleness_bound
    assert max(result.stage_busy.values()) <= 1.0 + 1e-9
    for activity in result.activities.values():
        shares = sum(activity.waiting_fractions.values()) + activity.busy_fraction
        assert shares == pytest.approx(1.0)
    return result


@pytest.mark.parametrize("placement", [COLOCATED, HOST_SIMULATOR, DEVICE_SIMULATOR])
@pytest.mark.parametrize("num_groups", [1, 4])
def test_synchronous_stages_add_up(placement: Any, num_groups: int):
    result = _run(placement=placement, num_groups=num_groups, envs_per_group=16 // num_groups)
    assert result.step_s == pytest.approx(_LOCKSTEP_S + 480.0)
    assert result.staleness_max == result.staleness_bound == 0
    assert result.env_steps_per_s == pytest.approx(16 * 12 * 2 / result.step_s)


def test_overlapping_training_leaves_the_longer_of_rollout_and_training():
    overlap = _schedule(training=True)
    assert _run(schedule=overlap).step_s == pytest.approx(_LOCKSTEP_S)
    slow = StageCosts(simulation_s=600.0, inference_s=420.0, training_s=1500.0)
    result = _run(schedule=overlap, costs=slow)
    assert result.step_s == pytest.approx(1500.0)
    assert result.staleness_max == result.staleness_bound == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("simulation_s", "inference_s", "training_s"),
    [(600.0, 420.0, 480.0), (400.0, 600.0, 480.0), (400.0, 420.0, 600.0)],
)
def test_with_everything_on_only_the_bottleneck_is_left(
    simulation_s: float, inference_s: float, training_s: float, stream: bool
):
    costs = StageCosts(simulation_s=simulation_s, inference_s=inference_s, training_s=training_s)
    schedule = _schedule(training=True, rollout=True, stream=stream)
    result = _run(schedule=schedule, costs=costs, num_groups=4, envs_per_group=4)
    bound_s = max(simulation_s, inference_s, training_s)
    # The window may begin and end one call earlier or later: 1 of 48 calls an update.
    assert result.step_s == pytest.approx(bound_s, rel=0.03)
    assert max(result.stage_busy.values()) > 0.97


def test_a_vectorised_batch_costs_twice_when_split_and_nothing_when_doubled():
    schedule, num_updates = _schedule(training=True, rollout=True), 8
    settings: dict[str, Any] = {"placement": DEVICE_SIMULATOR, "is_vectorised": True}
    settings |= {"schedule": schedule, "num_groups": 2, "num_updates": num_updates}
    split, whole = _run(envs_per_group=8, **settings), _run(envs_per_group=16, **settings)
    split_s = 2 * 600.0 + 420.0 + FORWARD_S * _WORKLOAD.num_passes
    # The window may begin and end one chunk step earlier or later: 12 make an update.
    assert split.step_s == pytest.approx(split_s, abs=split_s / 12 / num_updates)
    assert whole.step_s == pytest.approx(_LOCKSTEP_S, abs=_LOCKSTEP_S / 12 / num_updates)


def test_a_vectorised_batch_where_all_stages_share_the_devices_loses_nothing():
    """Everything on, two whole batches: the devices are never idle, as in the synchronous run."""
    settings: dict[str, Any] = {"placement": COLOCATED, "is_vectorised": True}
    schedule = _schedule(training=True, rollout=True, stream=True)
    result = _run(schedule=schedule, num_groups=2, num_updates=8, **settings)
    assert sum(result.stage_busy.values()) == pytest.approx(1.0)
    # Up to the chunk step by which the window may begin or end earlier or later.
    assert result.step_s == pytest.approx(1500.0, abs=1500.0 / 12 / 8)


def _batching_step_s(num_groups: int, batching: Batching) -> float:
    """Seconds of an update where only inference counts and batching alone decides.

    Groups simulate for 0.25 s, one after the other; a pass takes 10 s whatever its size.
    """
    workload = dataclasses.replace(_WORKLOAD, episode_steps=96, num_rollout_epochs=1)
    costs = StageCosts(simulation_s=48 * 0.25 * num_groups, inference_s=490.0, training_s=1.0)
    return _run(
        workload=workload,
        costs=costs,
        num_envs=4 * num_groups,
        num_groups=num_groups,
        envs_per_group=4,
        schedule=_schedule(training=True, rollout=True),
        batching=dataclasses.replace(batching, forward_s=10.0),
    ).step_s


@pytest.mark.parametrize("num_groups", [2, 4])
def test_trigger_wait_and_tuner_are_those_of_the_batcher(num_groups: int):
    one = _batching_step_s(num_groups, Batching())
    # Longer than a pass: groups that ask while the others are served are waited for. With less
    # they would not be, and a run that once fell into two halves would stay so.
    waiting = _batching_step_s(num_groups, Batching(trigger_groups=num_groups, max_wait_s=15.0))
    for_ever = _batching_step_s(num_groups, Batching(trigger_groups=num_groups))
    adaptive = _batching_step_s(num_groups, Batching(max_wait_s=0.02, is_adaptive=True))
    # 49 passes and 48 chunk steps. Between segments a group that asks while the others have left
    # is served alone, each at most once: one pass more per group, and where there is a timer,
    # after it. The window of two updates may begin or end one call earlier or later.
    least_s = 49 * 10.0 + 48 * 0.25 * num_groups
    alone_s = num_groups * 10.0 + (10.0 + 0.25 * num_groups) / 2
    assert least_s - 1e-6 <= for_ever <= least_s + alone_s
    assert least_s - 1e-6 <= waiting <= least_s + num_groups * 15.0 + alone_s
    # From one request on: while one group is served the others' gather, so two passes in turn.
    assert one > 1.6 * least_s
    assert adaptive < 1.05 * (least_s + alone_s)


def test_stages_are_busy_as_long_as_their_work_takes():
    result = _run(schedule=_schedule(training=True))
    for name, seconds in zip(STAGES, (600.0, 420.0, 480.0), strict=True):
        assert result.stage_busy[name] == pytest.approx(seconds / _LOCKSTEP_S)
    assert set(result.activities) == set(ROLES.values())


def test_trajectories_per_update():
    assert _plan().trajectories_per_update == 2
    assert _plan(num_groups=4, envs_per_group=4).trajectories_per_update == 8
    assert _plan(num_groups=2, envs_per_group=16).trajectories_per_update == 2


def test_an_unfinished_run_has_no_result():
    run = EmulatedRun(_plan(), IdleTime())
    run.close()
    with pytest.raises(ValueError, match="after 0 updates"):
        run.result()
