"""metrics.jsonl through kills and resumes, and the writers behind the registry."""

import json
import math
import random
import subprocess
import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvla.telemetry import WRITERS, writers
from jaxvla.telemetry.writers import (
    JsonlWriter,
    RunInfo,
    TensorboardWriter,
    WandbWriter,
    find_writers,
    open_writers,
    replacing,
    write_json,
)


def run_info(workdir, resume_update=None):
    return RunInfo(workdir=workdir, name="a run", config={"seed": 3}, resume_update=resume_update)


def write_updates(workdir, updates, resume_update=None):
    writer = JsonlWriter(run_info(workdir, resume_update))
    for update in updates:
        writer.write({"update": update, "time_s": 0.5 * update})
    writer.close()


def read(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def updates(workdir):
    return [record["update"] for record in read(workdir)]


def refuse_constant(text):
    raise AssertionError(f"{text} is not JSON")


def test_one_object_a_line_and_null_for_what_json_has_no_number_for(tmp_path):
    writer = JsonlWriter(run_info(tmp_path))
    writer.write({"update": 1, "learner/grad_norm": math.inf, "learner/approx_kl": np.float32(0.5)})
    # Read before closing: each record is flushed.
    line = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(line, parse_constant=refuse_constant)
    assert record == {"update": 1, "learner/grad_norm": None, "learner/approx_kl": 0.5}
    assert line.count("\n") == 1 and line.endswith("\n")
    writer.close()
    writer.close()


def test_updates_must_ascend(tmp_path):
    writer = JsonlWriter(run_info(tmp_path))
    writer.write({"update": 4})
    for update in (4, 3):
        with pytest.raises(ValueError, match="after update 4"):
            writer.write({"update": update})
    writer.close()


def test_resume_drops_updates_beyond_the_checkpoint(tmp_path):
    write_updates(tmp_path, range(1, 8))
    write_updates(tmp_path, [5, 6], resume_update=4)
    assert updates(tmp_path) == [1, 2, 3, 4, 5, 6]
    # The writer knows what it kept: going back is refused on the first record too.
    writer = JsonlWriter(run_info(tmp_path, resume_update=6))
    with pytest.raises(ValueError, match="update 6 after update 6"):
        writer.write({"update": 6})
    writer.close()


def test_a_run_without_checkpoint_starts_the_file_anew(tmp_path):
    write_updates(tmp_path, [0, 1, 2])
    write_updates(tmp_path, [0, 1])
    assert updates(tmp_path) == [0, 1]


def test_records_that_are_missing_before_the_checkpoint_are_logged(tmp_path, caplog):
    write_updates(tmp_path, [1, 2])
    write_updates(tmp_path, [6], resume_update=5)
    assert "no updates 3..5" in caplog.text
    caplog.clear()
    write_updates(tmp_path, [7], resume_update=6)
    assert not caplog.text


@settings(deadline=None)  # no timed assertions
@given(data=st.data())
def test_a_file_torn_at_any_byte_is_repaired(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    write_updates(workdir, range(1, 6))
    path = workdir / "metrics.jsonl"
    whole = path.read_bytes()
    size = data.draw(st.integers(0, len(whole)))
    resume_update = data.draw(st.integers(0, 5))
    path.write_bytes(whole[:size])
    kept = min(whole[:size].count(b"\n"), resume_update)
    write_updates(workdir, [9], resume_update=resume_update)
    assert updates(workdir) == [*range(1, kept + 1), 9]


@pytest.mark.parametrize("line", ["{}", "[1]", "not json", '{"update": null}', '{"update": 1}'])
def test_a_foreign_or_disordered_file_is_refused_and_left_alone(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    content = '{"update": 1}\n' + line + '\n{"update": 2}\n'
    path.write_text(content)
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        JsonlWriter(run_info(tmp_path, resume_update=2))
    assert path.read_text() == content


ENDLESS_WRITER = """
import pathlib, sys
from jaxvla.telemetry.writers import JsonlWriter, RunInfo

resume = int(sys.argv[2])
run = RunInfo(workdir=pathlib.Path(sys.argv[1]), name="", config={}, resume_update=resume)
writer = JsonlWriter(run)
update = resume
while True:
    update += 1
    writer.write({"update": update, "padding": "x" * 1_000_000})
    sys.stdout.write(f"{update}\\n")
    sys.stdout.flush()
"""


def test_kill_9_at_random_points_leaves_whole_lines(tmp_path):
    # Large records, so that a kill has a chance to fall inside a write.
    chance = random.Random(0)
    resume_update = 0
    for _ in range(6):
        command = [sys.executable, "-c", ENDLESS_WRITER, str(tmp_path), str(resume_update)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert child.stdout is not None
            for _ in range(chance.randrange(1, 6)):
                acknowledged = int(child.stdout.readline())
            for _ in range(chance.randrange(200_000)):  # a moment inside the next record
                pass
        finally:
            child.kill()
            child.wait(timeout=30)
            child.stdout.close()
        *lines, torn = (tmp_path / "metrics.jsonl").read_bytes().split(b"\n")
        assert [json.loads(line)["update"] for line in lines] == list(range(1, len(lines) + 1))
        assert len(lines) >= acknowledged
        assert not torn or torn.startswith(b'{"update": %d,' % (len(lines) + 1))
        resume_update = acknowledged - 1  # as if the newest checkpoint were one behind


def test_replacing_is_all_or_nothing(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"rate": math.nan, "counts": (np.int64(1), 2.5), "name": "é"})
    assert json.loads(path.read_text("utf-8")) == {"rate": None, "counts": [1, 2.5], "name": "é"}
    before = path.read_bytes()
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write("half")
        file.flush()
        assert path.read_bytes() == before
        raise RuntimeError
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_package_names_the_extra(monkeypatch, name, package):
    monkeypatch.setattr(writers.importlib.util, "find_spec", lambda asked: None)
    with pytest.raises(ValueError, match=rf"needs the package {package}.*jaxvla\[{name}\]"):
        find_writers([name])


def test_an_unknown_writer_is_refused():
    with pytest.raises(ValueError, match="did you mean 'wandb'"):
        find_writers(["wand"])


class MemoryWriter:
    """A writer from outside the package."""

    opened: list = []  # noqa: RUF012

    def __init__(self, run):
        self.records, self.closed = [], False
        MemoryWriter.opened.append(self)

    @classmethod
    def check(cls):
        pass

    def write(self, record):
        self.records.append(record)

    def close(self):
        self.closed = True


def test_open_writers_has_jsonl_first_and_closes_all(tmp_path, monkeypatch):
    monkeypatch.setattr(MemoryWriter, "opened", [])
    monkeypatch.setitem(WRITERS._entries, "memory", f"{__name__}:MemoryWriter")
    with pytest.raises(KeyError), open_writers(run_info(tmp_path), ["memory"]) as opened:
        for writer in opened:
            writer.write({"update": 1})
        raise KeyError
    (memory,) = MemoryWriter.opened
    assert memory.closed and memory.records == [{"update": 1}]
    assert updates(tmp_path) == [1]
    with pytest.raises(ValueError, match="closed file"):
        opened[0].write({"update": 2})


RECORD = {"update": 7, "time_s": 1.5, "learner/loss/total": 0.25, "train/return_mean": math.nan}


class Recorder:
    """Stands in for a third-party object: keeps every call."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


def test_tensorboard_gets_finite_scalars_over_update(tmp_path, monkeypatch):
    made = Recorder()
    fake = types.ModuleType("tensorboardX")
    fake.SummaryWriter = lambda **kwargs: made.calls.append(("new", (), kwargs)) or made
    monkeypatch.setitem(sys.modules, "tensorboardX", fake)
    writer = TensorboardWriter(run_info(tmp_path, resume_update=6))
    writer.write(RECORD)
    writer.close()
    assert made.calls == [
        ("new", (), {"logdir": str(tmp_path / "tensorboard"), "purge_step": 7}),
        ("add_scalar", ("time_s", 1.5), {"global_step": 7}),
        ("add_scalar", ("learner/loss/total", 0.25), {"global_step": 7}),
        ("flush", (), {}),
        ("close", (), {}),
    ]


def test_tensorboard_for_real(tmp_path):
    pytest.importorskip("tensorboardX")
    writer = TensorboardWriter(run_info(tmp_path))
    writer.write(RECORD)
    writer.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"learner/loss/total" in content and b"train/return_mean" not in content


def test_wandb_continues_the_run_of_the_work_directory(tmp_path, monkeypatch):
    made, inits = Recorder(), []
    fake = types.ModuleType("wandb")
    fake.init = lambda **kwargs: inits.append(kwargs) or made
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for resume_update in (None, 3):
        writer = WandbWriter(run_info(tmp_path, resume_update))
        writer.write(RECORD)
        writer.close()
    assert inits[0] == inits[1]
    assert inits[0]["config"] == {"seed": 3} and inits[0]["dir"] == str(tmp_path)
    assert made.calls[:3] == [
        ("define_metric", ("*",), {"step_metric": "update"}),
        ("log", ({"update": 7, "time_s": 1.5, "learner/loss/total": 0.25},), {}),
        ("finish", (), {}),
    ]
    (tmp_path / "other").mkdir()
    WandbWriter(run_info(tmp_path / "other")).close()
    assert inits[2]["id"] != inits[0]["id"]
