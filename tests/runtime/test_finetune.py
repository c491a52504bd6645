"""Supervised runs in seconds: a tiny policy imitates vectors that were written to disk."""

import dataclasses
import io
import json
import pathlib
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from runtime.tiny_run import COMMAND, NO_EVALUATION, HookedScreen, make_blueprint
from runtime.tiny_run import quick_jit as quick_jit_of_runs
from serving.tiny_policy import HORIZON
from simulation.counter_env import CounterEnv

from jaxvla import config as c
from jaxvla.data.episodes import EpisodeSamples
from jaxvla.data.recorded import RecordedEpisode, RecordedEpisodes, write_episodes
from jaxvla.runtime.build import Blueprint, Parts
from jaxvla.runtime.evaluate import restore_evaluated
from jaxvla.runtime.finetune import Finetuning, checkpoint_target
from jaxvla.runtime.finetune_training import published

quick_jit = pytest.fixture(autouse=True, scope="module")(quick_jit_of_runs)

NUM_STEPS = 9
SETTINGS: dict[str, Any] = {
    "num_steps": NUM_STEPS,
    "batch_size": 8,
    "accumulation_steps": 2,
    "ema_decay": 0.8,
    "log_interval": 2,
    "checkpoint_interval": 4,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Twelve episodes; the actions are a function of the state."""
    directory, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    write_episodes(directory, make_episodes(random), cameras=CounterEnv.spec.cameras, key="")
    return directory


def make_episodes(random: np.random.Generator, scale: float = 1.0) -> Iterator[RecordedEpisode]:
    for number in range(12):
        state = random.uniform(0, 1, (5, 2)).astype(np.float32)
        yield RecordedEpisode(
            instruction=CounterEnv.spec.instructions[number % 2],
            images=random.integers(0, 256, (5, 1, 2, 2, 3), dtype=np.uint8),
            state=state,
            actions=(scale * (state - 0.5)).astype(np.float32),
        )


def blueprint_of(evaluation: Any = NO_EVALUATION, **settings: Any) -> Blueprint:
    finetune = c.FinetuneConfig(**(SETTINGS | settings))
    return make_blueprint(finetune=finetune, evaluation=evaluation)


class SupervisedRun:
    """One process' share of a run; see `tiny_run.Run`."""

    def __init__(
        self, workdir: pathlib.Path, data: pathlib.Path, blueprint: Blueprint | None = None
    ):
        self.workdir = workdir
        self.stop = threading.Event()
        self.blueprint = blueprint or blueprint_of()
        self._output = io.StringIO()
        self.screen = HookedScreen(self._output, num_updates=NUM_STEPS)
        tokens = np.asarray([3, 1], np.int32)
        self.dataset = RecordedEpisodes(c.DatasetConfig(path=str(data)))
        self.samples = EpisodeSamples(
            self.dataset,
            cameras=CounterEnv.spec.cameras,
            image_size=CounterEnv.spec.image_size,
            action_horizon=HORIZON,
            prompt=lambda text, state: (tokens, tokens > 0),
        )

    def make(self) -> Finetuning:
        return Finetuning(
            self.blueprint,
            self.samples,
            workdir=self.workdir,
            screen=self.screen,
            stop_requested=self.stop,
            command=f"{COMMAND} --job=finetune",
        )

    def expect(self, code: int) -> "SupervisedRun":
        self.workdir.mkdir(exist_ok=True)
        actual = self.make().run()
        assert actual == code, f"exit code {actual}:\n" + self._output.getvalue()
        return self

    @property
    def lines(self) -> list[str]:
        return self._output.getvalue().splitlines()

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(x) for x in (self.workdir / "metrics.jsonl").read_text().splitlines()]

    def summary(self) -> dict[str, Any]:
        return json.loads((self.workdir / "summary.json").read_text())

    def steps(self) -> list[int]:
        return sorted(int(x.name) for x in (self.workdir / "checkpoints").iterdir())

    def digests(self, step: int = NUM_STEPS) -> dict[str, str]:
        record = self.workdir / "checkpoints" / str(step) / "record" / "metadata"
        return json.loads(record.read_text())["digests"]


@pytest.fixture(scope="module")
def whole(data: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> SupervisedRun:
    """A run that was never interrupted."""
    return SupervisedRun(tmp_path_factory.mktemp("whole"), data).expect(0)


def test_records(whole: SupervisedRun) -> None:
    records = whole.records()
    assert [record["update"] for record in records] == [2, 4, 6, 8, 9]
    for record in records:
        assert record["learner/loss/total"] == pytest.approx(record["learner/loss/actions"])
        assert record["learner/grad_norm"] > 0 and record["rate/samples_per_s"] > 0
        assert record["rate/samples_per_s"] == pytest.approx(8 * record["rate/updates_per_s"])
        shares = [value for name, value in record.items() if name.startswith("utilisation/")]
        assert sum(shares) == pytest.approx(1.0)
        assert "utilisation/learning/waiting_on/data_fraction" in record
        assert record["faults/skipped_optimizer_steps"] == 0
    assert whole.steps() == [8, 9]


def test_the_screen_and_the_summary(whole: SupervisedRun) -> None:
    updates = [line for line in whole.lines if line.startswith("update ")]
    assert len(updates) == 5 and all("samples/s" in line for line in updates)
    assert not any("env steps" in line or "staleness" in line for line in whole.lines)
    last = "\n".join(whole.lines[-5:])
    assert "success     before not evaluated, after not evaluated" in last
    assert "samples/s" in last and "bottleneck  learning" in last
    assert f"next        {COMMAND} --job=finetune --job=evaluate" in last
    summary = whole.summary()
    assert summary["outcome"] == "finished" and summary["update"] == NUM_STEPS
    assert summary["samples_per_s"] > 0 and summary["last_record"]["update"] == NUM_STEPS


def test_it_learns(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The least loss is that of the noise, which a linear policy cannot see: 2/3 or so."""
    optimizer = c.OptimizerConfig(learning_rate=3e-2)
    blueprint = blueprint_of(num_steps=60, log_interval=20, optimizer=optimizer, batch_size=32)
    records = SupervisedRun(tmp_path, data, blueprint).expect(0).records()
    losses = [record["learner/loss/actions"] for record in records]
    assert losses[0] > 1.3 * losses[-1]


@pytest.mark.parametrize("step", [3, 4, 8])
def test_an_interrupted_run_ends_bitwise_like_one_that_was_not(
    step: int, whole: SupervisedRun, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Stopped between records, at a checkpoint, before the last step."""
    first = SupervisedRun(tmp_path, data)
    read, may_read = first.samples.read, threading.Event()
    taken: list[int] = []

    def counted(rows: np.ndarray) -> Any:
        """The batch after the last one wanted comes with the wish to stop."""
        taken.append(len(rows))
        if len(taken) == step + 2:  # the first read is for shapes
            first.stop.set()
            may_read.set()
        return read(rows)

    first.samples.read = counted
    # One batch ahead at most: the stop is seen before the batch that it came with.
    first.blueprint = blueprint_of(prefetch=1)
    code = first.make().run()
    assert code == 3 and may_read.is_set()
    assert first.summary()["outcome"] == "stopped"
    reached = first.steps()[-1]
    assert reached in (step, step - 1) and first.records()[-1]["update"] == reached
    assert first.lines[-1].endswith("--job=finetune")
    second = SupervisedRun(tmp_path, data).expect(0)
    assert f"continuing {tmp_path} after update {reached}" in second.lines
    assert second.digests() == whole.digests()
    updates = [record["update"] for record in second.records()]
    assert updates == sorted({2, 4, 6, 8, 9, reached})
    losses = {x["update"]: x["learner/loss/total"] for x in second.records()}
    for record in whole.records():
        if record["update"] - 2 > reached:  # windows that the stop did not cut
            assert losses[record["update"]] == record["learner/loss/total"]


def test_a_stop_before_the_first_step(
    data: pathlib.Path, whole: SupervisedRun, tmp_path: pathlib.Path
) -> None:
    run = SupervisedRun(tmp_path, data)
    run.stop.set()
    run.expect(3)
    assert run.steps() == [0] and run.records() == []
    assert SupervisedRun(tmp_path, data).expect(0).digests() == whole.digests()


def test_what_is_evaluated_is_the_moving_average(whole: SupervisedRun) -> None:
    parts = Parts(whole.blueprint)
    found = restore_evaluated(parts, whole.workdir)
    assert found is not None and found.step == NUM_STEPS
    checkpointer = whole.blueprint.checkpointer(whole.workdir)
    everything = checkpointer.restore(lambda _: checkpoint_target(whole.blueprint))
    checkpointer.close()
    assert everything is not None
    params = jax.device_get(everything.arrays["train"].params)
    evaluated = jax.device_get(found.arrays["state"]["params"])
    kernel, newest = evaluated["torso"]["kernel"], params["torso"]["kernel"]
    assert (kernel != newest).any()
    assert int(everything.arrays["train"].num_steps) == NUM_STEPS


def test_without_a_moving_average_it_is_the_newest(
    data: pathlib.Path, whole: SupervisedRun, tmp_path: pathlib.Path
) -> None:
    run = SupervisedRun(tmp_path, data, blueprint_of(ema_decay=0.0)).expect(0)
    names = {name.partition("/")[0] for name in run.digests()}
    assert names == {"state"} and {"state", "train"} == {
        name.partition("/")[0] for name in whole.digests()
    }
    own, other = run.digests(), whole.digests()
    for name in own:  # the average changes nothing but what is published
        assert own[name] == other[name.replace("state/", "train/", 1)]


def test_parts_of_a_batch_change_nothing_but_rounding(
    data: pathlib.Path, whole: SupervisedRun, tmp_path: pathlib.Path
) -> None:
    run = SupervisedRun(tmp_path, data, blueprint_of(accumulation_steps=1)).expect(0)
    for one, two in zip(run.records(), whole.records(), strict=True):
        for name in ("learner/loss/total", "learner/grad_norm"):
            assert one[name] == pytest.approx(two[name], rel=1e-5)


def test_evaluations(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    evaluation = c.EvaluationConfig(num_episodes=4, num_videos=1, interval=4)
    run = SupervisedRun(tmp_path, data, blueprint_of(evaluation)).expect(0)
    summary = run.summary()
    assert summary["evaluation_before"]["eval/episodes"] == 4
    assert summary["evaluation_after"]["eval/episodes"] == 4
    assert ["eval/success_rate" in record for record in run.records()] == [
        False,
        True,
        False,
        True,
        False,
    ]
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 2
    assert any(line.startswith("success     before 0.") for line in run.lines)


def test_updates_that_stay_non_finite_end_the_run(tmp_path: pathlib.Path) -> None:
    """Actions of 1e30 overflow in the square of the loss."""
    episodes = make_episodes(np.random.default_rng(0), scale=1e30)
    write_episodes(tmp_path / "data", episodes, cameras=CounterEnv.spec.cameras, key="")
    run = SupervisedRun(tmp_path / "run", tmp_path / "data").expect(4)
    assert run.summary()["outcome"] == "unsafe"
    assert any("3 updates in a row had a non-finite gradient" in line for line in run.lines)
    assert run.records()[-1]["faults/skipped_optimizer_steps"] == 3
    assert not (run.workdir / "checkpoints").exists()


def test_an_error_of_the_reading_thread_is_shown(
    data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    run = SupervisedRun(tmp_path, data)
    read, calls = run.samples.read, []

    def fail(rows: np.ndarray) -> Any:
        calls.append(rows)
        if len(calls) > 3:
            raise OSError("the disk is gone")
        return read(rows)

    run.samples.read = fail
    with pytest.raises(OSError, match="the disk is gone"):
        run.make().run()
    assert run.summary()["outcome"] == "failed" and "disk" in run.summary()["detail"]
    assert not [x for x in threading.enumerate() if x.name == "prefetch" and x.is_alive()]


def test_the_published_parameters() -> None:
    from jaxvla.learning.train_state import TrainState

    zero = jax.numpy.zeros((), jax.numpy.int32)
    state = TrainState(params={"a": 1}, opt_state=None, num_steps=zero, num_skipped=zero)
    assert published(state) == {"a": 1}
    assert published(dataclasses.replace(state, ema={"a": 2})) == {"a": 2}
