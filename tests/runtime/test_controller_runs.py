"""Whole training runs: what they record, how they resume, and how they end."""

import dataclasses
import json
import math
import pathlib
import re
import threading
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from fault_rows import FaultRow
from serving.tiny_policy import TinyPolicy
from simulation.counter_env import CounterEnv
from tiny_run import (
    COMMAND,
    LOSSES,
    NO_EVALUATION,
    SYNCHRONOUS,
    TIMEOUT_S,
    Record,
    Run,
    keeps_bound,
    make_blueprint,
    quick_jit,
    require_invariants,
)

from jaxvla import config as c
from jaxvla.checkpoint import SaveError
from jaxvla.evaluation.evaluator import Evaluator
from jaxvla.learning.learner import NonFiniteError
from jaxvla.runtime.controller import _failure
from jaxvla.runtime.crew import make_batcher
from jaxvla.runtime.local import ProgramFailedError
from jaxvla.simulation.group import DeviceEnvGroup
from jaxvla.transport.staleness import StalenessViolation, credit_rule
from jaxvla.types import Params

fast_compilation = pytest.fixture(quick_jit, scope="module", autouse=True)


# ------------------------------------------------------------------- a run to its end


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Asynchronous, with a warm start, evaluated every second update."""
    blueprint = make_blueprint(
        warm_start=c.WarmStartConfig(num_steps=3, num_episodes=8, batch_size=4),
        evaluation=c.EvaluationConfig(num_episodes=4, num_videos=1, interval=2),
    )
    return Run(tmp_path_factory.mktemp("whole"), blueprint).expect(0)


def test_every_record_keeps_the_invariants(whole: Run) -> None:
    require_invariants(whole.records(), 4)
    assert {record["queue/staleness/bound"] for record in whole.records()} == {1}


def test_evaluation_keeps_its_cadence(whole: Run) -> None:
    """Before, every second update, and after; the last one is not evaluated twice."""
    evaluated = [x["update"] for x in whole.records() if "eval/success_rate" in x]
    assert evaluated == [2]
    shown = [line for line in whole.lines if line.startswith("evaluation at update")]
    assert [int(line.split()[3].rstrip(":")) for line in shown] == [0, 2, 4]


def test_summary_of_a_finished_run(whole: Run) -> None:
    summary, last = whole.summary(), whole.records()[-1]
    assert (summary["outcome"], summary["detail"], summary["update"]) == ("finished", "", 4)
    assert summary["last_record"] == last
    assert summary["ledger_closes"] is True
    totals = summary["totals"]
    assert totals["queue/consumed"] == 8 and totals["queue/in_flight"] == 0
    assert totals["queue/admitted"] == 8 + totals["queue/dropped"]
    assert totals["serving/recompiles"] == 0
    assert summary["staleness_bound"] == 1
    assert summary["max_staleness"] == max(x["queue/staleness/max"] for x in whole.records())
    for name in ("evaluation_before", "evaluation_after"):
        assert summary[name]["eval/episodes"] == 4
        assert {"eval/success_rate/short", "eval/success_rate/long"} <= set(summary[name])
    assert summary["env_steps_per_s"] > 0.0
    assert set(summary["utilisation"]) == {"simulation", "serving", "learning"}
    for activity in summary["utilisation"].values():
        shares = sum(activity["waiting_on"].values())
        assert activity["busy_fraction"] + shares == pytest.approx(1.0)


def test_checkpoints_keep_their_cadence(whole: Run) -> None:
    """Of updates 0, 2 and 4 the two newest are kept."""
    assert whole.steps() == [2, 4]


def test_the_story_of_a_run_is_told_in_order(whole: Run) -> None:
    told = [
        r"^compile took ",
        r"^demonstrations \(8 scripted episodes\) took ",
        r"^imitation \(3 steps of 4, \d+ samples\) took ",
        r"^  loss/actions \d+\.\d{3}, grad_norm \d+\.\d{3}$",
        r"^sampled and evaluated log-probs agree to \d\.\de[+-]\d\d$",
        r"^evaluation at update 0: ",
        r"^update 1/4 ",
        r"^update 2/4 ",
        r"^update 3/4 ",
        r"^update 4/4 ",
        r"^evaluation at update 4: ",
        r"^success +before .* of 4 episodes, after .* of 4 episodes$",
        r"^speed ",
        r"^bottleneck ",
        r"^staleness +max [01], bound 1$",
        r"^workdir ",
        rf"^next +{re.escape(COMMAND)} --job=evaluate$",
    ]
    places = []
    for pattern in told:
        found = [place for place, line in enumerate(whole.lines) if re.search(pattern, line)]
        assert len(found) == 1, f"{pattern}: {found}\n" + "\n".join(whole.lines)
        places += found
    assert places == sorted(places)


def test_files_of_a_run(whole: Run) -> None:
    videos = {path.name for path in (whole.workdir / "videos").iterdir()}
    assert videos == {"short_0.mp4", "long_0.mp4"}  # of the last evaluation only
    trace = json.loads((whole.workdir / "trace.json").read_text())
    names = {event["name"] for event in trace["traceEvents"]}
    assert {"simulate", "infer", "train", "publish", "wait"} <= names


def test_everything_large_is_compiled_before_the_programs_start(tmp_path: pathlib.Path) -> None:
    """Once each, in a thread of its own: nothing of it stands in the way of the first update."""
    compiled: list[tuple[str, str]] = []
    is_listening = True

    def listen(event: str, duration_secs: float, **details: Any) -> None:
        if is_listening and event == "/jax/core/compile/backend_compile_duration":
            compiled.append((str(details.get("fun_name")), threading.current_thread().name))

    jax.monitoring.register_event_duration_secs_listener(listen)
    Run(tmp_path, make_blueprint()).expect(0)
    is_listening = False
    for name in ("_prepare", "_draw", "_step"):
        threads = [thread for function, thread in compiled if function == f"jit({name})"]
        assert len(threads) == 1 and threads[0].startswith("ThreadPoolExecutor"), (name, threads)
    late = {function for function, thread in compiled if "/" in thread}
    assert late <= {"jit(_stack_on_device)", "jit(convert_element_type)"}


# ------------------------------------------------------------------------ stop and resume


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A synchronous run to its end."""
    return Run(tmp_path_factory.mktemp("uninterrupted"), make_blueprint(**SYNCHRONOUS)).expect(0)


@pytest.mark.fault(19)
def test_a_stopped_run_ends_like_one_that_was_not(
    uninterrupted: Run, tmp_path: pathlib.Path
) -> None:
    first = Run(tmp_path, make_blueprint(**SYNCHRONOUS))
    first.stop_after(3)
    first.expect(3)
    stopped = first.summary()
    assert (stopped["outcome"], stopped["update"]) == ("stopped", 3)
    assert stopped["evaluation_before"] is not None and stopped["evaluation_after"] is None
    assert stopped["ledger_closes"] is True
    assert first.lines[-1].split(maxsplit=1) == ["next", COMMAND]
    assert first.steps() == [2, 3]  # 3 was not due: it was saved because of the stop
    require_invariants(first.records(), 3)

    second = Run(tmp_path, make_blueprint(**SYNCHRONOUS)).expect(0)
    assert any(line.endswith("after update 3") for line in second.lines)
    require_invariants(second.records(), 4)
    assert second.steps()[-1] == 4
    assert second.digests(4) == uninterrupted.digests(4)
    for resumed, expected in zip(second.records(), uninterrupted.records(), strict=True):
        assert [resumed[name] for name in LOSSES] == [expected[name] for name in LOSSES]
    finished = second.summary()
    assert finished["update"] == 4
    for name in ("evaluation_before", "evaluation_after"):
        assert finished[name] == uninterrupted.summary()[name]
    dropped = finished["totals"]["queue/dropped"]
    assert finished["totals"]["queue/admitted"] == 8 + dropped
    assert finished["time_s"] > stopped["time_s"]


def test_a_finished_run_is_evaluated_again_and_not_trained(uninterrupted: Run) -> None:
    before, records = uninterrupted.summary(), uninterrupted.records()
    again = Run(uninterrupted.workdir, make_blueprint(**SYNCHRONOUS)).expect(0)
    assert again.records() == records
    assert not any(line.startswith("update ") for line in again.lines)
    summary = again.summary()
    assert summary["outcome"] == "finished" and summary["update"] == 4
    assert summary["evaluation_after"] == before["evaluation_after"]
    assert summary["evaluation_before"] == before["evaluation_before"]


def test_a_stop_during_the_warm_start_leaves_nothing_to_continue(tmp_path: pathlib.Path) -> None:
    warm_start = c.WarmStartConfig(num_steps=3, num_episodes=2, batch_size=2)
    run = Run(tmp_path, make_blueprint(warm_start=warm_start))
    run.stop.set()
    run.expect(3)
    assert run.steps() == [] and run.records() == []
    summary = run.summary()
    assert (summary["outcome"], summary["update"]) == ("stopped", 0)
    assert summary["evaluation_before"] is None
    assert run.lines[-1].split(maxsplit=1) == ["next", COMMAND]


def test_a_stop_before_the_first_update_saves_the_start(tmp_path: pathlib.Path) -> None:
    run = Run(tmp_path, make_blueprint())
    run.stop.set()
    run.expect(3)
    assert run.steps() == [0] and run.records() == []
    assert run.summary()["outcome"] == "stopped"


def test_an_update_that_outlasts_the_grace_of_a_stop_is_not_saved(tmp_path: pathlib.Path) -> None:
    """Its arrays change, or are another thread's collective, while it is under way."""
    run = Run(tmp_path, make_blueprint(**SYNCHRONOUS, runtime=c.RuntimeConfig(grace_s=0.2)))
    release, is_released = threading.Event(), threading.Event()

    def stop(record: Record) -> None:
        if record["update"] == 3:
            run.stop.set()
            assert release.wait(TIMEOUT_S)
            is_released.set()

    run.screen.on_update = stop
    try:
        run.expect(3)
        assert not is_released.is_set()
        assert run.steps() == [0, 2]
        assert run.summary()["outcome"] == "stopped"
        told = "an update takes longer than 0.1 s to stop: its work is lost"
        assert any(line.startswith(told) for line in run.lines)
    finally:
        release.set()
        assert is_released.wait(TIMEOUT_S)
    Run(tmp_path, make_blueprint(**SYNCHRONOUS)).expect(0)


# ------------------------------------------------------------------------- bad endings


def test_a_policy_that_contradicts_itself_is_not_trained(tmp_path: pathlib.Path) -> None:
    policy = TinyPolicy(CounterEnv.spec, noise_level=0.5, evaluated_noise_level=0.6)
    run = Run(tmp_path, make_blueprint(policy)).expect(4)
    assert run.steps() == [] and run.records() == []
    summary = run.summary()
    assert summary["outcome"] == "unsafe"
    assert summary["detail"].startswith("sampled and evaluated log-probs of the same weights")
    assert f"error: {summary['detail']}" in run.lines
    assert run.lines[-1].split(maxsplit=1) == ["next", COMMAND]


def test_a_failing_program_ends_the_run(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The simulator, in the middle of its fourth trajectory, after one update of two."""
    step_chunk, calls = DeviceEnvGroup.step_chunk, []

    def failing(group: DeviceEnvGroup, *arguments: Any) -> Any:
        calls.append(group.name)
        if len(calls) == 8:
            raise OSError("the world is gone")
        return step_chunk(group, *arguments)

    monkeypatch.setattr(DeviceEnvGroup, "step_chunk", failing)
    run = Run(tmp_path, make_blueprint(evaluation=NO_EVALUATION, **SYNCHRONOUS)).expect(1)
    summary = run.summary()
    assert summary["outcome"] == "failed"
    assert summary["detail"] == "simulation: OSError: the world is gone"
    assert "error: simulation: OSError: the world is gone" in run.lines
    assert summary["ledger_closes"] is True
    assert summary["totals"]["queue/dropped/simulator_failed"] == 1
    require_invariants(run.records(), 1)
    assert run.steps() == [0]  # what a failure leaves behind is not trusted
    assert summary["evaluation_before"] is None and summary["evaluation_after"] is None
    assert "the world is gone" in (tmp_path / "logs" / "simulation.log").read_text()


class NanPolicy(TinyPolicy):
    """Its critic is not finite when it is trained."""

    def evaluate(
        self, params: Params, encoding: jax.Array, trace: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        log_prob, entropy, value = super().evaluate(params, encoding, trace)
        return log_prob, entropy, jnp.nan * value


def _fail_to_save(run: Run, versions: set[int]) -> None:
    """Checkpoints of these versions cannot be written."""
    save = run.controller._checkpointer.save

    def saving(step: int, arrays: Any, record: dict[str, Any]) -> None:
        if step in versions:
            raise SaveError(f"checkpoint {step} could not be written: no space")
        save(step, arrays, record)

    run.controller._checkpointer.save = saving


@pytest.mark.fault(16)
def test_a_run_goes_on_without_checkpoints_for_a_while(tmp_path: pathlib.Path) -> None:
    blueprint = make_blueprint(
        evaluation=NO_EVALUATION, checkpoint=c.CheckpointConfig(interval=1, max_failed_saves=3)
    )
    run = Run(tmp_path, blueprint)
    _fail_to_save(run, {0, 1, 3})
    run.expect(0)
    assert run.steps() == [2, 4]
    assert run.records()[-1]["faults/failed_saves"] == 3
    told = [line for line in run.lines if "could not be written" in line]
    assert [line.rpartition("(")[2] for line in told] == [
        "1 of 3 in a row)",
        "2 of 3 in a row)",
        "1 of 3 in a row)",
    ]


@pytest.mark.fault(16)
def test_a_run_that_can_save_nothing_ends(tmp_path: pathlib.Path) -> None:
    blueprint = make_blueprint(
        evaluation=NO_EVALUATION, checkpoint=c.CheckpointConfig(interval=1, max_failed_saves=2)
    )
    run = Run(tmp_path, blueprint)
    _fail_to_save(run, {1, 2, 3, 4})
    run.expect(1)
    assert run.steps() == [0]
    assert "checkpoint 2 could not be written" in run.summary()["detail"]


@pytest.mark.fault(16)
def test_a_last_checkpoint_that_fails_is_a_failure(tmp_path: pathlib.Path) -> None:
    run = Run(tmp_path, make_blueprint(evaluation=NO_EVALUATION))
    _fail_to_save(run, {4})
    run.expect(1)
    assert run.steps() == [0, 2]
    assert run.summary()["outcome"] == "failed"


@pytest.mark.fault(9)
def test_updates_that_stay_non_finite_stop_the_run(
    tmp_path: pathlib.Path, fault_row: FaultRow
) -> None:
    learning = c.LearningConfig(num_updates=9, max_skipped_updates=2)
    blueprint = make_blueprint(
        NanPolicy(CounterEnv.spec), learning=learning, evaluation=NO_EVALUATION
    )
    run = Run(tmp_path, blueprint).expect(4)
    summary = run.summary()
    assert summary["outcome"] == "unsafe"
    assert summary["detail"].startswith("learning: NonFiniteError: 2 updates in a row")
    assert [x["learner/grad_norm"] for x in run.records()] == [None]
    assert run.steps() == [0]
    assert summary["detail"].endswith("The last good checkpoint is update 0")
    fault_row(survived=True, lost=0, bound_kept=keeps_bound(run), exit_code=4)


def test_a_failure_outside_of_the_programs_is_the_callers(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But the books are closed first."""

    def failing(*_: Any) -> None:
        raise OSError("no space left for videos")

    monkeypatch.setattr(Evaluator, "evaluate", failing)
    run = Run(tmp_path, make_blueprint())
    with pytest.raises(OSError, match="no space left"):
        run.run()
    summary = run.summary()
    assert summary["outcome"] == "failed"
    assert summary["detail"] == "OSError: no space left for videos"
    assert (tmp_path / "trace.json").is_file()


@pytest.mark.parametrize(
    ("cause", "outcome", "code"),
    [
        (NonFiniteError("3 updates"), "unsafe", 4),
        (StalenessViolation("2 > 1"), "unsafe", 4),
        (FloatingPointError("overflow"), "failed", 1),
    ],
)
def test_what_a_program_fails_of_decides_how_the_run_ends(
    cause: Exception, outcome: str, code: int
) -> None:
    error = ProgramFailedError("learning", cause)
    error.__cause__ = cause
    detail = f"learning: {type(cause).__name__}: {cause}"
    assert _failure(error) == (outcome, detail, code)


# ------------------------------------------------------------------- wiring, nothing run


def test_batches_form_dynamically_or_in_lockstep() -> None:
    serving = c.ServingConfig(trigger_size=2, max_wait_ms=20.0, max_batch=3, buckets=(3,))
    limits = {}
    for is_dynamic in (True, False):
        schedule = c.ScheduleConfig(overlap_rollout=is_dynamic)
        batcher = make_batcher(make_blueprint(serving=serving, schedule=schedule).config)
        limits[is_dynamic] = (batcher._trigger_rows, batcher._max_wait_s, batcher._capacity_rows)
        assert batcher._max_rows == 3
    assert limits == {True: (2, 0.02, 4), False: (3, math.inf, 4)}


def test_the_credit_rule_is_that_of_the_config() -> None:
    """The bound is in force only while simulation overlaps training."""
    learning = c.LearningConfig(num_updates=7, trajectories_per_update=5)
    for overlap, bound, interval in ((True, 3, 2), (False, 0, 1)):
        schedule = c.ScheduleConfig(
            overlap_training=overlap, max_staleness=3, publish_interval=interval
        )
        rule = credit_rule(make_blueprint(learning=learning, schedule=schedule).config)
        assert dataclasses.asdict(rule) == {
            "trajectories_per_update": 5,
            "max_staleness": bound,
            "publish_interval": interval,
            "window": 1,
            "num_updates": 7,
        }
