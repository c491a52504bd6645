"""Plug-ins that take time: how much, and that they change nothing else."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sleeping_stages import get_config

from jaxvla.config import ConfigError
from jaxvla.config_data import config_from_data, config_to_data
from jaxvla.envs.base import DeviceEnv
from jaxvla.models import MODELS
from jaxvla.models.pi import PiPolicy
from jaxvla.runtime.build import draw_blueprint
from jaxvla.scaling import sleeping
from jaxvla.scaling.sleeping import SleepingEnv, SleepingEnvConfig, SleepingPolicy
from jaxvla.types import Params, PolicySample


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of every sleep, which takes none."""
    taken: list[float] = []
    monkeypatch.setattr(sleeping, "_sleep", taken.append)
    return taken


def test_a_group_sleeps_once_for_a_chunk(naps: list[float]):
    env = SleepingEnv(SleepingEnvConfig(num_executed=4, chunk_s=0.3))
    assert isinstance(env, DeviceEnv)
    states = jax.vmap(env.reset)(jax.random.split(jax.random.key(0), 5), jnp.zeros(5, jnp.int32))
    step = jax.jit(jax.vmap(env.step))
    for _ in range(4):
        states = step(states, jnp.full((5, 2), 0.5))
    np.testing.assert_allclose(states.reward, 0.75)
    assert naps == []
    seen = jax.block_until_ready(jax.jit(env.observe)(states))
    assert naps == [0.3]
    assert seen.images.shape == (5, 1, 32, 32, 3) and not seen.images.any()


def test_episodes_end_by_their_time_limit():
    env = SleepingEnv(SleepingEnvConfig(num_executed=1))
    state = env.reset(jax.random.key(0), jnp.zeros((), jnp.int32))
    for _ in range(env.spec.max_episode_steps[0]):
        assert not state.truncated
        state = env.step(state, jnp.zeros(2))
    assert state.truncated and not state.terminated


def test_a_time_that_is_none_is_refused():
    with pytest.raises(ConfigError, match=r"env\.chunk_s = -1"):
        SleepingEnvConfig(chunk_s=-1).validate()


class Pair:
    """The policy of the script's config, the pi model behind it, and three observations."""

    def __init__(self) -> None:
        self.config = get_config()
        blueprint = draw_blueprint(self.config)
        self.sleeping, table = blueprint.policy, blueprint.table
        assert isinstance(self.sleeping, SleepingPolicy)
        self.plain = PiPolicy(self.sleeping.config, self.sleeping._normalizer)
        self.params = self.plain.init(jax.random.key(0))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.plain.observation_spec(3))
        tokens, mask = (jnp.repeat(jnp.asarray(x)[:1], 3, 0) for x in (table.tokens, table.mask))
        self.observation = dataclasses.replace(
            zeros, tokens=tokens, token_mask=mask, image_mask=jnp.ones_like(zeros.image_mask)
        )
        self._keys = jax.random.split(jax.random.key(1), 3)

    def sample(self, policy: PiPolicy) -> PolicySample:
        act = jax.jit(lambda *x: policy.act(*x, explore=True))
        return act(self.params, self.observation, self._keys)

    def gradient(self, policy: PiPolicy, trace: Any) -> Params:
        def loss(params: Params) -> jax.Array:
            encoding = policy.encode(params, self.observation)
            log_prob, _, value = policy.evaluate(params, encoding, trace)
            # As a policy loss, it is not linear: its gradient needs the value of the log-prob.
            return (jnp.square(log_prob) + value).sum()

        return jax.jit(jax.grad(loss))(self.params)


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair()


def test_the_config_crosses_to_other_processes(pair: Pair):
    assert config_from_data(config_to_data(pair.config)) == pair.config
    assert MODELS.get(pair.config.model.name) is SleepingPolicy


def test_the_policy_answers_what_a_pi_model_does_later(pair: Pair, naps: list[float]):
    sample, expected = pair.sample(pair.sleeping), pair.sample(pair.plain)
    jax.tree.map(np.testing.assert_array_equal, sample, expected)
    assert naps == [pytest.approx(0.05 + 3 * 0.001)]


def test_training_takes_the_time_of_its_rows_and_has_the_same_gradient(
    pair: Pair, naps: list[float]
):
    trace = pair.sample(pair.plain).trace
    gradient, expected = (pair.gradient(x, trace) for x in (pair.sleeping, pair.plain))
    jax.tree.map(np.testing.assert_array_equal, gradient, expected)
    assert naps == [pytest.approx(3 * 0.006)]
