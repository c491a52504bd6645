"""The learner program: what it takes, trains on, publishes and reports, and how it ends."""

import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_policy import LinearPolicy, make_trajectory

from jaxvla import rng
from jaxvla.algorithms.ppo import PPOConfig
from jaxvla.config import LearningConfig, ScheduleConfig
from jaxvla.learning.learner import Learner, NonFiniteError, Progress
from jaxvla.simulation.assembler import EpisodeStats, SegmentInfo
from jaxvla.telemetry.activity import ActivityMeter
from jaxvla.telemetry.metrics import MetricRecorder
from jaxvla.telemetry.tracing import Tracer
from jaxvla.transport.base import QueueItem, Ticket
from jaxvla.transport.in_process import InProcessQueue
from jaxvla.transport.staleness import CreditRule
from jaxvla.types import Params, Trajectory

TIMEOUT_S = 60.0
"""For waits that end at once unless the code is broken."""

KEY = jax.random.key(5)


class FakeQueue:
    """Hands out what it was given, then is closed."""

    def __init__(self, trajectories: list[Trajectory], log: list[tuple[Any, ...]]):
        self._items = [item_of(x, position) for position, x in enumerate(trajectories)]
        self._log = log

    def take(self, count: int, learner_version: int) -> list[QueueItem] | None:
        self._log.append(("take", count, learner_version))
        if len(self._items) < count:
            return None
        taken, self._items = self._items[:count], self._items[count:]
        return taken

    def close(self, reason: str) -> None:
        self._log.append(("close", reason))
        self._items.clear()


class FakeStore:
    """Keeps what was published."""

    def __init__(self, log: list[tuple[Any, ...]]):
        self.published: dict[int, Params] = {}
        self._log = log

    def publish(self, version: int, params: Params) -> None:
        self._log.append(("publish", version))
        self.published[version] = jax.device_get(params)


def item_of(trajectory: Trajectory, position: int) -> QueueItem:
    """Trajectory 2 s + g is segment s of env group g; the oldest sample is of version s // 2."""
    segment, group = divmod(position, 2)
    episodes = EpisodeStats(
        task=np.zeros(2, np.int32),
        success=np.array([True, position == 0]),
        return_=np.array([1.0, 0.0], np.float32),
        length=np.array([7, 9], np.int32),
    )
    info = SegmentInfo(
        group=f"group_{group}",
        next_segment=segment + 1,
        end_state=f"after {segment}",
        episodes=episodes,
        num_env_steps=10,
        num_useful_env_steps=(8 + group) * bool(np.any(trajectory.valid)),
        num_queries=16,
        num_invalid=0,
    )
    return QueueItem(
        ticket=Ticket(id=position, admission_version=0, owner="simulator"),
        payload=trajectory,
        policy_version_min=segment // 2,
        policy_version_max=segment,
        nbytes=0,
        info=info,
    )


class Run:
    """A learner between fakes, and the order of what it did."""

    def __init__(
        self,
        training: Any,
        trajectories: list[Trajectory],
        *,
        learning: dict[str, Any] | None = None,
        schedule: dict[str, Any] | None = None,
        num_epochs: int = 1,
        progress: Progress | None = None,
        queue: Any = None,
    ):
        self.log: list[tuple[Any, ...]] = []
        self.made = training
        self.store = FakeStore(self.log)
        self.recorder = MetricRecorder()
        self.meter = ActivityMeter("learning", tracer=Tracer())
        taken_from: Any = queue or FakeQueue(trajectories, self.log)
        published_to: Any = self.store
        self.learner = Learner(
            functions=training.functions,
            state=training.fresh_state(),
            progress=progress or Progress(),
            queue=taken_from,
            store=published_to,
            key=KEY,
            learning=LearningConfig(**dict[str, Any](num_updates=3) | (learning or {})),
            schedule=ScheduleConfig(**(schedule or {})),
            algorithm=PPOConfig(
                num_epochs=num_epochs, num_minibatches=training.functions._num_minibatches
            ),
            recorder=self.recorder,
            meter=self.meter,
            on_update=lambda x: self.log.append(("record", x.progress.version)),
        )

    def run(self) -> "Run":
        with self.meter.thread("learner"):
            self.learner.run()
        return self

    def record(self) -> dict[str, float]:
        return self.recorder.flush(update=0, time_s=1.0, extra={})

    def published(self) -> list[int]:
        return [entry[1] for entry in self.log if entry[0] == "publish"]


def trajectories(count: int, bad: tuple[int, ...] = ()) -> list[Trajectory]:
    """Random ones; the log-probs of those in `bad` are NaN though their samples are valid."""
    made = [make_trajectory(seed) for seed in range(count)]
    for index in bad:
        made[index].behavior_log_prob[0, 0] = np.nan
    return made


def same(actual: Any, expected: Any) -> bool:
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def test_an_update_is_take_publish_record(training) -> None:
    run = Run(training(), trajectories(6)).run()
    assert run.log == [
        (kind, *rest)
        for version in range(3)
        for kind, *rest in (("take", 2, version), ("publish", version + 1), ("record", version + 1))
    ]
    assert run.learner.progress.version == 3
    assert same(run.store.published[3], run.learner.state.params)
    assert not same(run.store.published[2], run.store.published[3])


def test_streaming_takes_one_trajectory_at_a_time(training) -> None:
    schedule = {"stream_microbatches": True}
    run = Run(training(), trajectories(4), learning={"num_updates": 2}, schedule=schedule).run()
    one, two = ([("take", 1, v)] * 2 + [("publish", v + 1), ("record", v + 1)] for v in (0, 1))
    assert run.log == one + two


@pytest.mark.parametrize(("interval", "versions"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (5, [5])])
def test_publish_interval_and_the_last_version(
    training, interval: int, versions: list[int]
) -> None:
    schedule = {"publish_interval": interval}
    run = Run(training(), trajectories(10), learning={"num_updates": 5}, schedule=schedule).run()
    assert run.published() == versions


def test_publish_current_gives_the_weights_the_run_starts_with(training) -> None:
    run = Run(training(), [], progress=Progress(version=7), learning={"num_updates": 7})
    run.learner.publish_current()
    assert run.published() == [7]
    assert same(run.store.published[7], run.made.fresh_state().params)
    run.run()  # the budget is spent: nothing more is taken
    assert run.log == [("publish", 7)]


def test_an_update_is_epochs_of_minibatch_steps(training) -> None:
    """The same steps by hand, on keys that depend on version and epoch alone."""
    made = training(num_minibatches=2)
    run = Run(made, trajectories(2), learning={"num_updates": 5}, num_epochs=2)
    run.learner.progress.version = 4
    run.run()
    functions, state = made.functions, made.fresh_state()
    batch = functions.prepare(state.params, trajectories(2), jnp.int32(4))
    for epoch in (0, 1):
        order = functions.draw(rng.stream(KEY, "order", 4, epoch), batch.weight.shape)
        for index in (0, 1):
            state, _ = functions.step(state, batch, order, jnp.int32(index))
    assert same(run.learner.state, state)
    assert int(state.num_steps) == 4


@pytest.mark.parametrize("standardize", [False, True])
def test_streamed_equals_batched(training, standardize: bool) -> None:
    """With one epoch of one minibatch."""
    made = training(eps=1e-3, standardize=standardize)
    parts = [make_trajectory(seed, num_invalid=seed) for seed in range(6)]
    batched, streamed = (
        Run(made, parts, schedule={"stream_microbatches": is_streamed}).run()
        for is_streamed in (False, True)
    )
    for actual, expected in zip(
        jax.tree.leaves(streamed.learner.state), jax.tree.leaves(batched.learner.state), strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)
    norms = [run.record()["learner/grad_norm"] for run in (batched, streamed)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.parametrize("standardize", [False, True])
def test_streamed_metrics_are_those_of_the_whole_batch(training, standardize: bool) -> None:
    """Trajectories count by their valid samples: here 16, 13, 2 and none."""
    made = training(eps=1e-3, standardize=standardize)
    parts = [make_trajectory(seed, num_invalid=n) for seed, n in enumerate((0, 3, 14, 16))]
    learning = {"num_updates": 1, "trajectories_per_update": 4}
    batched, streamed = (
        Run(made, parts, learning=learning, schedule={"stream_microbatches": is_streamed})
        .run()
        .record()
        for is_streamed in (False, True)
    )
    names = [name for name in batched if name.startswith("learner/")]
    assert len(names) == 9
    for name in names:
        assert streamed[name] == pytest.approx(batched[name], rel=1e-4, abs=1e-6), name
    assert ("learner/deferred_fraction" in streamed) == standardize


def test_streamed_metrics_without_any_valid_sample_are_zero(training) -> None:
    parts = [make_trajectory(seed, num_invalid=16) for seed in range(2)]
    learning, schedule = {"num_updates": 1}, {"stream_microbatches": True}
    record = Run(training(), parts, learning=learning, schedule=schedule).run().record()
    for name in ("loss/policy", "loss/value", "ratio/mean", "ratio/max", "grad_norm"):
        assert record[f"learner/{name}"] == 0.0, name


class ClosingQueue(InProcessQueue):
    """Closed by the first `take` that would have to wait."""

    def take(self, count: int, learner_version: int, timeout_s: float | None = None) -> Any:
        items = super().take(count, learner_version, timeout_s=0.0)
        if items is None:
            self.close("shutdown")
        return items


@pytest.mark.parametrize("is_streamed", [False, True])
def test_only_what_updates_used_is_consumed(training, is_streamed: bool) -> None:
    """Five trajectories are two updates of two and one that is left over."""
    queue = ClosingQueue(CreditRule(trajectories_per_update=2, max_staleness=2))
    for position, trajectory in enumerate(trajectories(5)):
        ticket = queue.admit("simulator")
        assert ticket is not None
        info = item_of(trajectory, position).info
        versions = {"policy_version_min": 0, "policy_version_max": 0}
        assert queue.put(ticket, trajectory, nbytes=0, info=info, **versions)
    schedule = {"stream_microbatches": is_streamed}
    run = Run(training(), [], queue=queue, schedule=schedule).run()
    assert run.learner.progress.version == 2
    ledger = queue.ledger()
    assert (ledger.consumed, ledger.dropped_by_reason) == (4, {"shutdown": 1})
    assert ledger.is_balanced and (ledger.in_flight, ledger.depth) == (0, 0)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_groups_stand_where_the_last_complete_update_left_them(training, is_streamed: bool) -> None:
    """What an interrupted update has taken already, a resumed run makes again."""
    schedule = {"stream_microbatches": is_streamed}
    run = Run(training(), trajectories(5), schedule=schedule).run()  # 2 updates and a half
    assert run.learner.progress.version == 2
    assert run.learner.progress.groups == {
        f"group_{group}": {"next_segment": 2, "end_state": "after 1"} for group in (0, 1)
    }
    assert run.published() == [1, 2]


def test_stop_ends_a_learner_that_waits(training) -> None:
    waits, is_closed = threading.Event(), threading.Event()

    class EmptyQueue:
        def take(self, count: int, learner_version: int) -> None:
            waits.set()
            assert is_closed.wait(TIMEOUT_S)

        def close(self, reason: str) -> None:
            assert reason == "told to"
            is_closed.set()

    run = Run(training(), [], queue=EmptyQueue())
    thread = threading.Thread(target=run.run, daemon=True)
    thread.start()
    assert waits.wait(TIMEOUT_S)
    run.learner.stop("told to")
    thread.join(TIMEOUT_S)
    assert not thread.is_alive()
    run.learner.close()
    assert run.log == [] and run.learner.progress.version == 0


@pytest.mark.fault(9)
@pytest.mark.parametrize("is_streamed", [False, True])
def test_updates_that_stay_non_finite_stop_the_run(training, is_streamed: bool) -> None:
    """Updates 1, 3 and 4 are bad; two in a row are one too many."""
    bad = (0, 4, 6)
    run = Run(
        training(),
        trajectories(12, bad),
        learning={"num_updates": 6, "max_skipped_updates": 2},
        schedule={"stream_microbatches": is_streamed},
    )
    with pytest.raises(NonFiniteError, match="2 updates in a row"):
        run.run()
    assert run.learner.progress.version == 4 and run.learner.progress.skipped_in_a_row == 2
    state = run.learner.state
    assert (int(state.num_steps), int(state.num_skipped)) == (1, 3)
    # A skipped update publishes the weights unchanged.
    assert same(run.store.published[1], run.made.fresh_state().params)
    assert same(run.store.published[4], run.store.published[2])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


@pytest.mark.fault(9)
def test_skipped_updates_are_counted_across_a_resume(training) -> None:
    progress = Progress(version=1, skipped_in_a_row=1)
    learning = {"num_updates": 6, "max_skipped_updates": 2}
    run = Run(training(), trajectories(2, bad=(0,)), learning=learning, progress=progress)
    with pytest.raises(NonFiniteError):
        run.run()


@pytest.mark.fault(7)
@pytest.mark.parametrize("is_streamed", [False, True])
def test_updates_without_a_valid_sample_stop_the_run(training, is_streamed: bool) -> None:
    """Updates 1, 3 and 4 have none; two in a row are one too many."""
    empty = (0, 1, 4, 5, 6, 7)
    run = Run(
        training(),
        [make_trajectory(i, num_invalid=16 * (i in empty)) for i in range(12)],
        learning={"num_updates": 6, "max_skipped_updates": 2},
        schedule={"stream_microbatches": is_streamed},
    )
    with pytest.raises(NonFiniteError, match="2 updates in a row had no valid sample"):
        run.run()
    assert run.learner.progress.version == 4 and run.learner.progress.skipped_in_a_row == 2
    assert int(run.learner.state.num_steps) == 1 and int(run.learner.state.num_skipped) == 0


@pytest.mark.fault(8)
def test_one_bad_minibatch_of_an_update_shows(training) -> None:
    """The other steps of the update are taken; the update counts as one that skipped."""
    made = training(num_minibatches=4)
    run = Run(made, trajectories(2, bad=(1,)), learning={"num_updates": 1}).run()
    assert int(run.learner.state.num_steps) == 3 and int(run.learner.state.num_skipped) == 1
    assert run.learner.progress.skipped_in_a_row == 1
    record = run.record()
    assert np.isnan(record["learner/grad_norm"])
    assert record["faults/skipped_optimizer_steps"] == 1


def test_metrics(training) -> None:
    made = training(num_minibatches=2)
    run = Run(made, trajectories(4), learning={"num_updates": 2}).run()
    record = run.record()
    # Episodes: 4 trajectories with 2 each, of which 4 + 1 succeeded.
    assert record["train/success_rate"] == pytest.approx(5 / 8)
    assert record["train/return_mean"] == pytest.approx(0.5)
    assert record["train/episode_length_mean"] == pytest.approx(8.0)
    assert run.learner.num_env_steps == 40
    rates = [record[f"rate/{kind}env_steps_per_s"] for kind in ("useful_", "")]
    assert rates[0] / rates[1] == pytest.approx((8 + 9 + 8 + 9) / 40)
    assert run.learner.staleness == [0, 0, 1, 1]
    assert record["faults/skipped_optimizer_steps"] == 0
    for name in ("policy", "value", "entropy", "total"):
        assert np.isfinite(record[f"learner/loss/{name}"])
    assert record["rate/updates_per_s"] > 0.0


def test_metrics_of_an_update_are_means_and_maxima_over_its_steps(training) -> None:
    made = training(num_minibatches=2)
    record = Run(made, trajectories(2), learning={"num_updates": 1}).run().record()
    functions, state, steps = made.functions, made.fresh_state(), []
    batch = functions.prepare(state.params, trajectories(2), jnp.int32(0))
    order = functions.draw(rng.stream(KEY, "order", 0, 0), batch.weight.shape)
    for index in (0, 1):
        state, metrics = functions.step(state, batch, order, jnp.int32(index))
        steps.append(jax.device_get(metrics))
    for name in steps[0]:
        values = np.array([step[name] for step in steps], np.float64)
        expected = values.max() if name == "ratio/max" else values.mean()
        assert record[f"learner/{name}"] == pytest.approx(expected, rel=1e-6), name
    assert steps[0]["ratio/max"] != steps[1]["ratio/max"]


def test_the_program_interface(training) -> None:
    run = Run(training(LinearPolicy()), [])
    assert run.learner.role == "learning"
    assert run.learner.threads() == {"learner": run.learner.run}
