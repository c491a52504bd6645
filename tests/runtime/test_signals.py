"""SIGTERM and SIGINT, in a process of their own."""

import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from jaxvla.runtime.signals import stop_on_signals

_CHILD = """
    import sys, threading
    from jaxvla.runtime.signals import stop_on_signals

    stop = threading.Event()
    with stop_on_signals(stop):
        print("ready", flush=True)
        assert stop.wait(60)
        print("stopping", flush=True)
        if sys.argv[1] == "hangs":
            try:
                threading.Event().wait(60)
            finally:
                print("cleaned up", flush=True)
    print("done", flush=True)
"""


def _start(mode: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_CHILD), mode], stdout=subprocess.PIPE, text=True
    )


@pytest.mark.fault(17)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_for_a_clean_stop(number: signal.Signals):
    with _start("stops") as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(number)
        rest, _ = child.communicate(timeout=60)
    assert rest == "stopping\ndone\n"
    assert child.returncode == 0


@pytest.mark.fault(17)
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_exits_with_3_at_once(second: signal.Signals):
    with _start("hangs") as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGTERM)
        assert child.stdout.readline() == "stopping\n"
        child.send_signal(second)
        rest, _ = child.communicate(timeout=60)
    assert child.returncode == 3
    assert rest == ""  # no clean-up ran


def test_a_stop_for_another_reason_does_not_make_the_first_signal_exit():
    stop = threading.Event()
    with stop_on_signals(stop):
        stop.set()
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.is_set()


def test_handlers_are_put_back():
    before = [signal.getsignal(x) for x in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(KeyError), stop_on_signals(threading.Event()):
        assert [signal.getsignal(x) for x in (signal.SIGTERM, signal.SIGINT)] != before
        raise KeyError
    assert [signal.getsignal(x) for x in (signal.SIGTERM, signal.SIGINT)] == before
