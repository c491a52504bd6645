"""A small sweep from the command line: real runs in processes of their own."""

import csv
import json
import pathlib
import signal

import pytest
from run_process import RunProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

LAYOUTS = ("colocated=2", "simulation+serving=1 learning=1")
SWEEP = (
    "--job=sweep",
    "--config.sweep.host_devices=2",
    f"--config.sweep.layouts={LAYOUTS}",
    "--config.sweep.warmup_updates=1",
    "--config.sweep.measured_updates=2",
    "--config.sweep.repeats=1",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunProcess:
    """Stopped after its first run, then continued."""
    workdir = tmp_path_factory.mktemp("sweep") / "sweep"
    first = RunProcess(workdir, *SWEEP)
    first.until(r"^trial 1/2 repeat 1/1 .* eta ")
    first.send(signal.SIGINT)
    first.expect(3)
    return RunProcess(workdir, *SWEEP).expect(0)


def _trials(run: RunProcess) -> list[dict]:
    return json.loads((run.workdir / "sweep.json").read_text())["trials"]


def test_a_sweep_goes_on_where_it_was_stopped(whole: RunProcess):
    shown = [line for line in whole.lines if line.startswith("trial ")]
    assert len(shown) == 1 and shown[0].startswith(f"trial 2/2 repeat 1/1 | {LAYOUTS[1]} | ")
    assert [trial["layout"] for trial in _trials(whole)] == list(LAYOUTS)


def test_every_trial_was_measured(whole: RunProcess):
    for trial in _trials(whole):
        (run,) = trial["repeats"]
        assert trial["failed"] is None and trial["num_updates"] == 2 + 2 + 2
        for name in ("env_steps_per_s", "useful_env_steps_per_s", "updates_per_s"):
            assert run[name] > 0
        # The records of a run say the same as its totals.
        records = pathlib.Path(whole.workdir, trial["directory"], "repeat_1/run/metrics.jsonl")
        _, first, _, last, *_ = map(json.loads, records.read_text().splitlines())
        assert run["measured_s"] == pytest.approx(last["time_s"] - first["time_s"])
        assert run["updates_per_s"] == pytest.approx(2 / run["measured_s"], rel=0.02)
        steps = 2 * 2 * 8 * 4 * 4  # updates, trajectories, envs, chunk queries, control steps
        assert run["env_steps_per_s"] <= 1.02 * steps / run["measured_s"]
        assert 0 <= run["staleness_mean"] <= run["staleness_max"] <= 1
        assert 0 < run["chunk_latency_ms_p50"] <= run["chunk_latency_ms_p99"]
        assert run["peak_rss_mib"] > 100 and run["compile_s"] > 0
        for role in ("simulation", "serving", "learning"):
            shares = [x for name, x in run.items() if name.startswith(f"utilisation/{role}/")]
            assert sum(shares) == pytest.approx(1.0, abs=0.02)


def test_nothing_but_training_was_run(whole: RunProcess):
    for trial in _trials(whole):
        run = whole.workdir / trial["directory"] / "repeat_1" / "run"
        config = json.loads((run / "config.json").read_text())
        assert config["config"]["meshes"]["layout"] == trial["layout"]
        assert len(config["devices"]) == 2
        summary = json.loads((run / "summary.json").read_text())
        assert summary["evaluation_before"] is None and summary["evaluation_after"] is None
        assert not (run / "checkpoints").exists() and not (run / "videos").exists()


def test_files_and_last_lines(whole: RunProcess):
    with (whole.workdir / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["layout"] for row in rows] == list(LAYOUTS)
    assert all(float(row["env_steps_per_s"]) > 0 for row in rows)
    text = "\n".join(whole.lines[-6:])
    assert "is fastest: " in text and "1 of the 3 repeats that telling takes" in text
    page = (whole.workdir / "report.html").read_text()
    assert all(layout in page for layout in LAYOUTS)


def test_a_finished_sweep_runs_nothing(whole: RunProcess):
    again = RunProcess(whole.workdir, *SWEEP).expect(0)
    assert not [line for line in again.lines if line.startswith("trial ")]


def test_another_sweep_is_refused(whole: RunProcess):
    before = (whole.workdir / "sweep.json").read_bytes()
    other = RunProcess(whole.workdir, *SWEEP, "--config.seed=7").expect(2)
    assert "has a sweep with config.seed = 0, now it is 7" in other.lines[-1]
    assert (whole.workdir / "sweep.json").read_bytes() == before
