"""The control step of `osc` in C MuJoCo and NumPy, for batches of worlds on CPU threads.

The same law in float64: a CPU steps a LIBERO scene ten times faster this way than through MJX.
C MuJoCo gives the interpreter free while it computes; the few small matrix products of the
controller in between do not.
"""

import copy
import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import flax.struct
import jax
import mujoco
import numpy as np

from jaxvla.envs.osc import (
    DAMPING,
    GRIPPER_SPEED,
    MAX_MOVE_M,
    MAX_TURN_RAD,
    NUM_SUBSTEPS,
    REST_DAMPING,
    REST_STIFFNESS,
    STIFFNESS,
    Arm,
)
from jaxvla.types import AnyArray


@flax.struct.dataclass(kw_only=True)
class StepInput:
    """E worlds before a control step, in any float dtype."""

    qpos: AnyArray
    """[E, nq]."""
    qvel: AnyArray
    """[E, nv]."""
    qacc_warmstart: AnyArray
    """[E, nv]."""
    goal_rotation: AnyArray
    """[E, 3, 3]."""
    gripper: AnyArray
    """[E, 2]."""


@flax.struct.dataclass(kw_only=True)
class StepOutcome:
    """E worlds after a control step, float32."""

    qpos: AnyArray
    """NaN where the world has diverged."""
    qvel: AnyArray
    qacc_warmstart: AnyArray
    goal_position: AnyArray
    """[E, 3]."""
    goal_rotation: AnyArray
    gripper: AnyArray
    xpos: AnyArray
    """[E, nbody, 3]; like the three below one physics step behind qpos, see `osc`."""
    xmat: AnyArray
    """[E, nbody, 9]."""
    geom_xpos: AnyArray
    """[E, ngeom, 3]."""
    geom_xmat: AnyArray
    """[E, ngeom, 9]."""
    contact_overflow: AnyArray
    """int32 [E], contacts that did not fit into a buffer; C MuJoCo has none."""


class HostPhysics:
    """Runs control steps of one scene."""

    def __init__(self, model: mujoco.MjModel, arm: Arm, placed: np.ndarray):
        """Args:
        model: the scene.
        arm: from `osc.find_arm`.
        placed: int [F], bodies whose pose differs between worlds.
        """
        self._lock = threading.Lock()  # devices of a mesh may call at the same time
        count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self._workers = [_Worker(model, arm, placed) for _ in range(count or 1)]
        self._pool = ThreadPoolExecutor(len(self._workers), thread_name_prefix="physics")

    def control_steps(
        self, worlds: StepInput, poses: np.ndarray, actions: np.ndarray
    ) -> StepOutcome:
        """One control step of every world.

        Args:
          worlds: E of them.
          poses: [E, F, 7], of the placed bodies (m; w, x, y, z).
          actions: [E, 7], see `osc`.
        """
        outcome = self.outcome_struct(len(actions))
        shares = np.array_split(np.arange(len(actions)), len(self._workers))
        with self._lock:
            jobs = [
                self._pool.submit(worker.run, share, worlds, poses, actions, outcome)
                for worker, share in zip(self._workers, shares, strict=True)
                if len(share)
            ]
            for job in jobs:
                job.result()
        return outcome

    def control_step(self, worlds: StepInput, poses: jax.Array, action: jax.Array) -> StepOutcome:
        """The same in jitted functions, for one world; under vmap all go to the host at once."""
        struct = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), self.outcome_struct(1)
        )
        return jax.pure_callback(
            self._call_host, struct, worlds, poses, action, vmap_method="broadcast_all"
        )

    def _call_host(self, worlds: StepInput, poses: AnyArray, actions: AnyArray) -> StepOutcome:
        """Any leading axes."""
        leading = actions.shape[:-1]
        count = math.prod(leading)

        def flat(x: AnyArray) -> np.ndarray:  # -1 would not do: scenes may have no fixtures
            return np.asarray(x).reshape(count, *x.shape[len(leading) :])

        outcome = self.control_steps(jax.tree.map(flat, worlds), flat(poses), flat(actions))
        return jax.tree.map(lambda x: x.reshape((*leading, *x.shape[1:])), outcome)

    def outcome_struct(self, num_worlds: int) -> StepOutcome:
        """An outcome with its arrays not filled in."""
        model = self._workers[0].model
        sizes = {
            "qpos": (model.nq,),
            "qvel": (model.nv,),
            "qacc_warmstart": (model.nv,),
            "goal_position": (3,),
            "goal_rotation": (3, 3),
            "gripper": (2,),
            "xpos": (model.nbody, 3),
            "xmat": (model.nbody, 9),
            "geom_xpos": (model.ngeom, 3),
            "geom_xmat": (model.ngeom, 9),
        }
        arrays = {name: np.empty((num_worlds, *x), np.float32) for name, x in sizes.items()}
        return StepOutcome(contact_overflow=np.zeros(num_worlds, np.int32), **arrays)


class _Slot:
    """Model and data of one world; fixtures stand elsewhere in every world."""

    def __init__(self, model: mujoco.MjModel, arm: Arm):
        self.model = copy.copy(model)
        self.data = mujoco.MjData(self.model)
        self.jacobian = np.empty((6, model.nv))
        self.inertia = np.empty((model.nv, model.nv))
        self.has_diverged = False
        self._home = model.qpos0.copy()
        self._home[arm.qpos] = arm.rest

    def load(
        self,
        qpos: AnyArray,
        qvel: AnyArray,
        qacc_warmstart: AnyArray,
        placed: np.ndarray,
        poses: np.ndarray,
    ) -> None:
        """Begins a control step. A state that is not finite stands for a diverged world."""
        parts = (qpos, qvel, qacc_warmstart, poses)
        self.has_diverged = not all(np.isfinite(part).all() for part in parts)
        if self.has_diverged:
            self._restart()
            return
        self.model.body_pos[placed], self.model.body_quat[placed] = poses[:, :3], poses[:, 3:]
        self._home[:] = self.data.qpos[:] = qpos
        self.data.qvel[:], self.data.qacc_warmstart[:] = qvel, qacc_warmstart

    def step1(self) -> None:
        """First half of a physics step: all that depends on the state alone."""
        mujoco.mj_step1(self.model, self.data)
        # MuJoCo puts a diverged world into a configuration in which the controller may fail.
        if any(self.data.warning[kind].number for kind in _DIVERGED):
            self.has_diverged = True
            self._restart()
            mujoco.mj_step1(self.model, self.data)

    def step2(self) -> None:
        """Second half; diverged worlds stay where they are."""
        if not self.has_diverged:
            mujoco.mj_step2(self.model, self.data)

    def _restart(self) -> None:
        """From the last sound state, at rest."""
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:] = self._home


class _Worker:
    """One thread's share of the worlds. Their torques are computed together."""

    def __init__(self, model: mujoco.MjModel, arm: Arm, placed: np.ndarray):
        self.model = model
        self._arm, self._placed = arm, placed
        self._slots: list[_Slot] = []
        self._low, self._high = arm.finger_range.T.astype(np.float64)

    def run(
        self,
        rows: np.ndarray,
        worlds: StepInput,
        poses: np.ndarray,
        actions: np.ndarray,
        outcome: StepOutcome,
    ) -> None:
        """Control steps of some rows, into `outcome`."""
        while len(self._slots) < len(rows):
            self._slots.append(_Slot(self.model, self._arm))
        slots = self._slots[: len(rows)]
        for slot, row in zip(slots, rows, strict=True):
            state = worlds.qpos[row], worlds.qvel[row], worlds.qacc_warmstart[row]
            slot.load(*state, self._placed, poses[row])
        outcome.goal_position[rows], outcome.goal_rotation[rows], outcome.gripper[rows] = (
            self._steps(slots, actions[rows], worlds.goal_rotation[rows], worlds.gripper[rows])
        )
        for slot, row in zip(slots, rows, strict=True):
            for name in _READ:
                getattr(outcome, name)[row] = getattr(slot.data, name)
            if slot.has_diverged:
                outcome.qpos[row] = np.nan

    def _steps(
        self,
        slots: list[_Slot],
        actions: np.ndarray,
        goal_rotation: AnyArray,
        gripper: AnyArray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A control step of R worlds; goal positions, goal rotations and gripper commands."""
        actions = np.clip(actions.astype(np.float64), -1.0, 1.0)
        opening = GRIPPER_SPEED * np.sign(actions[:, 6:]) * np.array([-1.0, 1.0])
        gripper, position = np.asarray(gripper, np.float64), np.empty((len(slots), 3))
        goal_rotation = np.asarray(goal_rotation)
        for substep in range(NUM_SUBSTEPS):
            for slot in slots:
                slot.step1()
            if substep == 0:
                site, present = self._hand(slots)
                position = site + actions[:, :3] * MAX_MOVE_M
                goal_rotation = _turned(actions[:, 3:6] * MAX_TURN_RAD, present, goal_rotation)
            gripper = np.clip(gripper + opening, -1.0, 1.0)
            fingers = 0.5 * (self._low + self._high) + 0.5 * (self._high - self._low) * gripper
            torques = self._torques(slots, position, goal_rotation)
            for row, slot in enumerate(slots):
                slot.data.ctrl[self._arm.motors] = torques[row]
                slot.data.ctrl[self._arm.fingers] = fingers[row]
                slot.step2()
        return position, goal_rotation, gripper

    def _hand(self, slots: list[_Slot]) -> tuple[np.ndarray, np.ndarray]:
        """Positions [R, 3] (m) and rotations [R, 3, 3] of the hands."""
        hand = self._arm.hand
        positions = np.stack([slot.data.site_xpos[hand] for slot in slots])
        return positions, np.stack([slot.data.site_xmat[hand] for slot in slots]).reshape(-1, 3, 3)

    def _torques(
        self, slots: list[_Slot], position: np.ndarray, rotation: np.ndarray
    ) -> np.ndarray:
        """Joint torques [R, J], N m; see `osc.torques`."""
        arm = self._arm
        for slot in slots:
            mujoco.mj_jacSite(slot.model, slot.data, slot.jacobian[:3], slot.jacobian[3:], arm.hand)
            mujoco.mj_fullM(slot.model, slot.data, slot.inertia)
        block = np.ix_(arm.dofs, arm.dofs)
        J = np.stack([slot.jacobian[:, arm.dofs] for slot in slots])
        M = np.stack([slot.inertia[block] for slot in slots])
        qpos = np.stack([slot.data.qpos[arm.qpos] for slot in slots])
        velocity = np.stack([slot.data.qvel[arm.dofs] for slot in slots])
        bias = np.stack([slot.data.qfrc_bias[arm.dofs] for slot in slots])
        site, present = self._hand(slots)
        error = np.concatenate([position - site, _rotation_error(rotation, present)], -1)
        pull = STIFFNESS * error - DAMPING * _times(J, velocity)
        J_transposed = np.swapaxes(J, 1, 2)
        mobility = J @ np.linalg.solve(M, J_transposed)
        wrench = np.concatenate(
            [_solve(mobility[:, :3, :3], pull[:, :3]), _solve(mobility[:, 3:, 3:], pull[:, 3:])],
            -1,
        )
        rest = REST_STIFFNESS * (arm.rest - qpos) - REST_DAMPING * velocity
        wrench -= _solve(mobility, _times(J, rest))
        torques = _times(J_transposed, wrench) + bias + _times(M, rest)
        return np.clip(torques, arm.torque_range[:, 0], arm.torque_range[:, 1])


_DIVERGED = tuple(
    int(kind)
    for kind in (
        mujoco.mjtWarning.mjWARN_BADQPOS,
        mujoco.mjtWarning.mjWARN_BADQVEL,
        mujoco.mjtWarning.mjWARN_BADQACC,
    )
)
_READ = ("qpos", "qvel", "qacc_warmstart", "xpos", "xmat", "geom_xpos", "geom_xmat")


def _times(matrices: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """[R, n, m] times [R, m]."""
    return (matrices @ vectors[..., None])[..., 0]


def _solve(matrices: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Solutions [R, n] for matrices [R, n, n]."""
    return np.linalg.solve(matrices, vectors[..., None])[..., 0]


def _rotation_error(goal: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Half the sum of the cross products of present and wanted axes, [R, 3].

    The sum over axes k of p_k x g_k is the skew part of G P^T.
    """
    skew = goal @ np.swapaxes(present, 1, 2)
    return 0.5 * np.stack(
        [
            skew[:, 2, 1] - skew[:, 1, 2],
            skew[:, 0, 2] - skew[:, 2, 0],
            skew[:, 1, 0] - skew[:, 0, 1],
        ],
        -1,
    )


def _turned(turns: np.ndarray, present: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Goal rotations [R, 3, 3] after turns (axis-angle [R, 3], rad); a turn of zero keeps it."""
    goals = before.astype(np.float64)
    quaternion, rotation = np.empty(4), np.empty(9)
    for row, turn in enumerate(turns):
        angle = float(np.linalg.norm(turn))
        if angle > 0.0:
            mujoco.mju_axisAngle2Quat(quaternion, turn / angle, angle)
            mujoco.mju_quat2Mat(rotation, quaternion)
            goals[row] = rotation.reshape(3, 3) @ present[row]
    return goals
