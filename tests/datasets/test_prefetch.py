"""The thread that reads ahead: order, bound, errors, a clean end."""

import threading
from typing import Any

import pytest

from jaxvla.data.prefetch import Prefetcher

TIMEOUT_S = 20.0


def test_items_come_in_order() -> None:
    with Prefetcher(lambda index: index * index, range(100), depth=3) as items:
        assert list(items) == [index * index for index in range(100)]


def test_no_more_is_read_ahead_than_was_asked_for() -> None:
    read: list[int] = []
    reached = threading.Event()

    def count(index: int) -> int:
        read.append(index)
        if index == 3:
            reached.set()
        return index

    with Prefetcher(count, range(1000), depth=2) as items:
        assert [next(items), next(items)] == [0, 1]
        # After two were taken, two more fit. That 4 is not read shows at the end.
        assert reached.wait(TIMEOUT_S)
    assert read == [0, 1, 2, 3]


def test_an_error_comes_after_the_items_before_it() -> None:
    def fail(index: int) -> int:
        if index == 2:
            raise OSError("disk")
        return index

    with Prefetcher(fail, range(9), depth=4) as items:
        assert [next(items), next(items)] == [0, 1]
        for _ in range(2):
            with pytest.raises(OSError, match="disk"):
                next(items)


@pytest.mark.parametrize("num_taken", [0, 1])
def test_leaving_the_block_ends_the_thread(num_taken: int) -> None:
    """While it waits for room."""
    made: Any = Prefetcher(lambda index: index, range(10**9), depth=1)
    with made as items:
        for _ in range(num_taken):
            next(items)
    assert not made._thread.is_alive()
    assert list(items) == []


def test_leaving_waits_for_the_read_in_progress() -> None:
    """Whoever closes the files afterwards may rely on it."""
    begun, may_go_on, has_returned = threading.Event(), threading.Event(), threading.Event()

    def slow(index: int) -> int:
        begun.set()
        assert may_go_on.wait(TIMEOUT_S)
        has_returned.set()
        return index

    with Prefetcher(slow, range(5), depth=1):
        assert begun.wait(TIMEOUT_S)
        threading.Timer(0.05, may_go_on.set).start()
    assert has_returned.is_set()


def test_a_block_that_fails_leaves_no_thread() -> None:
    made: Any = Prefetcher(lambda index: index, range(10**9), depth=2)
    with pytest.raises(RuntimeError, match="training"), made:
        raise RuntimeError("training")
    assert not made._thread.is_alive()


def test_depth() -> None:
    with pytest.raises(ValueError, match="depth = 0"):
        Prefetcher(lambda index: index, range(3), depth=0)
