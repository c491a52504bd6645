"""Kinds of exploration against float64 loops, recorded cases, and what they are for."""

import dataclasses
import functools
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from jaxvla.algorithms.ppo import PPO, PPOConfig
from jaxvla.models import flow
from jaxvla.models.exploration import KINDS, Exploration, PathExploration
from jaxvla.models.fpo import FpoExploration
from jaxvla.types import TrainingBatch

CASES_PATH = pathlib.Path(__file__).parents[1] / "data" / "oracle" / "flow_rl_cases.npz"
B, H, A, K = 6, 4, 3, 4
EXECUTED, DIMS = 3, 2
LOW, HIGH = 0.08, 0.16
CHAINS = [name for name, kind in KINDS.items() if kind.is_chain]


def make(name: str, *, num_steps: int = K, executed: int = EXECUTED, dims: int = DIMS) -> Any:
    if name == "fpo":
        return FpoExploration(num_steps=num_steps, num_draws=4, loss_steps=executed, loss_dims=dims)
    return PathExploration(
        KINDS[name],
        num_steps=num_steps,
        noise_level=0.5,
        num_choices=num_steps - 1 if name == "cps" else num_steps,
        log_prob_steps=executed,
        log_prob_dims=dims,
    )


def predictor(name: str, scale: Any = 3.0) -> flow.PredictFn:
    """A velocity and, for kinds that learn one, a standard deviation."""

    def predict(x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        velocity = jnp.sin(scale * x) + t[:, None, None]
        if name == "fpo" or not KINDS[name].has_noise_head:
            return velocity, None
        return velocity, flow.noise_head_std(jnp.cos(scale * x), LOW, HIGH)

    return predict


def keys_of(batch: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), batch)


def sample(name: str, keys: jax.Array, *, explore: bool = True, noise: Any = None) -> Any:
    return make(name).sample(predictor(name), keys, (H, A), explore=explore, noise=noise)


@dataclasses.dataclass
class Path:
    """A path in float64, of one row: states [K + 1, H, A] and what its transitions score."""

    states: list[np.ndarray]
    log_probs: list[np.ndarray]
    entropies: list[np.ndarray]


def walk(name: str, initial: Any, exploration: Any) -> Path:
    """Follows the definitions of the papers, one step after another."""
    x = np.asarray(initial, np.float64)
    path = Path(states=[x], log_probs=[], entropies=[])
    for index in range(K):
        t, t_next = 1.0 - index / K, 1.0 - (index + 1) / K
        v, noise = np.sin(3.0 * x) + t, np.asarray(exploration[index], np.float64)
        if name == "sde_chain":
            sigma = 0.5 * math.sqrt(t / (1.0 - (t if t < 1.0 else 1.0 - 1.0 / K)))
            x0, x1 = x - t * v, x + (1.0 - t) * v
            mean = (1.0 - t_next) * x0 + (t_next - sigma**2 / (2.0 * t * K)) * x1
            std = np.full_like(x, sigma / math.sqrt(K))
        else:
            mean, share = x - v / K, (np.tanh(np.cos(3.0 * x)) + 1.0) / 2.0
            std = LOW * (HIGH / LOW) ** share
        if name == "reinflow":
            noise = np.clip(noise, -3.0, 3.0)
        x = mean + std * noise
        path.states.append(x)
        path.log_probs.append(scipy.stats.norm.logpdf(x, mean, std)[:EXECUTED, :DIMS])
        path.entropies.append(scipy.stats.norm.entropy(mean, std)[:EXECUTED, :DIMS])
    return path


@pytest.mark.parametrize("name", CHAINS)
def test_chains_equal_float64(quick_jit, name: str) -> None:
    keys = keys_of(B)
    chunk, trace, log_prob = quick_jit(lambda k: sample(name, k))(keys)
    evaluated, entropy = quick_jit(lambda tr: make(name).evaluate(predictor(name), tr))(trace)
    draws = flow.draw(keys, (H, A), 1, num_random=K)
    assert trace.states.shape == (B, K + 1, H, A)
    np.testing.assert_array_equal(trace.step, 0)
    for row in range(B):
        path = walk(name, draws.initial[row], draws.exploration[row])
        np.testing.assert_allclose(trace.states[row], path.states, atol=2e-5)
        np.testing.assert_allclose(chunk[row], path.states[-1], atol=2e-5)
        wanted, wanted_entropy = np.sum(path.log_probs), np.sum(path.entropies)
        if name == "noise":  # the mean of K transitions and the standard normal start
            start = path.states[0][:EXECUTED, :DIMS]
            wanted = (wanted + scipy.stats.norm.logpdf(start).sum()) / (K + 1)
            of_start = EXECUTED * DIMS * scipy.stats.norm.entropy()
            wanted_entropy = (wanted_entropy + of_start) / (K + 1)
        if name == "sde_chain":  # no parameter moves it
            wanted_entropy = 0.0
        np.testing.assert_allclose(log_prob[row], wanted, atol=5e-4)
        np.testing.assert_allclose(evaluated[row], wanted, atol=5e-4)
        np.testing.assert_allclose(entropy[row], wanted_entropy, atol=1e-4)


@pytest.mark.parametrize("num_steps", [1, 3, 10])
@pytest.mark.parametrize("name", ["sde", "cps", "noise"])
def test_scores_of_recorded_transitions(name: str, num_steps: int) -> None:
    with np.load(CASES_PATH) as file:
        cases = dict(file)
    for index in range(num_steps):
        case = {n: cases[f"{name}/{num_steps}/{index}/{n}"] for n in ("x", "v", "std", "next")}
        trace = flow.FlowTrace(
            states=jnp.stack([case["x"], case["next"]], axis=1),
            step=jnp.full(len(case["x"]), index, jnp.int32),
        )

        def predict(x: Any, t: Any, case: Any = case, index: int = index) -> Any:
            np.testing.assert_allclose(t, 1.0 - index / num_steps, rtol=1e-6)
            return jnp.asarray(case["v"]), jnp.asarray(case["std"]) if name == "noise" else None

        table = KINDS[name].transitions(num_steps, 0.5)
        mean, std = flow.transitions_of(predict, trace, table)
        scored = {"num_steps": 5, "num_dims": 7}
        actual = flow.chunk_log_prob(trace.states[:, 1:], mean, std, **scored)[:, 0]
        expected = cases[f"{name}/{num_steps}/{index}/logp"][:, :5, :7].sum((1, 2))
        np.testing.assert_allclose(actual, expected, atol=2e-3)


@pytest.mark.parametrize("name", [*KINDS, "fpo"])
def test_scores_do_not_depend_on_who_computes_them(quick_jit, name: str) -> None:
    _, trace, log_prob = quick_jit(lambda k: sample(name, k))(keys_of(B))
    evaluated, _ = quick_jit(lambda tr: make(name).evaluate(predictor(name), tr))(trace)
    np.testing.assert_allclose(evaluated, log_prob, atol=1e-4)
    assert np.abs(log_prob).min() > 1e-2


@pytest.mark.parametrize("name", [*KINDS, "fpo"])
def test_without_exploration_the_chunk_is_a_function_of_the_noise(quick_jit, name: str) -> None:
    run = quick_jit(lambda k, noise: sample(name, k, explore=False, noise=noise))
    noise = jax.random.normal(jax.random.key(9), (B, H, A))
    chunk, _, log_prob = run(keys_of(B), noise)
    np.testing.assert_array_equal(chunk, run(keys_of(B, seed=1), noise)[0])
    np.testing.assert_array_equal(log_prob, 0.0)
    assert np.abs(chunk - run(keys_of(B), noise + 0.1)[0]).min() > 0.0
    x = np.asarray(noise, np.float64)
    for index in range(K):
        x = x - (np.sin(3.0 * x) + 1.0 - index / K) / K
    np.testing.assert_allclose(chunk, x, atol=2e-5)


@pytest.mark.parametrize("name", CHAINS)
def test_exploration_starts_from_given_noise_too(quick_jit, name: str) -> None:
    noise = jax.random.normal(jax.random.key(9), (B, H, A))
    _, trace, _ = quick_jit(lambda k, noise: sample(name, k, noise=noise))(keys_of(B), noise)
    np.testing.assert_array_equal(trace.states[:, 0], noise)


@pytest.mark.parametrize(("name", "is_clipped"), [("noise", False), ("reinflow", True)])
def test_only_reinflow_clips_its_draws(quick_jit, name: str, is_clipped: bool) -> None:
    def run(keys: jax.Array) -> jax.Array:
        exploration = make(name)
        _, trace, _ = exploration.sample(predictor(name), keys, (H, A), explore=True, noise=None)
        mean, std = flow.transitions_of(predictor(name), trace, flow.ode_transitions(K))
        return (trace.states[:, 1:] - mean) / std

    drawn = np.abs(quick_jit(run)(keys_of(500)))
    assert (drawn.max() < 3.0 + 1e-4) == is_clipped
    assert drawn.max() > 3.0 - 1e-4


@pytest.mark.parametrize("name", ["noise", "reinflow"])
def test_the_learned_deviation_has_the_gradient_of_a_normal(quick_jit, name: str) -> None:
    """d log p / d log std = z^2 - 1, d entropy / d log std = 1, per scored element."""
    _, trace, _ = quick_jit(lambda k: sample(name, k))(keys_of(B))

    def at(log_scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        def predict(x: jax.Array, t: jax.Array) -> tuple[jax.Array, Any]:
            velocity, std = predictor(name)(x, t)
            assert std is not None
            return velocity, std * jnp.exp(log_scale)

        log_prob, entropy = make(name).evaluate(predict, trace)
        return log_prob.sum(), entropy.sum()

    to_log_prob, to_entropy = quick_jit(jax.jacfwd(at))(jnp.float32(0.0))
    mean, std = flow.transitions_of(predictor(name), trace, flow.ode_transitions(K))
    z = np.asarray((trace.states[:, 1:] - mean) / std, np.float64)[:, :, :EXECUTED, :DIMS]
    terms = K + 1 if name == "noise" else 1
    np.testing.assert_allclose(to_log_prob, (z**2 - 1.0).sum() / terms, rtol=1e-3)
    np.testing.assert_allclose(to_entropy, z.size / terms, rtol=1e-5)


def test_a_gradient_keeps_no_prefix_per_transition() -> None:
    prefix = jax.ShapeDtypeStruct((100_000, A), jnp.float32)

    def kept_bytes(num_steps: int) -> int:
        exploration = make("noise", num_steps=num_steps)
        trace = jax.eval_shape(
            lambda: flow.FlowTrace(
                states=jnp.zeros((B, num_steps + 1, H, A)), step=jnp.zeros(B, jnp.int32)
            )
        )

        def residuals(prefix: jax.Array, trace: Any) -> Any:
            def total(prefix: jax.Array) -> jax.Array:
                def predict(x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
                    seen = jnp.tanh(x) @ (prefix.T @ prefix)
                    return seen, jnp.exp(seen)

                return exploration.evaluate(predict, trace)[0].sum()

            return jax.vjp(total, prefix)[1]

        leaves = jax.tree.leaves(jax.eval_shape(residuals, prefix, trace))
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)

    size = math.prod(prefix.shape) * 4
    assert size <= kept_bytes(2) < kept_bytes(8) < 1.1 * kept_bytes(2)


class Bandit:
    """Velocity x - m: the chunk is normal around (1 - 1/e) m to good accuracy."""

    def __init__(self, name: str):
        self.exploration: Exploration = make(name, executed=H, dims=A)
        self._learns_std = name != "fpo" and KINDS[name].has_noise_head

    def predict_fn(self, params: Any) -> flow.PredictFn:
        def predict(x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array | None]:
            velocity = x - params["mean"]
            if not self._learns_std:
                return velocity, None
            output = jnp.broadcast_to(params["std"], x.shape)
            return velocity, flow.noise_head_std(output, LOW, HIGH)

        return predict

    def evaluate(self, params: Any, encoding: Any, trace: Any) -> Any:
        log_prob, entropy = self.exploration.evaluate(self.predict_fn(params), trace)
        return log_prob, entropy, jnp.zeros_like(log_prob)


@pytest.mark.parametrize("name", [*KINDS, "fpo"])
def test_ppo_learns_a_bandit(quick_jit, name: str) -> None:
    """Reward: how near every number of the chunk comes to 0.8."""
    bandit, algorithm, optimizer = Bandit(name), PPO(PPOConfig(value_coef=0.0)), optax.adam(0.03)
    params = {"mean": jnp.zeros((H, A)), "std": jnp.zeros(())}
    loss = functools.partial(algorithm.loss, bandit)

    @quick_jit
    def update(params: Any, state: Any, key: jax.Array) -> Any:
        chunk, trace, log_prob = bandit.exploration.sample(
            bandit.predict_fn(params), jax.random.split(key, 256), (H, A), explore=True, noise=None
        )
        reward = -jnp.square(chunk - 0.8).sum((1, 2))
        zeros = jnp.zeros_like(reward)
        batch = TrainingBatch(
            observation=zeros,
            trace=trace,
            behavior_log_prob=log_prob,
            proximal_log_prob=log_prob,
            proximal_value=zeros,
            staleness=zeros.astype(jnp.int32),
            advantage=(reward - reward.mean()) / reward.std(),
            return_=zeros,
            weight=jnp.ones_like(reward),
        )
        for _ in range(2):
            grads, metrics = jax.grad(loss, has_aux=True)(params, batch)
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state, reward.mean(), metrics["ratio/mean"]

    state, rewards = optimizer.init(params), []
    for step in range(40):
        params, state, reward, ratio = update(params, state, jax.random.key(step))
        rewards.append(float(reward))
        assert 0.5 < ratio < 2.0
    assert np.mean(rewards[-3:]) > 0.3 * rewards[0]
