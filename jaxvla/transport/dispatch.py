"""Which function reads which frame of a connection.

A connection carries several conversations (tickets, weights, telemetry), told apart by the kind
of their frames. One thread per connection hands the frames out in order of arrival, so a
function that is handed one must not wait for another.
"""

import logging
from collections.abc import Callable, Mapping

from jaxvla.transport.channel import Connection, ConnectionLostError
from jaxvla.transport.frames import Frame, FrameError

_LOG = logging.getLogger(__name__)

Handler = Callable[[Frame], None]
"""Reads a frame. Raises FrameError when there is no going on after it."""
Handlers = Mapping[str, Handler]
"""By the kind of the frames."""


def dispatch(connection: Connection, handlers: Handlers) -> None:
    """Hands out the frames of a connection until it is lost.

    A frame that nobody reads or that is refused ends the connection, with a line in the log.
    """
    try:
        while True:
            frame = connection.receive()
            handler = handlers.get(frame.kind)
            if handler is None:
                raise FrameError(f"nobody reads frames of kind {frame.kind!r}")
            handler(frame)
    except FrameError as error:
        _LOG.error("%s: %s; the connection is closed", connection.peer, error)
    except ConnectionLostError as error:
        _LOG.info("%s: %s", connection.peer, error)
    finally:
        connection.close()
