"""How close libero_mjx is to LIBERO, task by task.

    MUJOCO_GL=disable python scripts/libero_parity.py [--suites ...] [--task_ids ...]
                      [--episodes=9] [--mjx] [--mjx_replay] [--workdir=DIR] [--json=FILE]

Needs the libero extra and compiled tasks (--job=compile_tasks). One line per task:

  rest      after 100 control steps in C MuJoCo, reduced model against LIBERO's own: mm and degrees
            by which the object that deviates most does. First from where all has come to rest,
            then from the start of the episode, when some objects still topple
  swing     after 200 physics steps of given motor torques, open loop, in C MuJoCo: rad by which
            a joint of the arm in the reduced model is from where it is in LIBERO's own
  replay    episodes in which the reduced model comes to the verdict of LIBERO itself, when it is
            given the same actions, of all episodes; and LIBERO's successes among them. A third
            of the episodes is the scripted expert's, a third the expert's with noise, and in a
            third the expert opens the hand on the way. Physics is C MuJoCo; C MuJoCo with the
            pyramidal friction cone that MJX needs; with --mjx_replay MJX
  stepped   with --mjx: worlds that were finite after 100 control steps of random actions at a
            batch of 8, and contacts that did not fit; rad by which a joint of the arm was from
            where C MuJoCo had it in the first 8

What --workdir has, and what --json has from an earlier time, is not measured again; --json has
no recorded actions, so that replaying more of them means recording anew.
"""

import argparse
import functools
import json
import os
import pathlib
from typing import Any

os.environ.setdefault("MUJOCO_GL", "disable")  # read when LIBERO is imported

from jaxvla.runtime import cpu_settings

cpu_settings.apply()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import mujoco  # noqa: E402
import numpy as np  # noqa: E402

from jaxvla.envs import libero_compiler as compiler  # noqa: E402
from jaxvla.envs.libero_deviation import replay, rest, resting_deviation, swing  # noqa: E402
from jaxvla.envs.libero_expert import make_expert  # noqa: E402
from jaxvla.envs.libero_mjx import LiberoMjx, LiberoMjxConfig  # noqa: E402
from jaxvla.envs.libero_start import settle  # noqa: E402
from jaxvla.envs.libero_task import LiberoTask, task_path  # noqa: E402
from jaxvla.envs.libero_workspace import read_state  # noqa: E402
from jaxvla.envs.osc import find_arm  # noqa: E402
from jaxvla.envs.osc_host import HostPhysics  # noqa: E402

_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
_MAX_STEPS = 200
_NOISE_STD = 0.3
_SWING_STEPS = 200
_SETTLE_STEPS = 100
_RANDOM_STEPS, _RANDOM_WORLDS = 100, 8
_COMPARED_STEPS = 8
_GRACE_STEPS = 5
"""A recording stops at LIBERO's success; what lands a little later counts as well."""


def main() -> None:
    """Measures what is missing, prints and saves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suites", nargs="*", default=_SUITES)
    parser.add_argument("--task_ids", type=int, nargs="*", default=list(range(10)))
    parser.add_argument("--episodes", type=int, default=9)
    parser.add_argument("--mjx", action="store_true", help="random actions in MJX")
    parser.add_argument("--mjx_replay", action="store_true", help="recorded actions in MJX")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/parity"))
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    options.workdir.mkdir(parents=True, exist_ok=True)
    known = _published_rows(options.json)
    rows = []
    for suite in options.suites:
        for task_id in options.task_ids:
            row = known.pop((suite, task_id), {})
            rows.append(_row(options, suite, task_id, row))
            print(_line(rows[-1]), flush=True)
    _summarise(rows)
    if options.json:
        rows = [*known.values(), *rows]
        rows.sort(key=lambda row: (_SUITES.index(row["suite"]), row["task_id"]))
        options.json.write_text(json.dumps([_published(row) for row in rows], indent=1) + "\n")


def _published_rows(path: pathlib.Path | None) -> dict[tuple[str, int], dict[str, Any]]:
    """Rows of an earlier --json by suite and task."""
    if path is None or not path.exists():
        return {}
    return {(row["suite"], row["task_id"]): row for row in json.loads(path.read_text())}


def _published(row: dict[str, Any]) -> dict[str, Any]:
    """A row without the actions."""
    episodes = [
        {name: one[name] for name in ("seed", "success", "num_steps")} for one in row["episodes"]
    ]
    return row | {"episodes": episodes}


def _row(
    options: argparse.Namespace, suite: str, task_id: int, row: dict[str, Any]
) -> dict[str, Any]:
    """All figures of a task: from its file in the work directory, from the published row, or
    measured now."""
    path = options.workdir / f"{suite}_{task_id}.json"
    if path.exists():
        row |= json.loads(path.read_text())
    replayed = ["mujoco", "pyramidal", *(["mjx"] if options.mjx_replay else [])]
    to_replay = [physics for physics in replayed if physics not in row]
    has_actions = all("actions" in one for one in row.get("episodes", [{}]))
    if "rest_mm" not in row or (to_replay and not has_actions):
        task = LiberoTask.load(task_path(suite, task_id))
        row |= {"suite": suite, "task_id": task_id, "name": task.name}
        row |= _deviations(suite, task_id, task)
        row |= _record(suite, task_id, task, options.episodes)
        path.write_text(json.dumps(row))
    family = functools.partial(_family, suite, tuple(options.task_ids))
    for physics in to_replay:
        # In MJX as many as there are random worlds: the same compiled step.
        count = _RANDOM_WORLDS if physics == "mjx" else None
        row[physics] = _verdicts(family(physics), task_id, row["episodes"][:count])
    if options.mjx and "stepped" not in row:
        row["stepped"] = _random_steps(family("mjx"), family("pyramidal"), task_id)
    path.write_text(json.dumps(row))
    return row


# --------------------------------------------------------------------------- LIBERO itself


def _deviations(suite: str, task_id: int, task: LiberoTask) -> dict[str, Any]:
    """What becomes of objects and arm in the two models, both in C MuJoCo."""
    original = compiler.original_model(suite, task_id)
    reduced: Any = mujoco.MjModel.from_xml_string(task.physics_xml)
    start = task.start_states[0]
    settled = rest(original, start, _SETTLE_STEPS)
    at_rest = resting_deviation(original, reduced, np.concatenate([settled.qpos, settled.qvel]))
    from_start = resting_deviation(original, reduced, start)
    controls, end = swing(original, start, _SWING_STEPS)
    return {
        "rest_mm": at_rest[0] * 1e3,
        "rest_deg": at_rest[1],
        "start_mm": from_start[0] * 1e3,
        "start_deg": from_start[1],
        "swing_rad": float(np.abs(replay(reduced, start, controls) - end).max()),
    }


def _record(suite: str, task_id: int, task: LiberoTask, num_episodes: int) -> dict[str, Any]:
    """Episodes of LIBERO with their actions."""
    entry = compiler.task_entry(suite, task_id)[0]
    with compiler.open_env(entry["bddl_file"]) as env:
        compiler.place_fixtures(env, task.fixtures, seed=0)
        try:
            act = jax.jit(make_expert(task, compiler.model_of(env)).action)
        except ValueError as error:
            return {"episodes": [], "no_plan": str(error)}
        return {"episodes": [_episode(env, act, task, seed) for seed in range(num_episodes)]}


def _episode(env: Any, act: Any, task: LiberoTask, seed: int) -> dict[str, Any]:
    """One episode; its kind goes in turn."""
    compiler.place_fixtures(env, task.fixtures, seed)
    settle(env, task.init_states[seed])
    random = np.random.default_rng(seed)
    opens_at = random.integers(20, 45)
    actions: list[list[float]] = []
    success = False
    while len(actions) < _MAX_STEPS and not success:
        action = np.array(act(read_state(env.env.sim.data._data)), np.float32)
        if seed % 3 == 1:
            action[:6] += random.normal(0.0, _NOISE_STD, 6).astype(np.float32)
        if seed % 3 == 2 and len(actions) >= opens_at:
            action[6] = -1.0
        actions.append(action.tolist())
        success = bool(env.step(action.astype(np.float64))[2])
    return {"seed": seed, "success": success, "num_steps": len(actions), "actions": actions}


# --------------------------------------------------------------------------------- ours


@functools.cache
def _family(suite: str, task_ids: tuple[int, ...], physics: str) -> LiberoMjx:
    """Tasks that share a scene share its compiled functions.

    Args:
      physics: "mujoco", "mjx", or "pyramidal": what MJX simulates, in C MuJoCo.
    """
    family = LiberoMjx(
        LiberoMjxConfig(
            suite=suite,
            task_ids=task_ids,
            image_size=64,
            physics="mjx" if physics == "mjx" else "mujoco",
            max_episode_steps=10_000,
        )
    )
    if physics == "pyramidal":
        scene: Any
        for scene in family.scenes:
            scene._physics = HostPhysics(scene.model, find_arm(scene.model), scene._fixtures)
    return family


@functools.cache
def _step(scene: Any) -> Any:
    return jax.jit(jax.vmap(scene.step))


def _scene_of(family: LiberoMjx, task_id: int) -> tuple[Any, int]:
    """The scene of a task, and the task's place in the spec."""
    place = family.config.task_ids.index(task_id)
    return next(scene for scene in family.scenes if place in scene.task_ids), place


def _start(scene: Any, place: int, seeds: list[int]) -> Any:
    tasks = jnp.full(len(seeds), place, jnp.int32)
    reset = jax.vmap(scene.reset_to, (None, 0, 0))
    return reset(jax.random.key(0), tasks, jnp.asarray(seeds, jnp.uint32))


def _verdicts(family: LiberoMjx, task_id: int, episodes: list[dict[str, Any]]) -> list[bool]:
    """Whether the recorded actions lead to success here."""
    if not episodes:
        return []
    scene, place = _scene_of(family, task_id)
    length = max(len(episode["actions"]) for episode in episodes) + _GRACE_STEPS
    actions = np.zeros((length, len(episodes), 7), np.float32)
    is_played = np.zeros((length, len(episodes)), bool)
    for row, episode in enumerate(episodes):
        end = len(episode["actions"])
        actions[:end, row] = episode["actions"]
        actions[end:, row, 6] = episode["actions"][-1][6]
        is_played[: end + _GRACE_STEPS * episode["success"], row] = True
    states = _start(scene, place, [episode["seed"] for episode in episodes])
    success = np.zeros(len(episodes), bool)
    for action, played in zip(actions, is_played, strict=True):
        states = _step(scene)(states, action)
        success |= np.asarray(states.success) & played
    return success.tolist()


def _random_steps(family: LiberoMjx, in_c: LiberoMjx, task_id: int) -> dict[str, Any]:
    """Random actions in MJX, and for the first steps the same in C MuJoCo."""
    (ours, place), (reference, _) = _scene_of(family, task_id), _scene_of(in_c, task_id)
    seeds = list(range(_RANDOM_WORLDS))
    states, expected = _start(ours, place, seeds), _start(reference, place, seeds)
    joints = find_arm(ours.model).qpos
    deviation = 0.0
    for index, key in enumerate(jax.random.split(jax.random.key(1), _RANDOM_STEPS)):
        actions = jax.random.uniform(key, (_RANDOM_WORLDS, 7), minval=-1.0)
        states = _step(ours)(states, actions)
        if index < _COMPARED_STEPS:
            expected = _step(reference)(expected, actions)
            apart = np.abs(np.asarray(states.qpos - expected.qpos)[:, joints]).max()
            deviation = max(deviation, float(apart))
    return {
        "finite": int(jax.vmap(ours.is_finite)(states).sum()),
        "worlds": _RANDOM_WORLDS,
        "contact_overflow": int(states.contact_overflow.sum()),
        "arm_rad": deviation,
    }


# ----------------------------------------------------------------------------- the table


def _line(row: dict[str, Any]) -> str:
    cells = [f"{row['suite']:<15}{row['task_id']:>3}"]
    cells.append(f"rest {row['rest_mm']:5.2f} mm {row['rest_deg']:5.2f} deg")
    cells.append(f"start {row['start_mm']:5.2f} mm {row['start_deg']:5.2f} deg")
    cells.append(f"swing {row['swing_rad']:.1e} rad")
    for physics in ("mujoco", "pyramidal", "mjx"):
        pairs = _pairs(row, physics)
        if pairs:
            equal, successes = sum(a == b for a, b in pairs), sum(a for a, _ in pairs)
            cells.append(f"{physics} {equal}/{len(pairs)} ({successes} successes)")
    if "stepped" in row:
        stepped = row["stepped"]
        cells.append(f"{stepped['finite']}/{stepped['worlds']} finite")
        cells.append(f"overflow {stepped['contact_overflow']}, arm {stepped['arm_rad']:.1e} rad")
    return "  ".join([*cells, row.get("no_plan", row["name"])])


def _pairs(row: dict[str, Any], physics: str) -> list[tuple[bool, bool]]:
    """Verdicts (LIBERO's, ours) on the recorded episodes."""
    theirs = [episode["success"] for episode in row["episodes"]]
    return list(zip(theirs, row.get(physics, ()), strict=False))


def _summarise(rows: list[dict[str, Any]]) -> None:
    print(
        f"{len(rows)} tasks; rest at most {max(row['rest_mm'] for row in rows):.2f} mm, "
        f"{max(row['rest_deg'] for row in rows):.2f} deg"
    )
    for physics in ("mujoco", "pyramidal", "mjx"):
        pairs = [pair for row in rows for pair in _pairs(row, physics)]
        if pairs:
            equal = sum(theirs == ours for theirs, ours in pairs)
            print(
                f"{physics}: {equal} of {len(pairs)} verdicts equal ({equal / len(pairs):.3f}), "
                f"{sum(theirs for theirs, _ in pairs)} successes in LIBERO, "
                f"{sum(ours for _, ours in pairs)} in ours"
            )
    stepped = [row["stepped"] for row in rows if "stepped" in row]
    if stepped:
        finite = sum(one["finite"] for one in stepped)
        print(
            f"mjx: {finite} of {sum(one['worlds'] for one in stepped)} worlds finite, overflow "
            f"{sum(one['contact_overflow'] for one in stepped)}, "
            f"arm within {max(one['arm_rad'] for one in stepped):.1e} rad of C MuJoCo"
        )


if __name__ == "__main__":
    main()
