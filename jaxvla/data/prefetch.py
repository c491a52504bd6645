"""Reading ahead: a thread makes the next few items while the last one is used."""

import collections
import threading
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

_T = TypeVar("_T")


class Prefetcher(Generic[_T]):
    """Iterates over `read(index)` for indices in order. To be used as a context manager.

    An error of `read` is raised by the iteration, after the items before it. Leaving the block
    ends the thread as soon as the read in progress has returned.
    """

    def __init__(self, read: Callable[[int], _T], indices: Iterable[int], *, depth: int):
        """Args:
        read: makes an item; called by one thread only.
        indices: what to read, in order.
        depth: items read ahead, >= 1.

        Raises:
          ValueError: depth is below 1.
        """
        if depth < 1:
            raise ValueError(f"depth = {depth}: it must be >= 1")
        self._read = read
        self._indices = iter(indices)
        self._depth = depth
        self._items: collections.deque[_T] = collections.deque()
        self._changed = threading.Condition()
        self._is_closed = self._has_ended = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)

    def __enter__(self) -> "Prefetcher[_T]":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()
        self._items.clear()

    def __iter__(self) -> Iterator[_T]:
        return self

    def __next__(self) -> _T:
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._has_ended or self._is_closed)
            if self._items and not self._is_closed:
                item = self._items.popleft()
                self._changed.notify_all()
                return item
            if self._error is not None:
                raise self._error
            raise StopIteration

    def _run(self) -> None:
        try:
            for index in self._indices:
                item = self._read(index)
                with self._changed:
                    self._items.append(item)
                    self._changed.notify_all()
                    self._changed.wait_for(self._has_room)
                    if self._is_closed:
                        break
        except BaseException as error:  # whoever iterates raises it
            self._error = error
        finally:
            with self._changed:
                self._has_ended = True
                self._changed.notify_all()

    def _has_room(self) -> bool:
        return len(self._items) < self._depth or self._is_closed
