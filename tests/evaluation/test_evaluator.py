"""The evaluator on an env whose episodes do what the actions say."""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import pytest
from simulation.counter_env import EXPLODE, FAIL, SUCCEED, WALK, CounterEnv

from jaxvla import rng
from jaxvla.config import EvaluationConfig
from jaxvla.evaluation import evaluator as evaluator_module
from jaxvla.evaluation.evaluator import Evaluator
from jaxvla.evaluation.statistics import EvaluationResult
from jaxvla.layout import parse_layout
from jaxvla.sharding import make_mesh
from jaxvla.simulation.group import DeviceEnvGroup, DeviceStepper
from jaxvla.simulation.unroll import TokenTable
from jaxvla.types import Observation, PolicySample, stand_in

KEY = jax.random.key(11)
"""Root of the env group."""

NUM_EXECUTED = 2
SHORT, LONG = 0, 1
"""Tasks of the env: episodes of at most 3 and 5 control steps, hence 2 and 3 chunks."""

Act = Callable[[np.ndarray, np.ndarray, np.ndarray], Any]
"""(task [E], identity of the episode [E], steps so far [E]) -> event [E] of both steps."""


class FakeSampler:
    """Acts by a function of what it reads, and keeps everything it was given."""

    def __init__(self, act: Act):
        self._act = act
        self.seen: list[Observation] = []
        self.keys: list[np.ndarray] = []
        self.params: list[Any] = []

    def run(
        self, kind: str, params: Any, observations: Sequence[Observation], keys: np.ndarray
    ) -> tuple[PolicySample, int]:
        assert kind == "act"
        (observation,) = observations
        seen: Any = jax.device_get(observation)
        self.seen.append(seen)
        self.keys.append(keys)
        self.params.append(params)
        event = self._act(seen.tokens[:, 0], seen.state[:, 0], seen.images[:, 0, 0, 0, 0])
        event = np.broadcast_to(event, len(seen.state))
        actions = np.stack([event, np.zeros_like(event)], -1)[:, None]
        nothing: Any = None
        sample = PolicySample(
            actions=stand_in(actions.repeat(NUM_EXECUTED, 1).astype(np.float32)),
            trace=nothing,
            log_prob=nothing,
            value=nothing,
        )
        return sample, len(keys)


class Group(DeviceEnvGroup):
    """Notes what the evaluator does with it."""

    def __init__(self, num_envs: int, task_ids: tuple[int, ...] = CounterEnv.task_ids):
        super().__init__(make_stepper(num_envs), name="evaluation", key=KEY)
        self.task_ids = task_ids
        self.num_closed = 0
        self.shown: list[list[int]] = []
        """Rows asked of `frames`."""

    def frames(self, rows: Sequence[int]) -> list[np.ndarray]:
        self.shown.append(list(rows))
        return super().frames(rows)

    def close(self) -> None:
        self.num_closed += 1


@functools.cache
def make_stepper(num_envs: int) -> DeviceStepper:
    env: Any = CounterEnv()
    tokens: Any = np.asarray([[SHORT], [LONG]], np.int32)
    return DeviceStepper(
        env,
        TokenTable(tokens=tokens, mask=tokens >= 0),
        num_envs=num_envs,
        num_executed=NUM_EXECUTED,
        mesh=make_mesh(parse_layout("colocated=1").roles["simulation"]),
    )


class Run:
    """An evaluator with what it uses."""

    def __init__(
        self,
        act: Act,
        *,
        num_envs: int = 4,
        should_stop: Callable[[], bool] = lambda: False,
        **settings: int,
    ):
        self.sampler: Any = FakeSampler(act)
        self.groups: list[Group] = []
        self.config = EvaluationConfig(**({"num_episodes": 6, "num_videos": 0} | settings))
        self._num_envs = num_envs
        self.evaluator = Evaluator(
            config=self.config,
            sampler=self.sampler,
            make_groups=lambda: [self._make_group()],
            should_stop=should_stop,
        )

    def _make_group(self) -> Group:
        self.groups.append(Group(self._num_envs))
        return self.groups[-1]

    def evaluate(self, videos: pathlib.Path | None = None) -> EvaluationResult:
        result = self.evaluator.evaluate({"kernel": 7}, videos)
        assert result is not None
        return result


def identity(seed: int) -> float:
    """What tells episode number `seed` of a task apart."""
    key = rng.stream(KEY, "episode")
    return float(jax.random.uniform(jax.random.fold_in(key, seed)))


def counts(result: EvaluationResult) -> dict[str, tuple[int, int]]:
    """(successes, episodes) by task, and of all."""
    found = {"all": result.overall, **result.per_task}
    return {name: (rate.num_successes, rate.num_episodes) for name, rate in found.items()}


def lucky(task: np.ndarray, identity: np.ndarray, num_steps: np.ndarray) -> np.ndarray:
    """Succeeds at once in about half of the episodes, else walks to the time limit."""
    return np.where(identity > 0.5, SUCCEED, WALK)


@pytest.mark.parametrize("num_episodes", [1, 3, 4, 6, 8, 11])
def test_every_episode_is_counted_exactly_once(num_episodes: int) -> None:
    """Whole waves of 4 and parts of one; which ones succeed is known from their seeds."""
    expected: dict[str, tuple[int, int]] = {}
    is_lucky = [identity(i // 2) > 0.5 for i in range(num_episodes)]
    for name, part in (("all", is_lucky), ("short", is_lucky[0::2]), ("long", is_lucky[1::2])):
        expected[name] = (sum(part), len(part))
    assert counts(Run(lucky, num_episodes=num_episodes).evaluate()) == expected


def test_the_seeds_in_use_tell_episodes_apart() -> None:
    assert {identity(seed) > 0.5 for seed in range(5)} == {True, False}
    assert len({identity(seed) for seed in range(6)}) == 6


def test_episodes_do_not_depend_on_how_many_run_side_by_side() -> None:
    results = [counts(Run(lucky, num_episodes=11, num_envs=n).evaluate()) for n in (3, 4)]
    assert results[0] == results[1]


def test_the_same_policy_sees_the_same_episodes_again() -> None:
    run = Run(lucky)
    first = run.evaluate()
    num_chunks = len(run.sampler.seen)
    assert run.evaluate() == first
    seen, keys = run.sampler.seen, run.sampler.keys
    assert len(seen) == 2 * num_chunks
    for again, before in zip(seen[num_chunks:], seen[:num_chunks], strict=True):
        jax.tree.map(np.testing.assert_array_equal, again, before)
    np.testing.assert_array_equal(keys[num_chunks:], keys[:num_chunks])
    assert len(run.groups) == 2


def keys_by_episode(run: Run, num_envs: int) -> dict[tuple[int, int], tuple[int, ...]]:
    """(episode, chunk) -> raw key, for policies that walk: every wave has three chunks."""
    run.evaluate()
    return {
        (num_envs * (call // 3) + row, call % 3): tuple(key.tolist())
        for call, keys in enumerate(run.sampler.keys)
        for row, key in enumerate(keys)
        if num_envs * (call // 3) + row < run.config.num_episodes
    }


def walk(task: np.ndarray, identity: np.ndarray, num_steps: np.ndarray) -> float:
    return WALK


def test_noise_is_a_function_of_seed_episode_and_chunk() -> None:
    three, four = (keys_by_episode(Run(walk, num_envs=n), n) for n in (3, 4))
    assert three == four
    assert set(four) == {(episode, chunk) for episode in range(6) for chunk in range(3)}
    assert len(set(four.values())) == 18
    other = keys_by_episode(Run(walk, seed=5), 4)
    assert not set(other.values()) & set(four.values())


def test_parameters_are_those_given() -> None:
    run = Run(lucky)
    run.evaluate()
    assert run.sampler.params and all(x == {"kernel": 7} for x in run.sampler.params)


def test_success_is_counted_per_task() -> None:
    """A task that succeeds after the other one has run out of time."""

    def act(task: np.ndarray, identity: np.ndarray, num_steps: np.ndarray) -> np.ndarray:
        return np.where((task == LONG) & (num_steps == 4), SUCCEED, WALK)

    result = Run(act).evaluate()
    assert counts(result) == {"all": (3, 6), "short": (0, 3), "long": (3, 3)}
    record = result.record()
    assert record["eval/success_rate"] == 0.5
    assert record["eval/success_rate/short"] == 0.0
    assert record["eval/success_rate/long"] == 1.0
    assert record["eval/episodes"] == 6


@pytest.mark.parametrize("end", [FAIL, EXPLODE])
def test_an_episode_is_over_at_its_first_end(end: float) -> None:
    """Envs restart at once; what they do then, while others are still running, is not counted."""
    firsts = np.asarray([identity(seed) for seed in range(3)], np.float32)

    def act(task: np.ndarray, identity: np.ndarray, num_steps: np.ndarray) -> np.ndarray:
        is_first = np.isclose(identity[:, None], firsts).any(1)
        return np.where(is_first, np.where(task == SHORT, end, WALK), SUCCEED)

    run = Run(act)
    result = run.evaluate()
    again = [x for x in run.sampler.seen if not np.isclose(x.state[:, :1], firsts).any(1).all()]
    assert again, "no env was restarted: the test shows nothing"
    assert counts(result) == {"all": (0, 6), "short": (0, 3), "long": (0, 3)}


def test_a_wave_ends_with_its_last_episode() -> None:
    """The second wave repeats its last episode to be full; nobody waits for more."""
    assert len(Run(walk).evaluate().per_task) == 2
    for num_episodes, num_chunks in ((1, 2), (2, 3), (5, 3 + 2)):  # an odd one is a short one
        run = Run(walk, num_episodes=num_episodes)
        run.evaluate()
        assert len(run.sampler.seen) == num_chunks


class Videos:
    """Takes the place of `write_video`."""

    def __init__(self) -> None:
        self.written: dict[str, dict[str, Any]] = {}

    def __call__(self, path: pathlib.Path, frames: np.ndarray, **shown: Any) -> pathlib.Path:
        assert path.name not in self.written
        assert frames.dtype == np.uint8 and frames.shape[1:] == (1, 2, 2, 3)
        self.written[path.name] = {"steps": frames[:, 0, 0, 0, 0].tolist(), **shown}
        return path


@pytest.fixture
def videos(monkeypatch: pytest.MonkeyPatch) -> Videos:
    """What is written instead of files. Pictures of the env hold the number of steps so far."""
    taken = Videos()
    monkeypatch.setattr(evaluator_module, "write_video", taken)
    return taken


def test_videos_of_the_first_episodes_of_each_task(videos: Videos, tmp_path: pathlib.Path) -> None:
    run = Run(walk, num_episodes=10, num_videos=2)
    run.evaluate(tmp_path)
    short = {"fps": 10.0, "instruction": "count to three", "success": False}
    long = {"fps": 10.0, "instruction": "count to five", "success": False}
    # A world stands still after its end, for the rest of its last chunk.
    expected = {
        f"{name}_{seed}.mp4": {"steps": steps, **shown}
        for seed in (0, 1)
        for name, steps, shown in (
            ("short", [0, 1, 2, 3, 3], short),
            ("long", [0, 1, 2, 3, 4, 5, 5], long),
        )
    }
    assert videos.written == expected
    # Rows 0 and 2 play the short task; nothing is rendered once they are over, nor afterwards.
    assert run.groups[0].shown == [[0, 1, 2, 3], [0, 1, 2, 3], [1, 3]]


def test_a_video_tells_the_outcome(videos: Videos, tmp_path: pathlib.Path) -> None:
    """Seven episodes: the second wave is not full, and its copies are not on video."""
    Run(lucky, num_episodes=7, num_videos=4).evaluate(tmp_path)
    assert sorted(videos.written) == sorted(
        [f"short_{seed}.mp4" for seed in range(4)] + [f"long_{seed}.mp4" for seed in range(3)]
    )
    for name, video in videos.written.items():
        is_lucky = identity(int(name.partition("_")[2][0])) > 0.5
        assert video["success"] == is_lucky
        assert (video["steps"] == [0, 1, 1]) == is_lucky


@pytest.mark.parametrize("num_videos", [0, 2])
def test_without_a_directory_nothing_is_rendered(videos: Videos, num_videos: int) -> None:
    run = Run(walk, num_videos=num_videos)
    run.evaluate(None)
    assert videos.written == {} and run.groups[0].shown == []


def test_a_real_video_is_written(tmp_path: pathlib.Path) -> None:
    Run(walk, num_episodes=1, num_videos=1).evaluate(tmp_path / "videos")
    assert [x.name for x in (tmp_path / "videos").iterdir()] == ["short_0.mp4"]


@pytest.mark.parametrize("num_chunks", [0, 2, 4])
def test_a_request_to_stop_is_honoured_between_chunks(
    videos: Videos, tmp_path: pathlib.Path, num_chunks: int
) -> None:
    """Before the first chunk, in the first wave of three chunks, and in the second one."""
    run = Run(walk, num_videos=2, should_stop=lambda: len(run.sampler.seen) >= num_chunks)
    assert run.evaluator.evaluate({}, tmp_path) is None
    assert len(run.sampler.seen) == num_chunks
    assert [group.num_closed for group in run.groups] == [1]
    assert len(videos.written) == (4 if num_chunks > 3 else 0)


def test_the_group_is_closed_at_the_end_and_on_failure() -> None:
    def fail(task: np.ndarray, identity: np.ndarray, num_steps: np.ndarray) -> float:
        raise OSError("no more memory")

    run = Run(fail)
    with pytest.raises(OSError, match="no more memory"):
        run.evaluate()
    done = Run(walk)
    done.evaluate()
    assert [group.num_closed for group in run.groups + done.groups] == [1, 1]


def test_groups_share_the_episodes_by_their_tasks() -> None:
    """Each plays its own; the result is that of one group that plays them all."""
    whole = Run(lucky, num_envs=2, num_episodes=7)
    split = Run(lucky, num_envs=2, num_episodes=7)
    parts = [Group(2, task_ids=(1,)), Group(2, task_ids=(0,))]
    split.evaluator._make_groups = lambda: iter(parts)
    assert split.evaluate() == whole.evaluate()
    assert [group.num_closed for group in parts] == [1, 1]
