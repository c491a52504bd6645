"""A simulator's way to a policy server in the same process, and how it asks any server."""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np

from jaxvla.serving.batcher import Batcher, Busy, Expired
from jaxvla.types import Observation

_LOG = logging.getLogger(__name__)

PAUSES_S = (0.05, 0.1, 0.2, 0.4, 0.8)
"""Between the attempts of `gather`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """What a request carries."""

    observation: Observation
    """Leading axis: rows."""
    keys: np.ndarray
    """uint32 [rows, 2], see `serving.sampling.row_keys`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a request's future resolves to."""

    result: Any
    """PolicySample of numpy arrays, or values float32 [rows] for kind "value"."""
    policy_version: int
    """Weights that made the result."""


class ServerLostError(RuntimeError):
    """The policy server is gone, and with it the request. Ask again: that waits for the server."""


class QueryClient(Protocol):
    """Who sends chunk queries under one name, wherever the server is."""

    name: str

    def join(self) -> None:
        """Counts as a live client from now on: batches are held back for its requests."""
        ...

    def leave(self) -> None:
        """Stops counting, for the time in which the client waits for something else."""
        ...

    def submit(self, kind: str, observation: Observation, keys: np.ndarray) -> Future:
        """Queues one request; the future gives an Answer. Raises as `Batcher.submit`."""
        ...


class InferenceClient(QueryClient):
    """Sends chunk queries under one name."""

    def __init__(self, batcher: Batcher, name: str):
        self.name = name
        self._batcher = batcher

    def join(self) -> None:
        """See `QueryClient.join`."""
        self._batcher.register(self.name)

    def leave(self) -> None:
        """See `QueryClient.leave`."""
        self._batcher.unregister(self.name)

    def submit(self, kind: str, observation: Observation, keys: np.ndarray) -> Future:
        """See `QueryClient.submit`."""
        query = Query(observation=observation, keys=keys)
        return self._batcher.submit(rows=len(keys), client=self.name, kind=kind, payload=query)


def gather(
    asks: Sequence[Callable[[], Future]], *, pause: Callable[[float], None] = time.sleep
) -> list[Answer]:
    """Asks for all, and waits for all answers.

    A request that the server turns away is asked again, a few times, whatever the others wait for:
    it may be the one for which the server holds their batch back. One that was lost with its server
    is asked again at once, for as long as its client has patience. Requests carry their random
    keys, so asking again changes no result.

    Args:
      asks: each queues a request.
      pause: waits for some seconds.

    Raises:
      Busy, Expired: the last attempt was turned away as well.
      Exception: whatever else an ask raises or the server answers, at once.
    """
    finished: SimpleQueue[tuple[int, Future]] = SimpleQueue()

    def ask(index: int) -> None:
        _ask(asks[index]).add_done_callback(lambda future: finished.put((index, future)))

    for index in range(len(asks)):
        ask(index)
    answers: dict[int, Answer] = {}
    pauses_s = [iter(PAUSES_S) for _ in asks]
    while len(answers) < len(asks):
        index, future = finished.get()
        try:
            answers[index] = future.result()
        except ServerLostError as loss:
            _LOG.warning("%s; asking again", loss)
            ask(index)
        except (Busy, Expired) as refusal:
            pause_s = next(pauses_s[index], None)
            if pause_s is None:
                raise
            _LOG.warning("%s; asking again in %g s", refusal, pause_s)
            pause(pause_s)
            ask(index)
    return [answers[index] for index in range(len(asks))]


def _ask(ask: Callable[[], Future]) -> Future:
    """A refusal becomes a future, so that the others are asked first."""
    try:
        return ask()
    except (Busy, ServerLostError) as refusal:
        refused: Future[Answer] = Future()
        refused.set_exception(refusal)
        return refused
