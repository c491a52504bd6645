"""The pool of worker processes: independent progress, and every way a worker can fail."""

import os
import pathlib
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # workers inherit sys.path

import fake_host_env as fake

from jaxvla.envs.host_pool import HostPool, HostResult, WorkerSpec

TIMEOUT_S = 60.0
"""Far above what any call takes: only a lost wake-up can reach it."""
BAD_IMAGES = "images: expected uint8 [2, 4, 4, 3], got float32"
BAD_STATE = "state: expected float32 [3], got float32 [2]"
fault = pytest.mark.fault


class PoolFactory:
    """Makes pools of FakeHostEnv in a test's directory and closes them at its end."""

    def __init__(self, directory: pathlib.Path):
        self.directory = directory
        self._pools: list[HostPool] = []

    def __call__(self, config: dict[str, Any] | None = None, **options: Any) -> HostPool:
        spec = WorkerSpec(
            env="fake_host_env:FakeHostEnv",
            config={"directory": str(self.directory), **(config or {})},
            environment={"FAKE_VARIABLE": "a kitchen"},
            image_shape=fake.IMAGE_SHAPE,
            state_dim=fake.STATE_DIM,
            action_dim=fake.ACTION_DIM,
        )
        defaults = {
            "num_envs": 1,
            "log_dir": self.directory / "logs",
            "reset_timeout_s": TIMEOUT_S,
            "step_timeout_s": TIMEOUT_S,
        }
        self._pools.append(HostPool(spec, **{**defaults, **options}))
        return self._pools[-1]

    def close(self) -> None:
        while self._pools:
            self._pools.pop().close()


@pytest.fixture
def make_pool(tmp_path: pathlib.Path) -> Iterator[PoolFactory]:
    factory = PoolFactory(tmp_path)
    yield factory
    factory.close()


def chunk(kind: float, num_steps: int = 1, reward: float = 0.0) -> np.ndarray:
    return np.tile(np.array([kind, reward], np.float32), (num_steps, 1))


def reset(pool: HostPool, index: int = 0, task: int = 0, seed: int = 0) -> HostResult:
    pool.submit_reset(index, task=task, seed=seed)
    return pool.collect(index)


def step(pool: HostPool, actions: np.ndarray, index: int = 0) -> HostResult:
    pool.submit_step_chunk(index, actions)
    return pool.collect(index)


def make_gate(directory: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """FIFOs by which an env tells that it is inside a call, and is let go."""
    entered, gate = directory / "entered", directory / "gate"
    os.mkfifo(entered)
    os.mkfifo(gate)
    return entered, gate


def assert_exits(pid: int) -> None:
    """Waits for the end of a process, which need not be a child."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    readable, _, _ = select.select([descriptor], [], [], TIMEOUT_S)
    if not readable:  # leave nothing behind, even when the test fails
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    os.close(descriptor)
    assert readable, f"process {pid} did not end by itself"


def test_results_and_shared_rows(make_pool: PoolFactory):
    pool = make_pool(num_envs=2)
    pool.submit_reset(0, task=3, seed=11)
    pool.submit_reset(1, task=4, seed=22)
    assert [pool.collect(1), pool.collect(0)] == [HostResult(), HostResult()]
    assert step(pool, chunk(fake.STEP, 5, reward=0.25), index=1) == HostResult(
        reward=1.25, num_steps=5
    )
    np.testing.assert_array_equal(pool.state, [[3, 11, 0], [4, 22, 5]])
    assert pool.images.shape == (2, *fake.IMAGE_SHAPE)
    assert (pool.images[0] == 0).all() and (pool.images[1] == 5).all()
    assert pool.restarts.total() == 0


def test_worker_environment_and_output(make_pool: PoolFactory, capfd: pytest.CaptureFixture[str]):
    pool = make_pool()
    reset(pool)
    pool.close()
    logs = make_pool.directory / "logs"
    assert (logs / "env-000.log").read_text() == f"built a kitchen in {logs}, jax: False\n"
    assert capfd.readouterr() == ("", "")


def test_slow_env_delays_nobody(make_pool: PoolFactory):
    entered, gate = make_gate(make_pool.directory)
    pool = make_pool(num_envs=2)
    for index in range(2):
        reset(pool, index)
    pool.submit_step_chunk(0, chunk(fake.GATE))
    entered.read_text()
    for _ in range(3):
        pool.submit_step_chunk(1, chunk(fake.STEP))
        assert pool.wait(TIMEOUT_S) == [1]
        assert not pool.collect(1).failed
    assert pool.wait(0.0) == []
    gate.write_text("")
    assert pool.wait(TIMEOUT_S) == [0]
    assert pool.collect(0) == HostResult(num_steps=1)
    np.testing.assert_array_equal(pool.state[:, 2], [1, 3])


@pytest.mark.fault(2)
def test_kill_in_the_middle_of_a_call(make_pool: PoolFactory):
    entered, _ = make_gate(make_pool.directory)
    pool = make_pool(num_envs=2)
    for index in range(2):
        reset(pool, index)
    pids = pool.pids
    pool.submit_step_chunk(0, chunk(fake.GATE))
    entered.read_text()
    os.kill(pids[0], signal.SIGKILL)
    assert pool.wait(TIMEOUT_S) == [0]
    result = pool.collect(0)
    assert result.failed and "step_chunk: killed by SIGKILL" in result.reason
    assert (pool.restarts, pool.last_signal) == ({"signal": 1}, "SIGKILL")
    assert pool.pids[0] != pids[0] and pool.pids[1] == pids[1]
    assert not step(pool, chunk(fake.STEP), index=1).failed
    with pytest.raises(ValueError, match="env 0 must be reset"):
        pool.submit_step_chunk(0, chunk(fake.STEP))
    assert not reset(pool, 0, task=6).failed
    np.testing.assert_array_equal(pool.state[0], [6, 0, 0])


def test_death_while_idle_is_reported_by_the_next_call(make_pool: PoolFactory):
    pool = make_pool()
    reset(pool)
    os.kill(pool.pids[0], signal.SIGKILL)
    assert_exits(pool.pids[0])
    assert "killed by SIGKILL" in step(pool, chunk(fake.STEP)).reason


@pytest.mark.parametrize(
    ("kind", "cause", "detail"),
    [
        (fake.RAISE, "exception", "ArithmeticError: the gripper left the table"),
        pytest.param(fake.EXIT, "exit", "exited with status 7", marks=fault(1)),
        pytest.param(fake.SEGFAULT, "signal", "killed by SIGSEGV", marks=fault(2)),
        pytest.param(fake.BAD_IMAGES, "exception", BAD_IMAGES, marks=fault(5)),
        pytest.param(fake.BAD_STATE, "exception", BAD_STATE, marks=fault(5)),
        (fake.BAD_STEPS, "exception", "num_steps: expected 1 to 1, got 2"),
        (fake.NO_FRAME, "exception", "frame: missing"),
    ],
)
def test_failures_are_named_and_survived(
    make_pool: PoolFactory, kind: float, cause: str, detail: str
):
    pool = make_pool()
    reset(pool)
    result = step(pool, chunk(kind))
    assert result.failed and detail in result.reason
    assert str(make_pool.directory / "logs" / "env-000.log") in result.reason
    assert pool.restarts == {cause: 1}
    assert not reset(pool).failed


@pytest.mark.fault(3)
def test_hanging_env_is_replaced_at_its_deadline(make_pool: PoolFactory):
    pool = make_pool(step_timeout_s=0.2)
    reset(pool)
    pid = pool.pids[0]
    pool.submit_step_chunk(0, chunk(fake.HANG))
    assert pool.wait(TIMEOUT_S) == [0]
    result = pool.collect(0)
    assert result.failed and "no answer within 0.2 s" in result.reason
    assert pool.restarts == {"deadline": 1}
    assert_exits(pid)
    assert not reset(pool).failed


def test_restart_budget_counts_failures_in_a_row(make_pool: PoolFactory):
    pool = make_pool(max_failures=2)
    for _ in range(2):  # a good chunk in between starts the count again
        reset(pool)
        assert not step(pool, chunk(fake.STEP)).failed
        assert step(pool, chunk(fake.RAISE)).failed
    reset(pool)
    pool.submit_step_chunk(0, chunk(fake.SUCCEED))
    assert pool.collect(0) == HostResult(reward=1.0, success=True, num_steps=1)


@pytest.mark.parametrize("config", [{"raise_in_build": True}, {"raise_in_reset": True}])
def test_restart_budget_ends_with_the_log(make_pool: PoolFactory, config: dict[str, bool]):
    pool = make_pool(config, max_failures=3)
    assert reset(pool).failed and reset(pool).failed
    pool.submit_reset(0, task=0, seed=0)
    with pytest.raises(RuntimeError) as error:
        pool.collect(0)
    message = str(error.value)
    assert message.startswith("3 failures in a row; the last: env 0, reset: ")
    assert "Traceback" in message  # the tail of the log
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit_reset(0, task=0, seed=0)


@pytest.mark.fault(5)
def test_an_env_that_fails_again_and_again_is_quarantined(make_pool: PoolFactory):
    """It gets no process any more; the other one works on, until it fails as often."""
    pool = make_pool(num_envs=2, max_failures=2)
    reset(pool, 0)
    assert step(pool, chunk(fake.BAD_STATE)).failed and pool.quarantined == {}
    reset(pool, 0)  # works, and does not count
    pid = pool.pids[0]
    reason = step(pool, chunk(fake.BAD_STATE)).reason
    assert reason.startswith("2 failures in a row; the last: env 0, step_chunk: ")
    assert pool.quarantined == {0: reason} and BAD_STATE in reason
    assert_exits(pid)
    for call in (lambda: reset(pool, 0), lambda: step(pool, chunk(fake.STEP))):
        with pytest.raises(ValueError, match=r"env 0 (is quarantined|must be reset)"):
            call()
    reset(pool, 1)
    assert not step(pool, chunk(fake.STEP), index=1).failed
    pool.submit_step_chunk(1, chunk(fake.RAISE))
    assert pool.wait(TIMEOUT_S) == [1] and pool.collect(1).failed
    reset(pool, 1)
    with pytest.raises(RuntimeError, match="2 failures in a row; the last: env 1"):
        step(pool, chunk(fake.RAISE), index=1)
    with pytest.raises(RuntimeError, match="closed"):
        reset(pool, 1)


def test_misuse_is_refused(make_pool: PoolFactory):
    pool = make_pool()
    with pytest.raises(ValueError, match="must be reset"):
        pool.submit_step_chunk(0, chunk(fake.STEP))
    with pytest.raises(ValueError, match="no outstanding call"):
        pool.collect(0)
    assert pool.wait(TIMEOUT_S) == []
    pool.submit_reset(0, task=0, seed=0)
    with pytest.raises(ValueError, match="still runs reset"):
        pool.submit_reset(0, task=0, seed=0)
    pool.collect(0)
    for actions in (np.zeros((1, 3)), np.zeros((0, 2)), np.zeros(2)):
        with pytest.raises(ValueError, match=r"expected \[n, 2\]"):
            pool.submit_step_chunk(0, actions)
    with pytest.raises(ValueError, match="not finite"):
        pool.submit_step_chunk(0, np.array([[0.0, np.nan]]))
    with pytest.raises(ValueError, match="read-only"):
        pool.images[0] = 0
    step(pool, chunk(fake.SUCCEED))
    with pytest.raises(ValueError, match="must be reset"):
        pool.submit_step_chunk(0, chunk(fake.STEP))


def test_pool_arguments_are_checked(make_pool: PoolFactory):
    with pytest.raises(ValueError, match="num_envs = 0"):
        make_pool(num_envs=0)
    with pytest.raises(ValueError, match="more than 131072 allowed"):
        make_pool({"blob": "x" * 200_000})


def test_actions_arrive_bit_by_bit(make_pool: PoolFactory):
    pool = make_pool()
    reset(pool)
    values = np.random.default_rng(0).uniform(-1, 1, 40).astype(np.float32)
    actions = np.stack([np.zeros_like(values), values], axis=1)
    assert step(pool, actions).reward == float(values.sum())


@pytest.mark.fault(35)
def test_close_leaves_nothing(make_pool: PoolFactory):
    shared_before = set(os.listdir("/dev/shm"))
    descriptors_before = set(os.listdir("/proc/self/fd"))
    pool = make_pool(num_envs=2)
    reset(pool, 0)
    pool.submit_step_chunk(0, chunk(fake.HANG))
    pids = pool.pids
    pool.close()
    pool.close()
    for pid in pids:
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, 0)  # dead and reaped
    with pytest.raises(RuntimeError, match="closed"):
        pool.wait(0.0)
    assert set(os.listdir("/dev/shm")) == shared_before
    make_pool.close()
    del pool  # the rows stay readable until the last view is gone
    # Others may close theirs meanwhile.
    assert set(os.listdir("/proc/self/fd")) <= descriptors_before


def test_close_wakes_a_blocked_collect(make_pool: PoolFactory):
    entered, _ = make_gate(make_pool.directory)
    pool = make_pool()
    reset(pool)
    pool.submit_step_chunk(0, chunk(fake.GATE))
    entered.read_text()
    errors: list[BaseException] = []

    def collect() -> None:
        try:
            pool.collect(0)
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=collect)
    thread.start()
    pool.close()
    thread.join(TIMEOUT_S)
    assert not thread.is_alive()
    assert [str(error) for error in errors] == ["the pool is closed"]
    assert pool.restarts.total() == 0


PARENT = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import fake_host_env as fake
import numpy as np
from jaxvla.envs.host_pool import HostPool, WorkerSpec
spec = WorkerSpec(env="fake_host_env:FakeHostEnv", config=dict(), image_shape=fake.IMAGE_SHAPE,
                  state_dim=fake.STATE_DIM, action_dim=fake.ACTION_DIM)
pool = HostPool(spec, num_envs=2, log_dir={logs!r}, reset_timeout_s=60, step_timeout_s=60)
for index in range(2):
    pool.submit_reset(index, task=0, seed=0)
    pool.collect(index)
pool.submit_step_chunk(0, np.array([[fake.HANG, 0]]))
print(*pool.pids, flush=True)
{end}
"""


@pytest.mark.fault(35)
@pytest.mark.parametrize(
    "end", ["", "raise SystemExit(1)", "os.kill(os.getpid(), signal.SIGKILL)", "os._exit(0)"]
)
def test_workers_end_with_their_parent(tmp_path: pathlib.Path, end: str):
    tests = str(pathlib.Path(__file__).parent)
    script = PARENT.format(tests=tests, logs=str(tmp_path), end=end)
    parent = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S
    )
    pids = [int(pid) for pid in parent.stdout.split()]
    assert len(pids) == 2
    for pid in pids:
        assert_exits(pid)


def test_workers_ignore_ctrl_c(make_pool: PoolFactory):
    pool = make_pool()
    reset(pool)
    os.kill(pool.pids[0], signal.SIGINT)
    assert not step(pool, chunk(fake.STEP)).failed
