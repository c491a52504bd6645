"""Starting the processes of a run on this machine. No jax.

A process gets its spec on its standard input, which stays open: when the supervisor dies it is
closed, and the process ends itself (`runtime.replica`). So nothing is left behind.
"""

import contextlib
import logging
import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Protocol

from jaxvla.runtime.replica_spec import ReplicaSpec

_LOG = logging.getLogger(__name__)

KILL_WAIT_S = 10.0
"""For a killed process to be gone."""


class Launched(Protocol):
    """A process that was started."""

    def kill(self) -> None:
        """Ends it at once. It may have ended already."""
        ...


class Launcher(Protocol):
    """A place where processes can be started."""

    def launch(self, spec: ReplicaSpec, on_end: Callable[[str], None]) -> Launched:
        """Starts a process.

        Args:
          spec: what it shall be.
          on_end: called once, in some thread, when it has ended, with how in a few words.
        """
        ...

    def close(self) -> None:
        """Ends what is left of all processes, and frees the place."""
        ...


class ProcessLauncher:
    """Child processes. Implements Launcher."""

    def __init__(
        self, log_dir: pathlib.Path, environments: Mapping[str, Mapping[str, str]] | None = None
    ):
        """Args:
        log_dir: where the processes' output goes, NAME.out.
        environments: variables that a process of that name has beside ours, such as those that
          show it its devices (`runtime.devices`).
        """
        self._log_dir = log_dir
        self._environments = environments or {}
        self._children: list[_Child] = []

    def launch(self, spec: ReplicaSpec, on_end: Callable[[str], None]) -> Launched:
        """See `Launcher.launch`."""
        self._log_dir.mkdir(parents=True, exist_ok=True)
        environment = self._environments.get(spec.name, {})
        child = _Child(spec, self._log_dir / f"{spec.name}.out", on_end, environment)
        self._children.append(child)
        return child

    def close(self) -> None:
        """See `Launcher.close`."""
        for child in self._children:
            child.kill()
        for child in self._children:
            child.join(KILL_WAIT_S)


class _Child:
    """A child process and the thread that waits for its end."""

    def __init__(
        self,
        spec: ReplicaSpec,
        log: pathlib.Path,
        on_end: Callable[[str], None],
        environment: Mapping[str, str],
    ):
        with open(log, "ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "jaxvla.runtime.replica"],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=os.environ | environment,
                # Ctrl-C is for the supervisor alone.
                start_new_session=True,
            )
        self._on_end = on_end
        self._thread = threading.Thread(target=self._wait, name=f"runtime/{spec.name}", daemon=True)
        self._thread.start()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(spec.to_json().encode() + b"\n")
            self._process.stdin.flush()
        except (OSError, ValueError):  # it has ended already, which the thread tells
            _LOG.warning("%s ended before it had its spec", spec.name)

    def kill(self) -> None:
        """See `Launched.kill`. With it go the processes that it has started."""
        if self._process.poll() is None:
            self._kill_group()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def join(self, timeout_s: float) -> None:
        """Waits until it is gone."""
        self._thread.join(timeout_s)

    def _wait(self) -> None:
        code = self._process.wait()
        self._kill_group()  # env processes that it left behind
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._on_end(f"signal {-code}" if code < 0 else f"exit code {code}")
