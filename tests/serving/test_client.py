"""Asking again when the server turns a request away."""

from collections import deque
from concurrent.futures import CancelledError, Future
from typing import Any

import pytest

from jaxvla.serving.batcher import BatcherClosedError, Busy, Expired
from jaxvla.serving.client import PAUSES_S, PendingAnswer


class Script:
    """A `submit` that does one thing after the other; the last one over and over."""

    def __init__(self, *acts: Any):
        self._acts = deque(acts)
        self.num_asked = 0
        self.pauses_s: list[float] = []

    def __call__(self) -> Future:
        self.num_asked += 1
        act = self._acts.popleft() if len(self._acts) > 1 else self._acts[0]
        if isinstance(act, Busy | BatcherClosedError):
            raise act
        future: Future = Future()
        if isinstance(act, Exception):
            future.set_exception(act)
        else:
            future.set_result(act)
        return future

    def pending(self) -> PendingAnswer:
        return PendingAnswer(self, pause=self.pauses_s.append)


def test_an_answer_is_asked_for_once_and_at_once() -> None:
    script = Script("actions")
    pending = script.pending()
    assert script.num_asked == 1
    assert pending.result() == "actions"
    assert (script.num_asked, script.pauses_s) == (1, [])


@pytest.mark.parametrize("refusal", [Busy("4 rows wait"), Expired("waited 5 s")])
def test_a_request_that_is_turned_away_is_repeated(refusal: Exception) -> None:
    script = Script(refusal, refusal, "actions")
    pending = script.pending()  # no pause yet: others may have to be asked meanwhile
    assert script.pauses_s == []
    assert pending.result() == "actions"
    assert script.num_asked == 3
    assert script.pauses_s == list(PAUSES_S[:2])


@pytest.mark.parametrize("refusal", [Busy("4 rows wait"), Expired("waited 5 s")])
def test_but_not_for_ever(refusal: Exception) -> None:
    script = Script(refusal)
    with pytest.raises(type(refusal)) as caught:
        script.pending().result()
    assert caught.value is refusal
    assert script.num_asked == len(PAUSES_S) + 1
    assert script.pauses_s == list(PAUSES_S)
    assert sum(PAUSES_S) < 5.0


def test_the_last_attempt_counts() -> None:
    script = Script(*[Busy("full")] * len(PAUSES_S), "actions")
    assert script.pending().result() == "actions"


def test_other_errors_are_final() -> None:
    error = RuntimeError("out of memory")
    script = Script(error)
    with pytest.raises(RuntimeError, match="out of memory"):
        script.pending().result()
    assert script.num_asked == 1
    cancelled: Future = Future()
    cancelled.cancel()
    with pytest.raises(CancelledError):
        PendingAnswer(lambda: cancelled).result()


def test_a_server_that_stops_meanwhile_is_not_asked_again() -> None:
    script = Script(Busy("full"), BatcherClosedError("finished"))
    with pytest.raises(BatcherClosedError, match="finished"):
        script.pending().result()
    with pytest.raises(BatcherClosedError, match="finished"):
        script.pending()
    assert script.num_asked == 3
