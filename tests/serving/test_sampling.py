"""Compiled inference: a row's answer is its own, whatever the batch, the bucket and the mesh."""

import functools
import itertools
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec
from serving.tiny_policy import TinyPolicy
from simulation.counter_env import CounterEnv

from jaxvla.layout import parse_layout
from jaxvla.serving.sampling import KINDS, Sampler, row_keys
from jaxvla.sharding import make_mesh, params_shardings
from jaxvla.types import Observation, Params, PolicySample

BUCKETS = (2, 4, 8)
NUM_ROWS = 8
KEY = jax.random.key(3)
POLICY = TinyPolicy(CounterEnv.spec)
# Without LLVM optimisation: compiles several times faster, computes the same.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
PARAMS = jax.device_get(quick_jit(POLICY.init)(jax.random.key(0)))
KEYS = row_keys(KEY, NUM_ROWS)


def make_sampler(
    layout: str = "colocated=1",
    *,
    policy: Any = POLICY,
    buckets: tuple[int, ...] = BUCKETS,
    kinds: tuple[str, ...] = KINDS,
) -> tuple[Sampler, Params]:
    """A compiled sampler and parameters in their place."""
    mesh = make_mesh(parse_layout(layout).roles["serving"])
    placed = params_shardings(PARAMS, policy.rules(), mesh, "serving")
    sampler = Sampler(policy, mesh=mesh, params_shardings=placed, buckets=buckets, kinds=kinds)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", quick_jit)
        sampler.compile(PARAMS, OBSERVATION)
    return sampler, jax.device_put(PARAMS, placed)


def random_observation(num_rows: int, seed: int) -> Any:
    """Host arrays; no two rows are alike."""
    random = np.random.default_rng(seed)
    spec = CounterEnv.spec
    cameras, size = len(spec.cameras), spec.image_size
    arrays: dict[str, Any] = {
        "images": random.integers(0, 256, (num_rows, cameras, size, size, 3), np.uint8),
        "image_mask": random.uniform(size=(num_rows, cameras)) < 0.8,
        "state": random.normal(size=(num_rows, spec.state_dim)).astype(np.float32),
        "tokens": random.integers(0, 9, (num_rows, 3), np.int32),
        "token_mask": random.uniform(size=(num_rows, 3)) < 0.8,
    }
    return Observation(**arrays)


OBSERVATION = random_observation(NUM_ROWS, seed=0)


@pytest.fixture(scope="module")
def compiled() -> tuple[Sampler, Params]:
    """A sampler on one device."""
    return make_sampler()


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """Kind -> what the policy itself gives for `OBSERVATION` and `KEY`."""
    keys = jax.random.split(KEY, NUM_ROWS)
    explore, act = (
        quick_jit(lambda p, obs, keys, e=explore: POLICY.act(p, obs, keys, explore=e))
        for explore in (True, False)
    )
    return jax.device_get(
        {
            "explore": explore(PARAMS, OBSERVATION, keys),
            "act": act(PARAMS, OBSERVATION, keys),
            "value": quick_jit(POLICY.values)(PARAMS, OBSERVATION),
        }
    )


def rows(tree: Any, index: Any) -> Any:
    return jax.tree.map(lambda x: x[index], tree)


def assert_same(actual: Any, expected: Any) -> None:
    def compare(x: Any, y: Any) -> None:
        assert isinstance(x, np.ndarray)
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        # Float32 sums of up to 8 terms, added in an order that the batch size may change.
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)

    jax.tree.map(compare, actual, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_rows", range(1, NUM_ROWS + 1))
def test_every_batch_size_gives_what_the_policy_gives(
    compiled: Any, alone: Any, kind: str, num_rows: int
) -> None:
    sampler, params = compiled
    first = slice(num_rows)
    result, bucket = sampler.run(kind, params, [rows(OBSERVATION, first)], KEYS[first])
    assert bucket == min(size for size in BUCKETS if size >= num_rows)
    assert_same(result, rows(alone[kind], first))


def test_the_kinds_differ_as_they_should(alone: Any) -> None:
    """Else the tests here could not tell them apart."""
    explore, act = alone["explore"], alone["act"]
    assert isinstance(explore, PolicySample)
    assert (np.abs(explore.log_prob) > 1e-3).all()
    np.testing.assert_array_equal(act.log_prob, 0.0)
    assert (np.abs(explore.actions - act.actions).max((1, 2)) > 1e-3).all()
    assert len(np.unique(alone["value"])) == NUM_ROWS


@settings(max_examples=60, deadline=None, derandomize=True)
@given(order=st.permutations(range(NUM_ROWS)), cuts=st.sets(st.integers(1, NUM_ROWS - 1)))
def test_a_row_depends_neither_on_its_place_nor_on_its_company(
    compiled: Any, alone: Any, order: list[int], cuts: set[int]
) -> None:
    """Any rows in any order, as requests of any sizes; the last cut ends the batch."""
    sampler, params = compiled
    edges = [0, *sorted(cuts)] if cuts else [0, NUM_ROWS]
    parts = [order[a:b] for a, b in itertools.pairwise(edges)]
    asked = order[: edges[-1]]
    observations = [rows(OBSERVATION, part) for part in parts]
    result, _ = sampler.run("explore", params, observations, KEYS[asked])
    assert_same(result, rows(alone["explore"], asked))


def test_a_row_that_is_not_finite_spoils_no_other(compiled: Any, alone: Any) -> None:
    """Also as the last one, which padding repeats."""
    sampler, params = compiled
    state = OBSERVATION.state[:3].copy()
    state[2] = np.nan
    observation = rows(OBSERVATION, slice(3)).replace(state=state)
    result, bucket = sampler.run("explore", params, [observation], KEYS[:3])
    assert bucket == 4
    assert_same(rows(result, slice(2)), rows(alone["explore"], slice(2)))
    assert np.isnan(result.value[2])


def test_padding_repeats_the_last_row(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up row (no camera, no token) might be something that the policy cannot compute."""
    sampler, params = compiled
    inputs = []

    def spy(params: Params, observation: Observation, keys: jax.Array) -> Any:
        inputs.append(jax.device_get((observation, keys)))
        return original(params, observation, keys)

    original = sampler._compiled["value", 4]
    monkeypatch.setitem(sampler._compiled, ("value", 4), spy)
    values, _ = sampler.run("value", params, [rows(OBSERVATION, slice(3))], KEYS[:3])
    assert values.shape == (3,)
    ((observation, keys),) = inputs
    padded = [0, 1, 2, 2]
    jax.tree.map(np.testing.assert_array_equal, observation, rows(OBSERVATION, padded))
    np.testing.assert_array_equal(keys, KEYS[padded])


@pytest.mark.fault(33)
def test_nothing_compiles_after_compile(compiled: Any) -> None:
    sampler, params = compiled
    compilations = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for kind in KINDS:
            for count in range(1, NUM_ROWS + 1):
                part = rows(OBSERVATION, slice(count))
                sampler.run(kind, params, [part], KEYS[:count])
                sampler.run(kind, params, [jax.tree.map(jax.device_put, part)], KEYS[:count])
        assert compilations == []
        jax.jit(lambda x: x + 1)(np.ones(3))  # this one is heard
        assert len(compilations) == 1
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_only_what_was_asked_for_is_built() -> None:
    traced = []

    class Counting(TinyPolicy):
        def act(self, params: Any, observation: Any, keys: Any, explore: bool) -> PolicySample:
            traced.append((explore, len(keys)))
            return super().act(params, observation, keys, explore)

    sampler, params = make_sampler(policy=Counting(CounterEnv.spec), buckets=(3, 5), kinds=("act",))
    assert sorted(traced) == [(False, 3), (False, 5)]
    for count in (1, 4):
        sampler.run("act", params, [rows(OBSERVATION, slice(count))], KEYS[:count])
    assert len(traced) == 2


@pytest.mark.fault(33)
def test_more_rows_than_the_largest_bucket_are_refused(compiled: Any) -> None:
    sampler, params = compiled
    message = "a batch of 9 rows; the largest bucket is 8"
    observation = random_observation(9, seed=1)
    with pytest.raises(ValueError, match=message):
        sampler.run("explore", params, [observation], row_keys(KEY, 9))


def test_row_keys_are_the_split_of_a_key() -> None:
    keys = row_keys(KEY, 5)
    assert (keys.shape, keys.dtype) == ((5, 2), np.uint32) and isinstance(keys, np.ndarray)
    np.testing.assert_array_equal(keys, jax.random.key_data(jax.random.split(KEY, 5)))


@pytest.mark.parametrize(
    ("axes", "rows_per_device", "columns_per_device"),
    [("", 2, 4), (":tensor2", 4, 2)],
    ids=["data", "tensor"],
)
def test_two_of_eight_devices_give_the_same(
    compiled: Any, alone: Any, axes: str, rows_per_device: int, columns_per_device: int
) -> None:
    """Devices 1 and 2; observations come from device 0, as from a simulator, or from the host."""
    layout = f"simulation=1 serving=2{axes} learning=1"
    sampler, params = make_sampler(layout, buckets=(4, 8), kinds=("explore",))
    function = sampler._compiled["explore", 4]
    (weights, observation, keys), _ = function.input_shardings
    placed = jax.tree.leaves((weights, observation, keys, function.output_shardings))
    assert {frozenset(x.device_set) for x in placed} == {frozenset(jax.devices()[1:3])}
    kernel = PARAMS["torso"]["kernel"]
    split = weights["torso"]["kernel"].shard_shape(kernel.shape)
    assert split == (kernel.shape[0], columns_per_device)
    for sharding in jax.tree.leaves((observation, keys, function.output_shardings)):
        assert sharding.shard_shape((4, 6))[0] == rows_per_device
        assert sharding.spec in (PartitionSpec("data"), PartitionSpec(("data",)))
    for count in (3, 4, 8):
        on_host = rows(OBSERVATION, slice(count))
        for given_observation in (on_host, jax.device_put(on_host, jax.devices()[0])):
            result, _ = sampler.run("explore", params, [given_observation], KEYS[:count])
            assert_same(result, rows(alone["explore"], slice(count)))
