"""Alarms: what takes too long while a run goes on, or waits.

consumes    ages of tickets and of weights, counts of envs that were set aside
produces    lines on the screen and in logs/runtime.log, counts under faults/
waits for   the clock
unblocked by  the end of the block that is watched

An alarm changes nothing: it tells whom the others wait for, long before a lease ends the wait.
"""

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Protocol

from jaxvla.config import ExperimentConfig
from jaxvla.telemetry.metrics import MetricRecorder, Total
from jaxvla.telemetry.progress import RunScreen
from jaxvla.transport.base import Ticket

_LOG = logging.getLogger(__name__)

STRAGGLERS, LAGS = "faults/stragglers", "faults/publish_lags"
"""Counts of alarms, by what they are about."""
QUARANTINED = "faults/quarantined_envs"
"""Count that the simulators keep."""
_MOST_PAUSE_S = 5.0
"""Longest time between two looks."""


class AgedQueue(Protocol):
    """What alarms need of a trajectory queue."""

    def outstanding(self) -> list[tuple[Ticket, float]]:
        """See `InProcessQueue.outstanding`."""
        ...


class AgedStore(Protocol):
    """What alarms need of a weight store."""

    def lagging(self) -> list[tuple[str, int, float]]:
        """See `AccountingStore.lagging`."""
        ...


class Alarms:
    """Looks at a run from time to time. Each alarm is given once, until its cause has gone."""

    def __init__(
        self,
        config: ExperimentConfig,
        *,
        queue: AgedQueue,
        store: AgedStore,
        recorder: MetricRecorder,
        screen: RunScreen,
    ):
        """Args:
        config: with the limits.
        queue, store, recorder: what is looked at.
        screen: where alarms are shown.
        """
        self._straggler_s = config.simulation.straggler_s
        self._publish_lag_s = config.serving.publish_lag_s
        self._queue = queue
        self._store = store
        self._recorder = recorder
        self._screen = screen
        self._known: set[str] = set()
        """Alarms whose cause was there at the last look."""
        self._num_quarantined = 0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Looks while the block runs, in a thread of its own."""
        is_over = threading.Event()
        pause_s = min(self._straggler_s / 4, self._publish_lag_s / 4, _MOST_PAUSE_S)

        def watch() -> None:
            while not is_over.wait(pause_s):
                self.look()

        thread = threading.Thread(target=watch, name="runtime/alarms", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    def look(self) -> None:
        """Gives the alarms that are due."""
        found: dict[str, tuple[str, str]] = {}
        for ticket, age_s in self._queue.outstanding():
            if age_s >= self._straggler_s:
                text = (
                    f"{ticket.owner} has been making one trajectory for {age_s:.3g} s "
                    f"(ticket {ticket.id}), and the learner takes them in order"
                )
                found[f"ticket {ticket.id}"] = STRAGGLERS, text
        for name, version, age_s in self._store.lagging():
            if age_s >= self._publish_lag_s:
                text = (
                    f"{name} still serves version {version}, newer weights were published "
                    f"{age_s:.3g} s ago; simulators get no tickets for those"
                )
                found[f"server {name}"] = LAGS, text
        for key in found.keys() - self._known:
            self._give(*found[key])
        self._known = set(found)
        self._look_for_quarantine()

    def _look_for_quarantine(self) -> None:
        count = int(self._recorder.totals().get(QUARANTINED, 0))
        if count > self._num_quarantined:
            self._show(f"{count} envs were set aside, see logs/simulation.log; others go on")
        self._num_quarantined = count

    def _give(self, name: str, text: str) -> None:
        self._recorder.add(name, 1, Total)
        self._show(text)

    def _show(self, text: str) -> None:
        _LOG.warning("%s", text)
        self._screen.message(f"alarm: {text}")
