"""Disks that are full and checkpoints that are damaged, in whole runs."""

import contextlib
import json
import pathlib
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import orbax.checkpoint as ocp
import pytest
from fault_rows import FaultRow
from runtime.tiny_run import (
    NO_EVALUATION,
    SYNCHRONOUS,
    TIMEOUT_S,
    Run,
    keeps_bound,
    make_blueprint,
    quick_jit,
    require_invariants,
)
from tiny_faults import TimedRun, lost

from jaxvla import config as c
from jaxvla.checkpoint import CorruptCheckpointError
from jaxvla.runtime.signals import stop_on_signals
from jaxvla.telemetry.writers import JsonlWriter, RunInfo

fast_compilation = pytest.fixture(quick_jit, scope="module", autouse=True)


# ------------------------------------------------------------------------------- full


class Disk:
    """A directory that can be made full, and have room again."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def fill(self) -> None:
        """From now on writing fails."""
        raise NotImplementedError

    def clear(self) -> None:
        """No longer."""
        raise NotImplementedError


class LimitedDisk(Disk):
    """No file of this process may grow beyond a limit (EFBIG)."""

    def fill(self) -> None:
        self._limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, self._limits[1]))

    def clear(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._limits)


class SmallDisk(Disk):
    """A file system of 4 MiB in memory (ENOSPC)."""

    def fill(self) -> None:
        with (self.path / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            for size in (4096, 1):
                while file.write(bytes(size)):
                    pass

    def clear(self) -> None:
        (self.path / "ballast").unlink()


@pytest.fixture(params=[LimitedDisk, SmallDisk])
def disk(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Iterator[Disk]:
    if request.param is LimitedDisk:
        yield LimitedDisk(tmp_path)
        return
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield SmallDisk(tmp_path)
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


@pytest.mark.fault(16)
def test_training_outlasts_a_full_disk(disk: Disk, fault_row: FaultRow) -> None:
    """Full from update 1 to update 4: the checkpoint of update 2 is not written, its metrics are
    later."""
    blueprint = make_blueprint(
        evaluation=NO_EVALUATION,
        learning=c.LearningConfig(num_updates=6, trajectories_per_update=2),
    )
    run = TimedRun(disk.path / "run", blueprint)
    note_time = run.screen.on_update
    full_s: list[float] = []

    def fill_and_clear(record: Any) -> None:
        note_time(record)
        if record["update"] == 1:
            full_s.append(time.monotonic())
            disk.fill()
        if record["update"] == 4:
            disk.clear()

    run.screen.on_update = fill_and_clear
    run.expect(0)
    require_invariants(run.records(), 6)  # none is missing
    assert run.steps() == [4, 6]
    assert run.records()[-1]["faults/failed_saves"] == 1
    assert run.records()[-1]["faults/failed_writes"] == 3
    told = "\n".join(run.lines)
    assert "checkpoint 2 could not be written" in told
    assert told.count("error: JsonlWriter could not write a record") == 1
    fault_row(
        survived=True,
        lost=lost(run),
        recovery_s=run.recovery_s(full_s[0] + 1e-6),
        bound_kept=keeps_bound(run),
        exit_code=0,
    )


@pytest.mark.fault(16)
def test_records_of_a_full_disk_are_written_later(disk: Disk) -> None:
    """Also the rest of one that was written in part."""
    info = RunInfo(workdir=disk.path, name="x", config={}, resume_update=None)
    writer, num_failed = JsonlWriter(info), 0
    disk.fill()
    for update in range(1, 41):
        try:
            writer.write({"update": update, "rate/x": 0.5})
        except OSError:
            num_failed += 1
    disk.clear()
    writer.write({"update": 41, "rate/x": 1.0})
    writer.close()
    assert num_failed > 0
    lines = (disk.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["update"] for line in lines] == list(range(1, 42))


@pytest.mark.fault(16)
def test_a_disk_that_stays_full_ends_the_run(tmp_path: pathlib.Path, fault_row: FaultRow) -> None:
    disk = LimitedDisk(tmp_path)
    blueprint = make_blueprint(
        evaluation=NO_EVALUATION,
        checkpoint=c.CheckpointConfig(interval=1, max_failed_saves=2),
        learning=c.LearningConfig(num_updates=6, trajectories_per_update=2),
    )
    run = Run(tmp_path / "run", blueprint)
    run.screen.on_update = lambda record: disk.fill() if record["update"] == 1 else None
    try:
        code = run.run()
    finally:
        disk.clear()
    assert code == 1 and run.steps() == [0]
    assert any("checkpoint 2 could not be written" in line for line in run.lines)
    assert "error: summary.json could not be written" in "\n".join(run.lines)
    again = Run(tmp_path / "run", blueprint).expect(0)
    require_invariants(again.records(), 6)
    assert not list((tmp_path / "run" / "checkpoints").glob("*tmp*"))
    fault_row(survived=True, bound_kept=keeps_bound(again), exit_code=1)


# ----------------------------------------------------------------------------- damaged


def _flip(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def _truncate(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage(step: pathlib.Path, how: Callable[[pathlib.Path], None]) -> None:
    """Hits every file with content of a step; some of them are left-overs that nobody reads."""
    for path in [x for x in step.rglob("*") if x.is_file() and x.parent.name == "d"]:
        how(path)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    blueprint = make_blueprint(evaluation=NO_EVALUATION, **SYNCHRONOUS)
    return Run(tmp_path_factory.mktemp("uninterrupted"), blueprint).expect(0)


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(_flip, marks=pytest.mark.fault(14)),
        pytest.param(_truncate, marks=[pytest.mark.fault(15), pytest.mark.slow]),
        pytest.param(pathlib.Path.unlink, marks=[pytest.mark.fault(15), pytest.mark.slow]),
    ],
)
def test_a_damaged_checkpoint_costs_the_updates_since_the_last_one(
    uninterrupted: Run, tmp_path: pathlib.Path, fault_row: FaultRow, how: Any
) -> None:
    """They are made again, to the bit; without any sound one the run does not start."""
    blueprint = make_blueprint(evaluation=NO_EVALUATION, **SYNCHRONOUS)
    Run(tmp_path, blueprint).expect(0)
    damage(tmp_path / "checkpoints" / "4", how)
    start_s = time.monotonic()
    again = TimedRun(tmp_path, blueprint)
    again.expect(0)
    assert any("checkpoint 4 is damaged and was passed over" in line for line in again.lines)
    assert any(line.endswith("after update 2") for line in again.lines)
    require_invariants(again.records(), 4)
    assert again.digests(4) == uninterrupted.digests(4)
    kept = keeps_bound(again)
    fault_row(survived=True, recovery_s=again.recovery_s(start_s), bound_kept=kept, exit_code=0)
    before = again.summary()
    for step in again.controller._checkpointer.steps():
        damage(tmp_path / "checkpoints" / str(step), how)
    with pytest.raises(CorruptCheckpointError, match="no checkpoint"):
        Run(tmp_path, blueprint).run()
    assert again.summary() == before


# ------------------------------------------------------------------------- interrupted


@pytest.mark.fault(18)
def test_sigterm_while_saving_leaves_a_complete_checkpoint(
    tmp_path: pathlib.Path, fault_row: FaultRow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes between the first file of update 2 and the last one."""
    blueprint = make_blueprint(evaluation=NO_EVALUATION, **SYNCHRONOUS)
    run = Run(tmp_path, blueprint)
    is_closed, save, asked_s = run.queue_closed(), ocp.CheckpointManager.save, []

    def interrupted(manager: Any, step: int, *arguments: Any, **options: Any) -> Any:
        if step == 2 and not asked_s:
            # Not by the thread that saves: signals are for the main thread, which waits.
            asked_s.append(time.monotonic())
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            assert is_closed.wait(TIMEOUT_S)
        return save(manager, step, *arguments, **options)

    monkeypatch.setattr(ocp.CheckpointManager, "save", interrupted)
    with stop_on_signals(run.stop):
        run.expect(3)
    stopped_s = time.monotonic() - asked_s[0]
    assert run.steps()[-1] == 2
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))
    again = Run(tmp_path, blueprint).expect(0)
    require_invariants(again.records(), 4)
    fault_row(
        survived=True,
        lost=lost(run),
        bound_kept=keeps_bound(again),
        exit_code=3,
        note=f"stopped after {stopped_s:.1f} s",
    )
