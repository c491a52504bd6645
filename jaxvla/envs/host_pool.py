"""A pool of worker processes, one environment in each, with observations in shared memory.

    caller                                    worker process i (host_worker.py)
    submit_reset, submit_step_chunk  ---->    runs the call on its own env
    wait, collect                    <----    writes row i of the shared memory, then answers

Consumes: calls for single envs. Produces: `HostResult`s and rows of `images` and `state`.
Waits for: an answer, the end of the process, or the deadline of the call, whichever is first.
Is unblocked by: any of the three, or `close` from another thread.

Every env goes on by itself: a slow one delays nobody who does not collect it. A process that
dies, raises or misses a deadline is killed and replaced while the others go on; the call it
was serving gives a `HostResult` with `failed` set, and the env has to be reset.

Requests and answers are JSON datagrams on a socket pair: no pickle in either direction. The
shared memory is an anonymous file (memfd), so nothing is left behind in the file system
however the processes end. Workers are started with exec, not with fork or multiprocessing:
that is safe beside JAX's threads, spares them an import of the caller's main module, and puts
environment variables and log files in place before they import anything. Linux only.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np

from jaxvla.envs.host_worker import encode, map_rows, receive, row_bytes

_EXIT_GRACE_S = 2.0
"""How long a worker that closed its channel may take to exit, so that its status is its own."""

_KILL_GRACE_S = 5.0
"""How long a killed worker is waited for; one stuck in a driver is left to the kernel."""

_LOG_TAIL_LINES = 20

_BOOTSTRAP = """\
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal
from jaxvla.envs.host_worker import serve
serve(*map(int, sys.argv[1:]))
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSpec:
    """How a worker builds its env, and the shapes it must produce."""

    env: str
    """"module:attribute" of a `HostEnv` class."""
    config: dict[str, Any]
    """The class's only argument: plain JSON values."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables, set before the process imports anything."""
    image_shape: tuple[int, int, int, int]
    """[C, h, w, 3]."""
    state_dim: int
    action_dim: int


@dataclass(frozen=True, kw_only=True, slots=True)
class HostResult:
    """Answer to one call for one env. After a reset only `failed` and `reason` matter."""

    reward: float = 0.0
    """Sum over the executed steps."""
    success: bool = False
    """The episode ended by success; the env's row still shows the frame before the chunk."""
    num_steps: int = 0
    """Control steps executed."""
    failed: bool = False
    """The process died, raised or hung; it was replaced and the env must be reset."""
    reason: str = ""
    """Why it failed, and where its log is; empty otherwise."""


@dataclass(kw_only=True, slots=True)
class _Worker:
    """The pool's side of one worker process."""

    process: subprocess.Popen[bytes]
    channel: socket.socket
    log: Path
    call: str = ""
    """Call that is being served; empty when idle."""
    deadline_s: float = 0.0
    """When that call counts as hung, on the monotonic clock."""
    is_ready: bool = False
    """An episode is running: action chunks are accepted."""
    num_failures: int = 0
    """Failures since the last chunk that succeeded, over replacements."""


class HostPool:
    """Worker processes for E envs.

    Meant for one caller thread; only `close` may be called while another method blocks. At
    most one call per env is outstanding. Rows `images[i]` and `state[i]` may be read between
    `collect(i)` and the next submit for env i.

    Attributes:
      spec: what the workers build.
      images: uint8 [E, C, h, w, 3], read-only view of the shared memory.
      state: float32 [E, S], read-only view of the shared memory.
      restarts: failures so far by cause: "exit", "signal", "exception" and "deadline".
      last_signal: name of the signal that last ended a worker, such as "SIGSEGV", or "".
      quarantined: envs that failed too often in a row and have no process any more, and why.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        num_envs: int,
        log_dir: str | Path,
        reset_timeout_s: float,
        step_timeout_s: float,
        max_failures: int = 5,
    ):
        """Starts the processes and returns without waiting for them.

        Args:
          spec: what to build.
          num_envs: processes E, at least 1.
          log_dir: directory of the logs `env-000.log` ..., which hold all output of the
            workers, and their working directory; created when missing, logs are appended to.
          reset_timeout_s: deadline of a reset, which includes starting the process and
            building the env when that has not happened yet.
          step_timeout_s: deadline of an action chunk.
          max_failures: failures of one env, without a good action chunk in between, after which
            it is quarantined.

        Raises:
          ValueError: num_envs is not positive or the spec's config is too large.
        """
        if num_envs < 1:
            raise ValueError(f"num_envs = {num_envs}: must be at least 1")
        self.spec = spec
        self.restarts: Counter[str] = Counter()
        self.last_signal = ""
        self.quarantined: dict[int, str] = {}
        self._hello = _encode_hello(spec)
        self._timeouts_s = {"reset": reset_timeout_s, "step_chunk": step_timeout_s}
        self._max_failures = max_failures
        self._log_dir = Path(log_dir)
        self._log_dir.mkdir(parents=True, exist_ok=True)
        self._memory = os.memfd_create("jaxvla-observations")
        os.ftruncate(self._memory, num_envs * row_bytes(spec.image_shape, spec.state_dim))
        self.images, self.state = map_rows(self._memory, spec.image_shape, spec.state_dim)
        self.images.flags.writeable = self.state.flags.writeable = False
        self._lock = threading.RLock()
        self._is_closed = False
        self._workers: list[_Worker] = []
        # Also runs when the pool is forgotten, and at interpreter exit.
        self._end_all = weakref.finalize(self, _end_all, self._workers, self._memory)
        self._workers.extend(self._start(index) for index in range(num_envs))

    @property
    def num_envs(self) -> int:
        return len(self._workers)

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids in the order of the envs; a replacement has a new one."""
        return tuple(worker.process.pid for worker in self._workers)

    def submit_reset(self, index: int, *, task: int, seed: int) -> None:
        """Asks env `index` to start an episode of `task`; see `HostEnv.reset`.

        Raises:
          ValueError: the env has an outstanding call, or is quarantined.
          RuntimeError: the pool is closed.
        """
        self._submit(index, {"call": "reset", "task": task, "seed": seed})

    def submit_step_chunk(self, index: int, actions: np.ndarray) -> None:
        """Asks env `index` to run `actions`, float [n, A] in [-1, 1].

        Raises:
          ValueError: wrong shape, values that are not finite, an outstanding call, or an env
            whose episode has ended (by success or failure) and was not reset.
          RuntimeError: the pool is closed.
        """
        if actions.ndim != 2 or not len(actions) or actions.shape[1] != self.spec.action_dim:
            raise ValueError(f"actions: expected [n, {self.spec.action_dim}], got {actions.shape}")
        if not np.isfinite(actions).all():
            raise ValueError(f"actions for env {index} are not finite")
        if not self._workers[index].is_ready:
            raise ValueError(f"env {index} must be reset before it can be stepped")
        rows = actions.astype(np.float32).tolist()
        self._submit(index, {"call": "step_chunk", "actions": rows})

    def wait(self, timeout_s: float) -> list[int]:
        """Blocks until `collect` would not block for at least one env.

        Returns:
          Those envs, ascending: answered, dead or past their deadline. Empty when no call is
          outstanding or none has ended within `timeout_s`.

        Raises:
          RuntimeError: the pool is closed.
        """
        with self._lock:
            self._check_open()
            busy = [worker for worker in self._workers if worker.call]
            if not busy:
                return []
            first_s = min(worker.deadline_s for worker in busy) - time.monotonic()
            channels = [worker.channel for worker in busy]
            answered = connection.wait(channels, max(0.0, min(timeout_s, first_s)))
            now_s = time.monotonic()
            return [
                index
                for index, worker in enumerate(self._workers)
                if worker.call and (worker.channel in answered or worker.deadline_s <= now_s)
            ]

    def collect(self, index: int) -> HostResult:
        """Blocks until the outstanding call of env `index` has ended and returns its result.

        Raises:
          ValueError: env `index` has no outstanding call.
          RuntimeError: the last env that was left has failed `max_failures` times in a row (the
            message ends with the tail of its log), which closes the pool; or the pool is closed.
        """
        with self._lock:
            self._check_open()
            worker = self._workers[index]
            if not worker.call:
                raise ValueError(f"env {index} has no outstanding call to collect")
            remaining_s = max(0.0, worker.deadline_s - time.monotonic())
            if not connection.wait([worker.channel], remaining_s):
                limit_s = self._timeouts_s[worker.call]
                return self._fail(index, "deadline", f"no answer within {limit_s:g} s")
            answer = receive(worker.channel)
            if answer is None:
                return self._fail(index, *self._describe_exit(worker))
            if "error" in answer:
                return self._fail(index, "exception", answer["error"])
            if worker.call == "step_chunk":  # resets may work in an env that cannot be stepped
                worker.num_failures = 0
            worker.call = ""
            worker.is_ready = not answer["success"]
            return HostResult(**answer)

    def close(self) -> None:
        """Ends every process. Idempotent; a thread blocked in the pool raises RuntimeError."""
        self._is_closed = True
        for worker in self._workers:
            worker.process.kill()  # wakes whoever waits for it, who then lets go of the lock
        with self._lock:
            self._end_all()

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("the pool is closed")

    def _submit(self, index: int, request: dict[str, Any]) -> None:
        with self._lock:
            self._check_open()
            worker = self._workers[index]
            if worker.call:
                raise ValueError(f"env {index} still runs {worker.call}; collect it first")
            if index in self.quarantined:
                raise ValueError(f"env {index} is quarantined: {self.quarantined[index]}")
            message = encode(request)
            worker.call = request["call"]
            worker.deadline_s = time.monotonic() + self._timeouts_s[worker.call]
            _send(worker.channel, message)

    def _start(self, index: int, num_failures: int = 0) -> _Worker:
        """Starts the process of env `index`; it begins to import and build at once."""
        channel, remote = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        log = self._log_dir / f"env-{index:03d}.log"
        descriptors = (remote.fileno(), self._memory)
        arguments = [str(number) for number in (*descriptors, index)]
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        variables = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **self.spec.environment}
        with remote, log.open("ab") as output:
            process = subprocess.Popen(
                # -P: modules in the working directory must not shadow others.
                [sys.executable, "-P", "-X", "faulthandler", "-c", _BOOTSTRAP, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=descriptors,
                env={**os.environ, **variables},
                cwd=self._log_dir,  # simulators drop files of their own, as MUJOCO_LOG.TXT
            )
        _send(channel, self._hello)
        return _Worker(process=process, channel=channel, log=log, num_failures=num_failures)

    def _describe_exit(self, worker: _Worker) -> tuple[str, str]:
        """Returns cause and detail for a process that closed its channel."""
        try:
            status = worker.process.wait(_EXIT_GRACE_S)
        except subprocess.TimeoutExpired:
            return "exit", "closed its channel"
        if status >= 0:
            return "exit", f"exited with status {status}"
        self.last_signal = signal.Signals(-status).name
        return "signal", f"killed by {self.last_signal}"

    def _fail(self, index: int, cause: str, detail: str) -> HostResult:
        """Ends the process of env `index`, starts its replacement and counts the failure. One that
        fails again and again gets none: it would take the time of those that work."""
        self._check_open()  # close has killed it: no failure, and nothing to replace
        worker = self._workers[index]
        _end(worker)
        self.restarts[cause] += 1
        num_failures = worker.num_failures + 1
        reason = f"env {index}, {worker.call}: {detail} (log: {worker.log})"
        if num_failures < self._max_failures:
            self._workers[index] = self._start(index, num_failures)
            return HostResult(failed=True, reason=reason)
        reason = f"{num_failures} failures in a row; the last: {reason}"
        self.quarantined[index] = reason
        worker.call, worker.is_ready = "", False
        if len(self.quarantined) == self.num_envs:
            self.close()
            tail = "\n".join(_last_lines(worker.log))
            raise RuntimeError(f"{reason}\n{tail}")
        return HostResult(failed=True, reason=reason)


def _encode_hello(spec: WorkerSpec) -> bytes:
    """First message to a worker, see `host_worker.serve`."""
    return encode(
        {
            "env": spec.env,
            "config": spec.config,
            "image_shape": spec.image_shape,
            "state_dim": spec.state_dim,
        }
    )


def _send(channel: socket.socket, message: bytes) -> None:
    """Sends to a worker; one that is dead is reported by `collect`, which finds it closed."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        channel.sendall(message)


def _end(worker: _Worker) -> None:
    """Kills a worker, which holds nothing worth saving, and reaps it."""
    worker.process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        worker.process.wait(_KILL_GRACE_S)
    worker.channel.close()


def _end_all(workers: list[_Worker], memory_fd: int) -> None:
    for worker in workers:
        worker.process.kill()  # all before the first wait, so that their ends overlap
    for worker in workers:
        _end(worker)
    os.close(memory_fd)


def _last_lines(log: Path) -> list[str]:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 8192))
        return file.read().decode(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
