"""Clocks of emulated stages."""

import hashlib
import sys
import threading
import time

import pytest

from jaxvla.scaling.emulated_time import FastTime, IdleTime, OtherThreads

_LONG_S = 60.0
"""Time-out of waits that are over at once unless something is broken."""

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def _join(*threads: threading.Thread) -> None:
    for thread in threads:
        thread.join(_LONG_S)
        assert not thread.is_alive()


def test_fast_time_is_the_real_time_made_faster():
    with FastTime(1000.0) as clock:
        begin_s = clock.now_s()
        clock.sleep_until(begin_s + 20.0)
        assert clock.now_s() >= begin_s + 20.0
        before_s, fast_s, after_s = time.monotonic(), clock.now_s(), time.monotonic()
        assert 1000.0 * before_s <= fast_s <= 1000.0 * after_s


def test_fast_time_does_not_wait_for_the_past():
    clock = FastTime(1e-9)  # a wait of any length would take for ever
    clock.sleep_until(clock.now_s())


@pytest.mark.parametrize("speed", [0.0, -1.0])
def test_fast_time_must_move_on(speed: float):
    with pytest.raises(ValueError, match="must be positive"):
        FastTime(speed)


@linux_only
def test_idle_time_jumps_to_the_next_sleeper():
    with IdleTime() as clock:
        assert clock.now_s() == 0.0
        clock.sleep_until(1e9)
        assert clock.now_s() == 1e9
        clock.sleep_until(5.0)
        assert clock.now_s() == 1e9


def test_fast_time_waits_for_a_condition_in_emulated_seconds():
    condition = threading.Condition()
    with FastTime(1000.0) as clock, condition:
        begin_s = clock.now_s()
        while clock.now_s() < begin_s + 20.0:  # a real wait of 20 s is beyond the time limit
            clock.wait(condition, begin_s + 20.0 - clock.now_s())


@linux_only
def test_idle_time_ends_a_wait_that_nobody_answers():
    condition = threading.Condition()
    with IdleTime() as clock, condition:
        clock.wait(condition, 1e9)
        assert clock.now_s() == 1e9
        clock.wait(condition, 1e-9)  # less than the clock resolves
        assert clock.now_s() > 1e9


@linux_only
@pytest.mark.parametrize("span_s", [5.0, None])
def test_idle_time_lets_a_wait_be_answered(span_s: float | None):
    """By somebody who holds the condition while he asks for the time, at the time of a sleeper."""
    condition, answers, seen = threading.Condition(), [], []

    def answer() -> None:
        clock.sleep_until(3.0)
        with condition:
            answers.append(clock.now_s())
            condition.notify_all()

    def wait() -> None:
        with condition:
            while not answers:
                clock.wait(condition, span_s)
            seen.append(clock.now_s())

    with IdleTime() as clock:
        threads = [threading.Thread(target=function) for function in (wait, answer)]
        for thread in threads:
            thread.start()
        _join(*threads)
    assert answers == seen == [3.0]


@linux_only
def test_idle_time_wakes_sleepers_in_order():
    seen: list[float] = []

    def visit(*times_s: float) -> None:
        for end_s in times_s:
            clock.sleep_until(end_s)
            seen.append(clock.now_s())

    with IdleTime() as clock:
        threads = [
            threading.Thread(target=visit, args=times) for times in ((1, 4, 5), (2, 3, 6), (3, 7))
        ]
        for thread in threads:
            thread.start()
        _join(*threads)
    assert seen == [1, 2, 3, 3, 4, 5, 6, 7]


@linux_only
def test_idle_time_stands_still_while_threads_work():
    # Several, so that most of them wait for the global lock at any moment.
    num_threads = 3
    seen: list[float] = []
    slept = threading.Event()

    def work() -> None:
        for _ in range(1_000_000):
            pass
        seen.append(clock.now_s())

    def sleep() -> None:
        clock.sleep_until(1.0)
        slept.set()

    with IdleTime() as clock:
        workers = [threading.Thread(target=work) for _ in range(num_threads)]
        for worker in workers:
            worker.start()
        # At work from before the first sleep: time has no moment to move in.
        sleeper = threading.Thread(target=sleep)
        sleeper.start()
        _join(*workers)
        assert slept.wait(_LONG_S)
        _join(sleeper)
    assert seen == [0.0] * num_threads


@linux_only
def test_idle_time_sees_those_who_wake_each_other():
    """What a sleeper sets off happens before the next sleeper wakes."""
    rounds = 20
    order: list[float] = []
    turns = [threading.Semaphore(0) for _ in range(4)]

    def pass_on(index: int) -> None:
        for _ in range(rounds):
            assert turns[index].acquire(timeout=_LONG_S)
            order.append(clock.now_s())
            if index + 1 < len(turns):
                turns[index + 1].release()

    def tick() -> None:
        for end_s in range(1, rounds + 1):
            clock.sleep_until(end_s)
            turns[0].release()
        clock.sleep_until(rounds + 1)

    with IdleTime() as clock:
        threads = [threading.Thread(target=pass_on, args=(i,)) for i in range(len(turns))]
        threads.append(threading.Thread(target=tick))
        for thread in threads:
            thread.start()
        _join(*threads)
    assert order == [end_s for end_s in range(1, rounds + 1) for _ in turns]


class _Sleeper:
    """A thread that runs for a moment when poked, and sleeps otherwise."""

    def __init__(self) -> None:
        self._poked = threading.Semaphore(0)
        self._is_over = False
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def poke(self) -> None:
        self._poked.release()

    def end(self) -> None:
        self._is_over = True
        self.poke()
        _join(self.thread)

    def _run(self) -> None:
        while not self._is_over:
            self._poked.acquire()


def _stillness(threads: OtherThreads) -> dict[str, bytes]:
    """The first look at which nobody runs."""
    deadline_s = time.monotonic() + _LONG_S
    while time.monotonic() < deadline_s:
        seen = threads.look()
        if seen is not None:
            return seen
    raise AssertionError("somebody always runs")


@linux_only
def test_a_thread_that_ran_between_two_looks_is_noticed():
    sleeper, watched = _Sleeper(), OtherThreads()
    name = str(sleeper.thread.native_id)
    for _ in range(20):
        before = _stillness(watched)[name]
        assert _stillness(watched)[name] == before
        sleeper.poke()
        deadline_s = time.monotonic() + _LONG_S
        # It runs when the kernel lets it; asleep or not, it must not look the same for ever.
        while _stillness(watched)[name] == before:
            assert time.monotonic() < deadline_s
    sleeper.end()
    watched.close()


@linux_only
def test_a_thread_that_runs_is_noticed():
    watched, has_begun = OtherThreads(), threading.Event()

    def work() -> None:
        has_begun.set()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000)  # a second without the global lock

    worker = threading.Thread(target=work)
    worker.start()
    assert has_begun.wait(_LONG_S)
    looks = [watched.look() for _ in range(50)]
    assert worker.is_alive()
    _join(worker)
    watched.close()
    assert looks == [None] * 50


@linux_only
def test_threads_that_end_are_forgotten():
    watched = OtherThreads()
    sleeper = _Sleeper()
    name = str(sleeper.thread.native_id)
    assert name in _stillness(watched)
    sleeper.end()
    assert name not in _stillness(watched)
    watched.close()
