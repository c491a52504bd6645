"""How well things are held: LIBERO's own model against the reduced ones, on the same actions.

    MUJOCO_GL=disable python scripts/libero_carry.py --workdir=runs/parity [--json=FILE]

Replays the scripted expert's successful episodes, recorded by scripts/libero_parity.py, in C
MuJoCo with LIBERO's own model, the reduced one with LIBERO's friction, and the reduced one with the
pyramidal friction that MJX needs. Follows the object that the goal names first. Per suite, for
each model:

  lifted   episodes in which it rises by 3 cm / episodes
  dropped  of these, those in which it leaves the hand (by 3 cm) while the fingers are told to close
  slip     mm by which it moves in the hand between being lifted and let go, of those not dropped:
           median, and the greatest
"""

import argparse
import json
import os
import pathlib
from typing import Any

os.environ.setdefault("MUJOCO_GL", "disable")  # read when LIBERO is imported

import mujoco
import numpy as np

from jaxvla.envs import libero_compiler as compiler
from jaxvla.envs.libero_scene import with_original_friction
from jaxvla.envs.libero_task import LiberoTask, task_path
from jaxvla.envs.osc import find_arm
from jaxvla.envs.osc_host import HostPhysics, StepInput

_LIFTED_M = 0.03
_DROPPED_M = 0.03
_FINGERS_OPEN = (1.0, -1.0)


def main() -> None:
    """Measures, prints and saves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/parity"))
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(options.workdir.glob("*.json")):
        row = json.loads(path.read_text())
        recorded = [e for e in row["episodes"] if "actions" in e]
        episodes = [e for e in recorded if e["success"] and e["seed"] % 3 == 0]
        if episodes:
            found.setdefault(row["suite"], []).extend(_task(row, episodes))
    for suite, episodes in found.items():
        for model in ("original", "reduced", "pyramidal"):
            print(f"{suite:<15}{model:<10}{_summary([one[model] for one in episodes])}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def _task(row: dict[str, Any], episodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What became of each episode in all models."""
    task = LiberoTask.load(task_path(row["suite"], row["task_id"]))
    reduced: Any = mujoco.MjModel.from_xml_string(task.physics_xml)
    models = {
        "original": compiler.original_model(row["suite"], row["task_id"]),
        "reduced": with_original_friction(reduced),
        "pyramidal": reduced,
    }
    body = _moved_body(task, reduced)
    if body is None:
        return []
    return [
        {"task_id": row["task_id"], "seed": episode["seed"]}
        | {name: _carry(model, task, episode, body) for name, model in models.items()}
        for episode in episodes
    ]


def _moved_body(task: LiberoTask, model: Any) -> int | None:
    """The first free body that the goal names."""
    free = set(model.jnt_bodyid[model.jnt_type == mujoco.mjtJoint.mjJNT_FREE].tolist())
    for term in task.goal:
        if "object" in term and model.body(term["object"]).id in free:
            return int(model.body(term["object"]).id)
    return None


def _carry(model: Any, task: LiberoTask, episode: dict[str, Any], body: int) -> dict[str, Any]:
    """Follows a body through a replayed episode."""
    arm, seed = find_arm(model), episode["seed"]
    fixtures = np.asarray([model.body(name).id for name in task.fixtures], int)
    physics = HostPhysics(model, arm, fixtures)
    qpos, qvel = np.split(task.start_states[seed][None], [model.nq], axis=1)
    worlds = StepInput(
        qpos=qpos,
        qvel=qvel,
        qacc_warmstart=np.zeros_like(qvel),
        goal_rotation=task.goal_rotations[seed][None],
        gripper=np.asarray([_FINGERS_OPEN]),
    )
    hand = model.site_bodyid[arm.hand]
    heights, places, closes = [], [], []
    for action in np.asarray(episode["actions"]):
        end = physics.control_steps(worlds, task.fixture_poses[seed][None], action[None])
        worlds = StepInput(
            qpos=end.qpos,
            qvel=end.qvel,
            qacc_warmstart=end.qacc_warmstart,
            goal_rotation=end.goal_rotation,
            gripper=end.gripper,
        )
        offset = np.asarray(end.xpos[0, body] - end.xpos[0, hand])
        places.append(offset @ np.asarray(end.xmat[0, hand]).reshape(3, 3))
        heights.append(float(end.xpos[0, body, 2]))
        closes.append(action[6] > 0)
    return _judge(np.asarray(heights), np.stack(places), np.asarray(closes))


def _judge(heights: np.ndarray, places: np.ndarray, closes: np.ndarray) -> dict[str, Any]:
    """Lifted, dropped, and slip in mm, from heights [T], places in the hand [T, 3] and commands."""
    is_up = (heights > heights[0] + _LIFTED_M) & closes
    if not is_up.any():
        return {"lifted": False, "dropped": False, "slip_mm": None}
    first = int(np.argmax(is_up))
    opened = np.flatnonzero(~closes[first:])
    last = first + int(opened[0]) if opened.size else len(closes)
    slip = np.linalg.norm(places[first:last] - places[first], axis=1)
    dropped = bool(slip.max() > _DROPPED_M)
    return {"lifted": True, "dropped": dropped, "slip_mm": float(slip[-1]) * 1e3}


def _summary(episodes: list[dict[str, Any]]) -> str:
    lifted = [one for one in episodes if one["lifted"]]
    slips = [one["slip_mm"] for one in lifted if not one["dropped"]]
    dropped = sum(one["dropped"] for one in lifted)
    middle, most = (np.median(slips), max(slips)) if slips else (np.nan, np.nan)
    return (
        f"lifted {len(lifted)}/{len(episodes)}  dropped {dropped}  "
        f"slip {middle:.1f} mm, at most {most:.1f}"
    )


if __name__ == "__main__":
    main()
