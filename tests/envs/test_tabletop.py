"""The tabletop env: episodes it draws, rules it follows, pictures it shows."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_tabletop import NUM_WORLDS, CompiledTabletop

from jaxvla.config import ConfigError
from jaxvla.envs import tabletop_scene as scene
from jaxvla.envs.tabletop import (
    COLORS,
    LIFT_HEIGHT_M,
    MAX_MOVE_M,
    REACH_TOLERANCE_M,
    TASKS,
    Tabletop,
    TabletopConfig,
    TabletopState,
)

NUM_DRAWS = 1800
STILL = np.zeros((NUM_WORLDS, 4), np.float32)
"""No motion; the grip at 0 holds the fingers half open."""
TIP_AT_ZERO_M = 0.2 - scene.TIP_BELOW_HAND_M
TOP_M = 2 * scene.BLOCK_HALF_M


# --- settings and spec --------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        TabletopConfig(tasks=("reach", "fly")),
        TabletopConfig(tasks=()),
        TabletopConfig(image_size=15),
        TabletopConfig(image_size=513),
    ],
)
def test_config_is_checked(config: TabletopConfig) -> None:
    with pytest.raises(ConfigError, match=r"config\.env\."):
        config.validate()


def test_default_config_is_valid() -> None:
    TabletopConfig().validate()


def test_spec_lists_a_sentence_per_task_and_color(tabletop: CompiledTabletop) -> None:
    spec = tabletop.env.spec
    assert spec.control_hz == pytest.approx(20.0)
    assert spec.max_episode_steps == (32, 80, 64)
    assert spec.instructions[:3] == (
        "reach the red block",
        "reach the green block",
        "reach the blue block",
    )
    assert spec.instructions[3] == "push the red block to the white zone"
    assert len(set(spec.instructions)) == len(TASKS) * len(COLORS)


def test_task_ids_follow_the_config(tabletop: CompiledTabletop) -> None:
    env = Tabletop(TabletopConfig(tasks=("lift", "reach")))
    assert env.spec.max_episode_steps == (TASKS["lift"][1], TASKS["reach"][1])
    shown = env.instruction_ids(tabletop.reset(0, [0, 1] * (NUM_WORLDS // 2)))
    sentences = [env.spec.instructions[i].split()[0] for i in np.asarray(shown)]
    assert sentences == ["lift", "reach"] * (NUM_WORLDS // 2)


# --- the draw of an episode ---------------------------------------------------------------


@pytest.fixture(scope="module")
def draws(tabletop: CompiledTabletop) -> TabletopState:
    """NUM_DRAWS fresh episodes, a third of each task."""
    keys = jax.random.split(jax.random.key(7), NUM_DRAWS)
    states = tabletop.draw(keys, jnp.arange(NUM_DRAWS, dtype=jnp.int32) % len(TASKS))
    return jax.tree.map(np.asarray, states)


def blocks_of(states: TabletopState) -> np.ndarray:
    """Positions and quaternions, float32 [..., blocks, 7]."""
    return np.asarray(states.qpos)[..., 5:].reshape(*states.qpos.shape[:-1], scene.NUM_BLOCKS, 7)


def assert_frequencies(values: np.ndarray, num_values: int) -> None:
    """Every value in [0, num_values) is as frequent as the others, within 4.5 sigma."""
    expected = len(values) / num_values
    counts = np.bincount(values, minlength=num_values)
    assert len(counts) == num_values
    deviation = np.sqrt(expected * (1.0 - 1.0 / num_values))
    assert np.abs(counts - expected).max() < 4.5 * deviation, counts


def test_episodes_start_afresh(draws: TabletopState) -> None:
    np.testing.assert_array_equal(draws.task, np.arange(NUM_DRAWS) % len(TASKS))
    for name in ("num_steps", "reward", "terminated", "truncated", "success", "qvel"):
        assert not np.any(getattr(draws, name)), name
    assert (blocks_of(draws)[:, :, 2:] == np.float32([0.025, 1, 0, 0, 0])).all()


def test_things_lie_in_reach_and_apart(draws: TabletopState) -> None:
    places = np.concatenate([blocks_of(draws)[:, :, :2], draws.zone[:, None]], 1)
    assert np.abs(places).max() + scene.BLOCK_HALF_M <= scene.REACH_M - 0.01 + 1e-6
    # Squares with edges along the axes overlap unless they are an edge apart along one axis.
    for a, b in itertools.combinations(range(scene.NUM_BLOCKS + 1), 2):
        gap = np.abs(places[:, a] - places[:, b]).max(-1)
        assert gap.min() >= 2 * scene.BLOCK_HALF_M + 0.02 - 1e-6


def test_no_episode_starts_solved(draws: TabletopState, tabletop: CompiledTabletop) -> None:
    assert (np.asarray(draws.set_point)[:, 2] > TOP_M + REACH_TOLERANCE_M).all()
    block = np.asarray(jax.vmap(tabletop.env.block)(draws))
    assert (np.abs(block[:, :2] - draws.zone).max(-1) > 0.045).all()


def test_hand_starts_at_its_set_point(draws: TabletopState, tabletop: CompiledTabletop) -> None:
    tip = np.asarray(jax.vmap(tabletop.env.tip)(draws))
    np.testing.assert_allclose(tip, draws.set_point, atol=1e-7)
    for axis, (low, high) in enumerate([(-0.08, 0.08), (-0.08, 0.08), (0.14, 0.2)]):
        assert (low <= tip[:, axis] + 1e-7).all() and (tip[:, axis] <= high + 1e-7).all()
        assert_frequencies(((tip[:, axis] - low) / (high - low) * 8).clip(0, 7).astype(int), 8)


def test_draws_are_uniform(draws: TabletopState) -> None:
    places = [blocks_of(draws)[:, i, :2] for i in range(scene.NUM_BLOCKS)] + [draws.zone]
    cell_m = 2 * scene.REACH_M / 3
    for place in places:
        cell = np.floor((place + scene.REACH_M) / cell_m).astype(int)
        assert_frequencies(cell[:, 0] * 3 + cell[:, 1], 9)
        within = (place + scene.REACH_M) % cell_m
        margin = scene.BLOCK_HALF_M + 0.01
        share = (within - margin) / (cell_m - 2 * margin)
        assert_frequencies((share[:, 0] * 8).clip(0, 7).astype(int), 8)
    orders = {order: i for i, order in enumerate(itertools.permutations(range(3)))}
    assert_frequencies(np.array([orders[tuple(color)] for color in draws.color]), 6)
    # The named block and its colour are drawn independently of the place in the list.
    named = np.take_along_axis(draws.color, draws.target[:, None], 1)[:, 0]
    assert_frequencies(draws.target * 3 + named, 9)


def test_instruction_names_the_target(draws: TabletopState, tabletop: CompiledTabletop) -> None:
    env = tabletop.env
    shown = np.asarray(env.instruction_ids(draws))
    for row in range(30):
        task = env.spec.tasks[draws.task[row]]
        color = list(COLORS)[draws.color[row, draws.target[row]]]
        assert env.spec.instructions[shown[row]] == TASKS[task][0].format(color)
    assert_frequencies(shown, len(env.spec.instructions))


def test_an_episode_is_a_function_of_its_key(
    draws: TabletopState, tabletop: CompiledTabletop
) -> None:
    keys = jax.random.split(jax.random.key(7), NUM_DRAWS)[:NUM_WORLDS]
    tasks = jnp.full(NUM_WORLDS, 2, jnp.int32)
    again = tabletop.draw(keys, tasks)
    first = jax.tree.map(lambda x: x[:NUM_WORLDS], draws)
    # The task decides about nothing else.
    jax.tree.map(np.testing.assert_array_equal, again, first.replace(task=tasks))
    assert len(np.unique(draws.qpos[:, 0])) == NUM_DRAWS


# --- success, termination, time limit -----------------------------------------------------


def arrange(
    tabletop: CompiledTabletop,
    task: str,
    *,
    tips: np.ndarray,
    blocks: np.ndarray,
    target: int = 0,
    num_steps: int = 0,
) -> TabletopState:
    """Worlds at rest: tips float32 [E, 3], block 0 at `blocks`, float32 [E, 3], the zone at the
    origin and the other blocks in two corners, the fingers half open."""
    states = tabletop.reset(0, tabletop.task(task))
    qpos = np.array(states.qpos)
    qpos[:, :3] = tips - np.array([0.0, 0.0, TIP_AT_ZERO_M])
    qpos[:, 3:5] = 0.5 * scene.FINGER_OPEN_M
    poses = qpos[:, 5:].reshape(NUM_WORLDS, 3, 7)  # a view
    poses[:] = np.array([0.0, 0.0, scene.BLOCK_HALF_M, 1.0, 0.0, 0.0, 0.0])
    poses[:, 0, :3] = blocks
    poses[:, 1, :2], poses[:, 2, :2] = -0.15, 0.15
    return states.replace(
        qpos=jnp.asarray(qpos),
        set_point=jnp.asarray(tips, jnp.float32),
        zone=jnp.zeros((NUM_WORLDS, 2)),
        target=jnp.full(NUM_WORLDS, target, jnp.int32),
        num_steps=jnp.full(NUM_WORLDS, num_steps, jnp.int32),
    )


def rows(*points: tuple[float, float, float]) -> np.ndarray:
    """Float32 [NUM_WORLDS, 3]: the points, the last one repeated."""
    filled = points + (points[-1],) * (NUM_WORLDS - len(points))
    return np.array(filled, np.float32)


ASIDE = rows((0.15, -0.15, 0.2))
REST_M = scene.BLOCK_HALF_M
FALL_M = 0.5 * 9.81 * 0.05**2
"""How far a block that is let go falls in a control step, about."""

SITUATIONS = {
    # Tips next to the top of block 0. Half-open fingers clear the block only above it.
    "reach": (
        rows((0, 0, TOP_M + 0.028), (0, 0, TOP_M + 0.032), (0.02, 0, TOP_M + 0.025)),
        rows((0, 0, REST_M)),
        [True, False, False],
    ),
    "push": (
        ASIDE,
        rows((0.044, 0, REST_M), (0.046, 0, REST_M), (0, -0.044, REST_M), (0, -0.046, REST_M)),
        [True, False, True, False],
    ),
    "lift": (
        ASIDE,
        rows(
            (0, 0, REST_M + LIFT_HEIGHT_M + FALL_M + 0.006),
            (0, 0, REST_M + LIFT_HEIGHT_M + FALL_M - 0.006),
            (0, 0, REST_M),
        ),
        [True, False, False],
    ),
}
"""Task -> (tips, block 0, whether it is solved after a control step at rest)."""


@pytest.mark.parametrize("task", SITUATIONS)
def test_success_ends_the_episode_with_reward_one(tabletop: CompiledTabletop, task: str) -> None:
    tips, blocks, solved = SITUATIONS[task]
    expected = np.array(solved + solved[-1:] * (NUM_WORLDS - len(solved)))
    stepped = tabletop.step(arrange(tabletop, task, tips=tips, blocks=blocks), STILL)
    np.testing.assert_array_equal(stepped.success, expected)
    np.testing.assert_array_equal(stepped.terminated, expected)
    np.testing.assert_array_equal(stepped.reward, expected.astype(np.float32))
    assert not np.any(stepped.truncated)
    np.testing.assert_array_equal(stepped.num_steps, 1)


@pytest.mark.parametrize("task", SITUATIONS)
def test_only_the_named_block_counts(tabletop: CompiledTabletop, task: str) -> None:
    tips, blocks, _ = SITUATIONS[task]
    states = arrange(tabletop, task, tips=tips, blocks=blocks, target=1)
    assert not np.any(tabletop.step(states, STILL).success)


@pytest.mark.parametrize("task", SITUATIONS)
def test_time_limit_truncates_unless_solved(tabletop: CompiledTabletop, task: str) -> None:
    tips, blocks, solved = SITUATIONS[task]
    limit = TASKS[task][1]
    last = arrange(tabletop, task, tips=tips, blocks=blocks, num_steps=limit - 1)
    stepped = tabletop.step(last, STILL)
    np.testing.assert_array_equal(stepped.num_steps, limit)
    np.testing.assert_array_equal(stepped.truncated[: len(solved)], ~np.array(solved))
    np.testing.assert_array_equal(stepped.terminated[: len(solved)], solved)
    before = arrange(tabletop, task, tips=tips, blocks=blocks, num_steps=limit - 2)
    assert not np.any(tabletop.step(before, STILL).truncated)


# --- actions ------------------------------------------------------------------------------


def test_actions_are_clipped(tabletop: CompiledTabletop) -> None:
    states = tabletop.reset(1, 0)
    action = np.random.default_rng(0).choice([-1.0, 1.0], (NUM_WORLDS, 4)).astype(np.float32)
    expected = tabletop.step(states, action)
    actual = tabletop.step(states, 3.0 * action)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_actions_move_the_set_point(tabletop: CompiledTabletop) -> None:
    states = tabletop.reset(1, 0)
    action = np.random.default_rng(0).uniform(-1, 1, (NUM_WORLDS, 4)).astype(np.float32)
    moved = np.asarray(tabletop.step(states, action).set_point - states.set_point)
    np.testing.assert_allclose(moved, MAX_MOVE_M * action[:, :3], atol=1e-7)


def test_hand_follows_and_stays_in_its_workspace(tabletop: CompiledTabletop) -> None:
    states = tabletop.reset(1, 0)
    up_and_out = np.tile(np.float32([1, -1, 1, -1]), (NUM_WORLDS, 1))
    for _ in range(30):
        states = tabletop.step(states, up_and_out)
    expected = np.broadcast_to([scene.REACH_M, -scene.REACH_M, 0.25], (NUM_WORLDS, 3))
    np.testing.assert_allclose(states.set_point, expected, atol=1e-7)
    np.testing.assert_allclose(jax.vmap(tabletop.env.tip)(states), expected, atol=2e-3)


@pytest.mark.parametrize(("grip", "opening_m"), [(-1.0, scene.FINGER_OPEN_M), (1.0, 0.0)])
def test_grip_moves_both_fingers(tabletop: CompiledTabletop, grip: float, opening_m: float) -> None:
    high = np.full((NUM_WORLDS, 3), 0.0, np.float32) + np.float32([0, 0, 0.2])
    states = arrange(tabletop, "lift", tips=high, blocks=rows((0.1, 0, REST_M)))
    for _ in range(20):
        states = tabletop.step(states, STILL + np.float32([0, 0, 0, grip]))
    np.testing.assert_allclose(states.qpos[:, 3:5], opening_m, atol=2e-3)


def test_worlds_do_not_influence_each_other(tabletop: CompiledTabletop) -> None:
    order = np.random.default_rng(0).permutation(NUM_WORLDS)
    states = tabletop.reset(2, np.arange(NUM_WORLDS) % 3)
    shuffled = jax.tree.map(lambda x: x[order], states)
    for _ in range(5):
        states = tabletop.step(states, tabletop.expert(states))
        shuffled = tabletop.step(shuffled, tabletop.expert(shuffled))
    expected = jax.tree.map(lambda x: x[order], states)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), shuffled, expected)


@pytest.mark.fault(6)
@pytest.mark.parametrize("field", ["qpos", "qvel"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_blown_up_physics_is_noticed(tabletop: CompiledTabletop, field: str, value: float) -> None:
    states = tabletop.reset(0, 0)
    broken = states.replace(**{field: getattr(states, field).at[3, -1].set(value)})
    is_finite = np.asarray(jax.vmap(tabletop.env.is_finite)(broken))
    np.testing.assert_array_equal(is_finite, np.arange(NUM_WORLDS) != 3)


def test_blown_up_physics_stays_blown_up(tabletop: CompiledTabletop) -> None:
    states = tabletop.reset(0, 0)
    broken = states.replace(qpos=states.qpos.at[3, 5].set(np.nan))
    stepped = tabletop.step(broken, STILL)
    assert not tabletop.env.is_finite(jax.tree.map(lambda x: x[3], stepped))
    assert not stepped.success[3] and stepped.reward[3] == 0.0
    healthy = np.arange(NUM_WORLDS) != 3
    expected = tabletop.step(states, STILL).qpos[healthy]
    np.testing.assert_allclose(stepped.qpos[healthy], expected, atol=1e-6)


# --- what the policy sees -----------------------------------------------------------------


def test_observation_has_the_shapes_of_the_spec(tabletop: CompiledTabletop) -> None:
    states, spec = tabletop.reset(3, 1), tabletop.env.spec
    seen, _ = tabletop.look(states)
    assert seen.images.shape == (NUM_WORLDS, 2, 48, 48, 3) and seen.images.dtype == jnp.uint8
    assert seen.state.shape == (NUM_WORLDS, spec.state_dim) and seen.state.dtype == jnp.float32
    assert seen.instruction.shape == (NUM_WORLDS,) and seen.instruction.dtype == jnp.int32
    np.testing.assert_allclose(seen.state[:, :3], states.set_point, atol=1e-6)
    np.testing.assert_allclose(seen.state[:, 3], scene.FINGER_OPEN_M, atol=1e-6)


def test_pictures_show_the_named_block_in_its_color(tabletop: CompiledTabletop) -> None:
    states = tabletop.reset(4, 2)
    seen, mask = tabletop.look(states)
    images, mask = np.asarray(seen.images, float), np.asarray(mask)
    named = np.take_along_axis(np.asarray(states.color), np.asarray(states.target)[:, None], 1)
    assert mask[:, 0].any((1, 2)).all()  # the base camera overlooks the whole table
    for row in range(NUM_WORLDS):
        strongest = images[row][mask[row]].argmax(-1)
        np.testing.assert_array_equal(strongest, named[row, 0])
        # Outside of it nothing looks like the named block.
        rest = images[row][~mask[row]]
        others = np.delete(rest, named[row, 0], -1).max(-1)
        assert (rest[:, named[row, 0]] < 2.0 * others).all()


def test_white_zone_is_shown_only_when_pushing(tabletop: CompiledTabletop) -> None:
    # The same worlds but for the task: what changes is the zone.
    shown = {task: tabletop.look(tabletop.reset(5, tabletop.task(task))) for task in TASKS}
    reach, push, lift = (np.asarray(seen.images)[:, 0] for seen, _ in shown.values())
    np.testing.assert_array_equal(reach, lift)
    zone = (push != reach).any(-1)
    assert (zone.sum((1, 2)) > 10).all()
    assert (push[zone] > 200).mean() > 0.8  # the rest is the marker's rim


def test_pictures_follow_the_hand(tabletop: CompiledTabletop) -> None:
    states = tabletop.reset(6, 0)
    moved = states.replace(qpos=states.qpos.at[:, 0].add(0.05))
    before, after = (np.asarray(tabletop.look(s)[0].images) for s in (states, moved))
    changed = (before != after).any(-1).mean((2, 3))
    assert (changed[:, 0] > 0.005).all()  # the hand in front of a fixed background
    assert (changed[:, 1] > 0.05).all()  # the camera at the wrist moves
