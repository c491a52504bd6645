"""A seven-joint arm with a two-finger gripper, and operational-space control in float64 NumPy.

The reference follows robosuite 1.4.0's definition (pseudo-inverses, mass matrix inverted) and
takes kinematics and dynamics from C MuJoCo, so it shares nothing with `jaxvla.envs.osc`.
"""

import mujoco
import numpy as np
from scipy.spatial.transform import Rotation

from jaxvla.envs.osc_host import StepInput

REST = np.array([0.1, -0.4, 0.2, -2.0, 0.1, 1.8, 0.5])
_LINK_M = 0.25
_AXES = ("0 0 1", "0 1 0", "0 0 1", "0 1 0", "0 0 1", "0 1 0", "0 0 1")


def arm_xml() -> str:
    """The arm hangs from the world; a free ball lies before it in every array of the state."""
    opening = ""
    for index, axis in enumerate(_AXES, 1):
        height = 0.3 if index == 1 else _LINK_M
        opening += f"""
      <body name="link{index}" pos="0 0 {height}">
        <joint name="robot0_joint{index}" axis="{axis}" range="-2.9 2.9" damping="0.1"
               armature="0.02" frictionloss="0.05"/>
        <geom type="capsule" fromto="0 0 0 0.03 0 {_LINK_M}" size="0.03" mass="{1.5 / index}"/>"""
    fingers = "".join(
        f"""
        <body name="finger{index}" pos="0 0 {_LINK_M}">
          <joint name="gripper0_gripper_finger_joint{index}" type="slide" axis="0 1 0"
                 range="{limits}" damping="20"/>
          <geom type="box" size="0.01 0.005 0.02" mass="0.05"/>
        </body>"""
        for index, limits in ((1, "0 0.04"), (2, "-0.04 0"))
    )
    motors = "".join(
        f'<motor name="robot0_torq_j{i}" joint="robot0_joint{i}" ctrlrange="{-limit} {limit}"/>'
        for i, limit in enumerate((80, 80, 80, 80, 80, 12, 12), 1)
    )
    return f"""
<mujoco>
  <compiler autolimits="true" angle="radian"/>
  <option timestep="0.002" integrator="Euler" iterations="20" ls_iterations="20"/>
  <default><geom contype="0" conaffinity="0"/></default>
  <worldbody>
    <body name="ball" pos="2 0 1"><freejoint name="ball"/><geom size="0.05" mass="0.3"/></body>
    {opening}
        <site name="gripper0_grip_site" pos="0.02 0.01 0.3" quat="0.7 0.1 0.7 0.1"/>
        {fingers}
    {"</body>" * len(_AXES)}
  </worldbody>
  <actuator>
    <position name="gripper0_gripper_finger_joint1" joint="gripper0_gripper_finger_joint1"
              kp="1000" ctrlrange="0 0.04"/>
    <position name="gripper0_gripper_finger_joint2" joint="gripper0_gripper_finger_joint2"
              kp="1000" ctrlrange="-0.04 0"/>
    {motors}
  </actuator>
</mujoco>"""


class ReferenceArm:
    """One world in C MuJoCo under the reference controller."""

    def __init__(self, model: mujoco.MjModel, rest: np.ndarray):
        self.model, self.data, self.rest = model, mujoco.MjData(model), rest
        joints = [model.joint(f"robot0_joint{i}") for i in range(1, 8)]
        self.dofs = np.array([joint.dofadr[0] for joint in joints])
        self.qpos = np.array([joint.qposadr[0] for joint in joints])
        self.motors = [model.actuator(f"robot0_torq_j{i}").id for i in range(1, 8)]
        self.fingers = [model.actuator(f"gripper0_gripper_finger_joint{i}").id for i in range(1, 3)]
        self.hand = model.site("gripper0_grip_site").id
        self.goal_position, self.goal_rotation = np.zeros(3), np.eye(3)
        self.gripper = np.zeros(2)

    def load(self, qpos: np.ndarray, qvel: np.ndarray) -> None:
        """Starts anew with the goal at the present pose."""
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:], self.data.qvel[:] = qpos, qvel
        mujoco.mj_forward(self.model, self.data)
        self.goal_position, self.goal_rotation = self.position, self.rotation
        self.gripper = np.zeros(2)

    @property
    def position(self) -> np.ndarray:
        return self.data.site_xpos[self.hand].copy()

    @property
    def rotation(self) -> np.ndarray:
        return self.data.site_xmat[self.hand].reshape(3, 3).copy()

    def set_goal(self, action: np.ndarray) -> None:
        action = np.clip(action, -1, 1)
        self.goal_position = self.position + 0.05 * action[:3]
        if np.any(action[3:6] != 0):
            turn = Rotation.from_rotvec(0.5 * action[3:6]).as_matrix()
            self.goal_rotation = turn @ self.rotation

    def torques(self) -> np.ndarray:
        model, data = self.model, self.data
        full = np.zeros((6, model.nv))
        mujoco.mj_jacSite(model, data, full[:3], full[3:], self.hand)
        J, velocity = full[:, self.dofs], full @ data.qvel
        M = self._mass_matrix()
        M_inv = np.linalg.inv(M)
        inertia, inertia_position, inertia_rotation = (
            np.linalg.pinv(part @ M_inv @ part.T) for part in (J, J[:3], J[3:])
        )
        kp, kd = 150.0, 2 * np.sqrt(150.0)
        error = sum(np.cross(self.rotation[:, k], self.goal_rotation[:, k]) for k in range(3)) / 2
        force = inertia_position @ (kp * (self.goal_position - self.position) - kd * velocity[:3])
        torque = inertia_rotation @ (kp * error - kd * velocity[3:])
        null = np.eye(7) - M_inv @ J.T @ inertia @ J
        back = 10 * (self.rest - data.qpos[self.qpos]) - 2 * np.sqrt(10) * data.qvel[self.dofs]
        wrench = np.concatenate([force, torque])
        total = J.T @ wrench + data.qfrc_bias[self.dofs] + null.T @ (M @ back)
        return np.clip(total, *model.actuator_ctrlrange[self.motors].T)

    def _mass_matrix(self) -> np.ndarray:
        """Inertia [7, 7], from torques that unit accelerations take (no private layout)."""
        rows = np.zeros((self.model.nv, self.model.nv))
        for k in range(self.model.nv):
            unit = np.eye(self.model.nv)[k]
            mujoco.mj_mulM(self.model, self.data, rows[k], unit)
        return rows[np.ix_(self.dofs, self.dofs)]

    def step(self, action: np.ndarray) -> None:
        """One control step of 25 physics steps."""
        for index in range(25):
            mujoco.mj_forward(self.model, self.data)
            if index == 0:
                self.set_goal(action)
            self.gripper = np.clip(
                self.gripper + np.array([-0.01, 0.01]) * np.sign(action[6]), -1, 1
            )
            low, high = self.model.actuator_ctrlrange[self.fingers].T
            self.data.ctrl[self.motors] = self.torques()
            self.data.ctrl[self.fingers] = (low + high) / 2 + (high - low) / 2 * self.gripper
            mujoco.mj_step(self.model, self.data)


def start_worlds(model: mujoco.MjModel, count: int, random: np.random.Generator) -> StepInput:
    """Arms near the rest pose, at rest, with their goals where they are."""
    reference = ReferenceArm(model, REST)
    qpos = np.tile(model.qpos0, (count, 1))
    qpos[:, reference.qpos] = REST + random.uniform(-0.2, 0.2, (count, 7))
    rotations = []
    for row in qpos:
        reference.load(row, np.zeros(model.nv))
        rotations.append(reference.rotation)
    zeros = np.zeros((count, model.nv))
    return StepInput(
        qpos=qpos,
        qvel=zeros,
        qacc_warmstart=zeros,
        goal_rotation=np.stack(rotations),
        gripper=np.zeros((count, 2)),
    )
