"""Simulators, servers and a learner as threads, with random delays and deaths from fixed seeds.

Queue and weight store are wired as in a run: what all servers have swapped in gives credit.
"""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import pytest

from jaxvla.transport.in_process import InProcessQueue, InProcessSubscription, InProcessWeightStore
from jaxvla.transport.staleness import CreditRule

TIMEOUT_S = 60.0
"""For waits that end at once unless the code is broken."""
NUM_UPDATES = 10
NUM_SIMULATORS = 6
NUM_SERVERS = 2


class Run:
    """One run: shared state and the loops of its programs."""

    def __init__(self, rule: CreditRule, seed: int):
        self.rule = rule
        self.seed = seed
        self.queue = InProcessQueue(rule, lease_s=0.2)
        self.store = InProcessWeightStore(on_acknowledged=self.queue.advance)
        self.store.publish(0, {"w": jnp.int32(0)})
        self.served: list[int | None] = [0] * NUM_SERVERS
        """Version that each server answers with; None: it is dead."""
        self.has_news = [threading.Event() for _ in range(NUM_SERVERS)]
        # Subscribed before anyone asks: a server that answers must be one that is waited for.
        self.subscriptions = [self.subscribe(i) for i in range(NUM_SERVERS)]
        self.is_over = threading.Event()

    def subscribe(self, number: int) -> InProcessSubscription:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return self.store.subscribe(f"server {number}", sharding, self.has_news[number].set)

    def delay(self, rng: random.Random) -> None:
        """Shakes the order of events; nothing relies on its length."""
        time.sleep(rng.choice([0.0, 0.0, 0.001, 0.004]))

    def serve(self, number: int) -> None:
        rng = random.Random(f"server {self.seed} {number}")
        subscription, has_news = self.subscriptions[number], self.has_news[number]
        has_news.set()  # version 0 is there already
        while not self.is_over.is_set():
            assert has_news.wait(TIMEOUT_S)
            has_news.clear()
            if (pulled := subscription.poll()) is not None:
                version, params = pulled
                assert int(params["w"]) == version
                self.delay(rng)
                self.served[number] = version
                subscription.acknowledge(version)
            if number and rng.random() < 0.2:  # never all of them at once
                self.served[number] = None
                subscription.close()
                self.delay(rng)
                subscription = self.subscribe(number)
                has_news.set()

    def simulate(self, number: int) -> int:
        """Returns how many of its tickets the lease ended: it left, or came too late."""
        rng = random.Random(f"simulator {self.seed} {number}")
        num_leases = life = 0
        while (ticket := self.queue.admit(f"simulator {number}.{life}")) is not None:
            versions = []
            for _ in range(3):  # chunk queries, each answered by any server
                versions.append(rng.choice([x for x in self.served if x is not None]))
                self.delay(rng)
            fate = rng.random()
            if fate < 0.08:
                life += 1  # a successor goes on
            is_in_time = False
            if 0.05 <= fate < 0.08:
                is_in_time = self.queue.fail_owner(ticket.owner, "crash") == 1
            elif 0.08 <= fate < 0.12:
                is_in_time = self.queue.fail(ticket, "sim_nan")
            elif fate >= 0.12:
                is_in_time = self.queue.put(
                    ticket,
                    payload=ticket.id,
                    policy_version_min=min(versions),
                    policy_version_max=max(versions),
                    nbytes=8,
                )
            num_leases += not is_in_time
        return num_leases

    def learn(self) -> list[list[tuple[int, int]]]:
        """Returns (ticket id, staleness) of what each update consumed."""
        rng = random.Random(f"learner {self.seed}")
        batches = []
        for learner_version in range(NUM_UPDATES):
            items = self.queue.take(
                self.rule.trajectories_per_update, learner_version, timeout_s=TIMEOUT_S
            )
            assert items is not None, f"update {learner_version} starved: {self.queue.ledger()}"
            batches.append([(x.ticket.id, learner_version - x.policy_version_min) for x in items])
            assert self.queue.ledger().is_balanced
            self.delay(rng)
            version = learner_version + 1
            if version % self.rule.publish_interval == 0:
                self.store.publish(version, {"w": jnp.int32(version)})
        return batches


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("max_staleness", "window", "publish_interval"), [(0, 1, 1), (2, 1, 1), (2, 6, 1), (2, 1, 3)]
)
def test_bound_order_and_balance_hold_in_a_stormy_run(
    seed, max_staleness, window, publish_interval
):
    rule = CreditRule(
        trajectories_per_update=4,
        max_staleness=max_staleness,
        window=window,
        publish_interval=publish_interval,
        num_updates=NUM_UPDATES,
    )
    run = Run(rule, seed)
    with ThreadPoolExecutor(NUM_SIMULATORS + NUM_SERVERS) as pool:
        servers = [pool.submit(run.serve, i) for i in range(NUM_SERVERS)]
        simulators = [pool.submit(run.simulate, i) for i in range(NUM_SIMULATORS)]
        try:
            batches = run.learn()
        finally:
            run.queue.close("finished")
            run.is_over.set()
            run.store.publish(NUM_UPDATES + 1, {"w": jnp.int32(NUM_UPDATES + 1)})  # wakes servers
        num_leases = sum(future.result(TIMEOUT_S) for future in simulators)
        for future in servers:
            future.result(TIMEOUT_S)

    ids = [i for batch in batches for i, _ in batch]
    assert len(set(ids)) == len(ids) == 4 * NUM_UPDATES
    if window == 1:
        assert ids == sorted(ids)
    assert max(staleness for batch in batches for _, staleness in batch) <= rule.bound
    if max_staleness == 0:
        assert all(staleness == 0 for batch in batches for _, staleness in batch)

    ledger = run.queue.ledger()
    assert ledger.is_balanced
    assert (ledger.consumed, ledger.in_flight, ledger.depth) == (4 * NUM_UPDATES, 0, 0)
    assert ledger.dropped_by_reason.get("lease", 0) == num_leases
    assert "finished" not in ledger.dropped_by_reason  # the cap left nothing over
