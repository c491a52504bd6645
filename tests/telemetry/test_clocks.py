"""The offset to another machine's clock against clocks and a network that are made up."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvla.telemetry.clocks import MAX_DRIFT, RemoteClock, clock_offset_s

ROUNDING_S = 1e-8
"""Of times up to 2e6 s in float64."""


@settings(deadline=None)
@given(
    st.floats(-1e6, 1e6),
    st.floats(0.0, 10.0),
    st.floats(0.0, 10.0),
    st.floats(-1e6, 1e6),
)
def test_the_offset_is_wrong_by_half_the_round_trip_at_most(
    asked_s: float, there_s: float, back_s: float, true_offset_s: float
) -> None:
    remote_s = asked_s + there_s + true_offset_s
    found_s = clock_offset_s(asked_s, remote_s, asked_s + there_s + back_s)
    # Where it is taken for none it lies within half a round trip of the best guess as well.
    error_s = (there_s + back_s) / 2 * (1 if found_s else 2)
    assert abs(found_s - true_offset_s) <= error_s + ROUNDING_S
    if true_offset_s == 0.0:
        assert found_s == 0.0


class Machines:
    """Two clocks, and a network between them."""

    def __init__(self, *, offset_s: float, drift: float):
        self.time_s = 1000.0
        """By our own clock."""
        self._offset_s = offset_s
        self._drift = drift
        self._asked_s: list[float] = []
        self.remote = RemoteClock(self._asked_s.append, clock=lambda: self.time_s)

    @property
    def true_offset_s(self) -> float:
        return self._offset_s + self._drift * (self.time_s - 1000.0)

    def exchange(self, there_s: float, back_s: float) -> None:
        """One question and its answer."""
        self.remote.ask()
        self.time_s += there_s
        remote_s = self.time_s + self.true_offset_s
        self.time_s += back_s
        self.remote.answered(self._asked_s.pop(), remote_s)

    def require_bound(self) -> None:
        assert self.remote.offset_s is not None
        error_s = abs(self.remote.offset_s - self.true_offset_s)
        assert error_s <= self.remote.error_s + ROUNDING_S


delays = st.tuples(st.floats(0.0, 2.0), st.floats(0.0, 2.0), st.floats(0.0, 600.0))


@settings(deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(-MAX_DRIFT, MAX_DRIFT), st.lists(delays, min_size=1))
def test_the_true_offset_is_always_within_the_bound(
    offset_s: float, drift: float, exchanges: list[tuple[float, float, float]]
) -> None:
    machines = Machines(offset_s=offset_s, drift=drift)
    for there_s, back_s, pause_s in exchanges:
        machines.exchange(there_s, back_s)
        machines.require_bound()
        machines.time_s += pause_s
        machines.require_bound()


def test_of_many_answers_the_fastest_counts() -> None:
    """Delays of 0.2 ms and, one-sided, up to 300 ms more: a mean would be wrong by 75 ms."""
    machines, random = Machines(offset_s=-5e5, drift=3e-6), np.random.default_rng(0)
    for _ in range(40):
        jitter_s = random.exponential(0.1, 2).clip(max=0.3) * (random.random(2) < 0.7)
        machines.exchange(2e-4 + jitter_s[0], 2e-4 + jitter_s[1])
        machines.time_s += 0.5
    machines.require_bound()
    assert machines.remote.offset_s is not None
    assert abs(machines.remote.offset_s - machines.true_offset_s) < 2e-3
    assert machines.remote.error_s < 5e-3


def test_an_old_answer_gives_way_to_a_slower_new_one() -> None:
    machines = Machines(offset_s=50.0, drift=MAX_DRIFT)
    machines.exchange(1e-3, 1e-3)
    machines.exchange(5e-3, 5e-3)
    assert machines.remote.error_s < 2e-3
    machines.time_s += 60.0
    machines.exchange(5e-3, 5e-3)
    assert math.isclose(machines.remote.error_s, 5e-3, rel_tol=1e-3)
    machines.require_bound()


def test_nothing_is_known_before_the_first_answer_and_strays_tell_nothing() -> None:
    machines = Machines(offset_s=50.0, drift=0.0)
    assert machines.remote.offset_s is None
    assert machines.remote.error_s == math.inf
    machines.remote.answered(3.0, 4.0)
    assert machines.remote.offset_s is None
    for _ in range(65):  # the first is not waited for any more
        machines.remote.ask()
        machines.time_s += 1.0
    machines.remote.answered(1000.0, 1060.0)
    assert machines.remote.offset_s is None
    machines.remote.answered(1001.0, 1060.0)
    assert machines.remote.offset_s is not None


def test_clocks_of_one_machine_have_no_offset() -> None:
    machines = Machines(offset_s=0.0, drift=0.0)
    for there_s, back_s in ((0.1, 0.3), (0.0, 0.2), (0.5, 0.0)):
        machines.exchange(there_s, back_s)
        assert machines.remote.offset_s == 0.0
        machines.require_bound()
