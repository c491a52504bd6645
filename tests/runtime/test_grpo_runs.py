"""Whole runs of GRPO: early ends, resumes to the bit, nothing compiled late."""

import pathlib
import threading
from typing import Any

import jax
import numpy as np
import pytest
from tiny_run import NO_EVALUATION, SYNCHRONOUS, Run, make_blueprint, quick_jit

from jaxvla import config as c
from jaxvla.algorithms.grpo import GRPOConfig
from jaxvla.runtime.build import Blueprint

fast_compilation = pytest.fixture(quick_jit, scope="module", autouse=True)

G = 2
LOSSES = ("learner/loss/total", "learner/loss/policy", "learner/grad_norm", "learner/ratio/max")
WHOLE_EPISODES = c.SimulationConfig(num_groups=1, envs_per_group=4, group_size=G, segment_length=3)
"""Longest episode: five control steps, two to a chunk."""


def blueprint(algorithm: GRPOConfig | None = None, **sections: Any) -> Blueprint:
    made = make_blueprint(
        algorithm=algorithm or GRPOConfig(group_size=G, num_epochs=2),
        **({**SYNCHRONOUS, "simulation": WHOLE_EPISODES, "evaluation": NO_EVALUATION} | sections),
    )
    assert made.spec.max_episode_steps == (3, 5) and made.config.env.num_executed == 2
    return made


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("uninterrupted"), blueprint()).expect(0)


def test_a_stopped_run_ends_like_one_that_was_not(
    uninterrupted: Run, tmp_path: pathlib.Path
) -> None:
    first = Run(tmp_path, blueprint())
    first.stop_after(3)
    first.expect(3)
    assert not any(name.startswith("groups/") for name in first.digests(3))  # only counters
    second = Run(tmp_path, blueprint()).expect(0)
    assert second.digests(4) == uninterrupted.digests(4)
    for resumed, expected in zip(second.records(), uninterrupted.records(), strict=True):
        assert [resumed[name] for name in LOSSES] == [expected[name] for name in LOSSES]
    assert len({record["learner/loss/policy"] for record in second.records()}) > 1


def test_a_run_does_what_it_says(uninterrupted: Run) -> None:
    """All trajectories are consumed, the policy learns, and the critic does not."""
    records = uninterrupted.records()
    assert [record["queue/consumed"] for record in records] == [2, 4, 6, 8]
    for record in records:
        assert record["serving/recompiles"] == 0
        assert 0.0 <= record["train/uniform_group_fraction"] <= 1.0
        assert all(np.isfinite(record[name]) for name in LOSSES)
    first, last = uninterrupted.digests(2), uninterrupted.digests(4)
    params = {name for name in first if name.startswith("state/params/")}
    critic = {name for name in params if "value_head" in name}
    assert critic and all(first[name] == last[name] for name in critic)
    assert any(first[name] != last[name] for name in params - critic)


@pytest.mark.slow
def test_early_ends_compile_nothing_late(tmp_path: pathlib.Path) -> None:
    """Asynchronous, streaming; trajectories need one to three chunks."""
    late: list[str] = []
    is_listening = True

    def listen(event: str, duration_secs: float, **details: Any) -> None:
        is_late = is_listening and threading.current_thread().name.startswith("simulation")
        if is_late and event == "/jax/core/compile/backend_compile_duration":
            late.append(str(details.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    simulation = c.SimulationConfig(num_groups=2, envs_per_group=2, group_size=2, segment_length=3)
    run = Run(
        tmp_path,
        blueprint(
            GRPOConfig(group_size=2, filter_uniform=True, aggregation="episode"),
            simulation=simulation,
            serving=c.ServingConfig(trigger_size=2, max_batch=4, buckets=(2, 4)),
            schedule=c.ScheduleConfig(stream_microbatches=True),
            learning=c.LearningConfig(num_updates=8, trajectories_per_update=2),
        ),
    ).expect(0)
    is_listening = False
    assert set(late) <= {"jit(_stack_on_device)", "jit(_explore_keys)"}
    assert len(late) == len(set(late))  # once for trajectories of all lengths
    steps = [record["queue/consumed"] for record in run.records()]
    assert steps == [2 * n for n in range(1, 9)]
    assert all(x["queue/staleness/max"] <= x["queue/staleness/bound"] for x in run.records())


@pytest.mark.slow
def test_lockstep_groups_end_apart_and_the_run_goes_on(tmp_path: pathlib.Path) -> None:
    """A lane that is done must not hold the server's batch back for the other one."""
    simulation = c.SimulationConfig(num_groups=2, envs_per_group=2, group_size=2, segment_length=3)
    serving = c.ServingConfig(trigger_size=4, max_batch=4, buckets=(2, 4))
    Run(tmp_path, blueprint(simulation=simulation, serving=serving)).expect(0)
