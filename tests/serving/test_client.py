"""Asking again when the server turns a request away."""

from collections import deque
from concurrent.futures import CancelledError, Future
from typing import Any

import pytest

from jaxvla.serving.batcher import BatcherClosedError, Busy, Expired
from jaxvla.serving.client import PAUSES_S, gather

REFUSALS = [Busy("4 rows wait"), Expired("waited 5 s")]


class Script:
    """A `submit` that does one thing after the other; the last one over and over."""

    def __init__(self, *acts: Any):
        self._acts = deque(acts)
        self.num_asked = 0

    def __call__(self) -> Future:
        self.num_asked += 1
        act = self._acts.popleft() if len(self._acts) > 1 else self._acts[0]
        if isinstance(act, Busy | BatcherClosedError):
            raise act
        future: Future = Future()
        if isinstance(act, Exception):
            future.set_exception(act)
        elif act is not None:
            future.set_result(act)
        return future


class Pauses(list[float]):
    """Notes how long it was to pause, and does not."""

    def __call__(self, pause_s: float) -> None:
        self.append(pause_s)


def test_an_answer_is_asked_for_once() -> None:
    scripts, pauses = [Script("a"), Script("b")], Pauses()
    assert gather(scripts, pause=pauses) == ["a", "b"]
    assert [x.num_asked for x in scripts] == [1, 1] and pauses == []


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_request_that_is_turned_away_is_repeated(refusal: Exception) -> None:
    scripts, pauses = [Script("a"), Script(refusal, refusal, "b")], Pauses()
    assert gather(scripts, pause=pauses) == ["a", "b"]
    assert [x.num_asked for x in scripts] == [1, 3]
    assert pauses == list(PAUSES_S[:2])


@pytest.mark.parametrize("refusal", REFUSALS)
def test_also_while_another_one_waits(refusal: Exception) -> None:
    """A server in lockstep answers the first once the second has asked."""
    first: Future = Future()
    second = Script(refusal, "b")

    def answer_first(pause_s: float) -> None:
        assert second.num_asked == 1
        first.set_result("a")

    assert gather([lambda: first, second], pause=answer_first) == ["a", "b"]
    assert second.num_asked == 2


@pytest.mark.parametrize("refusal", REFUSALS)
def test_but_not_for_ever(refusal: Exception) -> None:
    script, pauses = Script(refusal), Pauses()
    with pytest.raises(type(refusal)) as caught:
        gather([script], pause=pauses)
    assert caught.value is refusal
    assert script.num_asked == len(PAUSES_S) + 1
    assert pauses == list(PAUSES_S)
    assert sum(PAUSES_S) < 5.0


def test_the_last_attempt_counts() -> None:
    script = Script(*[Busy("full")] * len(PAUSES_S), "actions")
    assert gather([script], pause=Pauses()) == ["actions"]


@pytest.mark.parametrize("other", [Script("b"), Script(Busy("full")), Script(None)])
def test_other_errors_are_final(other: Script) -> None:
    """Whether another one is answered, turned away or waits."""
    script = Script(RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        gather([other, script], pause=Pauses())
    assert script.num_asked == 1


def test_a_request_that_is_cancelled_is_not_repeated() -> None:
    cancelled: Future = Future()
    cancelled.cancel()
    with pytest.raises(CancelledError):
        gather([lambda: cancelled])


def test_a_server_that_stops_meanwhile_is_not_asked_again() -> None:
    script = Script(Busy("full"), BatcherClosedError("finished"))
    for num_asked in (2, 3):
        with pytest.raises(BatcherClosedError, match="finished"):
            gather([script], pause=Pauses())
        assert script.num_asked == num_asked
