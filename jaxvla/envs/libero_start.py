"""Where LIBERO's episodes begin: its init states after a few control steps at rest.

`libero_host` lets dropped objects settle for `num_settle_steps` before the policy acts. There
are 50 init states a task, so the outcome is computed once, in C MuJoCo on LIBERO's own model,
when a task is compiled: `libero_mjx` starts from the very states that `libero_host` starts
from, and need not simulate them anew in every reset.
"""

from typing import Any

import numpy as np

from jaxvla.envs.libero_host import NO_OP

NUM_SETTLE_STEPS = 10
"""Control steps at rest, as `LiberoHostConfig` has it by default."""


def settle(env: Any, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Runs the start of an episode.

    Args:
      env: LIBERO's ControlEnv, just reset, with the fixtures in place.
      state: float64 [nq + nv], init state.

    Returns:
      float64 [nq + nv], the state when the policy takes over; float64 [3, 3], the hand's goal
      rotation then, which is the rotation it had in the init state.
    """
    env.set_init_state(np.concatenate([[0.0], state]))
    for robot in env.robots:
        robot.controller.update(force=True)
        robot.controller.reset_goal()
        # The gripper integrates its commands; only a rebuilt model would start at 0.
        robot.gripper.current_action = np.zeros_like(robot.gripper.current_action)
    for _ in range(NUM_SETTLE_STEPS):
        env.step(NO_OP)
    return env.get_sim_state()[1:], np.array(env.robots[0].controller.goal_ori)
