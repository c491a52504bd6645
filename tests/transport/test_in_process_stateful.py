"""Random operation sequences on the real queue against a naive account of every ticket."""

import json
from collections import Counter
from math import inf
from typing import ClassVar

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from jaxvla.transport.base import Ticket
from jaxvla.transport.in_process import InProcessQueue
from jaxvla.transport.staleness import CreditRule

LEASE_S = 10.0
NUM_SERVERS = 2
OWNERS = ("simulator a", "simulator b")
MOVES = ("admit", "admit", "finish", "finish", "take", "swap")
RARELY = st.sampled_from([False, False, False, True])
"""Failures come too seldom to keep the learner from its batches."""
ITEM_BYTES = (10, 25, 40)


class QueueMachine(RuleBasedStateMachine):
    """Keeps the whole history as a list of records, and derives everything from it."""

    reached: ClassVar[Counter[str]] = Counter()
    """How often, over all sequences, something happened that takes a while to come about."""

    @initialize(
        per_update=st.integers(1, 3),
        max_staleness=st.integers(0, 2),
        window=st.integers(1, 4),
        publish_interval=st.integers(1, 3),
        max_bytes=st.sampled_from([None, None, 60, 130]),
    )
    def start(self, per_update, max_staleness, window, publish_interval, max_bytes):
        self.rule = CreditRule(
            trajectories_per_update=per_update,
            max_staleness=max_staleness,
            window=window,
            publish_interval=min(publish_interval, max_staleness + 1),
        )
        self.max_bytes = max_bytes
        self.now_s = 0.0
        self.history: list[dict] = []
        """One record per ticket in admission order: ticket, state, oldest, newest, end_s."""
        self.num_late = 0
        self.num_completed = 0
        self.learner_version = 0
        self.published = 0
        self.served = [0] * NUM_SERVERS
        """Version that each policy server has swapped in."""
        self.pulled = 0
        self.taken_before = 0
        """Trajectories charged for the updates before the last restart."""
        self.num_in_batch = 0
        self.largest = 0
        self.queue = self.make_queue()

    def make_queue(self) -> InProcessQueue:
        return InProcessQueue(
            self.rule, lease_s=LEASE_S, max_bytes=self.max_bytes, clock=lambda: self.now_s
        )

    # The naive account.

    def expire(self):
        for record in self.history:
            if record["state"] == "outstanding" and record["end_s"] <= self.now_s:
                record["state"] = "dropped"

    def count(self, state) -> int:
        return sum(record["state"] == state for record in self.history)

    @property
    def present(self) -> int:
        return self.count("outstanding") + self.count("ready")

    def allows_admission(self) -> bool:
        taken = self.taken_before + sum(
            record["state"] in ("gathered", "taken")
            for record in self.history
            if record["is_this_life"]
        )
        limit = (self.pulled + self.rule.max_staleness + 1) * self.rule.trajectories_per_update
        has_memory = self.max_bytes is None or (self.present + 1) * self.largest <= self.max_bytes
        return self.present + taken < limit and has_memory

    def takable(self) -> list[dict]:
        live = [x for x in self.history if x["state"] != "dropped" and x["is_this_life"]]
        waiting_for = [i for i, x in enumerate(live) if x["state"] == "outstanding"]
        end = waiting_for[0] + self.rule.window if waiting_for else len(live)
        return [x for x in live[:end] if x["state"] == "ready"]

    # What can happen.

    @rule(moves=st.lists(st.tuples(st.sampled_from(MOVES), st.integers(0, 3)), max_size=8))
    def go_on(self, moves):
        """As a healthy run does. One rule for all of it, because hypothesis leaves some rules out
        of every sequence, and without any of these nothing comes about."""
        for move, number in moves:
            if move == "admit":
                self.admit(OWNERS[number % 2])
            elif move == "finish":
                self.finish(number)
            elif move == "take":
                self.take(is_whole_batch=number > 0)
            else:
                self.swap(number % NUM_SERVERS, is_late=False)

    def admit(self, owner):
        self.expire()
        ticket = self.queue.admit(owner, timeout_s=0.0)
        assert (ticket is not None) == self.allows_admission()
        if ticket is None:
            return
        assert ticket == Ticket(id=len(self.history), admission_version=self.pulled, owner=owner)
        self.history.append(
            {
                "ticket": ticket,
                "state": "outstanding",
                "oldest": min(self.served),
                "end_s": self.now_s + LEASE_S,
                "is_this_life": True,
            }
        )

    @precondition(lambda self: self.history)
    @rule(data=st.data(), nbytes=st.sampled_from(ITEM_BYTES), is_future=st.integers(0, 9))
    def put(self, data, nbytes, is_future):
        """Of any ticket ever given out, also ended ones and those of an earlier life."""
        self.expire()
        self.hand_in(data.draw(st.sampled_from(self.history[-6:])), nbytes, is_future == 0)

    def finish(self, place):
        self.expire()
        outstanding = [x for x in self.history if x["state"] == "outstanding"]
        if place < len(outstanding):
            self.hand_in(outstanding[place], ITEM_BYTES[0], is_future=False)

    def hand_in(self, record, nbytes, is_future):
        oldest = record["oldest"]
        newest = max(self.published, oldest) + is_future
        is_accepted = self.queue.put(
            record["ticket"],
            payload=None,
            policy_version_min=oldest,
            policy_version_max=newest,
            nbytes=nbytes,
        )
        assert is_accepted == (record["state"] == "outstanding")
        if is_accepted:
            record |= {"state": "ready", "newest": newest}
            self.largest = max(self.largest, nbytes)
            self.num_completed += 1
        else:
            self.num_late += 1

    @precondition(lambda self: self.history)
    @rule(data=st.data(), is_due=RARELY)
    def fail(self, data, is_due):
        if not is_due:
            return
        self.expire()
        record = data.draw(st.sampled_from(self.history[-6:]))
        has_failed = self.queue.fail(record["ticket"], "crash")
        assert has_failed == (record["state"] == "outstanding")
        if has_failed:
            record["state"] = "dropped"

    @rule(owner=st.sampled_from(OWNERS), is_due=RARELY)
    def an_owner_dies(self, owner, is_due):
        if not is_due:
            return
        self.expire()
        orphans = [
            record
            for record in self.history
            if record["state"] == "outstanding" and record["ticket"].owner == owner
        ]
        assert self.queue.fail_owner(owner, "crash") == len(orphans)
        for record in orphans:
            record["state"] = "dropped"

    @rule(seconds=st.sampled_from([0.1, 4.0, 11.0]), is_due=RARELY)
    def let_time_pass(self, seconds, is_due):
        if is_due:
            self.now_s += seconds

    def take(self, is_whole_batch):
        self.expire()
        missing = self.rule.trajectories_per_update - self.num_in_batch
        count = missing if is_whole_batch else 1
        if self.max_bytes is not None and count * self.largest > self.max_bytes:
            return
        for record in self.history:
            if record["state"] == "ready" and record["newest"] > self.learner_version:
                record["state"] = "dropped"
        expected = self.takable()[:count]
        self.reached["held back"] += len(expected) < count <= self.count("ready")
        items = self.queue.take(count, self.learner_version, timeout_s=0.0)
        assert (items is None) == (len(expected) < count)
        if items is None:
            return
        assert [item.ticket for item in items] == [record["ticket"] for record in expected]
        for item in items:
            assert self.learner_version - item.policy_version_min <= self.rule.bound
        oldest = min([x["ticket"].id for x in self.history if x["state"] == "outstanding"] or [inf])
        self.reached["overtaken"] += expected[-1]["ticket"].id > oldest
        for record in expected:
            record["state"] = "gathered"
        self.num_in_batch += count
        if self.num_in_batch == self.rule.trajectories_per_update:
            self.num_in_batch = 0
            for record in self.history:
                if record["state"] == "gathered":
                    record["state"] = "taken"
            self.learner_version += 1
            self.reached["three updates"] += self.learner_version >= 3
            if self.learner_version % self.rule.publish_interval == 0:
                self.published = self.learner_version

    @rule(server=st.integers(0, NUM_SERVERS - 1))
    def the_queue_hears_late(self, server):
        """Of a swap, after it has heard of the next one."""
        self.swap(server, is_late=True)

    def swap(self, server, is_late):
        """The queue hears of it, or of what was so before: it ignores what it knew already."""
        before = min(self.served)
        self.served[server] = self.published
        self.queue.advance(before if is_late else min(self.served))
        self.pulled = max(self.pulled, before if is_late else min(self.served))

    @rule(num_updates_lost=st.integers(0, 2), is_closed=st.booleans(), is_due=RARELY)
    def restart(self, num_updates_lost, is_closed, is_due):
        """A new process continues from a checkpoint of this moment, or an older learner."""
        if not is_due:
            return
        self.reached["restart"] += self.learner_version > 0
        self.expire()
        if is_closed:
            self.queue.close("shutdown")
        state = json.loads(json.dumps(self.queue.state_dict()))
        self.learner_version = max(0, self.learner_version - num_updates_lost)
        self.published = self.pulled = self.learner_version
        self.served = [self.learner_version] * NUM_SERVERS
        self.taken_before = self.learner_version * self.rule.trajectories_per_update
        self.num_in_batch = 0
        self.largest = 0
        for record in self.history:
            record["is_this_life"] = False
            if record["state"] in ("outstanding", "ready", "gathered"):
                record["state"] = "dropped"
        self.queue = self.make_queue()
        self.queue.load_state_dict(state, version=self.learner_version)

    @invariant()
    def ledger_agrees(self):
        self.expire()
        ledger = self.queue.ledger()
        assert ledger.is_balanced
        assert ledger.admitted == len(self.history)
        assert ledger.consumed == self.count("taken")
        assert ledger.dropped == self.count("dropped")
        assert ledger.in_flight == self.count("outstanding")
        assert ledger.depth == self.count("ready") + self.count("gathered")
        assert (ledger.late, ledger.completed) == (self.num_late, self.num_completed)

    @invariant()
    def somebody_can_go_on(self):
        """Unless memory is short: a batch can be taken, a ticket is out, or one can be had."""
        if self.pulled == self.published and self.max_bytes is None:
            missing = self.rule.trajectories_per_update - self.num_in_batch
            can_take = len(self.takable()) >= missing
            assert can_take or self.count("outstanding") or self.allows_admission()


def test_queue_agrees_with_a_naive_account():
    QueueMachine.reached.clear()
    run_state_machine_as_test(
        QueueMachine,
        settings=settings(
            max_examples=150, stateful_step_count=50, deadline=None, derandomize=True
        ),
    )
    for what in ("held back", "overtaken", "three updates", "restart"):
        assert QueueMachine.reached[what] >= 10, QueueMachine.reached
