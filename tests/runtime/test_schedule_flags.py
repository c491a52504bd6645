"""--record_schedule and --replay_schedule: what is refused, and how early."""

import contextlib
import io
import pathlib

import pytest

from jaxvla import main
from jaxvla.config import ExperimentConfig
from jaxvla.runtime import jobs
from jaxvla.runtime.build import draw_blueprint
from jaxvla.transport.schedule_file import ScheduleRecorder

_DEBUG = f"--config={pathlib.Path(__file__).parents[2] / 'configs' / 'debug.py'}"


@pytest.fixture
def place(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """An empty working directory; the allocator of this process is left alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "0")
    return tmp_path


def run_main(*arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main.main(["jaxvla", _DEBUG, *arguments])
    return code, out.getvalue(), err.getvalue()


_MISTAKES = {
    # what is wrong: (arguments, part of the one line)
    "both": ("--record_schedule=a --replay_schedule=b", "--record_schedule=a with --replay_sch"),
    "no schedule in it": ("--record_schedule=a --job=evaluate --workdir=used", "has no schedule"),
    "recording a resumed run": (
        "--record_schedule=a --workdir=used",
        "--workdir=used is not empty",
    ),
    "replaying a resumed run": (
        "--replay_schedule=a --workdir=used",
        "--workdir=used is not empty",
    ),
    "overwriting": ("--record_schedule=used/checkpoints/x", "is there already"),
    "no file": ("--replay_schedule=none", "--replay_schedule=none: cannot be read"),
    "another file": ("--replay_schedule=used/checkpoints/x", "is no schedule"),
}


@pytest.mark.parametrize("mistake", list(_MISTAKES))
def test_a_mistake_is_answered_before_a_device_is_touched(
    place: pathlib.Path, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    def count() -> int:
        raise AssertionError("devices were counted")

    monkeypatch.setattr(jobs, "_num_devices", count)
    (place / "used" / "checkpoints").mkdir(parents=True)
    (place / "used" / "checkpoints" / "x").write_text("x\n")
    before = sorted(place.rglob("*"))
    arguments, part = _MISTAKES[mistake]
    code, _, err = run_main(*arguments.split())
    assert code == 2 and err.count("\n") == 1
    assert part in err and "Fix: " in err
    assert sorted(place.rglob("*")) == before


def debug_config(*arguments: str) -> ExperimentConfig:
    _, config = main.parse(["jaxvla", _DEBUG, *arguments])
    assert config is not None
    return draw_blueprint(config).config


def test_a_schedule_of_another_seed_is_refused(place: pathlib.Path) -> None:
    """-1 and the number that it stands for are the same setting."""
    config = debug_config("--config.seed=3")
    recorder = ScheduleRecorder(place / "a.jsonl", config)
    recorder.taken(range(config.learning.trajectories_per_update))
    recorder.close()
    replay = "--replay_schedule=a.jsonl"
    code, _, err = run_main(replay, "--workdir=new")
    assert code == 2 and err.count("\n") == 1
    assert "--replay_schedule=a.jsonl: config.seed = 0, recorded with 3. Fix: " in err
    assert sorted(place.rglob("*")) == [place / "a.jsonl"]
    tokens = f"--config.model.max_tokens={config.model.max_tokens}"
    code, _, err = run_main(replay, "--dry_run", "--config.seed=3", tokens)
    assert (code, err) == (0, "")


def test_a_file_that_cannot_be_made_is_refused(place: pathlib.Path) -> None:
    (place / "file").write_text("")
    code, _, err = run_main("--record_schedule=file/a.jsonl", "--workdir=new")
    assert code == 2 and err.count("\n") == 1
    assert "--record_schedule=file/a.jsonl: " in err and "Fix: " in err
    assert sorted(place.rglob("*")) == [place / "file"]
