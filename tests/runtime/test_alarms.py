"""Alarms: each is given once, as long as its cause lasts."""

import threading
from typing import Any

from runtime.tiny_run import make_blueprint

from jaxvla import config as c
from jaxvla.runtime.alarms import Alarms
from jaxvla.telemetry.metrics import MetricRecorder, Total
from jaxvla.transport.base import Ticket

TIMEOUT_S = 60.0


class Scene:
    """A run to look at; also its queue, its store and its screen."""

    def __init__(self, **limits: float) -> None:
        self.ages_s: dict[int, float] = {}
        self.lags: list[tuple[str, int, float]] = []
        self.lines: list[str] = []
        self.is_told = threading.Event()
        self.recorder = MetricRecorder()
        simulation = c.SimulationConfig(straggler_s=limits.get("straggler_s", 10.0))
        serving = c.ServingConfig(publish_lag_s=limits.get("publish_lag_s", 5.0))
        config = make_blueprint(simulation=simulation, serving=serving).config
        screen: Any = self
        self.alarms = Alarms(config, queue=self, store=self, recorder=self.recorder, screen=screen)

    def outstanding(self) -> list[tuple[Ticket, float]]:
        return [
            (Ticket(id=i, admission_version=0, owner=f"group_{i}"), age_s)
            for i, age_s in self.ages_s.items()
        ]

    def lagging(self) -> list[tuple[str, int, float]]:
        return self.lags

    def message(self, text: str) -> None:
        self.lines.append(text)
        self.is_told.set()

    def look(self) -> list[str]:
        """What is told at one look."""
        self.lines.clear()
        self.alarms.look()
        return list(self.lines)


def test_a_straggler_is_told_once() -> None:
    scene = Scene()
    scene.ages_s = {3: 9.9, 4: 2.0}
    assert scene.look() == []
    scene.ages_s = {3: 10.5, 4: 2.6}
    (line,) = scene.look()
    assert line.startswith("alarm: group_3 has been making one trajectory for 10.5 s (ticket 3)")
    scene.ages_s = {3: 99.0, 4: 91.1}
    (line,) = scene.look()
    assert line.startswith("alarm: group_4 ")
    scene.ages_s = {}
    assert scene.look() == []
    assert scene.recorder.totals()["faults/stragglers"] == 2


def test_a_server_that_lags_again_is_told_again() -> None:
    scene = Scene()
    for lags, num_lines in (
        ([("server_0", 7, 4.0)], 0),
        ([("server_0", 7, 5.0)], 1),
        ([("server_0", 7, 50.0)], 0),
        ([], 0),
        ([("server_0", 9, 6.0), ("server_1", 9, 6.0)], 2),
    ):
        scene.lags = lags
        lines = scene.look()
        assert len(lines) == num_lines
    assert any(x.startswith("alarm: server_1 still serves version 9, newer") for x in lines)
    assert scene.recorder.totals()["faults/publish_lags"] == 3


def test_envs_that_were_set_aside_are_told_as_they_become_more() -> None:
    scene = Scene()
    assert scene.look() == []
    scene.recorder.add("faults/quarantined_envs", 2, Total)
    assert scene.look() == ["alarm: 2 envs were set aside, see logs/simulation.log; others go on"]
    assert scene.look() == []


def test_it_looks_while_the_block_runs() -> None:
    scene = Scene(straggler_s=0.01)
    scene.ages_s = {0: 1.0}
    with scene.alarms.watching():
        assert scene.is_told.wait(TIMEOUT_S)
    assert not any(x.name == "runtime/alarms" for x in threading.enumerate())
