"""The serve job: a trained policy behind a websocket, for openpi's clients.

A signal is the way to end it: the server stops accepting, answers what it has been asked, and
the exit code is 0.
"""

import contextlib
import errno
import math
import pathlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from jaxvla import sharding
from jaxvla.config import ConfigError, ExperimentConfig, UsageError, WebsocketConfig, override
from jaxvla.endpoint import batch_sizes, read_token
from jaxvla.runtime.build import Blueprint, Parts
from jaxvla.runtime.evaluate import StoredPolicy, stored_policy
from jaxvla.runtime.program import ProgramThreads
from jaxvla.serving.batcher import Batcher
from jaxvla.serving.requests import KIND, RequestKeys, RequestReader, Responder
from jaxvla.serving.sampling import Sampler
from jaxvla.serving.server import PolicyServer
from jaxvla.serving.websocket import (
    CLOSE_TIMEOUT_S,
    WebsocketServer,
    load_websockets,
    open_listener,
)
from jaxvla.telemetry.activity import ActivityMeter
from jaxvla.telemetry.metrics import MetricRecorder, Record
from jaxvla.telemetry.progress import Screen, format_duration, format_rate
from jaxvla.telemetry.tracing import NullTracer
from jaxvla.types import Params

EXIT_FINISHED, EXIT_FAILED = 0, 1

REPORT_S = 10.0
"""Between the lines of metrics."""


def check_endpoint(config: ExperimentConfig) -> None:
    """Finds out what would end the job only after it has compiled. Needs no device.

    Raises:
      UsageError: a package or the token is missing, or the address cannot be had.
    """
    try:
        load_websockets()
    except ValueError as error:
        raise UsageError(f"--job=serve: {error}") from error
    read_token(config.websocket)
    _bind(config.websocket).close()


def serve_policy(
    blueprint: Blueprint,
    workdir: pathlib.Path,
    screen: Screen,
    stop_requested: threading.Event,
) -> int:
    """Serves until a stop is asked for; returns the exit code of the contract.

    Args:
      blueprint: of the run that trained the policy.
      workdir: of that run. Nothing is written there.
      screen: where to show.
      stop_requested: set by signals, and here when a program fails.

    Raises:
      UsageError: see `check_endpoint`; or the env's observations do not fit openpi's requests.
    """
    settings = blueprint.config.websocket
    reader = _make_reader(blueprint)
    with contextlib.closing(_bind(settings)) as listener:
        parts = Parts(blueprint)
        placed = _placement(parts)
        weights = stored_policy(parts, workdir, placed)
        if weights is None:
            screen.message(f"{workdir} holds no complete checkpoint")
            return EXIT_FAILED
        sampler = _make_sampler(parts, placed)
        with screen.phase("compile"):
            sampler.compile(blueprint.params_struct(), blueprint.observation_struct(1))
        recorder, start_s = MetricRecorder(), time.monotonic()
        with _programs(parts, weights, sampler, reader, recorder, stop_requested.set) as run:
            run.websocket.start(listener, on_end=stop_requested.set)
            screen.message(_ready_line(blueprint, weights, sampler, listener))
            while not stop_requested.wait(REPORT_S):
                _report(recorder, weights.update, screen)
            screen.message("stopping: no new requests are accepted")
            run.stop(blueprint.config.runtime.grace_s)
        record = _report(recorder, weights.update, screen)
        screen.message(
            f"served {record['serving/requests']} requests, "
            f"{record['serving/request_errors']} of them with errors, in "
            f"{format_duration(time.monotonic() - start_s)}"
        )
        for name, error in run.errors():
            screen.message(f"{name} failed: {type(error).__name__}: {error}")
            return EXIT_FAILED
    return EXIT_FINISHED


class _FixedWeights:
    """A weight subscription to a version that no other follows."""

    def __init__(self, weights: StoredPolicy):
        self._weights: StoredPolicy | None = weights

    def poll(self) -> tuple[int, Params] | None:
        weights, self._weights = self._weights, None
        return None if weights is None else (weights.update, weights.params)

    def acknowledge(self, version: int) -> None:
        del version  # nobody waits

    def close(self) -> None:
        self._weights = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Programs:
    """The policy server and the websocket in front of it."""

    server: PolicyServer
    threads: ProgramThreads
    websocket: WebsocketServer

    def stop(self, grace_s: float) -> None:
        """Answers what has been asked, as far as that is possible within `grace_s`."""
        end_s = time.monotonic() + grace_s
        if self.threads.error is not None:
            self.server.stop("the policy server failed")  # nobody else would answer
        self.websocket.stop(max(0.0, grace_s - 2 * CLOSE_TIMEOUT_S))
        self.server.stop("the server stops")
        self.threads.join(max(0.0, end_s - time.monotonic()))

    def errors(self) -> list[tuple[str, BaseException]]:
        """Program and error of what failed."""
        found = {"serving": self.threads.error, "websocket": self.websocket.error}
        return [(name, error) for name, error in found.items() if error is not None]


@contextlib.contextmanager
def _programs(
    parts: Parts,
    weights: StoredPolicy,
    sampler: Sampler,
    reader: RequestReader,
    recorder: MetricRecorder,
    on_end: Callable[[], None],
) -> Iterator[_Programs]:
    """Runs the policy server while the block runs; the websocket is not started."""
    settings = parts.config.websocket
    batcher = Batcher(
        # As soon as the server is free it takes what there is: a client that thinks is not live.
        trigger_rows=1,
        max_wait_s=0.0,
        max_rows=sampler.buckets[-1],
        capacity_rows=max(sampler.buckets[-1], settings.max_connections),
        deadline_s=math.inf,  # the websocket's own deadline takes requests back
    )
    meter = ActivityMeter("serving", tracer=NullTracer())
    server = PolicyServer(
        sampler=sampler,
        batcher=batcher,
        subscribe=lambda wake: _FixedWeights(weights),
        recorder=recorder,
        meter=meter,
    )
    responder = Responder(reader=reader, keys=RequestKeys(parts.root), batcher=batcher)
    websocket = WebsocketServer(
        responder.answer,
        settings=settings,
        metadata=_metadata(parts.blueprint, weights),
        token=read_token(settings),
        recorder=recorder,
    )
    threads = ProgramThreads(server, meter, lambda _: on_end())
    threads.start()
    run = _Programs(server=server, threads=threads, websocket=websocket)
    try:
        yield run
    finally:
        run.stop(0.0)  # for exceptions: it has been stopped otherwise
        responder.close()
        server.close()


def _placement(parts: Parts) -> Params:
    """On all serving devices, however many policy servers share them in training."""
    blueprint = parts.blueprint
    return sharding.params_shardings(
        blueprint.params_struct(), blueprint.policy.rules(), parts.meshes["serving"], "serving"
    )


def _make_sampler(parts: Parts, placed: Params) -> Sampler:
    """On all serving devices, for the batch sizes of the websocket and for acting alone."""
    mesh = parts.meshes["serving"]
    return Sampler(
        parts.blueprint.policy,
        mesh=mesh,
        params_shardings=placed,
        buckets=batch_sizes(parts.config.websocket, mesh.shape["data"]),
        kinds=(KIND,),
    )


def _make_reader(blueprint: Blueprint) -> RequestReader:
    try:
        return RequestReader(blueprint.spec, blueprint.tokenize)
    except ValueError as error:
        raise UsageError(f"--job=serve: {error}. Fix: serve another policy") from error


def _metadata(blueprint: Blueprint, weights: StoredPolicy) -> dict[str, Any]:
    """What every client is told first."""
    config, spec = blueprint.config, blueprint.spec
    return {
        "model": config.model.name,
        "env": config.env.name,
        "update": weights.update,
        "action_horizon": config.model.action_horizon,
        "action_dim": spec.action_dim,
        "state_dim": spec.state_dim,
        "image_size": spec.image_size,
        "cameras": list(spec.cameras),
    }


def _bind(settings: WebsocketConfig) -> socket.socket:
    """Raises ConfigError when the address cannot be had."""
    try:
        return open_listener(settings)
    except OSError as error:
        is_of_port = error.errno in (errno.EADDRINUSE, errno.EACCES)
        reason = error.strerror
    except UnicodeError as error:
        is_of_port, reason = False, str(error)
    name, fix = ("port", 0) if is_of_port else ("host", "127.0.0.1")
    allowed = f"cannot listen on {settings.host} port {settings.port}: {reason}"
    full = f"websocket.{name}"
    raise ConfigError(full, getattr(settings, name), allowed, override(full, fix))


def _ready_line(
    blueprint: Blueprint, weights: StoredPolicy, sampler: Sampler, listener: socket.socket
) -> str:
    config = blueprint.config
    host, port = listener.getsockname()[:2]
    address = f"ws://[{host}]:{port}" if ":" in host else f"ws://{host}:{port}"
    return (
        f"ready       {address}, model {config.model.name} of update {weights.update}, "
        f"env {config.env.name}, batches of {', '.join(map(str, sampler.buckets))}"
    )


def _report(recorder: MetricRecorder, update: int, screen: Screen) -> Record:
    """Ends a window; shows it when somebody asked something."""
    record = recorder.flush(update=update, time_s=0.0, extra={})
    if record["rate/requests_per_s"] > 0:
        screen.message(_metrics_line(record))
    return record


def _metrics_line(record: Record) -> str:
    def ms(name: str) -> str:
        value = record.get(f"serving/request_ms/{name}", math.nan)
        return f"{value:.1f} ms" if math.isfinite(value) else "-"

    fill = record.get("serving/batch_fill", math.nan)
    return " | ".join(
        [
            f"{format_rate(record['rate/requests_per_s'])} requests/s",
            f"latency p50 {ms('p50')} p99 {ms('p99')}",
            f"batch fill {fill:.2f}" if math.isfinite(fill) else "batch fill -",
            f"errors {record['serving/request_errors']}",
        ]
    )
