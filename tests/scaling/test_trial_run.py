"""One run of a trial: its process, and what is read from its files."""

import json
import math
import os
import pathlib
import select
import sys
import threading
import time

import numpy as np
import pytest
from sweep_parts import make_trial

from jaxvla.scaling.trial_run import (
    SweepStoppedError,
    TrialFailedError,
    TrialRunner,
    inference_waits_ms,
    read_measurement,
    trial_environment,
)

_TIMES_S = [10.0, 12.0, 13.0, 17.0]
_RATES = [999.0, 100.0, 40.0, 10.0]


def _record(update: int) -> dict[str, float | None]:
    index = update - 1
    return {
        "update": update,
        "time_s": _TIMES_S[index],
        "rate/env_steps_per_s": _RATES[index],
        "rate/useful_env_steps_per_s": _RATES[index] / 2,
        "rate/chunk_queries_per_s": _RATES[index] / 4,
        "rate/updates_per_s": 1.0,
        "queue/staleness/mean": float(index),
        "queue/staleness/max": index + 1,
        "serving/recompiles": 0,
        "utilisation/learning/busy_fraction": 0.1 * index,
        "utilisation/simulation/busy_fraction": None if update == 3 else 0.5,
        **({"utilisation/learning/waiting_on/checkpoint_fraction": 0.7} if update == 3 else {}),
    }


def _write_run(run: pathlib.Path) -> pathlib.Path:
    """Files of a run of 4 updates, of which the first is the warm-up."""
    run.mkdir(parents=True, exist_ok=True)
    records = [json.dumps(_record(update)) for update in range(1, 5)]
    (run / "metrics.jsonl").write_text("\n".join(records) + "\n")
    summary = {"peak_rss_mib": 300.5, "peak_device_mib": None, "compile_s": 7.5}
    (run / "summary.json").write_text(json.dumps(summary))
    events = [{"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "simulation"}}]
    for start_s, length_ms, reason in (
        (9.0, 5.0, "inference"),  # before
        (9.999, 5.0, "inference"),  # begins before
        (10.0, 1.0, "inference"),
        (12.0, 3.0, "inference"),
        (13.0, 50.0, "learner"),
        (16.0, 2.0, "inference"),
        (16.999, 5.0, "inference"),  # ends after
    ):
        args = {"on": reason}
        times = {"ts": start_s * 1e6, "dur": length_ms * 1e3}
        events.append({"ph": "X", "pid": 1, "tid": 1, "name": "wait", **times, "args": args})
    (run / "trace.json").write_text(json.dumps({"traceEvents": events}))
    return run


def test_measured_is_what_follows_the_warm_up(tmp_path: pathlib.Path):
    found = read_measurement(_write_run(tmp_path), first=1, last=4)
    assert found["measured_s"] == 7.0
    # 2 s at 100, 1 s at 40 and 4 s at 10 steps a second are 280 steps in 7 s.
    assert found["env_steps_per_s"] == pytest.approx(280 / 7)
    assert found["useful_env_steps_per_s"] == pytest.approx(140 / 7)
    busy = (2 * 0.1 + 1 * 0.2 + 4 * 0.3) / 7
    assert found["utilisation/learning/busy_fraction"] == pytest.approx(busy)
    waiting = found["utilisation/learning/waiting_on/checkpoint_fraction"]
    assert waiting == pytest.approx(0.7 * 1 / 7)
    assert math.isnan(found["utilisation/simulation/busy_fraction"])
    assert (found["staleness_mean"], found["staleness_max"]) == (2.0, 4)
    assert (found["peak_rss_mib"], found["compile_s"]) == (300.5, 7.5)
    assert math.isnan(found["peak_device_mib"])
    assert found["chunk_latency_ms_p50"] == pytest.approx(2.0)
    assert found["chunk_latency_ms_p99"] == pytest.approx(np.percentile([1, 2, 3], 99))


def test_waits_of_a_window(tmp_path: pathlib.Path):
    run = _write_run(tmp_path)
    assert inference_waits_ms(run / "trace.json", 10.0, 17.0) == pytest.approx([1.0, 3.0, 2.0])
    assert inference_waits_ms(run / "trace.json", 0.0, 9.0) == []


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json"])
def test_files_that_are_not_there(tmp_path: pathlib.Path, name: str):
    (_write_run(tmp_path) / name).unlink()
    with pytest.raises(TrialFailedError, match="files are not complete"):
        read_measurement(tmp_path, first=1, last=4)


def test_updates_that_are_not_there(tmp_path: pathlib.Path):
    with pytest.raises(TrialFailedError, match="files are not complete: KeyError"):
        read_measurement(_write_run(tmp_path), first=1, last=5)


def test_compilation_within_a_measurement_is_no_measurement(tmp_path: pathlib.Path):
    path = _write_run(tmp_path) / "metrics.jsonl"
    path.write_text(path.read_text().replace('"serving/recompiles": 0', '"serving/recompiles": 1'))
    with pytest.raises(TrialFailedError, match="compiled anew"):
        read_measurement(tmp_path, first=1, last=4)


def test_host_devices_are_asked_for():
    given = {"XLA_FLAGS": "--xla_a=1 --xla_force_host_platform_device_count=2 --xla_b", "X": "y"}
    assert trial_environment(0, given) == given
    flags = "--xla_a=1 --xla_b --xla_force_host_platform_device_count=8"
    assert trial_environment(8, given) == {"X": "y", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    alone = "--xla_force_host_platform_device_count=3"
    assert trial_environment(3, {})["XLA_FLAGS"] == alone


# ----------------------------------------------------------------------- processes

_COPIES = """
import json, os, pathlib, shutil, sys
arguments = dict(x.split("=", 1) for x in sys.argv[1:])
run = pathlib.Path(arguments["--workdir"])
shutil.copytree(os.environ["FILES"], run)
(run / "checkpoints").mkdir()
(run / "arguments.json").write_text(json.dumps(sys.argv[1:]))
"""
_FAILS = "import sys; print('error: no memory'); print('bye'); sys.exit(4)"
_CRASHES = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
_STAYS = """
import os, pathlib, signal, subprocess, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
path = pathlib.Path(os.environ["FILES"])
path.with_suffix(".partial").write_text(f"{os.getpid()} {child.pid}")
path.with_suffix(".partial").rename(path)
child.wait()
"""


def _runner(
    program: str, files: pathlib.Path, stop: threading.Event | None = None, timeout_s: float = 60
) -> TrialRunner:
    return TrialRunner(
        arguments=["--config=x.py", "--config.learning.num_updates=99"],
        environment={**os.environ, "FILES": str(files)},
        timeout_s=timeout_s,
        stop_requested=stop or threading.Event(),
        program=(sys.executable, "-c", program),
    )


def test_a_run(tmp_path: pathlib.Path):
    files, directory = _write_run(tmp_path / "files"), tmp_path / "trial"
    directory.mkdir()
    (directory / "old").write_text("of a run that was interrupted")
    found = _runner(_COPIES, files).run(make_trial("colocated=4", seed="3"), directory)
    assert found["env_steps_per_s"] == pytest.approx(40.0) and found["duration_s"] > 0
    assert sorted(x.name for x in directory.iterdir()) == ["output.txt", "run"]
    assert not (directory / "run" / "checkpoints").exists()
    arguments = json.loads((directory / "run" / "arguments.json").read_text())
    assert arguments[0] == "--config=x.py" and arguments[-1] == "--job=train"
    last = dict(x.split("=", 1) for x in arguments)
    assert last["--config.learning.num_updates"] == "6"  # not the 99 of the sweep's command
    assert last["--config.meshes.layout"] == "colocated=4" and last["--config.seed"] == "3"


@pytest.mark.parametrize(
    ("program", "complaint"),
    [
        (_FAILS, r"exit code 4: error: no memory"),
        (_CRASHES, "signal SIGKILL: no output"),
        ("pass", "files are not complete"),
    ],
)
def test_a_run_that_fails(tmp_path: pathlib.Path, program: str, complaint: str):
    with pytest.raises(TrialFailedError, match=complaint):
        _runner(program, tmp_path / "files").run(make_trial("colocated=4"), tmp_path / "trial")
    assert (tmp_path / "trial" / "output.txt").exists()


def _require_gone(files: pathlib.Path) -> None:
    """All processes have ended, or do so now: a killed one takes a moment."""
    for pid in map(int, files.read_text().split()):
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            ended, _, _ = select.select([descriptor], [], [], 60)
            assert ended, f"process {pid} lives"
        finally:
            os.close(descriptor)


def test_a_run_that_takes_too_long_ends_with_all_that_it_started(tmp_path: pathlib.Path):
    files = tmp_path / "pids"
    with pytest.raises(TrialFailedError, match=r"longer than sweep\.timeout_s = 3"):
        _runner(_STAYS, files, timeout_s=3).run(make_trial("colocated=4"), tmp_path / "trial")
    if files.exists():  # a loaded machine may not have come so far
        _require_gone(files)


def test_a_stop_ends_the_run_and_removes_it(tmp_path: pathlib.Path):
    files, stop = tmp_path / "pids", threading.Event()

    def stop_when_it_runs() -> None:
        deadline_s = time.monotonic() + 60
        while not files.exists() and time.monotonic() < deadline_s:
            threading.Event().wait(0.02)
        stop.set()

    watcher = threading.Thread(target=stop_when_it_runs)
    watcher.start()
    with pytest.raises(SweepStoppedError):
        _runner(_STAYS, files, stop).run(make_trial("colocated=4"), tmp_path / "trial")
    watcher.join()
    _require_gone(files)
    assert not (tmp_path / "trial").exists()
