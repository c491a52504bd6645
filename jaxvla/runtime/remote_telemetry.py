"""What a process that is not the learner's measures, on its way there."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxvla.runtime.telemetry import Telemetry
from jaxvla.telemetry.activity import ActivityMeter
from jaxvla.telemetry.clocks import RemoteClock
from jaxvla.telemetry.forwarding import ForwardingRecorder, TelemetryForwarder, TelemetrySink
from jaxvla.telemetry.tracing import NullTracer, Tracer
from jaxvla.transport.channel import Connection
from jaxvla.transport.dispatch import Handlers
from jaxvla.transport.frames import Frame, FrameError
from jaxvla.transport.schema import read_seconds

_KIND, _CLOCK = "telemetry", "clock"


class ReplicaTelemetry:
    """Recorder, meter and tracer of one program."""

    def __init__(self, role: str, *, is_tracing: bool):
        """Args:
        role: of the program.
        is_tracing: spans are wanted.
        """
        self.recorder = ForwardingRecorder()
        self._is_tracing = is_tracing
        self._tracer = Tracer() if is_tracing else NullTracer()
        self.meter = ActivityMeter(role, tracer=self._tracer)
        self._clock: RemoteClock | None = None
        """Of the learner that is connected."""
        self.handlers: Handlers = {_CLOCK: self._on_clock}
        """For what the learner answers."""

    @contextlib.contextmanager
    def forwarding(self, connection: Connection) -> Iterator[None]:
        """Ships everything to the learner while the block runs, and what is left at its end.

        Spans are shipped with times of the learner's clock.
        """

        def ship(fields: dict[str, Any], arrays: list[np.ndarray]) -> None:
            connection.send(Frame(kind=_KIND, fields=fields, arrays=arrays))

        def ask(asked_s: float) -> None:
            connection.send(Frame(kind=_CLOCK, fields={"asked_s": asked_s}))

        self._clock = RemoteClock(ask, clock=self._tracer.clock) if self._is_tracing else None
        forwarder = TelemetryForwarder(
            ship,
            recorder=self.recorder,
            meters={self.meter.role: self.meter},
            tracer=self._tracer,
            clock=self._clock,
        )
        forwarder.start()
        try:
            yield
        finally:
            forwarder.close()

    def _on_clock(self, frame: Frame) -> None:
        if self._clock is not None:
            self._clock.answered(_reading(frame, "asked_s"), _reading(frame, "clock_s"))


def telemetry_handlers(
    sink: TelemetrySink, connection: Connection, clock: Callable[[], float]
) -> Handlers:
    """What the learner does with the telemetry of a process.

    Args:
      sink: where it goes.
      connection: to the process.
      clock: of the learner's tracer, which the process asks for.
    """

    def answer(frame: Frame) -> None:
        fields = {"asked_s": _reading(frame, "asked_s"), "clock_s": clock()}
        connection.send(Frame(kind=_CLOCK, fields=fields))

    return {
        _KIND: lambda frame: sink.receive(connection.peer, frame.fields, frame.arrays),
        _CLOCK: answer,
    }


def _reading(frame: Frame, name: str) -> float:
    """Of a monotonic clock, s. Raises FrameError."""
    seconds = read_seconds(frame.fields, name)
    if seconds is None:
        raise FrameError(f"{name} of a clock is missing")
    return seconds


def make_sink(telemetry: Telemetry) -> TelemetrySink:
    """Adds the other processes' telemetry to that of the run."""
    meters: Mapping[str, ActivityMeter] = telemetry.meters
    return TelemetrySink(recorder=telemetry.recorder, meters=meters, tracer=telemetry.tracer)
