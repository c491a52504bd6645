"""A training run as a process of its own, watched line by line."""

import json
import os
import pathlib
import re
import select
import signal
import subprocess
import sys
import uuid
from collections.abc import Mapping
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
DEVICE_FLAG = "--xla_force_host_platform_device_count"
MARK = "JAXVLA_TEST_RUN"
"""Environment variable by which all processes of a run are known."""


class RunProcess:
    """`python -m jaxvla.main --config=configs/debug.py` with overrides."""

    def __init__(
        self,
        workdir: pathlib.Path,
        *arguments: str,
        num_devices: int = 1,
        environment: Mapping[str, str] | None = None,
    ):
        self.workdir = workdir
        self.mark = uuid.uuid4().hex
        self.lines: list[str] = []
        flags = re.sub(rf"{DEVICE_FLAG}=\d+", "", os.environ.get("XLA_FLAGS", ""))
        own = {"XLA_FLAGS": f"{flags} {DEVICE_FLAG}={num_devices}".strip(), MARK: self.mark}
        command = [sys.executable, "-m", "jaxvla.main", "--config=configs/debug.py"]
        self._process = subprocess.Popen(
            [*command, f"--workdir={workdir}", *arguments],
            cwd=ROOT,
            env=os.environ | own | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def until(self, pattern: str) -> str:
        """Reads lines up to the first that matches."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line.rstrip("\n"))
            if re.search(pattern, line):
                return self.lines[-1]
        raise AssertionError(f"no line matches {pattern!r}:\n" + "\n".join(self.lines))

    def send(self, which: signal.Signals) -> None:
        """Sends a signal."""
        self._process.send_signal(which)

    def finish(self) -> int:
        """Reads to the end; returns the exit code."""
        assert self._process.stdout is not None
        self.lines += [line.rstrip("\n") for line in self._process.stdout]
        return self._process.wait()

    def expect(self, code: int) -> "RunProcess":
        """Reads to the end and requires the exit code."""
        actual = self.finish()
        assert actual == code, f"exit code {actual}:\n" + "\n".join(self.lines)
        return self

    def descendants(self, part: str = "") -> list[int]:
        """Ids of the run's processes, however they were started, with text in the command line."""
        found = []
        for process in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                is_own = f"{MARK}={self.mark}".encode() in (process / "environ").read_bytes()
                command = (process / "cmdline").read_bytes().decode(errors="replace")
            except OSError:  # it has ended meanwhile, or is another user's
                continue
            if is_own and command and part in command:
                found.append(int(process.name))
        return found

    def records(self) -> list[dict[str, Any]]:
        """metrics.jsonl."""
        return [json.loads(x) for x in (self.workdir / "metrics.jsonl").read_text().splitlines()]

    def summary(self) -> dict[str, Any]:
        """summary.json."""
        return json.loads((self.workdir / "summary.json").read_text())

    def digests(self, step: int) -> dict[str, str]:
        """Leaf path -> SHA-256 of the arrays of a checkpoint."""
        record = self.workdir / "checkpoints" / str(step) / "record" / "metadata"
        return json.loads(record.read_text())["digests"]


def require_nothing_left(run: RunProcess) -> None:
    """After the end of a run: no process of it, and nothing in its directory that was to go."""
    assert run.descendants() == []
    left = [x for x in run.workdir.rglob("*") if x.name.endswith((".partial", "-checkpoint-tmp"))]
    assert left == []


def wait_for_end(pid: int) -> None:
    """Of a process that is no child of this one."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], 30.0)[0], f"process {pid} lives on"
    finally:
        os.close(descriptor)


def lost(summary: Mapping[str, Any]) -> int:
    """Trajectories given up for other reasons than the end of the run."""
    ends = ("queue/dropped/finished", "queue/dropped/shutdown")
    totals = summary["totals"].items()
    return sum(n for name, n in totals if name.startswith("queue/dropped/") and name not in ends)
