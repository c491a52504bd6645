"""Weights from one policy server to others: the parent's side.

consumes    versions that this server has staged; connections of its children
produces    frames to every child, as the learner would send them
waits for   in two threads per child, the next frame and what `transport.weight_transfers` waits for
unblocked by  the server, the child, the loss of its connection, `close`

A parent only carries: which version a child has in use, the child tells the learner. A child whose
parent is lost gets its weights from the learner (`transport.weight_receiver`).
"""

import logging
import threading
from collections import Counter

from jaxvla.transport.channel import Connection
from jaxvla.transport.frames import Frame, FrameError
from jaxvla.transport.schema import NAME, read_text
from jaxvla.transport.weight_transfers import HostWeights, Transfers, VersionSource

_LOG = logging.getLogger(__name__)

CHILD = "weights_child"
"""Kind of the first frame of a child."""


def child_hello(session: str) -> Frame:
    """What a child says first.

    Args:
      session: of the run.
    """
    return Frame(kind=CHILD, fields={"session": session})


class WeightRelay(VersionSource):
    """Keeps the newest version that a policy server has staged, on the host, and hands it on."""

    def __init__(self, *, session: str):
        """Args:
        session: of the run; children of another one are refused.
        """
        self.changed = threading.Condition()
        """Guards what follows."""
        self.is_closed = False
        self._session = session
        self._newest: HostWeights | None = None
        self._children: set[Transfers] = set()
        self._faults: Counter[str] = Counter()

    @property
    def newest(self) -> HostWeights | None:
        """See `VersionSource.newest`."""
        return self._newest

    def faults(self) -> dict[str, int]:
        """Transfers that failed, by cause: "digest" or "lost"."""
        with self.changed:
            return dict(self._faults)

    def count_fault(self, cause: str) -> None:
        """See `VersionSource.count_fault`."""
        with self.changed:
            self._faults[cause] += 1

    def offer(self, weights: HostWeights) -> None:
        """Hands a version on, from now on instead of the one before.

        Args:
          weights: newer than all that were offered; the memory of their leaves stays as it is.
        """
        with self.changed:
            self._newest = weights
            self.changed.notify_all()

    def serve(self, connection: Connection, hello: Frame) -> None:
        """Serves one child until its connection is lost.

        Args:
          connection: of the child.
          hello: the first frame, of kind CHILD.
        """
        try:
            session = read_text(hello.fields, "session", NAME)
        except FrameError as error:
            _LOG.error("%s: %s", connection.peer, error)
            connection.close()
            return
        child = Transfers(self, connection.peer, connection)
        with self.changed:
            is_welcome = session == self._session and not self.is_closed
            if is_welcome:
                self._children.add(child)
        if is_welcome:
            child.run({}, leave=lambda: self._leave(child))
        else:
            _LOG.info("%s: is of session %s, or late", connection.peer, session)
            connection.close()

    def close(self) -> None:
        """Ends all transfers. Children take this server for lost."""
        with self.changed:
            self.is_closed = True
            children = list(self._children)
            self.changed.notify_all()
        for child in children:
            child.connection.close()

    def _leave(self, child: Transfers) -> None:
        with self.changed:
            child.is_over = True
            self._children.discard(child)
            self.changed.notify_all()
