"""The policy server between real neighbours and a sampler that does what it is told."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvla.serving.batcher import Batcher, BatcherClosedError, Busy
from jaxvla.serving.client import Answer, InferenceClient
from jaxvla.serving.server import PolicyServer
from jaxvla.telemetry.activity import ActivityMeter
from jaxvla.telemetry.metrics import MetricRecorder, Total
from jaxvla.telemetry.tracing import Tracer
from jaxvla.transport.in_process import InProcessWeightStore
from jaxvla.types import Observation

TIMEOUT_S = 60.0
"""For waits that end at once unless the code is broken."""

BUCKET = 8


class Hold:
    """Stops the server inside a batch."""

    def __init__(self) -> None:
        self.is_running = threading.Event()
        self._release = threading.Event()

    def __call__(self) -> None:
        self.is_running.set()
        assert self._release.wait(TIMEOUT_S)

    def wait(self) -> None:
        assert self.is_running.wait(TIMEOUT_S)

    def release(self) -> None:
        self._release.set()


class FakeSampler:
    """Echoes ids, keys and weights. Before each batch it does the next thing of its list."""

    def __init__(self) -> None:
        self.before: deque[Callable[[], None]] = deque()
        self.batches: list[tuple[str, list[int]]] = []
        """Kind and ids of every batch."""

    def run(
        self, kind: str, params: Any, observations: list[Observation], keys: np.ndarray
    ) -> tuple[dict[str, np.ndarray], int]:
        ids = np.concatenate([x.state[:, 0] for x in observations])
        self.batches.append((kind, ids.tolist()))
        if self.before:
            self.before.popleft()()
        # Read after whatever happened meanwhile: weights that are swapped early would show.
        weights = np.full(len(ids), np.asarray(params["kernel"])[0])
        return {"id": ids, "key": keys, "weights": weights}, BUCKET


class Rig:
    """A running policy server with three clients."""

    def __init__(
        self, *, capacity_rows: int = BUCKET, clock: Callable[[], float] | None = None
    ) -> None:
        self.sampler: Any = FakeSampler()
        clocks: Any = {"clock": clock} if clock else {}
        self.batcher = Batcher(
            trigger_rows=1,
            max_wait_s=float("inf"),
            max_rows=min(BUCKET, capacity_rows),
            capacity_rows=capacity_rows,
            **clocks,
        )
        self.acknowledged: SimpleQueue[int] = SimpleQueue()
        self.store = InProcessWeightStore(on_acknowledged=self.acknowledged.put)
        self.recorder = MetricRecorder(**clocks)
        self.meter = ActivityMeter("serving", tracer=Tracer(**clocks))
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        self.server = PolicyServer(
            sampler=self.sampler,
            batcher=self.batcher,
            subscribe=lambda wake: self.store.subscribe("server_0", place, wake),
            recorder=self.recorder,
            meter=self.meter,
        )
        self.clients = [InferenceClient(self.batcher, f"client_{i}") for i in range(3)]
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Rig":
        for client in self.clients:
            client.join()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.stop("finished")
        self.join()
        self.server.close()

    def join(self) -> None:
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        try:
            with self.meter.thread("server"):
                self.server.run()
        except BaseException as error:
            self.error = error

    def publish(self, version: int) -> None:
        self.store.publish(version, {"kernel": jnp.full(2, float(version))})

    def hold(self) -> Hold:
        """Stops the next batch."""
        self.sampler.before.append(hold := Hold())
        return hold

    def ask(self, client: int, *ids: int, kind: str = "explore") -> Future:
        return self.clients[client].submit(kind, observation_of(ids), keys_of(ids))


def observation_of(ids: tuple[int, ...]) -> Any:
    count = len(ids)
    arrays: dict[str, Any] = {
        "images": np.zeros((count, 1, 2, 2, 3), np.uint8),
        "image_mask": np.ones((count, 1), bool),
        "state": np.asarray(ids, np.float32)[:, None],
        "tokens": np.zeros((count, 1), np.int32),
        "token_mask": np.ones((count, 1), bool),
    }
    return Observation(**arrays)


def keys_of(ids: tuple[int, ...]) -> np.ndarray:
    return np.stack([np.asarray(ids, np.uint32), np.asarray(ids, np.uint32) + 100], -1)


def require(future: Future, ids: list[int], version: int) -> None:
    """The answer holds the rows asked for, made with and labelled as one version."""
    answer = future.result(TIMEOUT_S)
    assert isinstance(answer, Answer)
    assert answer.policy_version == version
    np.testing.assert_array_equal(answer.result["id"], ids)
    np.testing.assert_array_equal(answer.result["key"], keys_of(tuple(ids)))
    np.testing.assert_array_equal(answer.result["weights"], version)


def test_every_client_gets_its_own_rows() -> None:
    with Rig() as rig:
        rig.publish(0)
        hold = rig.hold()
        first = rig.ask(0, 9)
        hold.wait()
        futures = [rig.ask(1, 11), rig.ask(0, 1, 2, 3), rig.ask(2, 22, 21)]
        hold.release()
        require(first, [9], 0)
        require(futures[0], [11], 0)
        require(futures[1], [1, 2, 3], 0)
        require(futures[2], [22, 21], 0)
        assert rig.sampler.batches == [("explore", [9]), ("explore", [11, 1, 2, 3, 22, 21])]


def test_weights_change_between_batches_only_and_are_staged_during_one() -> None:
    with Rig() as rig, ThreadPoolExecutor(1) as pool:
        rig.publish(0)
        assert rig.acknowledged.get(timeout=TIMEOUT_S) == 0
        hold = rig.hold()
        running = rig.ask(0, 1)
        hold.wait()
        for version in (1, 2):
            pool.submit(rig.publish, version).result(TIMEOUT_S)  # nobody waits for the server
        assert rig.store.latest_version == 2
        assert rig.store.acknowledged_version == 0
        waiting = rig.ask(1, 2)
        hold.release()
        require(running, [1], 0)
        require(waiting, [2], 2)
        assert rig.acknowledged.get(timeout=TIMEOUT_S) == 2  # 1 was never in use
        require(rig.ask(2, 3), [3], 2)


def test_an_idle_server_swaps_new_weights_in_without_a_request() -> None:
    with Rig() as rig:
        for version in range(3):
            rig.publish(version)
            assert rig.acknowledged.get(timeout=TIMEOUT_S) == version
        assert rig.sampler.batches == []


def test_answers_are_never_older_than_what_was_acknowledged() -> None:
    """Clients ask until they have seen the last version; each answer is of one, none goes back."""
    last = 12
    answered = threading.Semaphore(0)

    def ask(client: int) -> list[int]:
        versions = [0]
        while versions[-1] < last:
            known = rig.store.acknowledged_version
            answer = rig.ask(client, 1, 2).result(TIMEOUT_S)
            np.testing.assert_array_equal(answer.result["weights"], answer.policy_version)
            assert answer.policy_version >= known
            versions.append(answer.policy_version)
            answered.release()
        return versions

    def publish() -> None:
        for version in range(1, last + 1):
            for _ in range(8):
                assert answered.acquire(timeout=TIMEOUT_S)
            rig.publish(version)

    with Rig() as rig, ThreadPoolExecutor(4) as pool:
        rig.publish(0)
        assert rig.acknowledged.get(timeout=TIMEOUT_S) == 0
        publishing = pool.submit(publish)
        for future in [pool.submit(ask, client) for client in range(3)]:
            versions = future.result(TIMEOUT_S)
            assert versions == sorted(versions)
        publishing.result(TIMEOUT_S)


@pytest.mark.fault(26)
def test_above_capacity_the_answer_is_busy() -> None:
    with Rig(capacity_rows=4) as rig:
        rig.publish(0)
        hold = rig.hold()
        running = rig.ask(0, 1)
        hold.wait()
        waiting = rig.ask(1, 1, 2, 3)
        with pytest.raises(Busy, match="3 rows are waiting of at most 4"):
            rig.ask(2, 4, 5)
        fits = rig.ask(2, 4)
        hold.release()
        require(running, [1], 0)
        require(waiting, [1, 2, 3], 0)
        require(fits, [4], 0)
        require(rig.ask(2, 4, 5), [4, 5], 0)  # and later there is room again


@pytest.mark.fault(10)
def test_an_error_reaches_all_requesters_of_its_batch_and_no_others() -> None:
    error = RuntimeError("out of memory")

    def fail() -> None:
        raise error

    with Rig() as rig:
        rig.publish(0)
        hold = rig.hold()
        rig.sampler.before.append(fail)
        before = rig.ask(0, 1)
        hold.wait()
        inside = [rig.ask(1, 2), rig.ask(0, 3, 4)]
        behind = rig.ask(2, 5, kind="value")
        hold.release()
        require(before, [1], 0)
        assert [future.exception(TIMEOUT_S) for future in inside] == [error, error]
        rig.join()
        assert rig.error is error  # the runtime learns of it too
        assert not behind.done()
        rig.server.stop("failure")
        with pytest.raises(BatcherClosedError, match="failure"):
            behind.result(TIMEOUT_S)


def test_a_request_before_the_first_weights_is_answered_with_an_error() -> None:
    with Rig() as rig:
        future = rig.ask(0, 1)
        with pytest.raises(RuntimeError, match="before the first weights"):
            future.result(TIMEOUT_S)
        rig.join()
        assert rig.error is future.exception() and rig.sampler.batches == []


def test_an_error_after_the_forward_pass_reaches_the_requester_too() -> None:
    with Rig() as rig:
        rig.recorder.add("serving/batch_fill", 1, Total)  # not how the server adds to it
        rig.publish(0)
        with pytest.raises(ValueError, match="serving/batch_fill"):
            rig.ask(0, 1).result(TIMEOUT_S)
        rig.join()
        assert isinstance(rig.error, ValueError)


def test_shutdown_answers_everything_that_is_pending() -> None:
    with Rig() as rig:
        rig.publish(0)
        hold = rig.hold()
        running = rig.ask(0, 1)
        hold.wait()
        waiting = [rig.ask(1, 2), rig.ask(2, 3, kind="value")]
        rig.server.stop("shutdown")
        for future in waiting:
            with pytest.raises(BatcherClosedError, match="shutdown"):
                future.result(TIMEOUT_S)
        with pytest.raises(BatcherClosedError, match="shutdown"):
            rig.ask(0, 4)
        assert not running.done()
        hold.release()
        require(running, [1], 0)
        rig.join()
        assert rig.error is None
        assert rig.sampler.batches == [("explore", [1])]


def test_stop_ends_an_idle_server() -> None:
    with Rig() as rig:
        rig.publish(0)
        assert rig.acknowledged.get(timeout=TIMEOUT_S) == 0
        rig.server.stop("finished")
        rig.join()
        assert rig.error is None


def test_a_client_that_leaves_takes_its_request_along() -> None:
    with Rig() as rig:
        rig.publish(0)
        hold = rig.hold()
        running = rig.ask(0, 1)
        hold.wait()
        left, stays = rig.ask(1, 2), rig.ask(2, 3)
        rig.clients[1].leave()
        assert left.cancelled()
        hold.release()
        require(running, [1], 0)
        require(stays, [3], 0)
        assert rig.sampler.batches == [("explore", [1]), ("explore", [3])]


def test_a_client_that_left_in_the_middle_of_its_batch_harms_nobody() -> None:
    with Rig() as rig:
        rig.publish(0)
        hold = rig.hold()
        running = rig.ask(0, 1)
        hold.wait()
        rig.clients[0].leave()
        hold.release()
        require(running, [1], 0)
        require(rig.ask(1, 2), [2], 0)


def test_a_server_that_is_closed_is_not_waited_for() -> None:
    with Rig() as rig:
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        other = rig.store.subscribe("server_1", place)
        rig.publish(0)
        assert other.poll() is not None
        other.acknowledge(0)
        assert rig.acknowledged.get(timeout=TIMEOUT_S) == 0
        rig.server.stop("finished")
        rig.join()
        rig.publish(1)
        assert other.poll() is not None
        other.acknowledge(1)
        assert rig.store.acknowledged_version == 0
        rig.server.close()
        assert rig.acknowledged.get(timeout=TIMEOUT_S) == 1


class FakeClock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


def test_metrics() -> None:
    """Two batches: 1 row alone, then 1 + 3 rows that waited 4 s and 1 s, at 2 s a batch."""
    clock = FakeClock()
    with Rig(clock=clock) as rig:
        rig.publish(0)
        hold = rig.hold()
        rig.sampler.before.append(lambda: clock.advance(2.0))
        first = rig.ask(0, 1)
        hold.wait()
        second = rig.ask(1, 2)
        clock.advance(3.0)
        third = rig.ask(2, 3, 4, 5)
        clock.advance(1.0)
        hold.release()
        for future in (first, second, third):
            future.result(TIMEOUT_S)
        record = rig.recorder.flush(update=1, time_s=0.0, extra={})
        # Waits 0, 4, 1; latencies 4, 4 + 2, 1 + 2 seconds.
        assert record["serving/queue_wait_ms/mean"] == pytest.approx(5000 / 3)
        assert record["serving/queue_wait_ms/max"] == pytest.approx(4000)
        assert record["serving/latency_ms/mean"] == pytest.approx(13_000 / 3)
        assert record["serving/latency_ms/p50"] == pytest.approx(4000)
        assert record["serving/latency_ms/min"] == pytest.approx(3000)
        assert record["serving/batch_fill"] == pytest.approx((1 + 4) / 2 / BUCKET)
        assert record["rate/chunk_queries_per_s"] == pytest.approx(5 / 6)
        assert record["serving/recompiles"] == 0
        # A pass of the critic alone is no chunk query.
        rig.sampler.before.append(lambda: clock.advance(1.0))
        rig.ask(0, 1, 2, kind="value").result(TIMEOUT_S)
        assert rig.recorder.flush(update=2, time_s=0.0, extra={})["rate/chunk_queries_per_s"] == 0
        # The first batch took 4 s, the second one 2 s, the third one 1 s.
        assert rig.meter.snapshot().total.busy_s["infer"] == pytest.approx(7.0)


@pytest.mark.fault(33)
def test_compilations_in_the_serving_thread_are_counted() -> None:
    def compile_something() -> None:
        jax.jit(lambda x: 3.0 * x + 1.0)(np.ones(5, np.float32))

    with Rig() as rig:
        rig.publish(0)
        rig.ask(0, 1).result(TIMEOUT_S)
        compile_something()  # in another thread: not the server's
        rig.ask(0, 2).result(TIMEOUT_S)
        rig.sampler.before.append(compile_something)
        rig.ask(0, 3).result(TIMEOUT_S)
        rig.ask(0, 4).result(TIMEOUT_S)
        record = rig.recorder.flush(update=1, time_s=0.0, extra={})
        assert record["serving/recompiles"] == 1


def test_the_count_of_compilations_is_there_before_the_first_batch() -> None:
    with Rig() as rig:
        rig.publish(0)
        assert rig.acknowledged.get(timeout=TIMEOUT_S) == 0
        assert rig.recorder.totals()["serving/recompiles"] == 0


def test_the_program_interface() -> None:
    rig = Rig()
    assert rig.server.role == "serving"
    assert rig.server.threads() == {"server": rig.server.run}
