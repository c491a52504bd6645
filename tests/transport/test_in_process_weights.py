"""The weight store: real copies, atomic swaps, acknowledgement, refusals."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxvla.transport.in_process import InProcessQueue, InProcessWeightStore
from jaxvla.transport.staleness import CreditRule
from jaxvla.transport.weight_copy import params_copier

TIMEOUT_S = 60.0
"""For waits that end at once unless the code is broken."""


def make_store(**options) -> Any:
    return InProcessWeightStore(**options)


def sharding(device: int = 0) -> SingleDeviceSharding:
    return SingleDeviceSharding(jax.devices()[device])


def on_mesh(spec: PartitionSpec, *devices: int) -> NamedSharding:
    """A sharding over the given devices; skips where the host shows too few."""
    if max(devices) >= jax.device_count():
        pytest.skip(f"needs {max(devices) + 1} devices")
    mesh = Mesh(np.array([jax.devices()[i] for i in devices]), ("data",))
    return NamedSharding(mesh, spec)


def make_params(version: int, target=None) -> dict:
    """Every element of every leaf is `version`."""
    params = {
        "encoder": {"kernel": jnp.full((4, 8), version, jnp.float32)},
        "step": jnp.full((4,), version, jnp.int32),
    }
    return jax.device_put(params, target or sharding())


def versions_in(params: dict) -> set[float]:
    return {float(x) for leaf in jax.tree.leaves(params) for x in np.unique(np.asarray(leaf))}


def increment(params: dict) -> dict:
    """Consumes its input, as the learner's step does."""
    shardings = jax.tree.map(lambda x: x.sharding, params)
    step = jax.jit(
        lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0, out_shardings=shardings
    )
    result = jax.block_until_ready(step(params))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    return result


ALL, SPLIT = PartitionSpec(), PartitionSpec("data")


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((ALL, 0), (ALL, 0)),
        ((SPLIT, 0, 1), (SPLIT, 0, 1)),
        ((SPLIT, 0, 1), (ALL, 0, 1)),
        ((ALL, 0, 1), (ALL, 1, 0)),
        ((ALL, 0, 1), (ALL, 0)),
        ((ALL, 0, 1), (SPLIT, 1, 2)),
        ((SPLIT, 0, 1), (ALL, 2, 3)),
        ((ALL, 0, 1), (ALL, 2, 3)),
    ],
    ids=["one device", "same", "gather", "reorder", "subset", "overlap", "gather away", "away"],
)
def test_published_weights_survive_donation_of_the_learners(source, target):
    source, target = on_mesh(*source), on_mesh(*target)
    store = make_store()
    subscription = store.subscribe("server", target)
    params = make_params(5, source)
    store.publish(5, params)
    increment(params)
    version, served = subscription.poll()
    assert version == 5
    assert versions_in(served) == {5.0}
    assert all(
        leaf.sharding.is_equivalent_to(target, leaf.ndim) for leaf in jax.tree.leaves(served)
    )


def test_copy_shares_no_buffer_with_its_source():
    params = make_params(1)
    copied, _ = params_copier(sharding())(params)
    for old, new in zip(jax.tree.leaves(params), jax.tree.leaves(copied), strict=True):
        assert old.unsafe_buffer_pointer() != new.unsafe_buffer_pointer()


def test_publishing_twice_compiles_once():
    copy = params_copier(sharding())
    copy(make_params(0))
    with jax.no_tracing():
        copy(make_params(1))


def test_subscriptions_get_their_own_copies():
    store = make_store()
    first = store.subscribe("first", sharding())
    second = store.subscribe("second", sharding())
    store.publish(0, make_params(0))
    one, two = first.poll()[1], second.poll()[1]
    assert one["step"].unsafe_buffer_pointer() != two["step"].unsafe_buffer_pointer()


def test_late_subscriber_gets_the_latest_version_although_the_learner_moved_on():
    store = make_store()
    params = make_params(3)
    store.publish(3, params)
    increment(params)
    version, served = store.subscribe("late", sharding()).poll()
    assert (version, versions_in(served)) == (3, {3.0})


def test_only_the_newest_version_is_delivered_and_only_once():
    store = make_store()
    subscription = store.subscribe("server", sharding())
    assert subscription.poll() is None
    for version in range(3):
        store.publish(version, make_params(version))
    assert subscription.poll()[0] == 2
    assert subscription.poll() is None


@pytest.mark.fault(24)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": {"kernel": jnp.zeros((4, 9))}}, r"'encoder/kernel': float32\[4,9\]"),
        ({"encoder": {"kernel": jnp.zeros((4, 8), jnp.bfloat16)}}, r"'encoder/kernel': bfloat16"),
        ({"encoder": {"weight": jnp.zeros((4, 8))}}, "'encoder/kernel': missing"),
        ({"bias": jnp.zeros(4)}, r"'bias': float32\[4\], but no such leaf in the first"),
        ({"step": np.zeros(4, np.int32)}, "'step' is a ndarray"),
    ],
)
def test_tree_unlike_the_first_is_refused_and_the_old_version_stays(change, message):
    store = make_store()
    subscription = store.subscribe("server", sharding())
    store.publish(0, make_params(0))
    with pytest.raises(ValueError, match=message):
        store.publish(1, make_params(1) | change)
    assert store.latest_version == 0
    version, served = subscription.poll()
    assert (version, versions_in(served)) == (0, {0.0})
    store.publish(1, make_params(1))


@pytest.mark.parametrize("version", [-1, 3, 4])
def test_versions_must_rise(version):
    store = make_store()
    store.publish(4, make_params(4))
    with pytest.raises(ValueError, match=f"version {version} after 4"):
        store.publish(version, make_params(version))


@pytest.mark.fault(23)
def test_failed_copy_changes_nothing_for_anybody():
    store = make_store()
    good = store.subscribe("good", sharding())
    bad = store.subscribe("bad", sharding())
    store.publish(0, make_params(0))
    working_copy = bad.copy

    def fail(params):
        raise ConnectionResetError("peer went away")

    bad.copy = fail
    with pytest.raises(ConnectionResetError):
        store.publish(1, make_params(1))
    assert store.latest_version == 0
    assert (good.poll()[0], bad.poll()[0]) == (0, 0)
    bad.copy = working_copy
    store.publish(1, make_params(1))
    assert (good.poll()[0], bad.poll()[0]) == (1, 1)


def test_readers_never_see_mixed_versions():
    num_readers, num_versions = 3, 12
    store = make_store()
    ready = threading.Barrier(num_readers + 1)

    def read(number):
        subscription = store.subscribe(f"server {number}", sharding())
        seen = []
        ready.wait(TIMEOUT_S)
        while not seen or seen[-1] < num_versions:
            pulled = subscription.poll()
            if pulled is None:
                newest = seen[-1] if seen else -1
                assert store.wait_for(newest + 1, TIMEOUT_S)
                continue
            assert versions_in(pulled[1]) == {float(pulled[0])}
            subscription.acknowledge(pulled[0])
            seen.append(pulled[0])
        return seen

    with ThreadPoolExecutor(num_readers) as pool:
        futures = [pool.submit(read, i) for i in range(num_readers)]
        ready.wait(TIMEOUT_S)
        params = make_params(0)
        for version in range(1, num_versions + 1):
            params = increment(params)
            store.publish(version, params)
        histories = [future.result(TIMEOUT_S) for future in futures]
    for seen in histories:
        assert seen == sorted(set(seen))
        assert seen[-1] == num_versions
    assert store.acknowledged_version == num_versions


@pytest.mark.fault(25)
def test_acknowledged_version_is_that_of_the_slowest_live_server():
    risen = []
    store = make_store(on_acknowledged=risen.append)
    fast = store.subscribe("fast", sharding())
    slow = store.subscribe("slow", sharding())
    store.publish(0, make_params(0))
    assert store.acknowledged_version is None
    for subscription in (fast, slow):
        subscription.acknowledge(subscription.poll()[0])
    store.publish(1, make_params(1))
    store.publish(2, make_params(2))
    fast.acknowledge(fast.poll()[0])
    assert (store.acknowledged_version, risen) == (0, [0])
    slow.close()
    slow.close()
    assert (store.acknowledged_version, risen) == (2, [0, 2])


def test_acknowledgement_of_what_was_never_pulled_is_refused():
    store = make_store()
    subscription = store.subscribe("server", sharding())
    store.publish(0, make_params(0))
    with pytest.raises(ValueError, match="server acknowledges version 0, pulled -1"):
        subscription.acknowledge(0)
    assert store.acknowledged_version is None


def test_newcomer_holds_the_acknowledged_version_until_it_serves():
    """Else it could serve what it pulled to a ticket that was admitted for something newer."""
    store = make_store()
    old = store.subscribe("old", sharding())
    store.publish(0, make_params(0))
    old.acknowledge(old.poll()[0])
    newcomer = store.subscribe("newcomer", sharding())
    pulled = newcomer.poll()[0]
    store.publish(1, make_params(1))
    old.acknowledge(old.poll()[0])
    assert store.acknowledged_version == 0
    newcomer.acknowledge(pulled)
    assert store.acknowledged_version == 0
    newcomer.acknowledge(newcomer.poll()[0])
    assert store.acknowledged_version == 1


def test_acknowledged_version_stays_when_the_last_server_leaves():
    store = make_store()
    subscription = store.subscribe("server", sharding())
    store.publish(0, make_params(0))
    subscription.acknowledge(subscription.poll()[0])
    subscription.close()
    assert store.acknowledged_version == 0
    store.publish(1, make_params(1))
    assert store.acknowledged_version == 0
    assert subscription.poll() is None


def test_live_names_are_unique_and_free_again_after_close():
    store = make_store()
    subscription = store.subscribe("server", sharding())
    with pytest.raises(ValueError, match="'server' is live"):
        store.subscribe("server", sharding())
    subscription.close()
    successor = store.subscribe("server", sharding())
    subscription.close()  # must not throw the successor out
    store.publish(0, make_params(0))
    assert successor.poll()[0] == 0


def test_swapped_in_version_gives_credit():
    queue: Any = InProcessQueue(CreditRule(trajectories_per_update=1, max_staleness=0))
    store = make_store(on_acknowledged=queue.advance)
    subscription = store.subscribe("server", sharding())
    queue.admit("simulator")
    store.publish(1, make_params(1))
    version, _ = subscription.poll()
    assert queue.admit("simulator", timeout_s=0.0) is None
    subscription.acknowledge(version)
    assert queue.admit("simulator", timeout_s=0.0).admission_version == 1


def test_publish_tells_the_servers_after_the_version_is_there():
    store = make_store()
    seen = []
    subscription = store.subscribe(
        "server", sharding(), lambda: seen.append(subscription.poll()[0])
    )
    store.publish(0, make_params(0))
    store.publish(1, make_params(1))
    assert seen == [0, 1]


class ProbeVersion(int):
    """Reports when it is compared, which the store does with its lock held before waiting."""

    was_compared = threading.Event()

    def __le__(self, other):
        self.was_compared.set()
        return int(self) <= other


@pytest.mark.parametrize("event", ["publish", "close"])
def test_wait_for_is_woken_by_publish_and_by_close(event):
    store = make_store()
    store.publish(0, make_params(0))
    version = ProbeVersion(1)
    version.was_compared.clear()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(store.wait_for, version)
        assert version.was_compared.wait(TIMEOUT_S)
        if event == "publish":
            store.publish(2, make_params(2))
        else:
            store.close()
        assert waiting.result(TIMEOUT_S) == (event == "publish")


def test_wait_for_answers_at_once_or_times_out():
    store = make_store()
    assert not store.wait_for(0, timeout_s=0.01)
    store.publish(0, make_params(0))
    assert store.wait_for(0)


@pytest.mark.fault(25)
def test_servers_that_lag_are_named_with_the_age_of_what_they_lack():
    now_s = [0.0]
    store = make_store(clock=lambda: now_s[0])
    swift, slow = (store.subscribe(name, sharding()) for name in ("swift", "slow"))
    for version in range(3):
        now_s[0] = 10.0 * version
        store.publish(version, make_params(version))
        for server in (swift, slow) if version == 0 else (swift,):
            server.acknowledge(server.poll()[0])
    now_s[0] = 25.0
    assert store.lagging() == [("slow", 0, 15.0)]
    slow.acknowledge(slow.poll()[0])
    assert store.lagging() == []


def test_metrics_measure_publication_and_the_slowest_swap():
    now_s = [0.0]
    store = make_store(clock=lambda: now_s[0])
    subscription = store.subscribe("server", sharding())
    working_copy = subscription.copy

    def slow_copy(params):
        now_s[0] += 0.5
        return working_copy(params)

    subscription.copy = slow_copy
    store.publish(0, make_params(0))
    now_s[0] += 2.0
    subscription.acknowledge(subscription.poll()[0])
    metrics = store.metrics()
    assert (metrics.publish_ms, metrics.pull_ms) == (500.0, 2000.0)
    assert metrics.nbytes == 4 * 8 * 4 + 4 * 4
