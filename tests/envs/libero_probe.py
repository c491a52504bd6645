"""Runs LiberoEnv in a process of its own and writes what it saw; see test_libero_host.py.

    python libero_probe.py CONFIG_JSON OUTPUT_NPZ

CONFIG_JSON is the config that a worker gets, of two tasks. MUJOCO_GL must be set. What the
env does is compared with the stock OffScreenRenderEnv, freshly built and stepped as LIBERO's
users step it.
"""

import json
import sys
from typing import Any

import numpy as np

from jaxvla.envs.libero_host import NO_OP, LiberoEnv
from jaxvla.envs.libero_init_states import load_init_states

SEED = 57
ACTIONS = np.random.default_rng(0).uniform(-1, 1, (4, 7)).astype(np.float32)
CLOSE = np.tile(np.array([0, 0, 0, 0, 0, 0, 1], np.float32), (5, 1))
HOLD = np.tile(NO_OP.astype(np.float32), (8, 1))


def main(config: dict[str, Any], output: str) -> None:
    env = LiberoEnv(config)
    seen: dict[str, Any] = {}
    seen.update(probe_episode(env))
    seen.update(probe_reset(env))
    seen.update(probe_success(env))
    seen.update(probe_divergence(env))
    seen.update(probe_stock(config["tasks"][0]))
    seen.update(probe_other_task(env))
    np.savez(output, **seen)


def probe_episode(env: LiberoEnv) -> dict[str, Any]:
    """An episode, another one that leaves the gripper closed, and the first again."""
    seen: dict[str, Any] = {}
    for name in ("first", "again"):
        frame = env.reset(0, SEED)
        seen[f"{name}_images"], seen[f"{name}_state"] = frame.images, frame.state
        seen[f"{name}_sim"] = env._env.get_sim_state()
        num_renders = count_renders(env)
        outcome = env.step_chunk(ACTIONS)
        assert outcome.frame is not None
        seen[f"{name}_num_renders"] = len(num_renders)
        seen[f"{name}_outcome"] = [outcome.reward, outcome.success, outcome.num_steps]
        seen[f"{name}_next_state"] = outcome.frame.state
        seen[f"{name}_next_sim"] = env._env.get_sim_state()
        seen[f"{name}_model"] = id(env._env.sim.model)
        env.reset(0, SEED + 1)
        closed = env.step_chunk(CLOSE).frame
        assert closed is not None
        seen["closed_fingers"] = closed.state[6:]
    return seen


def count_renders(env: LiberoEnv) -> list[str]:
    """Makes the simulation note every camera it renders, until the next call."""
    sim, cameras = env._env.sim, []
    render = type(sim).render

    def noting(*args: Any, camera_name: str, **options: Any) -> np.ndarray:
        cameras.append(camera_name)
        return render(sim, *args, camera_name=camera_name, **options)

    sim.render = noting
    return cameras


def probe_reset(env: LiberoEnv) -> dict[str, Any]:
    """What a reset restores, seen without settle steps."""
    num_settle_steps, env._num_settle_steps = env._num_settle_steps, 0
    seen: dict[str, Any] = {}
    for seed in (3, 53):
        env.reset(0, seed)
        seen[f"restored_{seed}"] = env._env.get_sim_state()
        seen[f"fixtures_{seed}"] = env._env.sim.model.body_pos.copy()
    robot = env._env.robots[0]
    seen["goal_position"] = robot.controller.goal_pos
    seen["hand_position"] = env._env.sim.data.site_xpos[robot.eef_site_id].copy()
    env._num_settle_steps = num_settle_steps
    return seen


def probe_success(env: LiberoEnv) -> dict[str, Any]:
    """Drops the bowl on the plate, which is the goal of the task."""
    env.reset(0, 0)
    data = env._env.sim.data
    bowl = data.get_joint_qpos("akita_black_bowl_1_joint0").copy()
    bowl[:2] = data.get_joint_qpos("plate_1_joint0")[:2]
    bowl[2] += 0.04
    data.set_joint_qpos("akita_black_bowl_1_joint0", bowl)
    outcome = env.step_chunk(HOLD)
    return {
        "success": [outcome.reward, outcome.success, outcome.num_steps],
        "success_has_frame": outcome.frame is not None,
    }


def probe_divergence(env: LiberoEnv) -> dict[str, Any]:
    env.reset(0, 0)
    env._env.sim.data.qvel[0] = 1e12
    try:
        env.step_chunk(HOLD[:1])
    except FloatingPointError as error:
        return {"divergence": str(error)}
    return {"divergence": ""}


def probe_stock(task: dict[str, str]) -> dict[str, Any]:
    """LIBERO's own env, new, with its own observations, brought to the state of `first`."""
    from libero.libero.envs import OffScreenRenderEnv

    np.random.seed(SEED)  # the fixtures' places are drawn while it is built
    stock = OffScreenRenderEnv(
        bddl_file_name=task["bddl_file"], camera_heights=64, camera_widths=64
    )
    # As its reset does, which would build everything again: markers are not to be seen.
    stock.env.visualize({kind: False for kind in stock.env._visualizations})
    stock.set_init_state(load_init_states(task["init_states_file"])[SEED % 50])
    stock.robots[0].controller.update(force=True)
    stock.robots[0].controller.reset_goal()
    raw = [stock.step(NO_OP)[0] for _ in range(10)][-1]
    seen = {"stock_sim": stock.get_sim_state(), "stock_position": raw["robot0_eef_pos"]}
    raw = [stock.step(action)[0] for action in ACTIONS.astype(np.float64)][-1]
    seen["stock_next_sim"] = stock.get_sim_state()
    seen["stock_next_position"] = raw["robot0_eef_pos"]
    raw = stock.set_init_state(seen["stock_sim"])  # observations of exactly this instant
    for name in ("agentview_image", "robot0_eye_in_hand_image"):
        seen[f"stock_{name}"] = raw[name]
    for name in ("eef_pos", "eef_quat", "gripper_qpos"):
        seen[f"stock_{name}"] = raw[f"robot0_{name}"]
    stock.close()
    return seen


def probe_other_task(env: LiberoEnv) -> dict[str, Any]:
    """A second task in the same process, whose scene is another one."""
    frame = env.reset(1, 0)
    return {"other_images": frame.images, "other_size": env._env.get_sim_state().size}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2])
