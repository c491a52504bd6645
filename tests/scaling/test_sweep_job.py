"""The job from its config to its exit code, with runs that are none."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import pytest
from sweep_parts import FakeRuns, make_config

from jaxvla import config as c
from jaxvla.config import UsageError
from jaxvla.scaling import sweep_job
from jaxvla.scaling.trial_run import SweepStoppedError

_LAYOUTS = ("colocated=2", "simulation+serving=1 learning=1")


class _Job:
    """`sweep_job.run`, but for plug-ins and processes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, workdir: pathlib.Path):
        self._monkeypatch = monkeypatch
        self._workdir = workdir

    def run(self, runs: FakeRuns, **options: Any) -> int:
        """The exit code."""
        self._monkeypatch.setattr(sweep_job, "TrialRunner", lambda **_: runs)
        for name in ("check_plugins", "_check_trials"):
            self._monkeypatch.setattr(sweep_job, name, lambda *_: None)
        config = make_config(layouts=_LAYOUTS, host_devices=2, repeats=1)

        def reconfigure(changes: Mapping[str, str]) -> c.ExperimentConfig:
            own = make_config()
            own.meshes.layout = changes["meshes.layout"]
            return own

        given = {"is_dry_run": False, "may_resume": True} | options
        return sweep_job.run(
            config,
            workdir=self._workdir,
            arguments=["--config=x.py", "--config.sweep.repeats=1", "--config.seed=3"],
            command="python -m jaxvla.main --config=x.py --job=sweep",
            reconfigure=reconfigure,
            **given,
        )


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> _Job:
    return _Job(monkeypatch, tmp_path / "sweep")


def test_a_whole_sweep(
    job: _Job, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job.run(FakeRuns(colocated=[1.0], simulation=[2.0])) == 0
    out = capsys.readouterr().out
    assert "sweep      2 trials x 1 repeats, 8 updates measured" in out
    assert "  1. 100 [100, 100] env steps/s           colocated=2\n" in out
    flags = "XLA_FLAGS=--xla_force_host_platform_device_count=2"
    command = (
        "python -m jaxvla.main --config=x.py --config.seed=3 --config.meshes.layout=colocated=2"
    )
    assert f"next       {flags} {command}\n" in out
    names = {x.name for x in (tmp_path / "sweep").iterdir()}
    assert names == {"sweep.json", "sweep.csv", "report.html"}
    conditions = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["conditions"]
    assert conditions["devices"] == {"num": 2, "kind": "cpu"}
    assert conditions["config"]["simulation"]["envs_per_group"] == 8


def test_a_sweep_in_which_all_trials_fail(job: _Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.run(FakeRuns(colocated=["lost"], simulation=["lost"])) == 1
    assert "--job=sweep --config.sweep.retry_failed=True\n" in capsys.readouterr().out


def test_a_sweep_that_is_stopped_goes_on(job: _Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.run(FakeRuns(colocated=[1.0], simulation=[SweepStoppedError()])) == 3
    assert "next       python -m jaxvla.main --config=x.py --job=sweep\n" in capsys.readouterr().out
    rest = FakeRuns(simulation=[2.0])
    assert job.run(rest) == 0 and len(rest.order) == 1


def test_a_dry_run_writes_nothing(
    job: _Job, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job.run(FakeRuns(), is_dry_run=True) == 0
    assert "  colocated=2  (colocated, " in capsys.readouterr().out
    assert not (tmp_path / "sweep").exists()


def test_a_used_directory_without_resuming(job: _Job, tmp_path: pathlib.Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    with pytest.raises(UsageError, match="is not empty and --noresume was given"):
        job.run(FakeRuns(), may_resume=False)
