"""One process of a learner of two, run by test_multihost.py.

    python multihost_process.py INDEX COORDINATOR_PORT LINK_PORT DIRECTORY SCENARIO

The leader writes CASE.npz with what `multihost_cases.flat` makes of every run.
"""

import os
import pathlib
import queue
import signal
import sys
import threading
from typing import Any

import jax
import numpy as np
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
    struct_of,
    target_of,
)

from jaxvla import multihost
from jaxvla.checkpoint import Checkpointer, _DamagedError
from jaxvla.learning.follower import Follower
from jaxvla.learning.learner import Learner, Progress
from jaxvla.telemetry.activity import ActivityMeter
from jaxvla.telemetry.tracing import NullTracer
from jaxvla.transport.channel import ChannelConfig, Connection, Listener, connect
from jaxvla.transport.frames import Frame
from jaxvla.transport.mirror import Leader, LeaderQueue

HOST = "127.0.0.1"
CHANNEL = ChannelConfig(token=b"0123456789abcdef", silence_s=5.0, ping_s=1.0)


class CountingLink:
    """A connection that counts the bytes of the arrays sent through it."""

    def __init__(self, connection: Connection):
        self.connection = connection
        self.num_bytes = 0

    def send(self, frame: Frame) -> None:
        self.num_bytes += sum(array.nbytes for array in frame.arrays)
        self.connection.send(frame)

    def receive(self) -> Frame:
        return self.connection.receive()

    def close(self) -> None:
        self.connection.close()


class Process:
    """This process, and what it does in a run."""

    def __init__(self, index: int, link: CountingLink, directory: pathlib.Path):
        self.index = index
        self.link = link
        self.directory = directory

    def lead(
        self,
        case: Case,
        *,
        queue: ListQueue | None = None,
        state: Any = None,
        progress: Progress | None = None,
        save_in: pathlib.Path | None = None,
    ) -> None:
        leader, queue = Leader([self.link]), queue or ListQueue(case)
        mirrored = LeaderQueue(queue, leader, case.training().functions.placement)
        leader.watch(on_stop=lambda: None, on_lost=lambda: queue.close("follower_lost"))
        learner, result = run_learner(
            case,
            queue=mirrored,
            fetch=leader.fetch,
            state=state,
            progress=progress,
        )
        if save_in is not None:
            version = learner.progress.version
            leader.say("save", {"version": version})
            arrays = {"state": learner.state, "groups": groups_of(learner)}
            Checkpointer(save_in, keep=2).save(version, arrays, {"version": version})
        leader.end()
        saved: dict[str, Any] = flat(result) | {"bytes_sent": np.asarray(self.link.num_bytes)}
        np.savez(self.directory / f"{case.name}.npz", **saved)

    def follow(
        self,
        case: Case,
        *,
        state: Any = None,
        progress: Progress | None = None,
        save_in: pathlib.Path | None = None,
    ) -> Learner:
        meter = ActivityMeter("learning", tracer=NullTracer())
        follower = Follower(
            functions=case.training().functions,
            state=state or case.training().fresh_state(),
            progress=progress or Progress(),
            link=self.link,
            trajectory=struct_of(case),
            checkpointer=Checkpointer(save_in or self.directory / "unused", keep=2),
            meter=meter,
            **case.settings(),
        )
        with meter.thread("follower"):
            follower.run()
        return follower.learner

    def run(self, case: Case, **options: Any) -> None:
        if self.index == 0:
            self.lead(case, **options)
        else:
            options = {n: x for n, x in options.items() if n in ("state", "progress", "save_in")}
            self.follow(case, **options)

    def restored(self, case: Case, directory: pathlib.Path) -> dict[str, Any]:
        """State and progress of a checkpoint."""
        target: dict[str, Any] = {"state": target_of(case)}
        if self.index == 0:
            target["groups"] = GROUPS_TARGET
        within = "" if self.index == 0 else "state/"
        found = Checkpointer(directory, keep=2).restore(lambda _: target, within=within)
        assert found is not None
        if self.index == 0:
            assert found.arrays["groups"]["group_1"]["qpos"].tolist() == [3.0, 3.0]
        return {"state": found.arrays["state"], "progress": Progress(version=found.step)}


def every_case(process: Process) -> None:
    for case in CASES:
        process.run(case)


def checkpoints(process: Process) -> None:
    """Saves for one process, and continues what one process has saved."""
    for name in ("data", "fsdp_across"):
        case = next(x for x in CASES if x.name == name)
        short = ListQueue(case, last=2 * PER_UPDATE)
        process.run(case, queue=short, save_in=process.directory / f"by_two_{name}")
        found = process.restored(case, process.directory / f"by_one_{name}")
        rest = ListQueue(case, first=2 * PER_UPDATE)
        process.run(case, queue=rest, **found)
        again = process.restored(case, process.directory / f"by_two_{name}")
        assert again["progress"].version == 2


def damaged(process: Process) -> None:
    """Both pass over the steps that one of them reads wrongly (4, 3) or cannot read (2)."""
    case = next(x for x in CASES if x.name == "fsdp_across")
    if process.index == 1:
        Checkpointer._arrays = _misread(Checkpointer._arrays)
    target = {"state": target_of(case)}
    found = Checkpointer(process.directory / "damaged", keep=4).restore(lambda _: target)
    assert found is not None and found.step == 1


def _misread(honest: Any) -> Any:
    """Step 4: a leaf that lies on both hosts, step 3: one of which each has a copy."""

    def read(self: Checkpointer, step: int, target: Any, **options: Any) -> Any:
        if step == 2:
            raise _DamagedError("a file could not be read")
        arrays = honest(self, step, target, **options)
        params = arrays["state"].params
        if step in (3, 4):
            name = {4: "torso", 3: "value_head"}[step]
            params[name]["kernel"] = _spoilt(params[name]["kernel"])
        return arrays

    return read


def _spoilt(array: jax.Array) -> jax.Array:
    """Another value on this process's devices."""
    parts = [jax.device_put(np.asarray(x.data) + 1, x.device) for x in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


def stop(process: Process) -> None:
    """The queue is closed during the second update, in the midst of its trajectories."""
    case = next(x for x in CASES if x.name == "fsdp_across_streamed")
    process.run(case, queue=ListQueue(case, last=PER_UPDATE + 1))


def follower_dies(process: Process) -> None:
    case = CASES[0]
    if process.index == 0:
        process.lead(case)
        return
    Follower._fetch = _die_after_first(Follower._fetch)
    process.follow(case)


def _die_after_first(fetch: Any) -> Any:
    """The follower is killed in the publication of version 1."""

    def wrapped(self: Follower, fields: Any) -> None:
        if self.learner.progress.version == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        fetch(self, fields)

    return wrapped


SCENARIOS = {f.__name__: f for f in (every_case, checkpoints, damaged, stop, follower_dies)}


def main() -> None:
    index, port, link_port = (int(x) for x in sys.argv[1:4])
    arrived: queue.Queue[Connection] = queue.Queue()
    over = threading.Event()

    def serve(connection: Connection) -> None:
        arrived.put(connection)
        over.wait()

    # Listens before the two meet, so that the follower finds it.
    listener = Listener(HOST, 0 if index else link_port, CHANNEL, serve, name="learner-0")
    if not index:
        listener.start()
    multihost.initialize(
        multihost.GroupSettings(
            num_processes=2,
            process_index=index,
            coordinator=f"{HOST}:{port}",
            heartbeat_timeout_s=10,
        )
    )
    if index:
        connection = connect((HOST, link_port), CHANNEL, name="learner-1", timeout_s=60.0)
    else:
        connection = arrived.get(timeout=60.0)
    SCENARIOS[sys.argv[5]](Process(index, CountingLink(connection), pathlib.Path(sys.argv[4])))
    assert multihost.same_everywhere(NUM_UPDATES)
    over.set()


if __name__ == "__main__":
    main()
