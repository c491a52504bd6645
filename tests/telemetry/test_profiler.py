"""The window of updates that JAX's profiler sees."""

import gzip
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxvla.config import TelemetryConfig
from jaxvla.telemetry.profiler import PROFILE_DIRECTORY, ProfileWindow


def _events(directory: pathlib.Path) -> list[dict[str, Any]]:
    (path,) = directory.rglob("*.trace.json.gz")
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def test_the_profile_holds_the_updates_of_the_window_and_no_others(tmp_path: pathlib.Path) -> None:
    window = ProfileWindow(TelemetryConfig(profile_start=2, profile_updates=2), tmp_path)
    for version in range(6):
        window.reached(version)
        with jax.profiler.StepTraceAnnotation("update", step_num=version):
            jax.block_until_ready(jnp.arange(4.0) + version)
    window.close()
    steps = [x for x in _events(tmp_path / PROFILE_DIRECTORY) if x.get("name") == "update"]
    assert sorted(int(x["args"]["step_num"]) for x in steps) == [2, 3]


@pytest.mark.parametrize(
    ("start", "count", "versions", "expected"),
    [
        (2, 0, [0, 1, 2, 3], []),  # the default: none
        (0, 1, [0, 1, 2], ["start 0", "stop 1"]),
        (1, 2, [0, 1, 2, 3, 4], ["start 1", "stop 3"]),
        (1, 9, [0, 1, 2], ["start 1", "stop end"]),  # the run ends before
        (1, 3, [2, 3, 4, 5], ["start 2", "stop 4"]),  # a resumed run
        (1, 3, [4, 5], []),  # one resumed after it
    ],
)
def test_when_it_starts_and_ends(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
    start: int,
    count: int,
    versions: list[int],
    expected: list[str],
) -> None:
    seen: list[str] = []
    now: list[int | str] = []
    monkeypatch.setattr(
        jax.profiler, "start_trace", lambda *_, **__: seen.append(f"start {now[0]}")
    )
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append(f"stop {now[0]}"))
    settings = TelemetryConfig(profile_start=start, profile_updates=count)
    window = ProfileWindow(settings, tmp_path)
    for version in versions:
        now[:] = [version]
        window.reached(version)
    now[:] = ["end"]
    window.close()
    window.close()
    assert seen == expected
