"""What a process that is not the learner's measures, on its way there."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxvla.runtime.telemetry import Telemetry
from jaxvla.telemetry.activity import ActivityMeter
from jaxvla.telemetry.forwarding import ForwardingRecorder, TelemetryForwarder, TelemetrySink
from jaxvla.telemetry.tracing import NullTracer, Tracer
from jaxvla.transport.channel import Connection
from jaxvla.transport.dispatch import Handlers
from jaxvla.transport.frames import Frame

_KIND = "telemetry"


class ReplicaTelemetry:
    """Recorder, meter and tracer of one program."""

    def __init__(self, role: str, *, is_tracing: bool):
        """Args:
        role: of the program.
        is_tracing: spans are wanted.
        """
        self.recorder = ForwardingRecorder()
        self._tracer = Tracer() if is_tracing else NullTracer()
        self.meter = ActivityMeter(role, tracer=self._tracer)

    @contextlib.contextmanager
    def forwarding(self, connection: Connection) -> Iterator[None]:
        """Ships everything to the learner while the block runs, and what is left at its end."""

        def ship(fields: dict[str, Any], arrays: list[np.ndarray]) -> None:
            connection.send(Frame(kind=_KIND, fields=fields, arrays=arrays))

        forwarder = TelemetryForwarder(
            ship, recorder=self.recorder, meters={self.meter.role: self.meter}, tracer=self._tracer
        )
        forwarder.start()
        try:
            yield
        finally:
            forwarder.close()


def telemetry_handlers(sink: TelemetrySink, peer: str) -> Handlers:
    """What the learner does with the telemetry of a process."""
    return {_KIND: lambda frame: sink.receive(peer, frame.fields, frame.arrays)}


def make_sink(telemetry: Telemetry) -> TelemetrySink:
    """Adds the other processes' telemetry to that of the run."""
    meters: Mapping[str, ActivityMeter] = telemetry.meters
    return TelemetrySink(recorder=telemetry.recorder, meters=meters, tracer=telemetry.tracer)
