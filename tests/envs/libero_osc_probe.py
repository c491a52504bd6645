"""Drives LIBERO's own controller and writes what it did; see test_osc_libero.py.

    python libero_osc_probe.py SUITE TASK OUTPUT_NPZ

MUJOCO_GL=disable must be set: nothing is rendered.
"""

import sys
from typing import Any

import numpy as np
from libero_stock import open_env, reduced_scene

NUM_STEPS = 60


def main(suite: str, task_id: int, output: str) -> None:
    with open_env(suite, task_id) as (env, init_states):
        env.set_init_state(init_states[0])
        robot = env.env.robots[0]
        robot.controller.update(force=True)  # else the first goal is that of the pose before
        robot.controller.reset_goal()
        seen = {**reduced_scene(env), **run(env, robot)}
    np.savez(output, **seen)


def run(env: Any, robot: Any) -> dict[str, np.ndarray]:
    """Random actions in free space, states and torques along the way."""
    actions = random_actions()
    rows = [snapshot(env, robot)]
    for action in actions:
        env.step(action.astype(np.float64))
        rows.append(snapshot(env, robot))
    seen = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return {"actions": actions, "rest": robot.controller.initial_joint, **seen}


def random_actions() -> np.ndarray:
    """float32 [NUM_STEPS, 7]: up first, then in all directions; the gripper closes and opens.

    Some do not turn the hand, and some are out of range.
    """
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1.1, 1.1, (NUM_STEPS, 7))
    actions[:15, 2] = rng.uniform(0.2, 1.0, 15)
    actions[20:24, 3:6] = 0.0
    actions[:, 6] = np.repeat(rng.choice([-1.0, 0.0, 1.0], NUM_STEPS // 10), 10)
    return actions.astype(np.float32)


def snapshot(env: Any, robot: Any) -> dict[str, np.ndarray]:
    """State, goal, and the torques that the controller would apply now."""
    controller, data = robot.controller, env.env.sim.data
    torques = np.clip(controller.run_controller(), *robot.torque_limits)
    return {
        "qpos": data.qpos.copy(),
        "qvel": data.qvel.copy(),
        "goal_position": controller.goal_pos.copy(),
        "goal_rotation": controller.goal_ori.copy(),
        "torques": torques,
        "gripper": np.broadcast_to(robot.gripper.current_action, (2,)).astype(np.float64),
        "hand": data.get_site_xpos(controller.eef_name).copy(),
    }


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
