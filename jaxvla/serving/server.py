"""PolicyServer: answers chunk queries with the newest weights it has.

consumes    requests from the batcher; weights from its subscription
produces    answers (actions, log-probs, values, policy version)
waits for   a batch to fire
unblocked by  clients' requests, a new weight version, close
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxvla.serving.batcher import Batch, Batcher
from jaxvla.serving.client import Answer
from jaxvla.serving.sampling import Sampler
from jaxvla.telemetry.activity import ActivityMeter
from jaxvla.telemetry.metrics import Distribution, Mean, Rate, Recorder, Total
from jaxvla.transport.base import WeightSubscription
from jaxvla.transport.schedule import FREE_SERVER, Served, ServerSchedule
from jaxvla.types import Params

_LOG = logging.getLogger(__name__)


@dataclass
class _Weights:
    """The weights in use; replaced as a whole between batches."""

    version: int
    params: Params


class PolicyServer:
    """One policy server. `run` is its only thread."""

    role = "serving"

    def __init__(
        self,
        *,
        name: str = "server",
        sampler: Sampler,
        batcher: Batcher,
        subscribe: Callable[[Callable[[], None]], WeightSubscription],
        recorder: Recorder,
        meter: ActivityMeter,
        schedule: ServerSchedule = FREE_SERVER,
    ):
        """Args:
        name: of its thread, in logs and traces.
        sampler: compiled before `run`.
        batcher: where requests wait.
        subscribe: makes the weight subscription from a wake-up callback.
        recorder: metrics.
        meter: busy / wait accounting.
        schedule: the one that the batcher and the subscription follow.
        """
        self._name = name
        self._sampler = sampler
        self._batcher = batcher
        self._subscription = subscribe(batcher.wake)
        self._recorder = recorder
        self._meter = meter
        self._schedule = schedule
        self._weights: _Weights | None = None
        self._compilations = _CompilationCounter()

    def threads(self) -> dict[str, Callable[[], None]]:
        """Thread name -> function, for the runtime to start."""
        return {self._name: self.run}

    def run(self) -> None:
        """Serves until the batcher is closed."""
        self._recorder.add("serving/recompiles", 0, Total)
        with self._compilations.watching():
            while not self._batcher.is_closed:
                self._swap_weights()
                with self._meter.waiting("requests"):
                    batch = self._batcher.next_batch()
                self._record_turned_away()
                if batch is not None:
                    self._swap_weights()  # published before the batch was due: no later than it
                    self._serve(batch)

    def stop(self, reason: str) -> None:
        """Fails waiting requests and ends `run`."""
        self._batcher.close(reason)

    def close(self) -> None:
        """Ends the weight subscription."""
        self._subscription.close()

    def _swap_weights(self) -> None:
        """Swaps in what there is; in a replay that may be several versions, one by one."""
        while (pulled := self._subscription.poll()) is not None:
            version, params = pulled
            self._weights = _Weights(version=version, params=params)
            self._subscription.acknowledge(version)

    def _serve(self, batch: Batch) -> None:
        """Answers every request of a batch, with an error if there is no other answer."""
        try:
            answers = self._answers(batch)
        except BaseException as error:
            for request in batch.requests:
                request.future.set_exception(error)
            raise
        for request, answer in zip(batch.requests, answers, strict=True):
            request.future.set_result(answer)

    def _answers(self, batch: Batch) -> list[Answer]:
        """Runs a batch; one answer per request."""
        weights = self._weights
        if weights is None:
            raise RuntimeError("a request arrived before the first weights were published")
        asked = tuple((request.client, request.rows) for request in batch.requests)
        self._schedule.running(Served(kind=batch.kind, version=weights.version, requests=asked))
        with self._meter.busy("infer", kind=batch.kind, rows=batch.rows):
            queries = [request.payload for request in batch.requests]
            keys = np.concatenate([query.keys for query in queries])
            observations = [query.observation for query in queries]
            result, bucket = self._sampler.run(batch.kind, weights.params, observations, keys)
        # Metrics first: once its answer is there, a client may close the books of an update.
        self._record(batch, bucket)
        parts = _split_rows(result, [request.rows for request in batch.requests])
        return [Answer(result=part, policy_version=weights.version) for part in parts]

    def _record(self, batch: Batch, bucket: int) -> None:
        add = self._recorder.add
        waits_ms = 1e3 * np.asarray(batch.waits_s)
        now_s = self._batcher.clock()
        latency_ms = [1e3 * (now_s - request.submitted_s) for request in batch.requests]
        add("serving/queue_wait_ms", waits_ms, Distribution)
        add("serving/latency_ms", latency_ms, Distribution)
        add("serving/batch_fill", batch.rows / bucket, Mean)
        add("serving/recompiles", self._compilations.take(), Total)
        setting = self._batcher.setting
        add("serving/trigger_rows", setting.trigger_rows, Mean)
        add("serving/max_wait_ms", 1e3 * setting.max_wait_s, Mean)
        if batch.kind == "explore":
            add("rate/chunk_queries_per_s", batch.rows, Rate)

    def _record_turned_away(self) -> None:
        num_refused, num_expired = self._batcher.take_turned_away()
        self._recorder.add("serving/refused", num_refused, Total)
        self._recorder.add("serving/expired", num_expired, Total)


class _CompilationCounter:
    """Counts XLA compilations that happen in the serving thread once it serves."""

    _EVENT = "/jax/core/compile/backend_compile_duration"

    def __init__(self) -> None:
        self._thread: int | None = None
        self._count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def watching(self) -> "_CompilationCounter":
        """Counts in the calling thread from now on, until the block ends."""
        return self

    def __enter__(self) -> None:
        self._thread = threading.get_ident()

    def __exit__(self, *exception: Any) -> None:
        self._thread = None

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == self._EVENT and threading.get_ident() == self._thread:
            self._count += 1
            _LOG.warning("compiled for %.1f s while serving", duration_secs)

    def take(self) -> int:
        """Compilations since the last call."""
        count, self._count = self._count, 0
        return count


def _split_rows(result: Any, sizes: list[int]) -> list[Any]:
    """Cuts a batched numpy pytree into parts of the given sizes along the first axis."""
    parts, start = [], 0
    for size in sizes:
        rows = slice(start, start + size)
        parts.append(jax.tree.map(lambda x, rows=rows: x[rows], result))
        start += size
    return parts
