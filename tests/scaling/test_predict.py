"""The command that prints scaling tables, on the files of a small run."""

import json
import pathlib

import pytest
from run_files import CONFIG, write_run

from jaxvla.scaling.predict import base_of, main, with_settings
from jaxvla.scaling.run_samples import read_run


@pytest.fixture
def workdir(tmp_path: pathlib.Path) -> pathlib.Path:
    write_run(tmp_path)
    return tmp_path


def _main(workdir: pathlib.Path, *options: str) -> int:
    return main(["predict", f"--run={workdir}", "--updates=3", "--warmup=1", *options])


def test_tables_are_printed_and_written(workdir: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    out = workdir / "prediction.json"
    overlap = ("--set=schedule.overlap_training=True", "--set=schedule.overlap_rollout=True")
    # The run was in lockstep, batches of eight; on their own, groups ask for four.
    assert _main(workdir, "--devices=1,2,4", *overlap, f"--json={out}") == 0
    text = capsys.readouterr().out
    for title in ("weak scaling, replicated (simulated)", "strong scaling, separate (simulated)"):
        assert title in text
    report = json.loads(out.read_text())
    assert report["label"] == "simulated"
    rows = report["rows"]
    assert {row["band"] for row in rows} == {"low", "mid", "high"}
    weak = [
        row
        for row in rows
        if (row["mode"], row["deployment"], row["band"]) == ("weak", "replicated", "mid")
    ]
    assert [row["num_devices"] for row in weak] == [1, 2, 4]
    assert weak[0]["efficiency"] == 1.0
    for row in weak:
        expected = row["efficiency"] * row["num_devices"] * weak[0]["env_steps_per_s"]
        assert row["env_steps_per_s"] == pytest.approx(expected)
        # Chunk steps took 3.1 s and 3.2 s, in the order of the draws.
        assert 0.8 < row["efficiency"] <= 1.01


def test_a_seed_decides_the_tables(workdir: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    texts = []
    for seed in (0, 0, 1):
        assert _main(workdir, "--devices=1,2", f"--seed={seed}") == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_bad_usage_is_refused(workdir: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    for options, message in (
        (("--devices=0",), "no multiple of the 1 devices"),
        (("--set=schedule.nothing=1",), "'schedule.nothing' is no field"),
        (("--set=simulation.num_groups=1",), "is no field of schedule or serving"),
        (("--set=schedule.max_staleness=x",), "'x' is no value"),
        ((f"--run={workdir / 'missing'}",), "no such file"),
    ):
        assert _main(workdir, *options) == 2
        assert message in capsys.readouterr().err


def test_runs_whose_stages_slowed_each_other_are_refused(workdir: pathlib.Path):
    run = write_run(workdir)
    trace = json.loads((workdir / "trace.json").read_text())
    for event in trace["traceEvents"]:
        if event["ph"] == "X" and event["pid"] == 3:
            event["ts"] -= 5e6  # the learner works while the simulator steps
    (workdir / "trace.json").write_text(json.dumps(trace))
    with pytest.raises(ValueError, match="stages that share devices overlapped for"):
        base_of([read_run(workdir)])
    apart = CONFIG | {"meshes": {"layout": "simulation=1 serving=1 learning=1"}}
    (workdir / "config.json").write_text(json.dumps({"config": apart, "devices": ["cuda:0"]}))
    assert base_of([read_run(workdir)]).devices_per_unit == 3
    assert base_of([run]).system.cores == {"cores": 2}


def test_settings_change_a_copy():
    changed = with_settings(CONFIG, ["schedule.max_staleness=3", "serving.max_wait_ms=1.5"])
    assert changed["schedule"]["max_staleness"] == 3
    assert changed["serving"]["max_wait_ms"] == 1.5
    assert CONFIG["schedule"]["max_staleness"] == 1
