"""The check before training finds every way in which two log-probs of a sample may differ."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from serving.tiny_policy import HORIZON, TinyPolicy
from simulation.counter_env import CounterEnv

from jaxvla.algorithms.ppo import PPOConfig
from jaxvla.config import EnvConfig, ExperimentConfig, ModelConfig, ServingConfig
from jaxvla.data.normalization import NormStats
from jaxvla.layout import parse_layout
from jaxvla.models.tokenizer import ByteTokenizer
from jaxvla.runtime.build import Blueprint, Parts
from jaxvla.runtime.self_check import LogProbCheck, PolicyMismatchError
from jaxvla.simulation.unroll import TokenTable
from jaxvla.types import Observation, Params, PolicySample

NUM_ROWS = 4
# Without LLVM optimisation: compiles several times faster, computes the same.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
Change = Callable[[jax.Array], jax.Array]


class ShiftedPolicy(TinyPolicy):
    """Changes what `evaluate` says of samples."""

    def __init__(self, change: Change):
        super().__init__(CounterEnv.spec)
        self._change = change

    def evaluate(
        self, params: Params, encoding: jax.Array, trace: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        log_prob, entropy, value = super().evaluate(params, encoding, trace)
        return self._change(log_prob), entropy, value


def make_blueprint(policy: Any, layout: str = "colocated=1") -> Blueprint:
    config = ExperimentConfig(
        name="check",
        env=EnvConfig(name="counter"),
        model=ModelConfig(name="tiny", action_horizon=HORIZON),
        algorithm=PPOConfig(),
        serving=ServingConfig(buckets=(NUM_ROWS,)),
    )
    tokens: Any = np.asarray([[3, 1], [4, 0]], np.int32)
    return Blueprint(
        config=config,
        env=CounterEnv(),
        policy=policy,
        layout=parse_layout(layout),
        tokenizer=ByteTokenizer(),
        stats=NormStats.from_bounds([0.0, 0.0], [1.0, 1.0], 2),
        table=TokenTable(tokens=tokens, mask=tokens > 0),
    )


def make_parts(policy: Any, layout: str = "colocated=1") -> tuple[Parts, Params]:
    """Parts with a compiled sampler, and parameters on the learning mesh."""
    blueprint = make_blueprint(policy, layout)
    parts = Parts(blueprint)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", quick_jit)
        parts.sampler.compile(blueprint.params_struct(), blueprint.observation_struct(1))
    return parts, parts.fresh_params(parts.training(parts.config.optimizer))


@pytest.fixture(scope="module")
def sound() -> tuple[Parts, Params]:
    """Of a policy as it should be."""
    return make_parts(TinyPolicy(CounterEnv.spec))


@pytest.fixture
def check(sound: tuple[Parts, Params]) -> Callable[[Any], float]:
    """Samples with the sound policy and evaluates with a given one."""
    sampling, params = sound

    def run(policy: Any) -> float:
        parts = Parts(make_blueprint(policy))
        parts.__dict__["sampler"] = sampling.sampler  # compiled once for all tests
        return LogProbCheck(parts).run(params)

    return run


@pytest.mark.parametrize("layout", ["colocated=1", "simulation=1 serving=2 learning=2:data1,fsdp2"])
def test_a_sound_policy_passes(layout: str) -> None:
    """Whatever lies on which devices. A chunk's log-prob is a sum of four float32 terms."""
    parts, params = make_parts(TinyPolicy(CounterEnv.spec), layout)
    assert 0.0 <= LogProbCheck(parts).run(params) < 1e-4


@pytest.mark.parametrize("shift", [0.25, -0.25])
def test_a_shift_is_found_and_measured(check: Any, shift: float) -> None:
    with pytest.raises(PolicyMismatchError, match=r"differ by 0\.25, allowed 0\.001$"):
        check(ShiftedPolicy(lambda log_prob: log_prob + shift))


def test_a_shift_within_the_tolerance_is_let_through_and_reported(check: Any) -> None:
    shift = 0.5 * TinyPolicy.log_prob_tolerance
    assert check(ShiftedPolicy(lambda x: x + shift)) == pytest.approx(shift, rel=0.05)


@pytest.mark.parametrize("row", range(NUM_ROWS))
def test_one_wrong_row_is_enough(check: Any, row: int) -> None:
    with pytest.raises(PolicyMismatchError, match=r"differ by 2, "):
        check(ShiftedPolicy(lambda log_prob: log_prob.at[row].add(2.0)))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_does_not_pass(check: Any, value: float) -> None:
    with pytest.raises(PolicyMismatchError, match=f"differ by {value}"):
        check(ShiftedPolicy(lambda log_prob: log_prob.at[1].set(value)))


@pytest.mark.parametrize("evaluated", [0.45, 0.502])
def test_another_noise_level_does_not_pass(check: Any, evaluated: float) -> None:
    """Samples are made with 0.5."""
    with pytest.raises(PolicyMismatchError, match="sampled and evaluated log-probs"):
        check(TinyPolicy(CounterEnv.spec, noise_level=0.5, evaluated_noise_level=evaluated))


class BlindPolicy(TinyPolicy):
    """Reads pictures, state or instruction when it samples and not when it evaluates."""

    def __init__(self, field: str):
        super().__init__(CounterEnv.spec)
        self._field = field

    def encode(self, params: Params, observation: Observation) -> jax.Array:
        blank = jnp.zeros_like(getattr(observation, self._field))
        return super().encode(params, dataclasses.replace(observation, **{self._field: blank}))


@pytest.mark.parametrize("field", ["images", "image_mask", "state", "tokens", "token_mask"])
def test_every_part_of_an_observation_takes_part(check: Any, field: str) -> None:
    """An observation of zeros would let a policy pass that forgets some of it."""
    with pytest.raises(PolicyMismatchError):
        check(BlindPolicy(field))


class DeterministicPolicy(TinyPolicy):
    """Reports the log-prob of exploring but does not explore."""

    def act(self, params: Params, observation: Any, keys: jax.Array, explore: bool) -> PolicySample:
        sample = super().act(params, observation, keys, explore=False)
        return dataclasses.replace(sample, log_prob=jnp.ones_like(sample.log_prob))


def test_a_policy_that_does_not_explore_does_not_pass() -> None:
    parts, params = make_parts(DeterministicPolicy(CounterEnv.spec))
    with pytest.raises(PolicyMismatchError):
        LogProbCheck(parts).run(params)


def test_the_check_may_run_again_with_other_weights(sound: Any) -> None:
    """It does not use the parameters up."""
    parts, params = sound
    checks = LogProbCheck(parts)
    first = checks.run(params)
    assert checks.run(jax.tree.map(lambda x: 2.0 * x, params)) < 1e-4
    assert checks.run(params) == first
