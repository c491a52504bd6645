"""Speed of the connections between jaxvla's processes: two processes of this machine.

    python scripts/bench_channel.py [--repeats=5] [--mb=10,100,1000] [--out=FILE]

Prints and saves, plain and within TLS (where there is an openssl command to make a certificate):
  * latency: round trips of a frame without arrays, and of a question with eight images of
    224 x 224 (1.2 MB) that is answered with eight action chunks (float32 [8, 50, 7]); p50 and p99;
  * throughput: MB/s of one frame with one array, from `send` until the other side, which has
    received all of it, has answered. Every transfer needs fresh memory on the receiving side;
  * for scale: copying as many bytes within this process, to memory in use (memcpy) and to fresh
    memory, as a receiver needs it.

A repeat measures everything once, so that slow changes of the machine meet all figures alike.
Figures are medians over the repeats; the round trips of all repeats give p50 and p99 together.
Warm-up is not counted. 1 MB = 10**6 bytes.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxvla.transport.channel import (
    ChannelConfig,
    Connection,
    Listener,
    TlsConfig,
    connect,
)
from jaxvla.transport.frames import Frame, Limits

_ROOT = pathlib.Path(__file__).parents[1]
_MB = 10**6
_WARM_UP = 20
_TOKEN_VARIABLE = "JAXVLA_BENCH_TOKEN"
_TIMEOUT_S = 60.0


def main() -> None:
    """Measures, prints and saves; or is the other process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--mb", type=_numbers, default=(10, 100, 1000))
    parser.add_argument("--round_trips", type=int, default=1000, help="per repeat")
    parser.add_argument("--out", type=pathlib.Path, default=_ROOT / "bench_channel.json")
    parser.add_argument("--answer", nargs=3, metavar=("CERTIFICATE", "KEY", "BYTES"))
    options = parser.parse_args()
    if options.answer:
        return answer(*options.answer)
    asked = {name: str(x) for name, x in vars(options).items() if x is not None}
    report: dict[str, Any] = {"machine": machine(), "options": asked}
    with tempfile.TemporaryDirectory() as folder:
        report |= measure(options, make_certificate(pathlib.Path(folder)))
    options.out.write_text(json.dumps(report, indent=2) + "\n")


def measure(options: argparse.Namespace, tls: TlsConfig | None) -> dict[str, Any]:
    """All figures: kind of connection -> case -> name with unit -> value."""
    kinds = {"plain": None} | ({"tls": tls} if tls else {})
    servers = {name: Server(each, max(options.mb) * _MB) for name, each in kinds.items()}
    report: dict[str, Any] = {}
    try:
        for name, server in servers.items():
            cases = latencies(server.connection, options.round_trips, options.repeats)
            report[name] = cases
            _show(f"{name}, latency", cases)
        for mb in options.mb:
            source = np.ones(mb * _MB, np.uint8)
            calls = {name: transfer(x.connection, source) for name, x in servers.items()}
            calls |= {"memcpy": copy_used(source), "fresh copy": copy_fresh(source)}
            seconds = in_turn(calls, options.repeats)
            rates = {name: {"mb_per_s": mb / took} for name, took in seconds.items()}
            for name, rate in rates.items():
                report.setdefault(name, {})[f"{mb} MB"] = rate
            _show(f"{mb} MB", rates)
    finally:
        for server in servers.values():
            server.close()
    return report


# -------------------------------------------------------------------------- the other process


class Server:
    """A process that answers, and our connection to it."""

    def __init__(self, tls: TlsConfig | None, max_bytes: int):
        token = secrets.token_hex(32)
        files = (tls.certificate, tls.key) if tls else ("", "")
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--answer", *files, str(max_bytes)],
            env={**os.environ, _TOKEN_VARIABLE: token},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        port = int(self._process.stdout.readline())
        config = ChannelConfig(token=token.encode(), tls=tls, limits=_limits(max_bytes))
        self.connection: Connection = connect(
            ("127.0.0.1", port), config, name="bench", timeout_s=_TIMEOUT_S
        )

    def close(self) -> None:
        """Ends the process as well."""
        self.connection.close()
        self._process.communicate()  # closes its input, which it waits for


def answer(certificate: str, key: str, max_bytes: str) -> None:
    """Answers on a free port, which it prints, until standard input ends."""
    tls = TlsConfig(certificate=certificate, key=key) if certificate else None
    config = ChannelConfig(
        token=os.environ[_TOKEN_VARIABLE].encode(), tls=tls, limits=_limits(int(max_bytes))
    )
    listener = Listener("127.0.0.1", 0, config, _answer_each)
    listener.start()
    print(listener.address[1], flush=True)
    sys.stdin.read()
    listener.close()


def _answer_each(connection: Connection) -> None:
    chunks = np.zeros((8, 50, 7), np.float32)
    while True:
        asked = connection.receive()
        arrays = [chunks] if asked.kind == "ask" else []
        del asked  # its memory, before the next one needs as much
        connection.send(Frame(kind="answer", arrays=arrays))


def _limits(max_bytes: int) -> Limits:
    return Limits(max_payload_bytes=max(max_bytes, 2**24))


def make_certificate(folder: pathlib.Path) -> TlsConfig | None:
    """One that is trusted itself; None without an openssl command."""
    if shutil.which("openssl") is None:
        print("no openssl command: nothing is measured within TLS")
        return None
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    command += " -subj /CN=jaxvla -days 2 -keyout key.pem -out certificate.pem"
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    certificate, key = str(folder / "certificate.pem"), str(folder / "key.pem")
    return TlsConfig(certificate=certificate, key=key, authority=certificate)


# ------------------------------------------------------------------------------- measurements


def latencies(connection: Connection, count: int, repeats: int) -> dict[str, dict[str, float]]:
    """Case -> p50 and p99 of its round trips in microseconds."""
    images = np.zeros((8, 224, 224, 3), np.uint8)
    cases = {
        "small": Frame(kind="hello", fields={"id": 1}),
        "1.2 MB": Frame(kind="ask", fields={"id": 1}, arrays=[images, np.zeros((8, 8))]),
    }
    took_us: dict[str, list[float]] = {name: [] for name in cases}
    for frame in cases.values():
        round_trips(connection, frame, _WARM_UP)
    for _ in range(repeats):
        for name, frame in cases.items():
            took_us[name] += round_trips(connection, frame, count)
    return {
        name: {"p50_us": float(np.percentile(x, 50)), "p99_us": float(np.percentile(x, 99))}
        for name, x in took_us.items()
    }


def round_trips(connection: Connection, frame: Frame, count: int) -> list[float]:
    """Microseconds of each."""
    took_us = []
    for _ in range(count):
        start_s = time.perf_counter()
        connection.send(frame)
        connection.receive()
        took_us.append(1e6 * (time.perf_counter() - start_s))
    return took_us


def transfer(connection: Connection, source: np.ndarray) -> Callable[[], None]:
    """Sends an array and waits until it has arrived."""
    frame = Frame(kind="put", arrays=[source])

    def once() -> None:
        connection.send(frame)
        connection.receive()

    return once


def copy_used(source: np.ndarray) -> Callable[[], None]:
    """To memory that has been written before."""
    target = source.copy()

    def once() -> None:
        target[:] = source

    return once


def copy_fresh(source: np.ndarray) -> Callable[[], None]:
    """To memory that the system has to find first."""

    def once() -> None:
        source.copy()

    return once


def in_turn(calls: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of every call, after one that is not counted."""
    took_s: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start_s = time.perf_counter()
            call()
            if repeat:
                took_s[name].append(time.perf_counter() - start_s)
    return {name: statistics.median(x) for name, x in took_s.items()}


# ------------------------------------------------------------------------------------ output


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
    } | {name: importlib.metadata.version(name) for name in ("jaxvla", "numpy", "msgpack")}


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _show(part: str, results: dict[str, dict[str, float]]) -> None:
    print(part)
    for case, values in results.items():
        told = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        print(f"  {case:<22}{told}", flush=True)


if __name__ == "__main__":
    main()
