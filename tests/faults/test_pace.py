"""Programs that are much slower than the others: who waits, what is told, what stays bounded."""

import pathlib
import threading
import time
from typing import Any

import pytest
from fault_rows import FaultRow
from runtime.tiny_run import (
    NO_EVALUATION,
    TIMEOUT_S,
    Run,
    keeps_bound,
    make_blueprint,
    quick_jit,
    require_invariants,
)
from tiny_faults import lost

from jaxvla import config as c
from jaxvla.serving.server import PolicyServer
from jaxvla.simulation.group import DeviceEnvGroup

fast_compilation = pytest.fixture(quick_jit, scope="module", autouse=True)

NUM_UPDATES = 6
PER_UPDATE, MAX_STALENESS = 2, 1
ALARM_S = 0.3
"""Long enough for a chunk of the tiny env, even on a machine that has other work."""


def make_run(workdir: pathlib.Path, **sections: Any) -> Run:
    learning = c.LearningConfig(num_updates=NUM_UPDATES, trajectories_per_update=PER_UPDATE)
    return Run(workdir, make_blueprint(evaluation=NO_EVALUATION, learning=learning, **sections))


def on_message(run: Run, part: str, act: Any) -> None:
    """Calls a function at the first line on the screen with some text, in the alarms' thread."""
    show, is_due = run.screen.message, [True]

    def message(text: str) -> None:
        show(text)
        if part in text and is_due:
            is_due.clear()
            act()

    run.screen.message = message


def starts_with(run: Run, beginning: str) -> list[str]:
    return [line for line in run.lines if line.startswith(beginning)]


@pytest.mark.fault(4)
def test_a_straggler_is_waited_for_and_named(
    tmp_path: pathlib.Path, fault_row: FaultRow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An env group stands still until the alarm is heard."""
    simulation = c.SimulationConfig(
        num_groups=2, envs_per_group=2, segment_length=2, straggler_s=ALARM_S
    )
    run = make_run(tmp_path, simulation=simulation)
    is_told, step_chunk, calls = threading.Event(), DeviceEnvGroup.step_chunk, []
    told_s: list[float] = []

    def slow(group: DeviceEnvGroup, *arguments: Any) -> Any:
        if group.name == "group_1":
            calls.append(group)
            if len(calls) == 4:
                assert is_told.wait(TIMEOUT_S)
                told_s.append(time.monotonic())
        return step_chunk(group, *arguments)

    updates_s: list[float] = []
    run.screen.on_update = lambda record: updates_s.append(time.monotonic())
    on_message(run, "alarm: group_1", is_told.set)
    monkeypatch.setattr(DeviceEnvGroup, "step_chunk", slow)
    run.expect(0)
    require_invariants(run.records(), NUM_UPDATES)
    (line, *_) = starts_with(run, "alarm: group_1 has been making one trajectory for")
    assert "(ticket " in line
    assert run.summary()["totals"]["faults/stragglers"] >= 1
    assert lost(run) == 0  # it was waited for
    fault_row(
        survived=True,
        lost=0,
        recovery_s=min(x for x in updates_s if x >= told_s[0]) - told_s[0],
        bound_kept=keeps_bound(run),
        exit_code=0,
    )


@pytest.mark.fault(20)
def test_a_slow_learner_is_waited_for(tmp_path: pathlib.Path, fault_row: FaultRow) -> None:
    """After each of its updates it stands still until the simulators have to."""
    run = make_run(tmp_path)
    queue = run.controller._queue
    depths: list[int] = []

    def wait_until_full(record: Any) -> None:
        version = int(record["update"])
        credit = min(version + MAX_STALENESS + 1, NUM_UPDATES) * PER_UPDATE
        want = credit - version * PER_UPDATE
        with queue._changed:
            assert queue._changed.wait_for(lambda: queue._book.ledger().depth >= want, TIMEOUT_S)
            ledger = queue._book.ledger()
        assert (ledger.depth, ledger.in_flight) == (want, 0)
        assert ledger.admitted == credit and not ledger.dropped
        depths.append(ledger.depth)

    run.screen.on_update = wait_until_full
    run.expect(0)
    require_invariants(run.records(), NUM_UPDATES)
    assert max(depths) == (MAX_STALENESS + 1) * PER_UPDATE
    assert run.summary()["max_staleness"] == MAX_STALENESS
    fault_row(survived=True, lost=lost(run), bound_kept=keeps_bound(run), exit_code=0)


@pytest.mark.fault(21)
def test_slow_simulators_are_waited_for_without_work(
    tmp_path: pathlib.Path, fault_row: FaultRow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only env group takes two seconds for a chunk; the process does next to nothing then."""
    alone = c.SimulationConfig(num_groups=1, envs_per_group=2, segment_length=2)
    run = make_run(tmp_path, simulation=alone, checkpoint=c.CheckpointConfig(interval=NUM_UPDATES))
    step_chunk, calls, used_s = DeviceEnvGroup.step_chunk, [], []
    is_idle = threading.Event()
    # Four trajectories of two chunks make two updates, after which the learner has nothing to do.
    run.screen.on_update = lambda record: is_idle.set() if record["update"] == 2 else None

    def slow(group: DeviceEnvGroup, *arguments: Any) -> Any:
        calls.append(group.name)
        if len(calls) == 9:
            assert is_idle.wait(TIMEOUT_S)
            before_s = time.process_time()
            threading.Event().wait(2.0)
            used_s.append(time.process_time() - before_s)
        return step_chunk(group, *arguments)

    monkeypatch.setattr(DeviceEnvGroup, "step_chunk", slow)
    run.expect(0)
    require_invariants(run.records(), NUM_UPDATES)
    assert len(used_s) == 1 and used_s[0] < 0.05 * 2.0
    utilisation = run.summary()["utilisation"]
    assert utilisation["learning"]["waiting_on"]["trajectories"] > 0.2
    assert utilisation["serving"]["waiting_on"]["requests"] > 0.2
    note = f"{100 * used_s[0] / 2.0:.1f} % of a core"
    fault_row(survived=True, lost=lost(run), bound_kept=keeps_bound(run), exit_code=0, note=note)


@pytest.mark.fault(25)
def test_a_server_that_keeps_its_weights_holds_admission_and_is_named(
    tmp_path: pathlib.Path, fault_row: FaultRow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It swaps nothing in after version 1, until the alarm is heard and nobody can go on."""
    run = make_run(tmp_path, serving=_serving(publish_lag_s=ALARM_S))
    queue, swap = run.controller._queue, PolicyServer._swap_weights
    is_free = threading.Event()
    servers: list[PolicyServer] = []
    freed_s: list[float] = []

    def stuck(server: PolicyServer) -> None:
        servers.append(server)
        in_use = server._weights.version if server._weights else -1
        if in_use < 1 or is_free.is_set():
            swap(server)

    def release() -> None:
        # Version 1 allows (1 + S + 1) P trajectories, and no more.
        def is_starved() -> bool:
            ledger = queue._book.ledger()
            return ledger.consumed == (1 + MAX_STALENESS + 1) * PER_UPDATE

        with queue._changed:
            assert queue._changed.wait_for(is_starved, TIMEOUT_S)
            ledger = queue._book.ledger()
        assert (ledger.admitted, ledger.in_flight, ledger.depth) == (6, 0, 0)
        freed_s.append(time.monotonic())
        is_free.set()
        servers[-1]._batcher.wake()

    updates_s: list[float] = []
    run.screen.on_update = lambda record: updates_s.append(time.monotonic())
    on_message(run, "still serves version 1", release)
    monkeypatch.setattr(PolicyServer, "_swap_weights", stuck)
    run.expect(0)
    require_invariants(run.records(), NUM_UPDATES)
    assert starts_with(run, "alarm: server")
    assert run.summary()["totals"]["faults/publish_lags"] >= 1
    assert run.summary()["max_staleness"] == MAX_STALENESS
    fault_row(
        survived=True,
        lost=lost(run),
        recovery_s=min(x for x in updates_s if x >= freed_s[0]) - freed_s[0],
        bound_kept=keeps_bound(run),
        exit_code=0,
    )


def _serving(**settings: Any) -> c.ServingConfig:
    return c.ServingConfig(trigger_size=2, max_batch=4, buckets=(2, 4), **settings)


@pytest.mark.fault(32)
def test_a_clock_that_jumps_ends_no_lease(
    tmp_path: pathlib.Path, fault_row: FaultRow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time of day jumps by a day, there and back, whenever anybody reads it."""
    now_s, jumps = time.time, [86_400.0, -86_400.0]

    def jumping() -> float:
        jumps.reverse()
        return now_s() + jumps[0]

    monkeypatch.setattr(time, "time", jumping)
    run = make_run(tmp_path).expect(0)
    monkeypatch.undo()
    require_invariants(run.records(), NUM_UPDATES)
    assert lost(run) == 0
    fault_row(survived=True, lost=0, bound_kept=keeps_bound(run), exit_code=0)
