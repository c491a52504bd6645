"""The local runtime with programs made of events."""

import functools
import logging
import threading
from collections.abc import Callable, Sequence

import pytest

from jaxvla.runtime.local import LocalRuntime, ProgramFailedError
from jaxvla.telemetry.activity import ActivityMeter
from jaxvla.telemetry.tracing import Tracer

_LONG_S = 60.0
"""Time-out of waits that are over at once unless something is broken."""


class _Program:
    """Runs functions in threads until told to stop."""

    def __init__(self, role: str, *functions: Callable[["_Program"], object]):
        self.role = role
        self.stopped = threading.Event()
        self.reasons: list[str] = []
        self._functions = functions

    def threads(self) -> dict[str, Callable[[], None]]:
        """One thread per function."""
        return {
            f"thread_{i}": functools.partial(_discard, f, self)
            for i, f in enumerate(self._functions)
        }

    def stop(self, reason: str) -> None:
        """Lets the threads end."""
        self.reasons.append(reason)
        self.stopped.set()

    def close(self) -> None:
        """Holds nothing."""


def _discard(function: Callable[["_Program"], object], program: "_Program") -> None:
    function(program)


def _until_stopped(program: _Program) -> None:
    assert program.stopped.wait(_LONG_S)


def _at_once(program: _Program) -> None:
    pass


def _failing(program: _Program) -> None:
    raise ArithmeticError(f"{program.role} broke")


def _run(
    programs: Sequence[_Program],
    *,
    main: _Program,
    stop: threading.Event | None = None,
    grace_s: float = _LONG_S,
) -> bool:
    tracer = Tracer()
    meters = {x.role: ActivityMeter(x.role, tracer=tracer) for x in programs}
    return LocalRuntime(stop or threading.Event()).run(programs, meters, main, grace_s)


def _is_alive(role: str) -> bool:
    return any(thread.name.startswith(f"{role}/") for thread in threading.enumerate())


def test_the_end_of_main_stops_the_others():
    server = _Program("serving", _until_stopped, _until_stopped)
    learner = _Program("learning", _at_once)
    assert _run([server, learner], main=learner)
    assert server.reasons == learner.reasons == ["finished"]
    assert not _is_alive("serving") and not _is_alive("learning")


def test_main_has_ended_only_when_all_its_threads_have():
    def second(program: _Program) -> None:
        _join("learning/thread_0")
        assert not program.stopped.wait(0.2)  # nobody is told to stop yet

    learner = _Program("learning", _at_once, second)
    _run([learner], main=learner)
    assert learner.reasons == ["finished"]


def test_another_program_that_ends_does_not_end_the_run():
    evaluator = _Program("evaluation", _at_once)
    ended = threading.Event()

    def after_evaluator(program: _Program) -> None:
        while _is_alive("evaluation"):
            next(x for x in threading.enumerate() if x.name == "evaluation/thread_0").join(_LONG_S)
        assert not program.stopped.is_set()
        ended.set()

    learner = _Program("learning", after_evaluator)
    _run([evaluator, learner], main=learner)
    assert ended.is_set() and learner.reasons == ["finished"]


def test_a_failure_stops_all_and_is_raised_with_the_programs_name():
    server = _Program("serving", _until_stopped)
    simulator = _Program("simulation", _until_stopped, _failing)
    learner = _Program("learning", _until_stopped)
    with pytest.raises(ProgramFailedError) as raised:
        _run([server, simulator, learner], main=learner)
    assert raised.value.role == "simulation"
    assert str(raised.value) == "simulation: ArithmeticError: simulation broke"
    assert isinstance(raised.value.__cause__, ArithmeticError)
    assert server.reasons == simulator.reasons == learner.reasons == ["failure"]
    assert not any(map(_is_alive, ("serving", "simulation", "learning")))


def test_a_failure_of_main_is_raised():
    learner = _Program("learning", _failing)
    with pytest.raises(ProgramFailedError, match="learning: ArithmeticError"):
        _run([_Program("serving", _until_stopped), learner], main=learner)


def test_the_first_failure_is_raised_though_others_fail_for_want_of_it():
    """The simulator, which stands first, fails because the learner has."""
    learner = _Program("learning", _failing)

    def in_consequence(program: _Program) -> None:
        assert learner_has_failed.wait(_LONG_S)
        raise EOFError("nobody consumes")

    class _Last(_Program):
        """Holds up the start until both have failed."""

        def threads(self) -> dict[str, Callable[[], None]]:
            _join("learning/thread_0")
            learner_has_failed.set()
            _join("simulation/thread_0")
            return super().threads()

    learner_has_failed = threading.Event()
    simulator = _Program("simulation", in_consequence)
    server = _Last("serving", _until_stopped)
    with pytest.raises(ProgramFailedError) as raised:
        _run([simulator, learner, server], main=server)
    assert raised.value.role == "learning"


def _join(name: str) -> None:
    for thread in threading.enumerate():
        if thread.name == name:
            thread.join(_LONG_S)
            assert not thread.is_alive()


def test_a_failure_while_stopping_is_raised():
    def failing_at_the_end(program: _Program) -> None:
        _until_stopped(program)
        raise OSError("disk full")

    server, learner = _Program("serving", failing_at_the_end), _Program("learning", _at_once)
    with pytest.raises(ProgramFailedError, match="serving: OSError: disk full"):
        _run([server, learner], main=learner)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_program_that_cannot_be_started_stops_the_others(position: int):
    class _Unwilling(_Program):
        def threads(self) -> dict[str, Callable[[], None]]:
            raise ArithmeticError("no threads")

    programs = [_Program("serving", _until_stopped), _Program("learning", _until_stopped)]
    programs.insert(position, _Unwilling("simulation"))
    with pytest.raises(ProgramFailedError, match="simulation: ArithmeticError: no threads") as e:
        _run(programs, main=programs[-1])
    assert isinstance(e.value.__cause__, ArithmeticError)
    assert all(program.reasons == ["failure"] for program in programs)
    assert not any(map(_is_alive, ("serving", "simulation", "learning")))


def test_a_request_to_stop_ends_the_run_without_an_error():
    stop = threading.Event()
    server = _Program("serving", _until_stopped)
    learner = _Program("learning", lambda program: (stop.set(), _until_stopped(program)))
    _run([server, learner], main=learner, stop=stop)
    assert server.reasons == learner.reasons == ["shutdown"]


def test_programs_are_stopped_in_reverse_order():
    order: list[str] = []

    class _Noting(_Program):
        def stop(self, reason: str) -> None:
            order.append(self.role)
            super().stop(reason)

    programs = [_Noting("serving", _until_stopped), _Noting("simulation", _until_stopped)]
    learner = _Noting("learning", _at_once)
    _run([*programs, learner], main=learner)
    assert order == ["learning", "simulation", "serving"]


def test_a_thread_that_does_not_stop_is_reported_and_left_behind(
    caplog: pytest.LogCaptureFixture,
):
    release = threading.Event()
    deaf = _Program("serving", *(lambda _: release.wait(_LONG_S),) * 3)
    learner = _Program("learning", _at_once)
    try:
        with caplog.at_level(logging.ERROR):
            _run([deaf, learner], main=learner, grace_s=0.05)
        assert [x.getMessage() for x in caplog.records] == ["serving did not stop within 0 s"]
        assert _is_alive("serving")
        assert all(x.daemon for x in threading.enumerate() if x.name.startswith("serving/"))
    finally:
        release.set()
        for number in range(3):
            _join(f"serving/thread_{number}")


def test_a_main_program_that_does_not_stop_is_told_of():
    release, stop = threading.Event(), threading.Event()
    stop.set()
    learner = _Program("learning", lambda _: release.wait(_LONG_S))
    try:
        assert not _run([learner], main=learner, stop=stop, grace_s=0.05)
    finally:
        release.set()
        _join("learning/thread_0")
