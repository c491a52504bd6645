"""Samples and gradients that are not numbers, in whole runs of a tiny policy."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from fault_rows import FaultRow
from runtime.tiny_run import (
    NO_EVALUATION,
    SYNCHRONOUS,
    Run,
    keeps_bound,
    make_blueprint,
    quick_jit,
    require_invariants,
)
from simulation.counter_env import EXPLODE, CounterEnv, CounterState

from jaxvla import config as c
from jaxvla.learning.learner import Learner

fast_compilation = pytest.fixture(quick_jit, scope="module", autouse=True)


class ExplodingEnv(CounterEnv):
    """Its physics blows up after the second control step of an episode, in some tasks."""

    exploding_tasks: tuple[int, ...] = (1,)

    def step(self, state: CounterState, action: jax.Array) -> CounterState:
        is_due = (state.num_steps == 2) & jnp.isin(state.task, jnp.asarray(self.exploding_tasks))
        return super().step(state, action.at[0].set(jnp.where(is_due, EXPLODE, 0.0)))


class AlwaysExplodingEnv(ExplodingEnv):
    """Every chunk of every task ends in NaN."""

    def step(self, state: CounterState, action: jax.Array) -> CounterState:
        return CounterEnv.step(self, state, action.at[0].set(EXPLODE))


def run_of(env: Any, workdir: pathlib.Path, **sections: Any) -> Run:
    blueprint = make_blueprint(evaluation=NO_EVALUATION, **SYNCHRONOUS, **sections)
    return Run(workdir, dataclasses.replace(blueprint, env=env))


@pytest.mark.fault(6)
def test_worlds_that_blow_up_are_not_trained_on(tmp_path: pathlib.Path, fault_row: FaultRow):
    run = run_of(ExplodingEnv(), tmp_path).expect(0)
    require_invariants(run.records(), 4)
    summary = run.summary()
    assert summary["totals"]["faults/invalid_samples"] > 0
    dropped = summary["totals"]["queue/dropped"]
    fault_row(survived=True, lost=dropped, bound_kept=keeps_bound(run), exit_code=0)


@pytest.mark.fault(7)
def test_a_run_in_which_every_world_blows_up_ends(tmp_path: pathlib.Path, fault_row: FaultRow):
    learning = c.LearningConfig(num_updates=9, max_skipped_updates=3)
    run = run_of(AlwaysExplodingEnv(), tmp_path, learning=learning).expect(4)
    summary = run.summary()
    assert summary["outcome"] == "unsafe"
    assert summary["detail"].startswith("learning: NonFiniteError: 3 updates in a row had no valid")
    assert summary["detail"].endswith("The last good checkpoint is update 2")
    assert [record["update"] for record in run.records()] == [1, 2]
    fault_row(survived=True, bound_kept=keeps_bound(run), exit_code=4)


@pytest.mark.fault(8)
def test_a_gradient_that_is_once_no_number_changes_nothing(
    tmp_path: pathlib.Path, fault_row: FaultRow, monkeypatch: pytest.MonkeyPatch
):
    """The second update's rewards are NaN in the learner's memory: its state stays, to the bit."""
    take = Learner._take
    states: dict[int, Any] = {}

    def spoiling(learner: Learner, count: int) -> Any:
        items = take(learner, count)
        states[learner.progress.version] = jax.device_get(learner.state)
        if learner.progress.version == 1 and items is not None:
            for item in items:
                item.payload.reward[...] = float("nan")
        return items

    monkeypatch.setattr(Learner, "_take", spoiling)
    run = run_of(CounterEnv(), tmp_path).expect(0)
    assert [x["learner/grad_norm"] is None for x in run.records()] == [False, True, False, False]
    before, after = states[1], states[2]
    assert int(after.num_skipped) - int(before.num_skipped) == 1
    for name in ("params", "opt_state"):
        pairs = zip(
            jax.tree.leaves(getattr(before, name)),
            jax.tree.leaves(getattr(after, name)),
            strict=True,
        )
        assert all((a == b).all() for a, b in pairs), name
    assert run.summary()["totals"]["queue/consumed"] == 8
    fault_row(survived=True, lost=0, bound_kept=keeps_bound(run), exit_code=0)
