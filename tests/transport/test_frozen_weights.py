"""Weights of which a part never changes: what is copied, and that the rest stays whole."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxvla.transport.in_process import InProcessWeightStore
from jaxvla.transport.weight_copy import params_copier

TRAINABLE = "^head/"
HEAD_BYTES, ENCODER_BYTES = 4 * 6 * 4, 4 * 8 * 4
FROZEN = -1.0
"""What the encoder holds everywhere."""


def make_store() -> Any:
    return InProcessWeightStore(trainable=TRAINABLE)


def on_mesh(spec: PartitionSpec, *devices: int) -> NamedSharding:
    if max(devices) >= jax.device_count():
        pytest.skip(f"needs {max(devices) + 1} devices")
    return NamedSharding(Mesh(np.array([jax.devices()[i] for i in devices]), ("data",)), spec)


ONE = SingleDeviceSharding(jax.devices()[0])
ALL, SPLIT = PartitionSpec(), PartitionSpec("data")


def make_params(version: int, place: Any = ONE) -> dict[str, Any]:
    """Every element of the head is `version`."""
    params = {
        "encoder": {"kernel": jnp.full((4, 8), FROZEN)},
        "head": {"kernel": jnp.full((4, 6), float(version))},
    }
    return jax.device_put(params, place)


def train(params: dict[str, Any]) -> dict[str, Any]:
    """Raises the head by 1 and consumes its input, as the learner's step does."""

    def step(tree: dict[str, Any]) -> dict[str, Any]:
        return tree | {"head": jax.tree.map(lambda x: x + 1, tree["head"])}

    shardings = jax.tree.map(lambda x: x.sharding, params)
    trained = jax.jit(step, donate_argnums=0, out_shardings=shardings)(params)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    return jax.block_until_ready(trained)


def assert_is_version(params: dict[str, Any], version: int, place: Any = ONE) -> None:
    """Every leaf is there, where it belongs, with the right numbers."""
    expected = make_params(version)
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for leaf, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(leaf, wanted)
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((ALL, 0), (ALL, 0)),
        ((SPLIT, 0, 1), (SPLIT, 0, 1)),
        ((ALL, 0, 1), (ALL, 1, 0)),
        ((ALL, 0, 1), (ALL, 0)),
        ((ALL, 0, 1), (ALL, 2, 3)),
    ],
    ids=["one device", "same", "reorder", "subset", "away"],
)
def test_both_kinds_of_leaves_survive_donation(source: Any, target: Any) -> None:
    """The newest weights, and those that a server still has in use."""
    source, target = on_mesh(*source), on_mesh(*target)
    store = make_store()
    subscription = store.subscribe("server", target)
    params, pulled = make_params(0, source), []
    for version in range(3):
        store.publish(version, params)
        params = train(params)
        pulled.append(subscription.poll())
    for version, (number, served) in enumerate(pulled):
        assert number == version
        assert_is_version(served, version, target)


def test_frozen_leaves_are_copied_once_per_server() -> None:
    store = make_store()
    first = store.subscribe("first", ONE)
    params = make_params(0)
    for version, expected in enumerate((HEAD_BYTES + ENCODER_BYTES, HEAD_BYTES, HEAD_BYTES)):
        store.publish(version, params)
        assert store.metrics().nbytes == expected
        params = train(params)
    second = store.subscribe("second", ONE)  # copies what there is: no publication
    store.publish(3, params)
    assert store.metrics().nbytes == 2 * HEAD_BYTES
    one, two = first.poll()[1], second.poll()[1]
    for name in ("encoder", "head"):
        pointers = {x[name]["kernel"].unsafe_buffer_pointer() for x in (one, two)}
        assert len(pointers) == 2, name


def test_without_a_server_every_leaf_is_kept_for_the_first_one() -> None:
    store = make_store()
    params = make_params(0)
    for version in range(2):
        store.publish(version, params)
        assert store.metrics().nbytes == HEAD_BYTES + ENCODER_BYTES
        params = train(params)
    version, served = store.subscribe("late", ONE).poll()
    assert version == 1
    assert_is_version(served, 1)


def test_a_late_server_gets_a_complete_tree_although_the_learner_moved_on() -> None:
    store = make_store()
    store.subscribe("early", ONE)
    params = make_params(0)
    for version in range(3):
        store.publish(version, params)
        params = train(params)
    late = store.subscribe("late", ONE)
    assert_is_version(late.poll()[1], 2)
    store.publish(3, params)
    train(params)
    assert_is_version(late.poll()[1], 3)


def test_a_server_that_leaves_takes_nothing_along() -> None:
    store = make_store()
    subscription = store.subscribe("server", ONE)
    store.publish(0, make_params(0))
    subscription.close()
    assert_is_version(store.subscribe("server", ONE).poll()[1], 0)


@pytest.mark.parametrize("name", ["encoder", "head"])
def test_both_kinds_of_leaves_are_checked(name: str) -> None:
    store = make_store()
    subscription = store.subscribe("server", ONE)
    store.publish(0, make_params(0))
    for change, message in (
        ({name: {"kernel": jnp.zeros((4, 9))}}, rf"'{name}/kernel': float32\[4,9\]"),
        ({name: {}}, f"'{name}/kernel': missing"),
    ):
        with pytest.raises(ValueError, match=message):
            store.publish(1, make_params(1) | change)
    assert_is_version(subscription.poll()[1], 0)


def test_a_failed_first_copy_is_made_again_in_full() -> None:
    store = make_store()
    good = store.subscribe("good", ONE)
    bad = store.subscribe("bad", ONE)
    working_copy = bad.copy

    def fail(params: Any) -> Any:
        raise ConnectionResetError("peer went away")

    bad.copy = fail
    with pytest.raises(ConnectionResetError):
        store.publish(0, make_params(0))
    assert good.poll() is None and store.latest_version is None
    bad.copy = working_copy
    store.publish(0, make_params(0))
    assert_is_version(good.poll()[1], 0)
    assert_is_version(bad.poll()[1], 0)


def test_publishing_compiles_a_second_time_for_the_part_and_never_again() -> None:
    copy = params_copier(ONE, TRAINABLE)
    for version in range(2):
        copy(make_params(version))
    with jax.no_tracing():
        copy(make_params(2))


def test_each_leaf_goes_to_its_own_place() -> None:
    """A tree of shardings, of which the second copy needs a part."""
    split, whole = on_mesh(SPLIT, 0, 1), on_mesh(ALL, 0, 1)
    copy = params_copier({"encoder": {"kernel": split}, "head": {"kernel": whole}}, TRAINABLE)
    place = functools.partial(make_params, place=whole)
    for version in range(2):
        copied, _ = copy(place(version))
        for name, sharding in (("encoder", split), ("head", whole)):
            assert copied[name]["kernel"].sharding.is_equivalent_to(sharding, 2)
        assert float(copied["head"]["kernel"][0, 0]) == version
