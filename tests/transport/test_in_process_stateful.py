"""Random operation sequences on the real queue against a naive account of every ticket."""

import json

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxvla.transport.base import Ticket
from jaxvla.transport.in_process import InProcessQueue
from jaxvla.transport.staleness import CreditRule

LEASE_S = 10.0
ITEM_BYTES = (10, 25, 40)


class QueueMachine(RuleBasedStateMachine):
    """Keeps the whole history as a list of records, and derives everything from it."""

    @initialize(
        per_update=st.integers(1, 3),
        max_staleness=st.integers(0, 2),
        window=st.integers(1, 4),
        max_bytes=st.sampled_from([None, None, 60, 130]),
    )
    def start(self, per_update, max_staleness, window, max_bytes):
        self.rule = CreditRule(
            trajectories_per_update=per_update, max_staleness=max_staleness, window=window
        )
        self.max_bytes = max_bytes
        self.now_s = 0.0
        self.history: list[dict] = []
        """One record per ticket in admission order: ticket, state, version, nbytes, end_s."""
        self.num_late = 0
        self.num_completed = 0
        self.learner_version = 0
        self.published = 0
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

    @rule()
    def admit(self):
        self.expire()
        ticket = self.queue.admit("simulator", timeout_s=0.0)
        assert (ticket is not None) == self.allows_admission()
        if ticket is None:
            return
        assert ticket == Ticket(
            id=len(self.history), admission_version=self.pulled, owner="simulator"
        )
        self.history.append(
            {
                "ticket": ticket,
                "state": "outstanding",
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

    @precondition(lambda self: self.count("outstanding"))
    @rule(nbytes=st.sampled_from(ITEM_BYTES))
    def finish_the_oldest(self, nbytes):
        """Without it hardly any update would get all of its trajectories."""
        self.expire()
        outstanding = [x for x in self.history if x["state"] == "outstanding"]
        if outstanding:
            self.hand_in(outstanding[0], nbytes, is_future=False)

    def hand_in(self, record, nbytes, is_future):
        oldest = record["ticket"].admission_version
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
    @rule(data=st.data())
    def fail(self, data):
        self.expire()
        record = data.draw(st.sampled_from(self.history[-6:]))
        has_failed = self.queue.fail(record["ticket"], "crash")
        assert has_failed == (record["state"] == "outstanding")
        if has_failed:
            record["state"] = "dropped"

    @rule(seconds=st.sampled_from([1.0, 4.0, 11.0]))
    def let_time_pass(self, seconds):
        self.now_s += seconds

    @rule(is_whole_batch=st.booleans())
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
        items = self.queue.take(count, self.learner_version, timeout_s=0.0)
        assert (items is None) == (len(expected) < count)
        if items is None:
            return
        assert [item.ticket for item in items] == [record["ticket"] for record in expected]
        for item in items:
            assert self.learner_version - item.policy_version_min <= self.rule.bound
        for record in expected:
            record["state"] = "gathered"
        self.num_in_batch += count
        if self.num_in_batch == self.rule.trajectories_per_update:
            self.num_in_batch = 0
            for record in self.history:
                if record["state"] == "gathered":
                    record["state"] = "taken"
            self.learner_version += 1
            self.published = self.learner_version

    @rule(data=st.data())
    def servers_swap(self, data):
        """To any published version; the queue ignores what is older than it knows."""
        version = data.draw(st.integers(max(0, self.pulled - 1), self.published))
        self.queue.advance(version)
        self.pulled = max(self.pulled, version)

    @rule(num_updates_lost=st.integers(0, 2), is_closed=st.booleans(), chance=st.integers(0, 3))
    def restart(self, num_updates_lost, is_closed, chance):
        """A new process continues from a checkpoint of this moment, or an older learner."""
        if chance:
            return
        self.expire()
        if is_closed:
            self.queue.close("shutdown")
        state = json.loads(json.dumps(self.queue.state_dict()))
        self.learner_version = max(0, self.learner_version - num_updates_lost)
        self.published = self.pulled = self.learner_version
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


QueueMachine.TestCase.settings = settings(
    max_examples=120, stateful_step_count=50, deadline=None, derandomize=True
)
test_queue_agrees_with_a_naive_account = QueueMachine.TestCase
