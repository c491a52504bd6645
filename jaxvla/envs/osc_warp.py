"""The control step of `osc` in MuJoCo Warp (MJX's impl "warp"), for NVIDIA GPUs.

Needs the `warp` extra, and is imported by nothing that does not ask for it. The same law as in
`osc`; what differs is how a physics step is cut. Warp has no functions for the parts of a step,
so torques are computed from a `forward` of the model without contacts, which gives the same
kinematics, inertia and bias, and `step` then does the whole physics step.

Warp keeps the contacts of all worlds in one buffer, whose size must be known when the data are
made: `jax.custom_batching` tells the number of worlds.
"""

import copy
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import mujoco
import numpy as np

from jaxvla.envs import osc
from jaxvla.envs.osc_host import StepInput, StepOutcome
from jaxvla.envs.quiet_mjx import mjx

_ROWS_PER_CONTACT = 4
"""Of the pyramidal friction cone of a contact of dimension 3."""


class WarpPhysics:
    """Runs control steps of one scene."""

    def __init__(
        self,
        model: mujoco.MjModel,
        arm: osc.Arm,
        placed: np.ndarray,
        *,
        pairs_per_world: int,
        contacts_per_world: int,
    ):
        """Args:
        model: the scene.
        arm: from `osc.find_arm`.
        placed: int [F], bodies whose pose differs between worlds.
        pairs_per_world: pairs of geoms that are near each other, on average over worlds.
        contacts_per_world: greatest number of contacts of a world.

        Raises:
          ValueError: warp is not installed.
        """
        self._arm, self._placed, self._host_model = arm, placed, model
        try:
            self._model = mjx.put_model(model, impl="warp")
        except (RuntimeError, ImportError) as error:
            raise ValueError(f"warp: {error}. Fix: pip install 'jaxvla[warp]'") from error
        touchless = copy.copy(model)
        touchless.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_CONTACT
        self._touchless = mjx.put_model(touchless, impl="warp")
        self._buffer_per_world = pairs_per_world + contacts_per_world
        num_rows = int((model.dof_frictionloss > 0).sum()) + 2 * int(model.jnt_limited.sum())
        self._rows_per_world = _ROWS_PER_CONTACT * contacts_per_world + num_rows
        self._step = jax.custom_batching.custom_vmap(self._step_one)
        self._step.def_vmap(self._step_batch)

    def control_step(self, worlds: StepInput, poses: jax.Array, action: jax.Array) -> StepOutcome:
        """One control step of one world, in jitted functions; under vmap of all at once.

        Args:
          worlds: float32, without the leading axis.
          poses: float32 [F, 7], of the placed bodies (m; w, x, y, z).
          action: float32 [7], see `osc`.
        """
        return self._step(worlds, poses, action)

    def _step_one(self, worlds: StepInput, poses: jax.Array, action: jax.Array) -> StepOutcome:
        batch = jax.tree.map(lambda x: jnp.asarray(x)[None], (worlds, poses, action))
        return jax.tree.map(lambda x: x[0], self._run(1, *batch))

    def _step_batch(self, num_worlds: int, is_batched: Any, *arguments: Any) -> Any:
        def fill(x: jax.Array, has_axis: bool) -> jax.Array:
            return x if has_axis else jnp.broadcast_to(x, (num_worlds, *jnp.shape(x)))

        outcome = self._run(num_worlds, *jax.tree.map(fill, arguments, tuple(is_batched)))
        return outcome, jax.tree.map(lambda _: True, outcome)

    def _run(
        self, num_worlds: int, worlds: StepInput, poses: jax.Array, actions: jax.Array
    ) -> StepOutcome:
        """Leading axis [E] everywhere."""
        buffer_size = num_worlds * self._buffer_per_world
        data = mjx.make_data(
            self._host_model, impl="warp", naconmax=buffer_size, njmax=self._rows_per_world
        )

        def advance(world: StepInput, poses: jax.Array, action: jax.Array) -> StepOutcome:
            start = data.replace(
                qpos=world.qpos, qvel=world.qvel, qacc_warmstart=world.qacc_warmstart
            )
            goal = osc.OscState(
                goal_position=jnp.zeros(3),  # set by the action
                goal_rotation=world.goal_rotation,
                gripper=world.gripper,
            )
            return self._advance(start, goal, poses, action)

        outcome = jax.vmap(advance)(worlds, poses, actions)
        # One buffer serves all worlds; the first one reports what it could not hold.
        excess = jnp.maximum(outcome.contact_overflow - buffer_size, 0)
        return dataclasses.replace(outcome, contact_overflow=excess.at[1:].set(0))

    def _advance(
        self, data: mjx.Data, state: osc.OscState, poses: jax.Array, action: jax.Array
    ) -> StepOutcome:
        """Physics steps of one world; `contact_overflow` holds the contacts of all worlds."""
        model = osc.place_bodies(self._model, self._placed, poses)
        touchless = osc.place_bodies(self._touchless, self._placed, poses)

        def substep(carry: tuple[mjx.Data, osc.OscState], index: jax.Array):
            data, state = carry
            seen = mjx.forward(touchless, data)
            ctrl, state = osc.controls(
                seen, self._inertia(seen), index, arm=self._arm, state=state, action=action
            )
            return (mjx.step(model, data.replace(ctrl=ctrl)), state), None

        with jax.default_matmul_precision("highest"):
            steps = jnp.arange(osc.NUM_SUBSTEPS)
            (data, state), _ = jax.lax.scan(substep, (data, state), steps)
        impl: Any = data._impl
        return StepOutcome(
            qpos=data.qpos,
            qvel=data.qvel,
            qacc_warmstart=data.qacc_warmstart,
            goal_position=state.goal_position,
            goal_rotation=state.goal_rotation,
            gripper=state.gripper,
            xpos=data.xpos,
            xmat=data.xmat.reshape(-1, 9),
            geom_xpos=data.geom_xpos,
            geom_xmat=data.geom_xmat.reshape(-1, 9),
            contact_overflow=impl.nacon[0],
        )

    def _inertia(self, data: mjx.Data) -> jax.Array:
        """float32 [nv, nv], from the lower triangle that Warp stores row by row."""
        model = self._host_model
        impl: Any = data._impl
        rows = np.repeat(np.arange(model.nv), model.M_rownnz)
        lower = jnp.zeros((model.nv, model.nv)).at[rows, model.M_colind].set(impl.M)
        return lower + jnp.tril(lower, -1).T
