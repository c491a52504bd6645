"""A learner of two processes with 4 devices each, and one of one process with 8."""

import contextlib
import os
import pathlib
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from multihost_cases import (
    CASES,
    GROUPS_TARGET,
    NUM_UPDATES,
    PER_UPDATE,
    Case,
    ListQueue,
    flat,
    groups_of,
    run_learner,
    target_of,
)

from jaxvla.checkpoint import Checkpointer
from jaxvla.learning.learner import Learner, Progress
from jaxvla.transport.weight_copy import gather_leaves

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

HERE = pathlib.Path(__file__).parent
TIMEOUT_S = 600.0
HEARTBEAT_S = 10.0


def free_port() -> int:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        return server.getsockname()[1]


class Pair:
    """Two processes that play a scenario of multihost_process.py."""

    def __init__(self, directory: pathlib.Path, scenario: str):
        ports = [str(free_port()), str(free_port())]
        flags = re.sub(r"(device_count)=\d+", r"\1=4", os.environ["XLA_FLAGS"])
        path = os.pathsep.join([str(HERE), str(HERE.parents[1])])
        self._logs = [directory / f"{scenario}_{index}.log" for index in (0, 1)]
        self.processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    str(HERE / "multihost_process.py"),
                    *(str(index), *ports, str(directory), scenario),
                ],
                env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": path},
                stdout=log.open("w"),
                stderr=subprocess.STDOUT,
            )
            for index, log in enumerate(self._logs)
        ]

    def wait(self) -> list[int]:
        """Exit codes of both."""
        end_s = time.monotonic() + TIMEOUT_S
        return [x.wait(max(0.1, end_s - time.monotonic())) for x in self.processes]

    def log(self, index: int) -> str:
        return self._logs[index].read_text()

    def require_success(self) -> None:
        codes = self.wait()
        assert codes == [0, 0], "\n".join(self.log(index)[-3000:] for index in (0, 1))


@contextlib.contextmanager
def pair(directory: pathlib.Path, scenario: str) -> Iterator[Pair]:
    """None of the processes outlives the block."""
    both = Pair(directory, scenario)
    try:
        yield both
    finally:
        for process in both.processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def alone(case: Case, **options: Any) -> tuple[Learner, dict[str, np.ndarray]]:
    """The same run in this process, on its 8 devices."""
    queue = options.pop("queue", None) or ListQueue(case)
    learner, result = run_learner(
        case, queue=queue, fetch=lambda leaves, _: gather_leaves(leaves), **options
    )
    return learner, flat(result)


def require_close(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Compares losses, norms and parameters; returns the largest difference of a parameter."""
    largest = 0.0
    assert expected.keys() <= found.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=2e-6, err_msg=name)
        if name.startswith("params/"):
            largest = max(largest, float(np.abs(found[name] - value).max()))
    return largest


def loaded(path: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Directory with the results of all cases."""
    directory = tmp_path_factory.mktemp("by_two")
    with pair(directory, "every_case") as both:
        both.require_success()
    return directory


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_processes_compute_what_one_does(by_two: pathlib.Path, case: Case) -> None:
    _, expected = alone(case)
    found = loaded(by_two / f"{case.name}.npz")
    assert f"loss/{NUM_UPDATES - 1}/learner/grad_norm" in expected
    assert f"params/{NUM_UPDATES}/torso/kernel" in expected
    largest = require_close(found, expected)
    print(f"{case.name}: parameters differ by {largest:.2g} at most")  # noqa: T201
    moved = found[f"params/{NUM_UPDATES}/torso/kernel"] - found["params/0/torso/kernel"]
    assert np.abs(moved).max() > 1e-2


def test_a_follower_gets_its_part_only(by_two: pathlib.Path) -> None:
    """Half of every trajectory that divides, all of one that does not."""
    for name, part in (("data", 0.5), ("data_undivided", 1.0)):
        case = next(x for x in CASES if x.name == name)
        whole = sum(x.nbytes for x in jax.tree.leaves(case.trajectory(0)))
        sent = int(loaded(by_two / f"{name}.npz")["bytes_sent"])
        before = CASES.index(case)
        if before:
            sent -= int(loaded(by_two / f"{CASES[before - 1].name}.npz")["bytes_sent"])
        assert sent == part * whole * PER_UPDATE * NUM_UPDATES


def save_alone(case: Case, directory: pathlib.Path) -> None:
    """Two updates in one process, and a checkpoint."""
    learner, _ = alone(case, queue=ListQueue(case, last=2 * PER_UPDATE))
    arrays = {"state": learner.state, "groups": groups_of(learner)}
    Checkpointer(directory, keep=2).save(2, arrays, {"version": 2})


def test_checkpoints_do_not_tell_how_many_processes_wrote_them(tmp_path: pathlib.Path) -> None:
    cases = [x for x in CASES if x.name in ("data", "fsdp_across")]
    for case in cases:
        save_alone(case, tmp_path / f"by_one_{case.name}")
    with pair(tmp_path, "checkpoints") as both:
        both.require_success()
    for case in cases:
        _, expected = alone(case)
        # Two processes went on from what one had saved.
        last = {n: x for n, x in expected.items() if n.startswith(("loss/2", "params/3"))}
        found = loaded(tmp_path / f"{case.name}.npz")
        found = {n.replace("loss/0", "loss/2"): x for n, x in found.items()}
        require_close(found, last)
        # One process goes on from what two have saved.
        target = {"state": target_of(case), "groups": GROUPS_TARGET}
        checkpointer = Checkpointer(tmp_path / f"by_two_{case.name}", keep=2)
        restored = checkpointer.restore(lambda _, target=target: target)
        assert restored is not None and restored.record == {"version": 2}
        np.testing.assert_array_equal(restored.arrays["groups"]["group_1"]["qpos"], [3.0, 3.0])
        _, continued = alone(
            case,
            queue=ListQueue(case, first=2 * PER_UPDATE),
            state=restored.arrays["state"],
            progress=Progress(version=2),
        )
        continued = {n.replace("loss/0", "loss/2"): x for n, x in continued.items()}
        require_close(continued, last)


def test_what_one_process_misreads_both_pass_over(tmp_path: pathlib.Path) -> None:
    case = next(x for x in CASES if x.name == "fsdp_across")
    checkpointer = Checkpointer(tmp_path / "damaged", keep=4)
    for step in (1, 2, 3, 4):
        checkpointer.save(step, {"state": case.training().fresh_state()}, {})
    with pair(tmp_path, "damaged") as both:
        both.require_success()
    for log in map(both.log, (0, 1)):
        assert re.findall(r"checkpoint (\d) is damaged", log) == ["4", "3", "2"], log


def test_a_stop_ends_both_and_leaves_whole_updates(tmp_path: pathlib.Path) -> None:
    with pair(tmp_path, "stop") as both:
        both.require_success()
    case = next(x for x in CASES if x.name == "fsdp_across_streamed")
    _, expected = alone(case, queue=ListQueue(case, last=PER_UPDATE))
    found = loaded(tmp_path / f"{case.name}.npz")
    assert "params/1/torso/kernel" in found and "params/2/torso/kernel" not in found
    require_close(found, expected)


def test_the_death_of_a_follower_ends_the_leader(tmp_path: pathlib.Path) -> None:
    with pair(tmp_path, "follower_dies") as both:
        both.processes[1].wait(TIMEOUT_S)
        died_s = time.monotonic()
        code = both.processes[0].wait(TIMEOUT_S)
        ended_s = time.monotonic() - died_s
    print(f"the leader ended {ended_s:.1f} s after, exit code {code}")  # noqa: T201
    assert both.processes[1].returncode == -9
    assert code != 0
    assert ended_s < 3 * HEARTBEAT_S, both.log(0)
    assert "learner process 1 is gone" in both.log(0), both.log(0)


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_nobody_meets_says_so(index: int) -> None:
    runtime = (
        f"num_processes=2, process_index={index}, coordinator='127.0.0.1:{free_port()}', "
        "connect_timeout_s=3"
    )
    script = (
        f"from jaxvla import multihost; multihost.initialize(multihost.GroupSettings({runtime}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 1, done.stderr[-2000:]
    assert f"learner process {index} has waited 3 s at 127.0.0.1" in done.stderr
