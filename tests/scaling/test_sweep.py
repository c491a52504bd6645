"""The order of a sweep, its estimate of the time left, its files and its resumption."""

import csv
import json
import math
import pathlib
import threading

import pytest
from sweep_parts import FakeRuns, make_trial

from jaxvla.config import UsageError
from jaxvla.scaling.sweep import Sweep
from jaxvla.scaling.sweep_files import SweepBook, read_results
from jaxvla.scaling.trial_run import SweepStoppedError

_LAYOUTS = (
    "colocated=4",
    "simulation=1 serving=1 learning=2",
    "learning=2 simulation+serving=2",
)


class _Study:
    """A sweep in a directory, with runs that are none."""

    def __init__(self, workdir: pathlib.Path, runs: FakeRuns, *, repeats: int = 2, **options: bool):
        self.lines: list[str] = []
        self.stop_requested = threading.Event()
        self.sweep = Sweep(
            [make_trial(layout) for layout in _LAYOUTS],
            book=SweepBook(workdir, {"config": {"seed": 0}}, {"pruned": {}}),
            workdir=workdir,
            repeats=repeats,
            retry_failed=options.get("retry_failed", False),
            run=runs.run,
            say=self.lines.append,
            stop_requested=self.stop_requested,
        )


def test_trials_take_turns(tmp_path: pathlib.Path):
    runs = FakeRuns(colocated=[1.0, 1.0], simulation=[2.0, 2.0], learning=[4.0, 4.0])
    assert _Study(tmp_path, runs).sweep.run()
    names = [name for name, _ in runs.order]
    assert names == ["colocated", "simulation", "learning"] * 2
    directories = [directory for _, directory in runs.order]
    assert len(set(directories)) == 6
    assert {x.name for x in directories} == {"repeat_1", "repeat_2"}


def test_what_remains_takes_as_long_as_what_was_run(tmp_path: pathlib.Path):
    runs = FakeRuns(
        colocated=[1.0, 3.0, 2.0], simulation=[10.0, 20.0, 5.0], learning=[4.0, 4.0, 4.0]
    )
    study = _Study(tmp_path, runs, repeats=3)
    assert math.isnan(study.sweep.eta_s())
    assert study.sweep.run()
    etas = [line.rpartition("eta ")[2] for line in study.lines]
    assert etas == [
        "8.0s",  # all like the first: 8 x 1
        "38s",  # 2 x 1, 2 x 10, 3 x the median of 1 and 10, 5.5 -> 38.5, to even
        "30s",  # 2 x (1 + 10 + 4)
        "30s",  # 1 x 2 + 2 x 10 + 2 x 4
        "25s",  # 2 + 15 + 2 x 4
        "21s",  # 2 + 15 + 4
        "19s",
        "4.0s",
        "0.0s",
    ]
    assert study.lines[0] == (
        "trial 1/3 repeat 1/3 | colocated=4 | 100 env steps/s | took 1.0s | eta 8.0s"
    )


def test_a_trial_that_fails_is_noted_and_left_out(tmp_path: pathlib.Path):
    runs = FakeRuns(colocated=[1.0, 1.0], simulation=["exit code 1: no memory"], learning=[4.0] * 2)
    study = _Study(tmp_path, runs)
    assert study.sweep.run()
    assert [name for name, _ in runs.order].count("simulation") == 1
    assert "failed: exit code 1: no memory" in study.lines[1]
    by_layout = {x["layout"]: x for x in _trials(tmp_path)}
    assert by_layout[_LAYOUTS[1]]["failed"] == "exit code 1: no memory"
    assert by_layout[_LAYOUTS[1]]["repeats"] == []
    assert len(by_layout[_LAYOUTS[0]]["repeats"]) == 2


def test_only_what_is_missing_is_run(tmp_path: pathlib.Path):
    stop = SweepStoppedError()
    first = FakeRuns(colocated=[1.0, stop], simulation=["lost"], learning=[4.0])
    assert not _Study(tmp_path, first).sweep.run()
    assert len(first.order) == 4
    second = FakeRuns(colocated=[2.0], simulation=[], learning=[8.0])
    assert _Study(tmp_path, second).sweep.run()
    assert [(name, x.name) for name, x in second.order] == [
        ("colocated", "repeat_2"),
        ("learning", "repeat_2"),
    ]
    third = FakeRuns(colocated=[3.0], simulation=[5.0] * 3, learning=[3.0])
    assert _Study(tmp_path, third, repeats=3, retry_failed=True).sweep.run()
    assert [x["failed"] for x in _trials(tmp_path)] == [None] * 3
    assert [[r["duration_s"] for r in x["repeats"]] for x in _trials(tmp_path)] == [
        [1.0, 2.0, 3.0],
        [5.0, 5.0, 5.0],
        [4.0, 8.0, 3.0],
    ]
    fourth = FakeRuns()
    assert _Study(tmp_path, fourth, repeats=3).sweep.run() and not fourth.order


def test_a_stop_between_runs(tmp_path: pathlib.Path):
    study = _Study(tmp_path, FakeRuns())
    study.stop_requested.set()
    assert not study.sweep.run()
    assert [x["repeats"] for x in _trials(tmp_path)] == [[], [], []]


def _trials(workdir: pathlib.Path) -> list[dict]:
    return json.loads((workdir / "sweep.json").read_text())["trials"]


def test_files(tmp_path: pathlib.Path):
    runs = FakeRuns(colocated=[1.0, 2.0, 4.0], simulation=["lost"], learning=[4.0] * 3)
    _Study(tmp_path, runs, repeats=3).sweep.run()
    first = _trials(tmp_path)[0]
    assert first["median"] == {"env_steps_per_s": 50.0, "duration_s": 2.0}
    assert first["spread"] == {"env_steps_per_s": [25.0, 100.0], "duration_s": [1.0, 4.0]}
    assert first["placement"] == "colocated" and first["num_devices"] == 4
    with (tmp_path / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [x["layout"] for x in rows] == list(_LAYOUTS)
    assert rows[0]["env_steps_per_s"] == "50" and rows[0]["env_steps_per_s_max"] == "100"
    assert rows[1]["failed"] == "lost" and rows[1]["env_steps_per_s"] == ""
    read = read_results(tmp_path / "sweep.json")
    assert json.loads(json.dumps([x.record() for x in read])) == _trials(tmp_path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "is no sweep of jaxvla"),
        ('{"conditions": {}}', "is no sweep of jaxvla"),
        (
            '{"conditions": {"config": {"seed": 1}}, "trials": []}',
            "has a sweep with config.seed = 1, now it is 0",
        ),
    ],
)
def test_a_sweep_of_something_else(tmp_path: pathlib.Path, content: str, complaint: str):
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(UsageError, match=complaint):
        _Study(tmp_path, FakeRuns())
    assert (tmp_path / "sweep.json").read_text() == content


def test_a_directory_of_something_else(tmp_path: pathlib.Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"is not empty and has no sweep\.json"):
        _Study(tmp_path, FakeRuns())
