"""Demonstrations and scenes, read off an env that counts its steps."""

import functools
import itertools
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from walk_env import IMAGE_SIZE, LIMITS, MAX_GOAL, GroundedWalkEnv, WalkEnv, expert_move

from jaxvla.config import DatasetConfig
from jaxvla.data.demonstrations import num_samples
from jaxvla.data.episodes import EpisodeSamples
from jaxvla.data.recorded import RecordedEpisodes, write_episodes
from jaxvla.envs.base import DeviceEnv, GroundedEnv
from jaxvla.layout import parse_layout
from jaxvla.sharding import batch_sharding, make_mesh
from jaxvla.simulation.demonstrator import Demonstrator
from jaxvla.simulation.unroll import TokenTable
from jaxvla.types import SupervisedBatch, stand_in

E, H = 4, 3
TABLE = TokenTable(
    tokens=stand_in(np.array([[5, 6, 0], [7, 8, 9]], np.int32)),
    mask=stand_in(np.array([[True, True, False], [True, True, True]])),
)
IDENTITY, NUM_STEPS, PLACE, GOAL = range(4)
"""Entries of the state vector."""


@functools.cache
def demonstrator(
    *,
    noise_std: float = 0.0,
    num_envs: int = E,
    is_grounded: bool = False,
    num_devices: int = 1,
    horizon: int = H,
) -> Demonstrator:
    return Demonstrator(
        GroundedWalkEnv() if is_grounded else WalkEnv(),
        TABLE,
        num_envs=num_envs,
        action_horizon=horizon,
        noise_std=noise_std,
        mesh=make_mesh(parse_layout(f"colocated={num_devices}").roles["simulation"]),
    )


def collect(num_episodes: int, seed: int = 0, **options: Any) -> Any:
    return demonstrator(**options).collect(num_episodes, jax.random.key(seed))


def column(samples: SupervisedBatch, entry: int) -> np.ndarray:
    return np.asarray(samples.observation.state)[:, entry]


def episodes(samples: SupervisedBatch) -> list[tuple[int, SupervisedBatch]]:
    """(task, samples in the order given) of every episode, by identity."""
    identity = column(samples, IDENTITY)
    found = []
    for name in dict.fromkeys(identity.tolist()):
        rows = np.flatnonzero(identity == name)
        episode: SupervisedBatch = jax.tree.map(lambda x, r=rows: x[r], samples)
        (task,) = set(np.asarray(episode.observation.images).ravel().tolist())
        found.append((task, episode))
    return found


def assert_same(actual: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_walk_env_is_what_it_says() -> None:
    assert isinstance(WalkEnv(), DeviceEnv) and not isinstance(WalkEnv(), GroundedEnv)
    assert isinstance(GroundedWalkEnv(), GroundedEnv)


# --- demonstrations ---------------------------------------------------------------------------


@pytest.mark.parametrize("horizon", [1, 3, 8])
def test_one_sample_per_step_until_the_end(horizon: int) -> None:
    """Blocks of fewer, of as many and of more steps than episodes have."""
    samples = collect(16, horizon=horizon)
    found = episodes(samples)
    assert len(found) == 16
    for task, episode in found:
        goal = column(episode, GOAL)[0]
        length = int(min(goal, LIMITS[task]))
        assert column(episode, NUM_STEPS).tolist() == list(range(length))
    lengths = {len(column(episode, GOAL)) for _, episode in found}
    assert 1 in lengths and max(LIMITS) in lengths  # the shortest and those out of time


@pytest.mark.parametrize("horizon", [1, 3, 8])
def test_a_label_is_the_chunk_that_follows(horizon: int) -> None:
    """It reaches beyond the end of the episode, where the expert still acts."""
    samples = collect(16, horizon=horizon)
    assert samples.actions is not None
    step = column(samples, NUM_STEPS)[:, None] + np.arange(horizon)
    expected = np.stack([expert_move(step), step + 1 >= column(samples, GOAL)[:, None]], -1)
    assert samples.actions.dtype == np.float32
    np.testing.assert_array_equal(samples.actions, np.clip(expected, -1.0, 1.0))
    if horizon == 8:
        assert expected.max() > 1.0  # there was something to clip


@pytest.mark.parametrize("is_grounded", [False, True])
def test_recorded_episodes_hold_the_samples_that_are_collected(
    is_grounded: bool, tmp_path: pathlib.Path
) -> None:
    """Read back from disk, in whatever order."""
    made = demonstrator(is_grounded=is_grounded, horizon=8)
    recorded = list(made.episodes(6, jax.random.key(0)))
    assert len(recorded) == 8
    write_episodes(tmp_path, recorded, cameras=("only",), key="")
    dataset = RecordedEpisodes(DatasetConfig(path=str(tmp_path)))

    def prompt(text: str, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        row = WalkEnv().spec.instructions.index(text)
        return np.asarray(TABLE.tokens)[row], np.asarray(TABLE.mask)[row]

    samples = EpisodeSamples(
        dataset, cameras=["only"], image_size=IMAGE_SIZE, action_horizon=8, prompt=prompt
    )
    collected = collect(6, is_grounded=is_grounded, horizon=8)
    assert samples.num_samples == num_samples(collected)
    read = samples.read(np.arange(samples.num_samples))

    def in_order(batch: SupervisedBatch) -> Any:
        order = np.lexsort((column(batch, NUM_STEPS), column(batch, IDENTITY)))
        return jax.tree.map(lambda x: np.asarray(x)[order], batch)

    assert_same(in_order(read), in_order(collected))


def test_collecting_stops_between_batches_of_episodes() -> None:
    polls = iter([False, True])
    assert demonstrator().collect(10_000, jax.random.key(0), lambda: next(polls)) is None


def test_samples_are_complete_and_on_the_host() -> None:
    samples = collect(4)
    N = num_samples(samples)
    seen = samples.observation
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(samples))
    assert {len(leaf) for leaf in jax.tree.leaves(samples)} == {N}
    assert samples.actions is not None and samples.actions.shape == (N, H, 2)
    assert seen.images.shape == (N, 1, IMAGE_SIZE, IMAGE_SIZE, 3) and seen.images.dtype == np.uint8
    task = np.asarray(seen.images)[:, 0, 0, 0, 0]
    np.testing.assert_array_equal(seen.tokens, TABLE.tokens[task])
    np.testing.assert_array_equal(seen.token_mask, TABLE.mask[task])
    assert seen.image_mask.shape == (N, 1) and np.asarray(seen.image_mask).all()
    assert samples.target_mask is None


@pytest.mark.parametrize(
    ("wanted", "num_envs", "run"), [(4, 4, 4), (5, 4, 8), (4, 3, 6), (1, 4, 4)]
)
def test_episodes_fill_batches_and_tasks_evenly(wanted: int, num_envs: int, run: int) -> None:
    found = episodes(collect(wanted, num_envs=num_envs))
    assert len(found) == run
    assert sorted(task for task, _ in found) == sorted([0, 1] * (run // 2))


def test_demonstrations_depend_on_the_key_alone() -> None:
    samples = collect(8, seed=1, noise_std=0.1)
    collect(4, seed=3, noise_std=0.1)
    assert_same(collect(8, seed=1, noise_std=0.1), samples)
    # More episodes begin with the same ones.
    longer = collect(12, seed=1, noise_std=0.1)
    assert_same(jax.tree.map(lambda x: x[: num_samples(samples)], longer), samples)
    other = collect(8, seed=2, noise_std=0.1)
    assert not set(column(samples, IDENTITY).tolist()) & set(column(other, IDENTITY).tolist())


def moves(samples: SupervisedBatch) -> np.ndarray:
    """What disturbed the moves, wherever an episode went on: float32 [n]."""
    noise = []
    for _, episode in episodes(samples):
        place, step = column(episode, PLACE), column(episode, NUM_STEPS)
        noise.append(np.diff(place) - expert_move(step[:-1]))
    return np.concatenate(noise)


def test_without_noise_the_expert_keeps_to_its_path() -> None:
    np.testing.assert_array_equal(moves(collect(16)), 0.0)


def test_noise_drives_the_expert_off_its_path_but_not_its_labels() -> None:
    samples = collect(256, noise_std=0.5, num_envs=64)
    noise = moves(samples)
    n = len(noise)
    assert n > 500 and len(np.unique(noise)) > 0.99 * n
    # 4.5 standard errors of mean and standard deviation.
    assert abs(noise.mean()) < 4.5 * 0.5 / np.sqrt(n)
    assert abs(noise.std() - 0.5) < 4.5 * 0.5 / np.sqrt(2 * n)
    assert samples.actions is not None
    step = column(samples, NUM_STEPS)
    np.testing.assert_array_equal(np.asarray(samples.actions)[:, 0, 0], expert_move(step))
    # The grip was not disturbed: episodes end exactly where the expert ends them.
    for task, episode in episodes(samples):
        assert len(column(episode, GOAL)) == min(column(episode, GOAL)[0], LIMITS[task])


def test_noise_of_steps_and_episodes_is_independent() -> None:
    """Correlation of neighbouring steps, within 4.5 standard errors of none."""
    pairs = []
    for _, episode in episodes(collect(256, noise_std=0.5, num_envs=64)):
        place, step = column(episode, PLACE), column(episode, NUM_STEPS)
        noise = np.diff(place) - expert_move(step[:-1])
        pairs += itertools.pairwise(noise)
    first, second = np.array(pairs).T
    assert abs(np.corrcoef(first, second)[0, 1]) < 4.5 / np.sqrt(len(pairs))


def test_masks_come_with_the_samples_of_a_grounded_env() -> None:
    samples, plain = collect(8, is_grounded=True), collect(8)
    assert samples.target_mask is not None
    where = np.asarray(samples.target_mask).reshape(num_samples(samples), IMAGE_SIZE**2)
    np.testing.assert_array_equal(where.sum(1), 1)
    np.testing.assert_array_equal(where.argmax(1), column(samples, GOAL))
    assert_same(samples.replace(target_mask=None), plain)


def test_four_devices_give_what_one_gives() -> None:
    assert_same(collect(8, num_devices=4), collect(8))
    spread, single = (collect(8, noise_std=0.1, num_devices=n) for n in (4, 1))
    # Six moves of a size below 1 in float32; normal numbers are rounded differently where
    # fewer rows are computed together.
    for entry, atol in ((IDENTITY, 0.0), (NUM_STEPS, 0.0), (GOAL, 0.0), (PLACE, 6 * 2**-24)):
        np.testing.assert_allclose(column(spread, entry), column(single, entry), 0.0, atol)
    np.testing.assert_array_equal(spread.actions, single.actions)


# --- scenes -----------------------------------------------------------------------------------


def scenes(batch_size: int, num_batches: int, seed: int = 0, **options: Any) -> list[Any]:
    made = demonstrator(is_grounded=True, **options)
    key = jax.random.key(seed)
    return list(made.scenes(batch_size=batch_size, num_batches=num_batches, key=key))


def test_scenes_are_labelled_and_not_stepped() -> None:
    batches = scenes(5, 3)
    assert len(batches) == 3
    for batch in batches:
        assert batch.actions is None and num_samples(batch) == 5
        assert batch.target_mask.shape == (5, 1, IMAGE_SIZE, IMAGE_SIZE)
        assert batch.target_mask.dtype == bool
        where = np.asarray(batch.target_mask).reshape(5, -1).argmax(1)
        np.testing.assert_array_equal(where, column(batch, GOAL))
        np.testing.assert_array_equal(column(batch, PLACE), -1.0)  # what `scene` makes
        tasks = np.asarray(batch.observation.images)[:, 0, 0, 0, 0]
        assert tasks.tolist() == [0, 1, 0, 1, 0]
        np.testing.assert_array_equal(batch.observation.tokens, TABLE.tokens[tasks])


def test_every_scene_is_new() -> None:
    batches = scenes(8, 4)
    identity = np.concatenate([column(batch, IDENTITY) for batch in batches])
    assert len(np.unique(identity)) == 32
    goals = np.concatenate([column(batch, GOAL) for batch in batches])
    assert set(goals.tolist()) == set(range(1, MAX_GOAL + 1))


def test_scenes_depend_on_the_key_and_their_number_alone() -> None:
    batches = scenes(4, 3, seed=1)
    assert_same(scenes(4, 2, seed=1), batches[:2])
    assert not np.any(column(scenes(4, 1, seed=2)[0], IDENTITY) == column(batches[0], IDENTITY))


def test_scenes_are_spread_over_the_mesh() -> None:
    (batch,) = scenes(8, 1, num_devices=4)
    mesh = make_mesh(parse_layout("colocated=4").roles["simulation"])
    for leaf in jax.tree.leaves(batch):
        assert leaf.sharding.is_equivalent_to(batch_sharding(mesh), leaf.ndim)
    assert_same(batch, scenes(8, 1)[0])


def test_scenes_are_made_one_batch_at_a_time() -> None:
    """As many as one likes, and nothing is made before it is wanted."""
    stream = demonstrator(is_grounded=True).scenes(
        batch_size=2, num_batches=10**9, key=jax.random.key(0)
    )
    assert num_samples(next(stream)) == num_samples(next(stream)) == 2


# --- compilation ------------------------------------------------------------------------------


@pytest.mark.parametrize("num_devices", [1, 4])
def test_compile_leaves_the_physics_compiled(num_devices: int) -> None:
    """Collecting afterwards compiles the small functions only."""
    compiled: list[str] = []
    made = demonstrator.__wrapped__(num_devices=num_devices, horizon=5)

    def listen(event: str, duration_secs: float, **about: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(str(about))

    made.compile()
    jax.monitoring.register_event_duration_secs_listener(listen)
    made.collect(4, jax.random.key(0))
    assert not [name for name in compiled if "_advance" in name]
