"""One run of a trial: a training process of its own, and what its files say. No jax.

consumes    a trial, a directory
produces    the run's files but its checkpoints, output.txt, a measurement
waits for   the process
unblocked by  its end, the time limit, a signal
"""

import contextlib
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

import numpy as np

from jaxvla.layout import ROLES
from jaxvla.scaling.sweep_plan import Trial

Measurement = dict[str, float]
"""Name -> value of one run; NaN where there is none."""

HOST_DEVICES_FLAG = "--xla_force_host_platform_device_count"
_POLL_S = 0.2
_GRACE_S = 20.0
"""From SIGTERM to SIGKILL."""
_RATES = ("env_steps", "useful_env_steps", "chunk_queries", "updates")


class TrialFailedError(Exception):
    """The run gave no measurement. The message says why in one line."""


class SweepStoppedError(Exception):
    """A signal asked to stop during a run."""


def trial_environment(host_devices: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Environment variables of a trial.

    Args:
      host_devices: devices to make of the CPUs; 0: leave the devices as they are.
      environment: of this process.
    """
    if not host_devices:
        return dict(environment)
    given = re.sub(rf"{HOST_DEVICES_FLAG}=\S*", "", environment.get("XLA_FLAGS", ""))
    flags = " ".join([*given.split(), f"{HOST_DEVICES_FLAG}={host_devices}"])
    return {**environment, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


class TrialRunner:
    """Runs trials as processes."""

    def __init__(
        self,
        *,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        timeout_s: float,
        stop_requested: threading.Event,
        program: Sequence[str] = (sys.executable, "-m", "jaxvla.main"),
    ):
        """Args:
        arguments: of the program, --config and all settings of the sweep's own command line.
        environment: of the processes.
        timeout_s: of a run.
        stop_requested: set by signals.
        program: what runs.
        """
        self._command = [*program, *arguments]
        self._environment = dict(environment)
        self._timeout_s = timeout_s
        self._stop_requested = stop_requested

    def run(self, trial: Trial, directory: pathlib.Path) -> Measurement:
        """Runs a trial once.

        Args:
          trial: what to run.
          directory: for its files; what is in it is deleted.

        Raises:
          TrialFailedError: it failed or took too long.
          SweepStoppedError: a stop was asked for; the directory is gone.
        """
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        settings = [f"--config.{name}={value}" for name, value in trial.settings().items()]
        # The last of several arguments with one name is the one in force.
        command = [*self._command, *settings, f"--workdir={directory / 'run'}", "--job=train"]
        start_s = time.monotonic()
        try:
            code = self._wait(command, directory / "output.txt")
        except SweepStoppedError:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        finally:
            shutil.rmtree(directory / "run" / "checkpoints", ignore_errors=True)
        if code:
            raise TrialFailedError(_why(code, directory / "output.txt"))
        measured = read_measurement(
            directory / "run", first=trial.first_update, last=trial.last_update
        )
        return measured | {"duration_s": time.monotonic() - start_s}

    def _wait(self, command: list[str], output: pathlib.Path) -> int:
        """Runs a process to its end; returns its exit code."""
        with output.open("wb") as file:
            try:
                return run_process(
                    command,
                    environment=self._environment,
                    output=file,
                    timeout_s=self._timeout_s,
                    stop_requested=self._stop_requested,
                )
            except subprocess.TimeoutExpired:
                limit = f"took longer than sweep.timeout_s = {self._timeout_s:g}"
                raise TrialFailedError(limit) from None


def run_process(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    output: IO[bytes] | None,
    timeout_s: float,
    stop_requested: threading.Event,
) -> int:
    """Runs a process to its end, whatever that is; nothing that it has started is left then.

    Args:
      command: with its arguments.
      environment: of the process.
      output: file for what it writes; None: where this process writes.
      timeout_s: after which it is ended.
      stop_requested: set by signals. Those of the terminal do not reach the process itself.

    Returns:
      Its exit code, -N for signal N.

    Raises:
      subprocess.TimeoutExpired: it took longer.
      SweepStoppedError: a stop was asked for.
    """
    deadline_s = time.monotonic() + timeout_s
    process = subprocess.Popen(
        command,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
        start_new_session=True,
    )
    try:
        while True:
            try:
                return process.wait(_POLL_S)
            except subprocess.TimeoutExpired:
                if stop_requested.is_set():
                    raise SweepStoppedError from None
                if time.monotonic() > deadline_s:
                    raise
    finally:
        _end(process)


def _end(process: subprocess.Popen) -> None:
    """Ends the process, and what it has started."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
    with contextlib.suppress(ProcessLookupError):  # nothing is left of it
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _why(code: int, output: pathlib.Path) -> str:
    """One line on a run that failed: its last error, else its last line."""
    lines = [x for x in output.read_text(errors="replace").splitlines() if x.strip()]
    errors = [x for x in lines if re.search(r"error", x, re.IGNORECASE)]
    last = (errors or lines or ["no output"])[-1].strip()
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"{how}: {last[:500]}"


def read_measurement(run: pathlib.Path, *, first: int, last: int) -> Measurement:
    """What the files of a finished run say of its updates after the warm-up.

    Rates are means over the time between two updates, utilisation and staleness means over the
    updates in between, weighted by time and alike. Latencies are the waits of env groups for
    inference.

    Args:
      run: its work directory.
      first: update at whose end measuring begins, at least 1.
      last: update at whose end it stops.

    Raises:
      TrialFailedError: something is missing, or was compiled while it was measured.
    """
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        records = {x["update"]: x for x in map(json.loads, lines)}
        summary = json.loads((run / "summary.json").read_text())
        window = [records[update] for update in range(first, last + 1)]
    except (OSError, ValueError, KeyError) as error:
        raise TrialFailedError(f"its files are not complete: {error!r}") from error
    if window[-1]["serving/recompiles"]:
        raise TrialFailedError("inference was compiled anew after it was ready")
    times_s = np.asarray([x["time_s"] for x in window], np.float64)
    spent_s, measured = np.diff(times_s), window[1:]
    found = {f"{name}_per_s": _mean(measured, f"rate/{name}_per_s", spent_s) for name in _RATES}
    for name in _utilisation_names(measured):
        found[name] = _mean(measured, name, spent_s)
    found["staleness_mean"] = _mean(measured, "queue/staleness/mean", np.ones_like(spent_s))
    found["staleness_max"] = max(x["queue/staleness/max"] for x in measured)
    waits_ms = inference_waits_ms(run / "trace.json", times_s[0], times_s[-1])
    for percent in (50, 99):
        value = np.percentile(waits_ms, percent) if waits_ms else math.nan
        found[f"chunk_latency_ms_p{percent}"] = float(value)
    found["peak_rss_mib"] = summary["peak_rss_mib"] or math.nan
    found["peak_device_mib"] = summary["peak_device_mib"] or math.nan
    found["compile_s"] = summary["compile_s"] or math.nan
    found["measured_s"] = float(spent_s.sum())
    return found


def _utilisation_names(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of all records: an unusual reason of waiting need not be in each."""
    names = dict.fromkeys(name for record in records for name in record)
    return [name for name in names if name.startswith(tuple(f"utilisation/{r}/" for r in ROLES))]


def _mean(records: Sequence[Mapping[str, Any]], name: str, weights: np.ndarray) -> float:
    """Weighted mean; 0 where a record lacks the name, NaN if one has no value (null)."""
    values = [record.get(name, 0.0) for record in records]
    array = np.asarray([math.nan if x is None else x for x in values], np.float64)
    return float(np.average(array, weights=weights))


def inference_waits_ms(trace: pathlib.Path, start_s: float, end_s: float) -> list[float]:
    """Durations of all waits for inference that lie within a window of a run.

    Args:
      trace: trace.json of the run.
      start_s: seconds since the run began.
      end_s: the same.
    """
    events = json.loads(trace.read_text())["traceEvents"]
    waits = [x for x in events if x["ph"] == "X" and x.get("args") == {"on": "inference"}]
    return [
        x["dur"] / 1e3
        for x in waits
        if start_s <= x["ts"] / 1e6 and x["ts"] + x["dur"] <= end_s * 1e6
    ]
