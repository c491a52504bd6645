"""What batcher and router do in a replay; when they do it otherwise is in their own tests."""

import pathlib
from typing import Any

import numpy as np
import pytest

from jaxvla import config as c
from jaxvla.algorithms.ppo import PPOConfig
from jaxvla.serving.batcher import Batch, Batcher
from jaxvla.serving.client import InferenceClient
from jaxvla.serving.routing import RoutedClient, Router
from jaxvla.transport.schedule import Schedule, ScheduleDivergedError, Served
from jaxvla.transport.schedule_file import ScheduleRecorder, ScheduleReplay


class Rig:
    """Two servers without threads, and clients a, b and c that ask for one row."""

    def __init__(self, schedule: Schedule):
        self.parts = [schedule.server(f"server_{index}") for index in range(2)]
        limits: dict[str, Any] = {"max_rows": 3, "capacity_rows": 3, "max_wait_s": float("inf")}
        self.batchers = [Batcher(trigger_rows=1, schedule=x, **limits) for x in self.parts]
        router = Router(2, None, schedule)
        self.clients = {
            name: RoutedClient([InferenceClient(x, name) for x in self.batchers], router, rows=1)
            for name in "abc"
        }

    def ask(self, name: str, kind: str = "explore") -> Any:
        observation: Any = None
        return self.clients[name].submit(kind, observation, np.zeros((1, 2), np.uint32))

    def batch(self, server: int) -> Batch | None:
        return self.batchers[server].next_batch(timeout_s=0.0)


@pytest.fixture
def replay(tmp_path: pathlib.Path) -> Rig:
    """All on server 1; c before a in one batch, then b alone."""
    path = tmp_path / "schedule.jsonl"
    config = c.ExperimentConfig(
        name="tiny",
        env=c.EnvConfig(name="counter"),
        model=c.ModelConfig(name="tiny"),
        algorithm=PPOConfig(),
    )
    recorder = ScheduleRecorder(path, config)
    for name in "abc":
        recorder.joined(name, 1)
    for names in ("ca", "b"):
        requests = tuple((name, 1) for name in names)
        recorder.server("server_1").running(Served(kind="explore", version=0, requests=requests))
    recorder.left("a")
    recorder.taken(range(config.learning.trajectories_per_update))
    recorder.close()
    rig = Rig(ScheduleReplay(path))
    for client in rig.clients.values():
        client.join()
    return rig


def served(batch: Batch | None) -> list[str]:
    return [] if batch is None else [request.client for request in batch.requests]


def test_recorded_requests_make_a_batch_and_no_others(replay: Rig) -> None:
    """One row would trigger, all have asked, and b asked before c: it waits all the same."""
    for name in "ab":
        replay.ask(name)
        assert replay.batch(1) is None
    replay.ask("c")
    first = replay.batch(1)
    assert served(first) == ["c", "a"]
    assert replay.batch(0) is None
    requests = (("c", 1), ("a", 1))
    replay.parts[1].running(Served(kind="explore", version=0, requests=requests))
    assert served(replay.batch(1)) == ["b"]


def test_clients_keep_to_what_is_recorded(replay: Rig) -> None:
    replay.ask("a")
    replay.clients["a"].leave()
    with pytest.raises(ScheduleDivergedError, match=r"b asks for 'value' of 1 rows; .* 'explore'"):
        replay.ask("b", "value")
    with pytest.raises(
        ScheduleDivergedError, match=r"c leaves its server; .* c asks for 'explore'"
    ):
        replay.clients["c"].leave()
