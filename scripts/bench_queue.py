"""Speed of what lies between the programs: trajectory queue, batcher, weight store.

    python scripts/bench_queue.py [--repeats=5] [--threads=1,4,16,64] [--mib=10,100,1000]

Prints and saves, all in one process with the real classes:
  * queue: admit-put-take cycles/s with so many producers and one consumer, empty payloads;
  * batcher: requests/s with so many closed-loop clients and a call that does nothing, fixed and
    adaptive; and what batching adds to the latency of a real call, that is without the time in
    which the server computes the request's batch or the one before it;
  * weights: seconds to publish a tree to one server, and for the server to pull it, next to two
    ways of copying as many bytes: to memory in use (memcpy) and to fresh memory, as a
    publication needs it.

Every figure is the median over the repeats; a repeat measures everything once, so that slow
changes of the machine meet all figures alike. Warm-up is not counted.
"""

import argparse
import json
import os
import pathlib
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from jaxvla.runtime import cpu_settings

cpu_settings.apply()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import importlib.metadata  # noqa: E402
import platform  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from jaxvla.serving.adaptive import Tuner  # noqa: E402
from jaxvla.serving.batcher import Batcher  # noqa: E402
from jaxvla.transport.in_process import InProcessQueue, InProcessWeightStore  # noqa: E402
from jaxvla.transport.staleness import CreditRule  # noqa: E402

_ROOT = pathlib.Path(__file__).parents[1]
_MIB = 2**20
_NUM_LEAVES = 64
_Results = dict[str, dict[str, float]]
"""Case -> name with unit -> median."""


def main() -> None:
    """Measures, prints and saves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=_numbers, default=(1, 4, 16, 64))
    parser.add_argument("--mib", type=_numbers, default=(10, 100, 1000))
    parser.add_argument("--requests", type=int, default=4000, help="per measurement")
    parser.add_argument("--out", type=pathlib.Path, default=_ROOT / "bench_queue.json")
    options = parser.parse_args()
    report: dict[str, Any] = {"machine": machine(), "options": _plain(vars(options))}
    count = options.requests
    parts: dict[str, dict[str, Callable[[], dict[str, float]]]] = {
        "queue": {f"{n} producers": _call(queue, n, count) for n in options.threads},
        "batcher": {
            f"{n} clients, {mode}": _call(batcher, n, count, mode == "adaptive")
            for n in options.threads
            for mode in ("fixed", "adaptive")
        },
        "batcher_latency": {f"{n} clients": _call(latency, n, count) for n in options.threads},
        "weights": {f"{mib} MiB": _call(weights, mib) for mib in options.mib},
    }
    for part, cases in parts.items():
        report[part] = in_turn(cases, options.repeats)
        _show(part, report[part])
    options.out.write_text(json.dumps(report, indent=2) + "\n")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    return {name: str(x) if isinstance(x, pathlib.Path) else x for name, x in options.items()}


def _call(function: Callable[..., dict[str, float]], *arguments: Any) -> Any:
    return lambda: function(*arguments)


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    packages = ("jaxvla", "jax", "jaxlib", "numpy")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "devices": [str(device) for device in jax.devices()],
        "python": platform.python_version(),
    } | {name: importlib.metadata.version(name) for name in packages}


def in_turn(cases: dict[str, Callable[[], dict[str, float]]], repeats: int) -> _Results:
    """Medians of `repeats` measurements of every case, one of each after the other."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, measure in cases.items():
            results[name].append(measure())
    return {
        name: {key: statistics.median(one[key] for one in got) for key in got[0]}
        for name, got in results.items()
    }


def _show(part: str, results: _Results) -> None:
    print(part)
    for case, values in results.items():
        told = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        print(f"  {case:<22}{told}", flush=True)


# ------------------------------------------------------------------------------ queue


def queue(num_producers: int, num_cycles: int) -> dict[str, float]:
    """Producers put as fast as they get tickets; the learner takes and publishes at once."""
    rule = CreditRule(trajectories_per_update=num_producers, max_staleness=1)
    bench = InProcessQueue(rule)

    def produce(index: int) -> None:
        while (ticket := bench.admit(f"producer_{index}")) is not None:
            version = ticket.admission_version
            bench.put(
                ticket, None, policy_version_min=version, policy_version_max=version, nbytes=0
            )

    def consume(first: int, count: int) -> float:
        start_s = time.perf_counter()
        for version in range(first, first + count):
            bench.take(num_producers, version)
            bench.advance(version + 1)
        return time.perf_counter() - start_s

    with ThreadPoolExecutor(num_producers) as pool:
        for index in range(num_producers):
            pool.submit(produce, index)
        num_updates = max(1, num_cycles // num_producers)
        num_warm = max(1, num_updates // 10)
        consume(0, num_warm)
        elapsed_s = consume(num_warm, num_updates)
        bench.close("finished")
    return {"cycles_per_s": num_updates * num_producers / elapsed_s}


# ---------------------------------------------------------------------------- batcher


@dataclass(frozen=True, kw_only=True, slots=True)
class _Computed:
    """Answer: when the server was busy with calls."""

    previous_end_s: float
    start_s: float
    end_s: float


def serve(bench: Batcher, call: Callable[[], None]) -> None:
    """A policy server without policy: one call per batch."""
    previous_end_s = 0.0
    while (batch := bench.next_batch()) is not None:
        start_s = time.perf_counter()
        call()
        end_s = time.perf_counter()
        computed = _Computed(previous_end_s=previous_end_s, start_s=start_s, end_s=end_s)
        previous_end_s = end_s
        for request in batch.requests:
            request.future.set_result(computed)


def closed_loop(
    num_clients: int, num_requests: int, call: Callable[[], None], *, is_adaptive: bool
) -> tuple[float, list[float]]:
    """Clients that ask again at once, of a server that fires when it is idle.

    Returns:
      Requests/s, and of every request the seconds that nobody computed for it.
    """
    tuner = Tuner(buckets=range(1, num_clients + 1), max_rows=num_clients)
    bench = Batcher(
        trigger_rows=1,
        max_wait_s=0.0,
        max_rows=num_clients,
        capacity_rows=num_clients,
        tuner=tuner if is_adaptive else None,
    )
    num_each = max(10, num_requests // num_clients)
    num_warm = num_each // 10
    is_warm = threading.Barrier(num_clients + 1)

    def ask(name: str) -> list[float]:
        bench.register(name)
        added_s = []
        for index in range(num_warm + num_each):
            if index == num_warm:
                is_warm.wait()
            start_s = time.perf_counter()
            done = bench.submit(rows=1, client=name, kind="explore", payload=None).result()
            latency_s = time.perf_counter() - start_s
            busy_s = done.end_s - done.start_s + max(0.0, done.previous_end_s - start_s)
            added_s.append(latency_s - busy_s)
        bench.unregister(name)
        return added_s[num_warm:]

    with ThreadPoolExecutor(num_clients + 1) as pool:
        server = pool.submit(serve, bench, call)
        clients = [pool.submit(ask, f"client_{i}") for i in range(num_clients)]
        is_warm.wait()
        start_s = time.perf_counter()
        added_s = [x for client in clients for x in client.result()]
        elapsed_s = time.perf_counter() - start_s
        bench.close("finished")
        server.result()
    return len(added_s) / elapsed_s, added_s


def batcher(num_clients: int, num_requests: int, is_adaptive: bool) -> dict[str, float]:
    """Requests/s when a call costs nothing."""
    rate, _ = closed_loop(num_clients, num_requests, lambda: None, is_adaptive=is_adaptive)
    return {"requests_per_s": rate}


def latency(num_clients: int, num_requests: int) -> dict[str, float]:
    """What the batcher adds to a call of about a millisecond that lets other threads run."""
    source = np.ones(2_000_000, np.float32)
    target = np.empty_like(source)

    def call() -> None:
        np.sqrt(source, out=target)

    bare_s = []
    for _ in range(100):
        start_s = time.perf_counter()
        call()
        bare_s.append(time.perf_counter() - start_s)
    _, added_s = closed_loop(num_clients, num_requests // 4, call, is_adaptive=False)
    p50, p99 = np.percentile(added_s, (50, 99))
    bare_ms = 1e3 * statistics.median(bare_s[10:])
    return {"bare_call_ms": bare_ms, "added_ms_p50": 1e3 * p50, "added_ms_p99": 1e3 * p99}


# ---------------------------------------------------------------------------- weights


def weights(mib: int) -> dict[str, float]:
    """A tree of equal float32 leaves on one device, published to a server on the same one."""
    size = mib * _MIB // 4 // _NUM_LEAVES
    params = {f"leaf_{i}": jnp.full(size, float(i)) for i in range(_NUM_LEAVES)}
    jax.block_until_ready(params)
    publish_s, pull_s = publications(params)
    memcpy_s, fresh_s = copies([np.asarray(leaf) for leaf in params.values()])
    return {
        "publish_ms": 1e3 * publish_s,
        "pull_ms": 1e3 * pull_s,
        "memcpy_ms": 1e3 * memcpy_s,
        "fresh_copy_ms": 1e3 * fresh_s,
        "publish_over_memcpy": publish_s / memcpy_s,
        "publish_over_fresh_copy": publish_s / fresh_s,
        "pull_over_memcpy": pull_s / memcpy_s,
    }


def publications(params: dict[str, jax.Array]) -> tuple[float, float]:
    """Median seconds of a publication and of a pull, from the third version on.

    The first one compiles; the second one finds one copy in memory, all later ones two.
    """
    store = InProcessWeightStore()
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    server = store.subscribe("server_0", place)
    publish_s, pull_s = [], []
    in_use = None
    for version in range(5):
        publish_s.append(_seconds(lambda v=version: store.publish(v, params)))
        start_s = time.perf_counter()
        in_use = server.poll()
        server.acknowledge(version)
        pull_s.append(time.perf_counter() - start_s)
    assert in_use is not None, "every version was staged"
    return statistics.median(publish_s[2:]), statistics.median(pull_s[2:])


def copies(source: list[np.ndarray]) -> tuple[float, float]:
    """Median seconds of copying to memory in use, and to fresh memory."""
    target = [leaf.copy() for leaf in source]
    memcpy_s, fresh_s = [], []
    for _ in range(3):
        memcpy_s.append(_seconds(lambda: [np.copyto(*x) for x in zip(target, source, strict=True)]))
        fresh_s.append(_seconds(lambda: [leaf.copy() for leaf in source]))
    return statistics.median(memcpy_s), statistics.median(fresh_s)


def _seconds(function: Callable[[], Any]) -> float:
    start_s = time.perf_counter()
    function()
    return time.perf_counter() - start_s


if __name__ == "__main__":
    main()
