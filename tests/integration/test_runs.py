"""Whole runs in processes of their own: what a user sees, on one device and on eight."""

import json
import math
import pathlib
import re
import signal
import time

import pytest
from fault_rows import FaultRow
from integration.run_process import RunProcess, lost
from read_page import charts, facts
from trace_format import check_trace

pytestmark = pytest.mark.timeout(900)

PLAIN = (
    "--config.warm_start.num_steps=0",
    "--config.warm_start.num_grounding_steps=0",
    "--config.evaluation.num_episodes=0",
)
SYNCHRONOUS = (
    *PLAIN,
    "--config.schedule.overlap_training=False",
    "--config.schedule.overlap_rollout=False",
    "--config.learning.num_updates=12",
)
LAYOUT = "--config.meshes.layout"
DISJOINT = f"{LAYOUT}=simulation=2 serving=2 learning=4:data2,fsdp2"
COLOCATED = f"{LAYOUT}=colocated=8:data2,fsdp4"
HYBRID = f"{LAYOUT}=simulation+serving=4 learning=4:fsdp4"
OVERLAPPING = f"{LAYOUT}=simulation=2@0 serving=4@0 learning=4@2:data2,fsdp2"
LOSSES = ("learner/loss/total", "learner/loss/policy", "learner/loss/value", "learner/approx_kl")


def require_invariants(records: list[dict], num_updates: int) -> None:
    """What must hold in every record of any run."""
    assert [record["update"] for record in records] == list(range(1, num_updates + 1))
    for record in records:
        assert record["queue/staleness/min"] >= 0
        assert record["queue/staleness/max"] <= record["queue/staleness/bound"]
        ended = record["queue/consumed"] + record["queue/dropped"]
        assert record["queue/admitted"] == ended + record["queue/in_flight"] + record["queue/depth"]
        assert record["serving/recompiles"] == 0
    times = [record["time_s"] for record in records]
    assert times == sorted(times)
    consumed = [record["queue/consumed"] for record in records]
    assert consumed == list(range(2, 2 * num_updates + 1, 2))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunProcess:
    """The debug config as it is: warm start, asynchronous training, evaluation."""
    return RunProcess(tmp_path_factory.mktemp("whole")).expect(0)


@pytest.fixture(scope="module")
def synchronous(tmp_path_factory: pytest.TempPathFactory) -> RunProcess:
    """A synchronous run of 12 updates on one device, never interrupted."""
    return RunProcess(tmp_path_factory.mktemp("synchronous"), *SYNCHRONOUS).expect(0)


def test_every_record_keeps_the_invariants(whole: RunProcess) -> None:
    require_invariants(whole.records(), 4)
    assert whole.summary()["outcome"] == "finished"


def test_the_last_lines_say_what_matters(whole: RunProcess) -> None:
    last = "\n".join(whole.lines[-6:])
    for pattern in (
        r"^success +before \d\.\d\d \[.*\] of 6 episodes, after \d\.\d\d",
        r"^speed .* env steps/s",
        r"^bottleneck ",
        r"^staleness +max [01], bound 1",
        rf"^workdir +{re.escape(str(whole.workdir))}",
        r"^next .*--job=evaluate",
    ):
        assert re.search(pattern, last, re.MULTILINE), f"{pattern}\n{last}"
    assert not any("\x1b" in line for line in whole.lines)


def test_files_of_the_contract(whole: RunProcess) -> None:
    spans = check_trace((whole.workdir / "trace.json").read_text())
    assert {"simulate", "infer", "train"} <= {span["name"] for span in spans}
    report = (whole.workdir / "report.html").read_text()
    assert facts(report)["updates"] == "4 of 4"
    assert {"Success", "Busy and waiting", "Time of each thread"} <= set(charts(report))
    counts = whole.summary()["staleness_counts"]
    assert sum(counts.values()) == whole.records()[-1]["queue/consumed"]
    assert len(list((whole.workdir / "videos").glob("*.mp4"))) == 3
    assert json.loads((whole.workdir / "config.json").read_text())["config"]["name"] == "debug"
    assert {path.name for path in (whole.workdir / "checkpoints").iterdir()} == {"2", "4"}


def test_evaluate_repeats_the_last_evaluation(whole: RunProcess) -> None:
    RunProcess(whole.workdir, "--job=evaluate").expect(0)
    result = json.loads((whole.workdir / "eval.json").read_text())
    after = next(line for line in whole.lines if line.startswith("success"))
    assert f"after {result['eval/success_rate']:.2f}" in after
    assert result["update"] == 4 and result["eval/episodes"] == 6
    assert "evaluate job, update 4" in (whole.workdir / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(DISJOINT, id="disaggregated"),
        pytest.param(COLOCATED, id="colocated"),
        pytest.param(HYBRID, id="hybrid"),
        pytest.param(OVERLAPPING, id="overlapping"),
    ],
)
def test_eight_devices_give_the_losses_of_one(
    synchronous: RunProcess, tmp_path: pathlib.Path, layout: str
) -> None:
    sharded = RunProcess(
        tmp_path, *SYNCHRONOUS, "--config.learning.num_updates=4", layout, num_devices=8
    ).expect(0)
    for one, eight in zip(synchronous.records()[:4], sharded.records(), strict=True):
        for name in LOSSES:
            assert math.isclose(one[name], eight[name], rel_tol=0.0, abs_tol=1e-5), name
        assert math.isclose(one["learner/grad_norm"], eight["learner/grad_norm"], rel_tol=1e-3)


@pytest.mark.slow
def test_asynchronous_run_on_disjoint_meshes(tmp_path: pathlib.Path) -> None:
    run = RunProcess(tmp_path, *PLAIN, DISJOINT, num_devices=8).expect(0)
    require_invariants(run.records(), 4)


@pytest.mark.slow
def test_asynchronous_run_with_two_policy_servers_on_devices_of_their_own(
    tmp_path: pathlib.Path,
) -> None:
    servers = ("--config.serving.num_servers=2", "--config.serving.split_devices")
    run = RunProcess(tmp_path, *PLAIN, DISJOINT, *servers, num_devices=8).expect(0)
    require_invariants(run.records(), 4)
    log = (tmp_path / "logs" / "serving.log").read_text()
    assert "compiled for" not in log


@pytest.mark.slow
@pytest.mark.fault(17, 19)
def test_an_interrupted_run_ends_bitwise_like_one_that_was_not(
    synchronous: RunProcess, tmp_path: pathlib.Path, fault_row: FaultRow
) -> None:
    first = RunProcess(tmp_path, *SYNCHRONOUS)
    first.until(r"^update +2/12")
    asked_s = time.monotonic()
    first.send(signal.SIGTERM)
    first.expect(3)
    note = f"stopped after {time.monotonic() - asked_s:.1f} s"
    fault_row(fault=17, survived=True, lost=lost(first.summary()), exit_code=3, note=note)
    assert first.summary()["outcome"] == "stopped"
    assert facts((tmp_path / "report.html").read_text())["outcome"] == "stopped"
    second = RunProcess(tmp_path, *SYNCHRONOUS).expect(0)
    require_invariants(second.records(), 12)
    assert second.digests(12) == synchronous.digests(12)
    for whole, resumed in zip(synchronous.records(), second.records(), strict=True):
        assert [whole[name] for name in LOSSES] == [resumed[name] for name in LOSSES]
    fault_row(fault=19, survived=True, bound_kept=True, exit_code=0)


@pytest.mark.slow
@pytest.mark.fault(12, 19)
def test_a_killed_run_continues_from_its_last_checkpoint(
    synchronous: RunProcess, tmp_path: pathlib.Path, fault_row: FaultRow
) -> None:
    first = RunProcess(tmp_path, *SYNCHRONOUS)
    first.until(r"^update +3/12")
    first.send(signal.SIGKILL)
    assert first.finish() == -signal.SIGKILL
    killed_s = time.monotonic()
    second = RunProcess(tmp_path, *SYNCHRONOUS)
    second.until(r"^update +\d+/12")
    recovery_s = time.monotonic() - killed_s
    second.expect(0)
    assert any("after update" in line for line in second.lines)
    require_invariants(second.records(), 12)
    assert second.digests(12) == synchronous.digests(12)
    figures = {"lost": lost(second.summary()), "recovery_s": recovery_s}
    fault_row(fault=12, survived=True, bound_kept=True, exit_code=0, **figures)
    fault_row(fault=19, survived=True, bound_kept=True, exit_code=0)
