"""The choice of a layout from two sweeps, which are a script here."""

import json
import pathlib
import sys
import threading

import pytest
from sweep_parts import make_result

from jaxvla.config import UsageError
from jaxvla.scaling.auto_layout import choose_layout, known_layout

_SWEEP = """
import json, pathlib, sys
arguments = dict(x.split("=", 1) for x in sys.argv[1:])
directory = pathlib.Path(arguments["--workdir"])
answers = json.loads((directory.parent / "answers.json").read_text())
directory.mkdir(exist_ok=True)
calls = directory / "calls.json"
earlier = json.loads(calls.read_text()) if calls.exists() else []
calls.write_text(json.dumps([*earlier, arguments]))
(directory / "sweep.json").write_text(json.dumps({"trials": answers[len(earlier)]}))
"""
_LAYOUTS = [f"simulation={n} serving=1 learning=1" for n in (1, 2, 4, 8)]


def _trials(*speeds: tuple[float, ...]) -> list[dict]:
    pairs = zip(_LAYOUTS, speeds, strict=True)
    return [make_result(layout, *values).record() for layout, values in pairs]


def _choose(workdir: pathlib.Path, script: str, lines: list[str]) -> str:
    return choose_layout(
        ["--config=x.py", "--config.sweep.axes=seed=1,2"],
        workdir=workdir / "run",
        say=lines.append,
        stop_requested=threading.Event(),
        program=(sys.executable, "-c", script),
    )


def test_the_fastest_three_are_tried_again(tmp_path: pathlib.Path):
    first = _trials((10.0,), (50.0,), (30.0,), (40.0,))
    # The one that was first by luck is last of the three; the one left out stays out.
    second = _trials((99.0,), (50.0, 20.0, 20.0), (30.0, 31.0, 32.0), (40.0, 41.0, 42.0))
    (tmp_path / "answers.json").write_text(json.dumps([first, second]))
    lines: list[str] = []
    assert _choose(tmp_path, _SWEEP, lines) == _LAYOUTS[3]
    calls = json.loads((tmp_path / "run_layouts" / "calls.json").read_text())
    assert [call["--config.sweep.repeats"] for call in calls] == ["1", "3"]
    assert "--config.sweep.layouts" not in calls[0]
    again = calls[1]["--config.sweep.layouts"]
    assert again == str((_LAYOUTS[1], _LAYOUTS[3], _LAYOUTS[2]))
    for call in calls:
        assert call["--job"] == "sweep" and call["--config"] == "x.py"
        assert call["--config.sweep.axes"] == "()"  # not those of the command
    assert any("is fastest: 41.0 [40.0, 42.0] env steps/s" in line for line in lines)
    assert not any(_LAYOUTS[0] in line for line in lines)
    assert not (tmp_path / "run").exists()


def test_trials_that_fail(tmp_path: pathlib.Path):
    with pytest.raises(UsageError, match=r"ended with exit code 5\. Fix: "):
        _choose(tmp_path, "import sys; sys.exit(5)", [])


def test_a_run_keeps_its_layout(tmp_path: pathlib.Path):
    assert known_layout(tmp_path) is None
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"config": {"meshes": {"layout": "colocated=4"}}}))
    assert known_layout(tmp_path) == "colocated=4"
    path.write_text("{}")
    with pytest.raises(UsageError, match=r"is no config of a run.* Fix: "):
        known_layout(tmp_path)
