"""With all switches off a run is the plain synchronous algorithm, to the bit."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import NO_EVALUATION, Run, make_blueprint, quick_jit

from jaxvla import config as c
from jaxvla import rng
from jaxvla.runtime.build import Blueprint, Parts
from jaxvla.runtime.groups import Groups
from jaxvla.serving.sampling import row_keys
from jaxvla.simulation.assembler import SegmentAssembler
from jaxvla.simulation.group import Cursor, EnvGroup
from jaxvla.telemetry.metrics import MetricRecorder
from jaxvla.types import Observation, Trajectory

fast_compilation = pytest.fixture(quick_jit, scope="module", autouse=True)

NUM_UPDATES = 5


class PlainAlgorithm:
    """Roll out, update, again: no program, thread, queue, batcher or copy of the weights."""

    def __init__(self, blueprint: Blueprint, log_dir: pathlib.Path):
        parts = Parts(blueprint)
        self.config = parts.config
        self.training = parts.training(self.config.optimizer)
        self.state = self.training.init(parts.fresh_params(self.training))
        self.sampler = parts.sampler
        self.sampler.compile(blueprint.params_struct(), blueprint.observation_struct(1))
        groups = Groups(parts, log_dir=log_dir, recorder=MetricRecorder())
        groups.steppers[0].compile()
        self.groups = groups.training(0)
        self.observations = [group.reset(Cursor()) for group in self.groups]
        simulator = rng.stream(parts.root, "simulator", 0)
        self.keys = [rng.stream(simulator, "sampling", i) for i in range(len(self.groups))]
        self.learning_key = rng.stream(parts.root, "learning")

    def update(self, version: int) -> dict[str, float]:
        """One trajectory of every group, then the epochs of minibatch steps."""
        functions, algorithm = self.training.functions, self.config.algorithm
        made = [self.roll_out(i, group, version) for i, group in enumerate(self.groups)]
        placed = [functions.place(trajectory) for trajectory in made]
        batch = functions.prepare(self.state.params, placed, jnp.int32(version))
        steps = []
        for epoch in range(algorithm.num_epochs):
            key = rng.stream(self.learning_key, "order", version, epoch)
            order = functions.draw(key, batch.weight.shape)
            for index in range(algorithm.num_minibatches):
                self.state, metrics = functions.step(self.state, batch, order, jnp.int32(index))
                steps.append(jax.device_get(metrics))
        return {
            name: float(
                (np.max if name.endswith("/max") else np.mean)(
                    np.asarray([step[name] for step in steps], np.float64)
                )
            )
            for name in steps[0]
        }

    def roll_out(self, index: int, group: EnvGroup, version: int) -> Trajectory:
        """The next segment of a group."""
        assembler, observation = SegmentAssembler(), self.observations[index]
        for chunk in range(self.config.simulation.segment_length):
            key = rng.stream(self.keys[index], "explore", version, chunk)
            sample = self.ask("explore", observation, row_keys(key, group.num_envs))
            result = group.step_chunk(sample.actions, Cursor(segment=version, chunk=chunk))
            assembler.add(observation, sample, version, result)
            observation = result.observation
        self.observations[index] = observation
        queries = assembler.bootstrap_queries(observation)
        none = np.zeros((group.num_envs, 2), np.uint32)
        return assembler.finish([self.ask("value", x, none[: len(x.state)]) for x in queries])

    def ask(self, kind: str, observation: Observation, keys: np.ndarray) -> Any:
        return self.sampler.run(kind, self.state.params, [observation], keys)[0]


def test_all_switches_off_is_the_plain_algorithm(tmp_path: pathlib.Path) -> None:
    blueprint = make_blueprint(
        schedule=c.ScheduleConfig(overlap_training=False, overlap_rollout=False),
        serving=c.ServingConfig(trigger_size=4, max_batch=4, buckets=(4,)),
        learning=c.LearningConfig(num_updates=NUM_UPDATES, trajectories_per_update=2),
        evaluation=NO_EVALUATION,
    )
    plain = PlainAlgorithm(blueprint, tmp_path / "plain")
    expected = [plain.update(version) for version in range(NUM_UPDATES)]
    records = Run(tmp_path / "run", blueprint).expect(0).records()
    actual = [{name: record[f"learner/{name}"] for name in expected[0]} for record in records]
    assert actual == expected
    assert len({losses["loss/total"] for losses in expected}) == NUM_UPDATES
