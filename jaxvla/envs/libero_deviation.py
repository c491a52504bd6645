"""How far a reduced scene is from LIBERO's own model, both in C MuJoCo."""

import mujoco
import numpy as np

from jaxvla.envs.osc import find_arm

_HOLD_STEPS = 5
"""Physics steps for which motor torques are held."""
_WAVE_NM = np.array([4.0, 4.0, 4.0, 4.0, 1.0, 1.0, 0.5])
_WAVE_S = np.array([0.5, 0.6, 0.7, 0.8, 0.4, 0.3, 0.2])
"""Amplitudes and periods of torques that swing the arm by some degrees per joint."""


def resting_deviation(
    original: mujoco.MjModel,
    reduced: mujoco.MjModel,
    state: np.ndarray,
    num_control_steps: int = 100,
) -> tuple[float, float]:
    """Compares where free objects come to rest.

    The arm is held by gravity compensation alone.

    Args:
      original: LIBERO's own model.
      reduced: the model made from it.
      state: [nq + nv], to start from.
      num_control_steps: duration, in control steps of 50 ms.

    Returns:
      Of the object that deviates most: distance in m, and of the one that has turned most:
      angle in degrees.
    """
    ends = [rest(model, state, num_control_steps) for model in (original, reduced)]
    bodies = original.jnt_bodyid[original.jnt_type == mujoco.mjtJoint.mjJNT_FREE]
    if not bodies.size:
        return 0.0, 0.0
    one, other = ends
    distance = np.linalg.norm(one.xipos[bodies] - other.xipos[bodies], axis=1).max()
    cosine = np.abs((one.xquat[bodies] * other.xquat[bodies]).sum(axis=1)).min()
    return float(distance), float(np.degrees(2 * np.arccos(min(1.0, cosine))))


def rest(model: mujoco.MjModel, state: np.ndarray, num_control_steps: int) -> mujoco.MjData:
    """Steps a scene while nothing but gravity compensation moves the arm.

    Args:
      model: LIBERO's or a reduced one.
      state: [nq + nv], to start from.
      num_control_steps: duration, in control steps of 50 ms.
    """
    arm, data = find_arm(model), _start(model, state)
    for _ in range(round(num_control_steps * 0.05 / model.opt.timestep / _HOLD_STEPS)):
        data.ctrl[arm.motors] = data.qfrc_bias[arm.dofs]
        mujoco.mj_step(model, data, _HOLD_STEPS)
    mujoco.mj_kinematics(model, data)
    mujoco.mj_comPos(model, data)
    return data


def swing(model: mujoco.MjModel, state: np.ndarray, num_steps: int) -> tuple[np.ndarray, ...]:
    """Moves the arm by torques that swing around gravity compensation.

    Args:
      model: LIBERO's or a reduced one.
      state: [nq + nv], to start from.
      num_steps: physics steps.

    Returns:
      The commands, [num_steps, nu], and the arm's joint angles at the end, [7], rad.
    """
    arm, data = find_arm(model), _start(model, state)
    controls = np.empty((num_steps, model.nu))
    for step in range(num_steps):
        wave = np.sin(2 * np.pi * data.time / _WAVE_S)
        data.ctrl[arm.motors] = data.qfrc_bias[arm.dofs] + _WAVE_NM * wave
        controls[step] = data.ctrl
        mujoco.mj_step(model, data)
    return controls, _joints(model, data)


def replay(model: mujoco.MjModel, state: np.ndarray, controls: np.ndarray) -> np.ndarray:
    """Open loop: the arm's joint angles, [7], rad, after the given commands."""
    data = _start(model, state)
    for control in controls:
        data.ctrl[:] = control
        mujoco.mj_step(model, data)
    return _joints(model, data)


def _start(model: mujoco.MjModel, state: np.ndarray) -> mujoco.MjData:
    data = mujoco.MjData(model)
    data.qpos[:], data.qvel[:] = np.split(state, [model.nq])
    mujoco.mj_forward(model, data)
    return data


def _joints(model: mujoco.MjModel, data: mujoco.MjData) -> np.ndarray:
    return data.qpos[find_arm(model).qpos]
