"""Operational-space control of a robot arm in MJX, with the settings that LIBERO uses.

This is the OSC_POSE controller of robosuite 1.4.0 (fixed impedance, relative goals, position
and orientation uncoupled) together with its Panda gripper, as functions of `mjx.Data`:
  https://github.com/ARISE-Initiative/robosuite/blob/v1.4.0/robosuite/controllers/osc.py
  https://github.com/ARISE-Initiative/robosuite/blob/v1.4.0/robosuite/utils/control_utils.py
  https://github.com/ARISE-Initiative/robosuite/blob/v1.4.0/robosuite/models/grippers/panda_gripper.py
The control law is that of O. Khatib, "A unified approach for motion and force control of robot
manipulators: the operational space formulation", IEEE J. Robotics and Automation 3(1), 1987.

An action, float [7], is a motion of the hand in the world's axes and a gripper command:
  [0:3]  displacement, a fraction in [-1, 1] of MAX_MOVE_M per axis
  [3:6]  rotation (axis-angle), a fraction in [-1, 1] of MAX_TURN_RAD per component
  [6]    gripper: positive closes, negative opens, 0 leaves its command as it is
Everything outside [-1, 1] is clipped.

A control step sets the goal once, from the pose the hand has then, and follows it for
NUM_SUBSTEPS physics steps, each with torques of its own. Everything here is for one world;
vmap it for batches.
"""

import dataclasses
from dataclasses import dataclass

import flax.struct
import jax
import jax.numpy as jnp
import mujoco
import numpy as np

from jaxvla.envs.broad_phase import fwd_position
from jaxvla.envs.quiet_mjx import mjx
from jaxvla.types import AnyArray

ACTION_DIM = 7
NUM_SUBSTEPS = 25
"""Physics steps of 2 ms per control step: 20 Hz."""

MAX_MOVE_M = 0.05
MAX_TURN_RAD = 0.5
STIFFNESS = 150.0
"""Of position (1/s^2) and orientation (1/s^2): accelerations, since the law weighs them with the
inertia that the hand feels."""
DAMPING = 2.0 * STIFFNESS**0.5
"""Critical damping, 1/s."""
REST_STIFFNESS = 10.0
"""Of the joints towards the arm's rest pose, in the directions the hand does not feel, 1/s^2."""
REST_DAMPING = 2.0 * REST_STIFFNESS**0.5
GRIPPER_SPEED = 0.01
"""Change of the gripper's command per physics step; it runs from -1 (closed) to 1 (open) for the
first finger, the other way for the second."""

PANDA_REST_RAD = (0.0, -0.161037389, 0.0, -2.44459747, 0.0, 2.2267522, np.pi / 4)
"""Joint angles that LIBERO's mounted Panda starts from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmNames:
    """How a model calls the parts that the controller needs; defaults are LIBERO's."""

    joints: tuple[str, ...] = tuple(f"robot0_joint{i}" for i in range(1, 8))
    motors: tuple[str, ...] = tuple(f"robot0_torq_j{i}" for i in range(1, 8))
    """One torque actuator per joint, in the same order."""
    fingers: tuple[str, ...] = ("gripper0_gripper_finger_joint1", "gripper0_gripper_finger_joint2")
    """Two position actuators; the first one's range is [closed, open], the second's reversed."""
    hand: str = "gripper0_grip_site"
    """Site whose pose is controlled."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Arm:
    """Places of an arm with J joints in a model's arrays; static in jitted functions."""

    hand: int
    """Site id."""
    joints: np.ndarray
    """int [J], joint ids."""
    qpos: np.ndarray
    """int [J], addresses in `qpos`."""
    dofs: np.ndarray
    """int [J], addresses in `qvel`."""
    motors: np.ndarray
    """int [J], indices into `ctrl`."""
    fingers: np.ndarray
    """int [2], indices into `ctrl`."""
    torque_range: np.ndarray
    """float32 [J, 2], N m."""
    finger_range: np.ndarray
    """float32 [2, 2], m."""
    rest: np.ndarray
    """float32 [J], rad."""


@flax.struct.dataclass(kw_only=True)
class OscState:
    """What the controller remembers from one control step to the next."""

    goal_position: AnyArray
    """float32 [3], where the hand is to be, world frame, m."""
    goal_rotation: AnyArray
    """float32 [3, 3], how it is to be turned: hand frame to world frame."""
    gripper: AnyArray
    """float32 [2], command of each finger in [-1, 1], a fraction of half its range."""


def find_arm(
    model: mujoco.MjModel,
    names: ArmNames | None = None,
    rest_rad: tuple[float, ...] = PANDA_REST_RAD,
) -> Arm:
    """Looks the arm up by name.

    Args:
      model: the model that the `mjx.Model` was made from.
      names: None for LIBERO's.
      rest_rad: pose [J] that joints tend to as far as the hand's pose leaves them free.

    Raises:
      KeyError: the model has no part of such a name.
      ValueError: the numbers of joints, motors and rest angles differ; the joints are not
        hinges, or not all the joints that move the hand; or the model's integrator is not
        Euler's, the one that `control_step` runs.
    """
    names = names or ArmNames()
    if not len(names.joints) == len(names.motors) == len(rest_rad):
        raise ValueError(
            f"{len(names.joints)} joints, {len(names.motors)} motors and {len(rest_rad)} rest "
            "angles: expected as many of each"
        )
    if model.opt.integrator != mujoco.mjtIntegrator.mjINT_EULER:
        raise ValueError(f"integrator {model.opt.integrator}: only Euler's is implemented")
    hand = model.site(names.hand).id
    joints = np.asarray([model.joint(name).id for name in names.joints])
    _check_chain(model, hand, joints)
    motors = np.asarray([model.actuator(name).id for name in names.motors])
    fingers = np.asarray([model.actuator(name).id for name in names.fingers])
    return Arm(
        hand=hand,
        joints=joints,
        qpos=model.jnt_qposadr[joints].copy(),
        dofs=model.jnt_dofadr[joints].copy(),
        motors=motors,
        fingers=fingers,
        torque_range=model.actuator_ctrlrange[motors].astype(np.float32),
        finger_range=model.actuator_ctrlrange[fingers].astype(np.float32),
        rest=np.asarray(rest_rad, np.float32),
    )


def _check_chain(model: mujoco.MjModel, hand: int, joints: np.ndarray) -> None:
    """Raises ValueError if `_jacobian` would not be that of the hand."""
    body, movers = int(model.site_bodyid[hand]), set()
    while body:
        movers |= set(np.flatnonzero(model.jnt_bodyid == body).tolist())
        body = int(model.body_parentid[body])
    if movers != set(joints.tolist()):
        names = sorted(model.joint(joint).name for joint in movers)
        raise ValueError(f"joints of the arm must be those that move the hand: {names}")
    if (model.jnt_type[joints] != mujoco.mjtJoint.mjJNT_HINGE).any():
        raise ValueError("joints of the arm must be hinges")


def initial_state(data: mjx.Data, *, arm: Arm) -> OscState:
    """The hand is to stay where it is; the gripper's command is half open.

    Args:
      data: with kinematics computed (`mjx.kinematics` or more).
    """
    return OscState(
        goal_position=data.site_xpos[arm.hand],
        goal_rotation=data.site_xmat[arm.hand],
        gripper=jnp.zeros(2),
    )


def set_goal(data: mjx.Data, action: jax.Array, *, arm: Arm, state: OscState) -> OscState:
    """Places the goal relative to the hand's present pose, not to the goal before.

    A rotation of exactly zero keeps the goal rotation from before, as robosuite does: the hand
    then goes on turning to where it was told to. A displacement of zero stops it where it is.

    Args:
      data: with kinematics computed.
      action: float [7], see the module.
    """
    action = jnp.clip(action, -1.0, 1.0)
    turn = action[3:6] * MAX_TURN_RAD
    turned = rotation_matrix(turn) @ data.site_xmat[arm.hand]
    return dataclasses.replace(
        state,
        goal_position=data.site_xpos[arm.hand] + action[:3] * MAX_MOVE_M,
        goal_rotation=jnp.where((turn != 0.0).any(), turned, state.goal_rotation),
    )


def rotation_matrix(axis_angle: jax.Array) -> jax.Array:
    """Rodrigues' formula: I + sin(a)/a K + (1 - cos(a))/a^2 K^2, K the cross-product matrix.

    Args:
      axis_angle: float [3], rad; a is its length. Zero gives the identity.

    Returns:
      float [3, 3].
    """
    angle = jnp.linalg.norm(axis_angle)
    # Written with sinc(x) = sin(pi x) / (pi x), which is exact at 0.
    sine = jnp.sinc(angle / jnp.pi)
    cosine = 0.5 * jnp.sinc(angle / (2.0 * jnp.pi)) ** 2
    K = jnp.cross(jnp.eye(3), axis_angle[None])
    return jnp.eye(3) + sine * K + cosine * K @ K


def torques(data: mjx.Data, inertia: jax.Array, *, arm: Arm, state: OscState) -> jax.Array:
    """Joint torques that take the hand to its goal.

    With the Jacobian J = [Jp; Jr] of the hand, the joints' inertia matrix M, and
    L(J) = (J M^-1 J^T)^-1, the inertia that is felt at the hand (Khatib 1987, section III):
      tau = J^T [L(Jp) a_p; L(Jr) a_r] + bias + N^T M a_q,   N = I - M^-1 J^T L(J) J
    where a_p = k (goal - position) - d velocity, a_r likewise with half the sum of the cross
    products of the present and the wanted axes, and a_q the same for joints and rest pose.
    Uncoupled means that position and orientation each have an L of their own.

    Args:
      data: after `mjx.fwd_position` and `mjx.fwd_velocity`.
      inertia: float32 [nv, nv], of all joints, from `mjx.full_m`.

    Returns:
      float32 [J], N m, within the motors' ranges.
    """
    J = _jacobian(data, arm)
    velocity = J @ data.qvel[arm.dofs]
    M = inertia[np.ix_(arm.dofs, arm.dofs)]
    # J M^-1 J^T, the inverse of L(J), symmetric.
    mobility = J @ _solve(M, J.T)
    move = STIFFNESS * (state.goal_position - data.site_xpos[arm.hand]) - DAMPING * velocity[:3]
    error = _rotation_error(state.goal_rotation, data.site_xmat[arm.hand])
    turn = STIFFNESS * error - DAMPING * velocity[3:]
    wrench = jnp.concatenate([_solve(mobility[:3, :3], move), _solve(mobility[3:, 3:], turn)])
    rest = REST_STIFFNESS * (arm.rest - data.qpos[arm.qpos]) - REST_DAMPING * data.qvel[arm.dofs]
    # N^T M a = M a - J^T L(J) J a
    rest_torque = M @ rest - J.T @ _solve(mobility, J @ rest)
    torque = J.T @ wrench + data.qfrc_bias[arm.dofs] + rest_torque
    return jnp.clip(torque, arm.torque_range[:, 0], arm.torque_range[:, 1])


def _jacobian(data: mjx.Data, arm: Arm) -> jax.Array:
    """Velocity of the hand per joint velocity [6, J]: what a turn about each hinge gives."""
    axis = data.xaxis[arm.joints]
    lever = data.site_xpos[arm.hand] - data.xanchor[arm.joints]
    return jnp.concatenate([jnp.cross(axis, lever), axis], -1).T


def _solve(A: jax.Array, b: jax.Array) -> jax.Array:
    """A^-1 b for a symmetric positive definite A."""
    return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(A, lower=True), b)


def _rotation_error(goal: AnyArray, present: jax.Array) -> jax.Array:
    """Half the sum of cross products of the axes [3]; sin(angle) times the axis of the turn."""
    return 0.5 * jnp.cross(present, goal, axisa=0, axisb=0, axisc=0).sum(-1)


def gripper_control(
    command: AnyArray, action: jax.Array, *, arm: Arm
) -> tuple[jax.Array, jax.Array]:
    """Moves the fingers' command by one physics step's share.

    Args:
      command: float32 [2], `OscState.gripper`.
      action: float [7] (only its sign at [6] matters).

    Returns:
      The new command [2] and the fingers' control values [2], m.
    """
    step = GRIPPER_SPEED * jnp.sign(action[6]) * jnp.asarray([-1.0, 1.0])
    command = jnp.clip(command + step, -1.0, 1.0)
    low, high = jnp.asarray(arm.finger_range).T
    return command, 0.5 * (low + high) + 0.5 * (high - low) * command


def controls(
    data: mjx.Data,
    inertia: jax.Array,
    index: jax.Array,
    *,
    arm: Arm,
    state: OscState,
    action: jax.Array,
) -> tuple[jax.Array, OscState]:
    """What motors and fingers are told for one physics step; the first one sets the goal.

    Args:
      data: after `mjx.fwd_position` and `mjx.fwd_velocity`.
      inertia: float32 [nv, nv], see `torques`.
      index: int32 [], of the physics step in its control step.
      action: float [7], see the module.

    Returns:
      float32 [nu], N m and m (other actuators keep what `data` has), and the new state.
    """
    new_goal = set_goal(data, action, arm=arm, state=state)
    state = jax.tree.map(lambda new, old: jnp.where(index == 0, new, old), new_goal, state)
    command, fingers = gripper_control(state.gripper, action, arm=arm)
    torque = torques(data, inertia, arm=arm, state=state)
    ctrl = data.ctrl.at[arm.motors].set(torque).at[arm.fingers].set(fingers)
    return ctrl, dataclasses.replace(state, gripper=command)


def place_bodies(model: mjx.Model, bodies: np.ndarray, poses: jax.Array) -> mjx.Model:
    """The model with bodies (int [F]) at other poses in their parents, [F, 7] (m; w, x, y, z)."""
    return model.replace(
        body_pos=model.body_pos.at[bodies].set(poses[:, :3]),
        body_quat=model.body_quat.at[bodies].set(poses[:, 3:]),
    )


def control_step(
    model: mjx.Model, data: mjx.Data, *, arm: Arm, state: OscState, action: jax.Array
) -> tuple[mjx.Data, OscState]:
    """One control step: sets the goal, then runs NUM_SUBSTEPS physics steps.

    Each physics step computes kinematics and inertia once and uses them for torques and
    dynamics alike. The outcome is that of `mjx.forward`, torques, `mjx.step`, at half the cost
    and a third of the compile time. Sensors are not computed.

    As in MuJoCo (and in LIBERO, which checks success at this point), positions of bodies,
    geoms and contacts in the result belong to the state before the last physics step, 2 ms
    ago; only `qpos`, `qvel` and `time` are the newest.

    Args:
      model: of the impl "jax", with Euler's integrator.
      data: `qpos`, `qvel`, `qacc_warmstart` and `time` are what matters.
      action: float [7], see the module.
    """

    def substep(carry: tuple[mjx.Data, OscState], index: jax.Array):
        data, state = carry
        data = mjx.fwd_velocity(model, fwd_position(model, data))
        inertia = mjx.full_m(model, data)
        ctrl, state = controls(data, inertia, index, arm=arm, state=state, action=action)
        data = mjx.fwd_actuation(model, data.replace(ctrl=ctrl))
        data = mjx.solve(model, mjx.fwd_acceleration(model, data))
        return (mjx.euler(model, data), state), None

    # Accelerators multiply matrices with 8 to 11 bits unless told otherwise: too few here.
    with jax.default_matmul_precision("highest"):
        (data, state), _ = jax.lax.scan(substep, (data, state), jnp.arange(NUM_SUBSTEPS))
    return data, state
