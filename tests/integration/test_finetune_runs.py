"""Whole supervised runs in processes of their own, from the scripted expert to an evaluation."""

import json
import pathlib
import re
import signal

import pytest
from integration.run_process import RunProcess
from read_page import charts

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]

SETTINGS = (
    "--job=finetune",
    "--config.finetune.num_steps=8",
    "--config.finetune.batch_size=16",
    "--config.finetune.accumulation_steps=2",
    "--config.finetune.ema_decay=0.5",
    "--config.finetune.log_interval=2",
    "--config.finetune.checkpoint_interval=4",
    "--config.finetune.compute_norm_stats",
    "--config.finetune.dataset.num_episodes=8",
)
PLAIN = (*SETTINGS, "--config.evaluation.num_episodes=0")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunProcess:
    """A run with evaluation, never interrupted."""
    return RunProcess(tmp_path_factory.mktemp("whole"), *SETTINGS).expect(0)


def test_files_of_the_contract(whole: RunProcess) -> None:
    assert [record["update"] for record in whole.records()] == [2, 4, 6, 8]
    assert whole.summary()["outcome"] == "finished"
    stats = json.loads((whole.workdir / "norm_stats.json").read_text())["norm_stats"]
    assert set(stats) == {"state", "actions"} and len(stats["state"]["q01"]) == 4
    names = {path.name for path in whole.workdir.iterdir()}
    assert {"config.json", "metrics.jsonl", "summary.json", "trace.json", "videos"} <= names
    assert "Samples" in charts((whole.workdir / "report.html").read_text())
    assert len(list((whole.workdir / "demonstrations").glob("episode_*"))) == 8
    assert re.search(r"^success +before \d\.\d\d .*, after \d\.\d\d", "\n".join(whole.lines), re.M)


def test_evaluate_works_on_the_work_directory_as_it_is(whole: RunProcess) -> None:
    """Its own statistics are found; only the work directory is named."""
    RunProcess(whole.workdir, "--job=evaluate").expect(0)
    result = json.loads((whole.workdir / "eval.json").read_text())
    after = whole.summary()["evaluation_after"]
    assert result["update"] == 8 and result["eval/success_rate"] == after["eval/success_rate"]


def test_training_goes_on_from_it(whole: RunProcess, tmp_path: pathlib.Path) -> None:
    run = RunProcess(
        tmp_path,
        f"--config.model.initial_weights={whole.workdir}",
        "--config.warm_start.num_steps=0",
        "--config.warm_start.num_grounding_steps=0",
        "--config.evaluation.num_episodes=0",
        "--config.learning.num_updates=1",
    ).expect(0)
    own, given = (
        json.loads((x / "norm_stats.json").read_text()) for x in (tmp_path, whole.workdir)
    )
    assert own == given and run.records()[0]["update"] == 1


def test_a_stopped_run_ends_bitwise_like_one_that_was_not(tmp_path: pathlib.Path) -> None:
    first = RunProcess(tmp_path / "twice", *PLAIN, "--config.finetune.num_steps=100000")
    first.until(r"^update +4/")
    first.send(signal.SIGTERM)
    first.expect(3)
    assert first.summary()["outcome"] == "stopped"
    last = first.records()[-1]["update"] + 2
    settings = (*PLAIN, f"--config.finetune.num_steps={last}")
    second = RunProcess(tmp_path / "twice", *settings).expect(0)
    straight = RunProcess(tmp_path / "once", *settings).expect(0)
    assert second.digests(last) == straight.digests(last)


def test_a_mesh_of_eight_devices_gives_the_losses_of_one(tmp_path: pathlib.Path) -> None:
    one = RunProcess(tmp_path / "one", *PLAIN).expect(0)
    eight = RunProcess(
        tmp_path / "eight", *PLAIN, "--config.meshes.layout=colocated=8:data2,fsdp4", num_devices=8
    ).expect(0)
    for a, b in zip(one.records(), eight.records(), strict=True):
        assert a["learner/loss/actions"] == pytest.approx(b["learner/loss/actions"], rel=1e-4)
