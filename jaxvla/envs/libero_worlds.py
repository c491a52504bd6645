"""One LIBERO scene in MJX, with all the tasks that are played in it."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import flax.struct
import jax
import jax.numpy as jnp
import mujoco
import numpy as np

from jaxvla.config import EnvConfig
from jaxvla.envs import osc, predicates
from jaxvla.envs.base import EnvState
from jaxvla.envs.broad_phase import BUDGET_NUMERICS, contact_overflow
from jaxvla.envs.libero_expert import Expert, make_expert
from jaxvla.envs.libero_scene import with_original_friction
from jaxvla.envs.libero_task import LiberoTask
from jaxvla.envs.osc_host import HostPhysics, StepInput, StepOutcome
from jaxvla.envs.quiet_mjx import mjx, own_device
from jaxvla.envs.rendering.rasterizer import BodyPoses, Camera, Rasterizer
from jaxvla.envs.rendering.surfaces import Surfaces
from jaxvla.types import AnyArray, EnvObservation, EnvSpec

if TYPE_CHECKING:
    from jaxvla.envs.osc_warp import WarpPhysics
    from jaxvla.envs.rendering.warp_renderer import WarpRenderer

HAND_BODY = "robot0_right_hand"
"""Body whose orientation is part of the policy's state."""
FINGER_JOINTS = ("gripper0_finger_joint1", "gripper0_finger_joint2")
_OPEN = (1.0, -1.0)
"""The gripper's command after control steps at rest."""
_LOOK_NOISE_RAD = 0.25
"""Greatest turn of each joint of the arm in scenes that are only looked at."""


@flax.struct.dataclass(kw_only=True)
class LiberoState(EnvState):
    """The physics state and the episode's draw. Everything else is recomputed."""

    qpos: jax.Array
    """float32 [nq]."""
    qvel: jax.Array
    """float32 [nv]."""
    qacc_warmstart: jax.Array
    """float32 [nv], the solver's starting point; part of the state for exact resumes."""
    controller: osc.OscState
    fixtures: jax.Array
    """float32 [F, 7], poses of the fixtures in this episode (m; w, x, y, z)."""


class LiberoScene:
    """Implements GroundedEnv and FixedStartsEnv for tasks whose models differ only in where the
    fixtures stand.

    What is traced slowly is jitted by itself: every function that uses it shares the trace.
    """

    def __init__(
        self,
        tasks: Sequence[LiberoTask],
        task_ids: Sequence[int],
        *,
        model: mujoco.MjModel,
        spec: EnvSpec,
        config: EnvConfig,
        max_shift_m: float,
        physics: str,
        renderer: str,
    ):
        """Args:
        tasks: of this scene.
        task_ids: their ids in the spec.
        model: the physics model.
        spec: of the whole env.
        config: of the whole env.
        max_shift_m: see `LiberoMjxConfig`.
        physics: see `LiberoMjxConfig`.
        renderer: see `LiberoMjxConfig`.

        Raises:
          ValueError: warp is asked for and not installed.
        """
        self.spec, self.config, self.model = spec, config, model
        self.task_ids = tuple(task_ids)
        self._max_shift_m = max_shift_m
        self._place_of = np.zeros(len(spec.tasks), np.int32)
        self._place_of[list(task_ids)] = np.arange(len(tasks))
        self._mjx_model = mjx.put_model(model, own_device(), impl="jax")
        self._data = mjx.make_data(self._mjx_model, own_device(), impl="jax")
        self._arm = osc.find_arm(model)
        self._hand = model.body(HAND_BODY).id
        self._fingers = np.asarray([model.joint(name).qposadr[0] for name in FINGER_JOINTS])
        self._fixtures = np.asarray([model.body(name).id for name in tasks[0].fixtures], int)
        self._physics = self._make_physics(physics)
        self._starts = np.stack([task.start_states for task in tasks]).astype(np.float32)
        self._rotations = np.stack([task.goal_rotations for task in tasks]).astype(np.float32)
        self._poses = np.stack([task.fixture_poses for task in tasks]).astype(np.float32)
        self._bind_goals(tasks)
        self._bind_cameras(tasks[0], renderer)

    def _make_physics(self, physics: str) -> "HostPhysics | WarpPhysics | None":
        """What runs control steps; None: `osc.control_step`."""
        if physics == "mjx":
            return None
        if physics == "mujoco":
            return HostPhysics(with_original_friction(self.model), self._arm, self._fixtures)
        # Imported by nobody who does not ask for it.
        from jaxvla.envs.osc_warp import WarpPhysics

        pairs, contacts = (int(self.model.numeric(x).data[0]) for x in BUDGET_NUMERICS)
        return WarpPhysics(
            self.model,
            self._arm,
            self._fixtures,
            pairs_per_world=pairs,
            contacts_per_world=contacts,
        )

    def _bind_goals(self, tasks: Sequence[LiberoTask]) -> None:
        """Goals, experts and visible targets; tasks of a scene often share them."""
        distinct: list[tuple[predicates.GoalTerm, ...]] = []
        goal_of = []
        for task in tasks:
            terms = tuple(predicates.term_from_dict(term) for term in task.goal)
            if terms not in distinct:
                distinct.append(terms)
            goal_of.append(distinct.index(terms))
        self._goal_of = np.asarray(goal_of)
        self._goals = [predicates.bind(terms, self.model) for terms in distinct]
        self._exemplars = [tasks[goal_of.index(goal)] for goal in range(len(distinct))]
        self._targets = [_target_bodies(terms, self.model) for terms in distinct]

    def _bind_cameras(self, task: LiberoTask, renderer: str) -> None:
        surfaces = Surfaces.from_arrays(task.surfaces)
        bodies = surfaces.body_ids(self.model)
        self._renderer = self._make_renderer(renderer, surfaces, bodies)
        self._cameras = task.cameras
        self._camera_bodies = [self.model.body(camera.body).id for camera in task.cameras]
        body_of_geom = np.asarray(bodies)[surfaces.geom_body]
        # One row per goal, bool [goals, G].
        self._is_target = np.stack([np.isin(body_of_geom, target) for target in self._targets])

    def _make_renderer(
        self, renderer: str, surfaces: Surfaces, bodies: list[int]
    ) -> "Rasterizer | WarpRenderer":
        size = self.spec.image_size
        if renderer == "jax":
            return Rasterizer(surfaces, body_ids=bodies, size=size)
        # Imported by nobody who does not ask for it.
        from jaxvla.envs.rendering.warp_renderer import WarpRenderer

        return WarpRenderer(surfaces, body_ids=bodies, size=size)

    # -------------------------------------------------------------------------- episodes

    def reset(self, key: jax.Array, task: jax.Array) -> LiberoState:
        """Starts from one of the task's init states, drawn at random."""
        draw, shift = jax.random.split(key)
        return self._start(jax.random.randint(draw, (), 0, self._starts.shape[1]), task, shift)

    def reset_to(self, key: jax.Array, task: jax.Array, seed: jax.Array) -> LiberoState:
        """Starts from init state `seed % K`, as `libero_host` does."""
        return self._start(seed % self._starts.shape[1], task, key)

    def _start(self, index: jax.Array, task: jax.Array, key: jax.Array) -> LiberoState:
        place = jnp.asarray(self._place_of)[task]
        qpos, qvel = jnp.split(jnp.asarray(self._starts)[place, index], [self.model.nq])
        fixtures = jnp.asarray(self._poses)[place, index]
        if self._max_shift_m:
            shift = jax.random.uniform(key, (2,), minval=-1.0) * self._max_shift_m
            is_free = self.model.jnt_type == mujoco.mjtJoint.mjJNT_FREE
            places = self.model.jnt_qposadr[is_free]
            qpos = qpos.at[places].add(shift[0]).at[places + 1].add(shift[1])
            fixtures = fixtures.at[:, :2].add(shift)
        return LiberoState(
            qpos=qpos,
            qvel=qvel,
            qacc_warmstart=jnp.zeros(self.model.nv),
            controller=osc.OscState(
                goal_position=jnp.zeros(3),  # set by the first action
                goal_rotation=jnp.asarray(self._rotations)[place, index],
                gripper=jnp.asarray(_OPEN),
            ),
            fixtures=fixtures,
            task=jnp.asarray(task, jnp.int32),
            num_steps=jnp.zeros((), jnp.int32),
            reward=jnp.zeros(()),
            terminated=jnp.zeros((), bool),
            truncated=jnp.zeros((), bool),
            success=jnp.zeros((), bool),
            contact_overflow=jnp.zeros((), jnp.int32),
        )

    @functools.partial(jax.jit, static_argnums=0)
    def step(self, state: LiberoState, action: jax.Array) -> LiberoState:
        """Runs the controller and the physics for one control step, checks success."""
        data, controller, overflow = self._control_step(state, action)
        num_steps = state.num_steps + 1
        reached = jnp.stack([goal.is_reached(data) for goal in self._goals])
        success = reached[self._goal_index(state)]
        limit = jnp.asarray(self.spec.max_episode_steps)[state.task]
        return dataclasses.replace(
            state,
            qpos=data.qpos,
            qvel=data.qvel,
            qacc_warmstart=data.qacc_warmstart,
            controller=controller,
            contact_overflow=state.contact_overflow + overflow,
            num_steps=num_steps,
            reward=success.astype(jnp.float32),
            terminated=success,
            truncated=~success & (num_steps >= limit),
            success=success,
        )

    def _control_step(
        self, state: LiberoState, action: jax.Array
    ) -> tuple[mjx.Data | StepOutcome, osc.OscState, AnyArray]:
        """Physics and controller after a control step, by the configured physics, and the number
        of contacts that did not fit then."""
        if self._physics is None:
            data = self._data.replace(
                qpos=state.qpos, qvel=state.qvel, qacc_warmstart=state.qacc_warmstart
            )
            model = self._placed(state.fixtures)
            data, controller = osc.control_step(
                model, data, arm=self._arm, state=state.controller, action=action
            )
            return data, controller, contact_overflow(model, data)
        worlds = StepInput(
            qpos=state.qpos,
            qvel=state.qvel,
            qacc_warmstart=state.qacc_warmstart,
            goal_rotation=state.controller.goal_rotation,
            gripper=state.controller.gripper,
        )
        outcome = self._physics.control_step(worlds, state.fixtures, action)
        controller = osc.OscState(
            goal_position=outcome.goal_position,
            goal_rotation=outcome.goal_rotation,
            gripper=outcome.gripper,
        )
        return outcome, controller, outcome.contact_overflow

    def _placed(self, fixtures: jax.Array) -> mjx.Model:
        """The model with the fixtures where an episode has them."""
        return osc.place_bodies(self._mjx_model, self._fixtures, fixtures)

    def is_finite(self, state: LiberoState) -> jax.Array:
        """bool [], False when the physics of this world has blown up."""
        return jnp.isfinite(state.qpos).all() & jnp.isfinite(state.qvel).all()

    # ---------------------------------------------------------------------- observations

    def observe(self, states: LiberoState) -> EnvObservation:
        """Renders both cameras of every world; leading axis [E]."""
        return self._observe(states)[0]

    @functools.partial(jax.jit, static_argnums=0)
    def _observe(self, states: LiberoState) -> tuple[EnvObservation, jax.Array]:
        """Also the geoms that pixels show, int32 [E, C, h, w]."""
        data = jax.vmap(self._kinematics)(states)
        frames = [
            self._renderer.render_batch(
                BodyPoses(xpos=data.xpos, xmat=data.xmat), self._camera(index, data)
            )
            for index in range(len(self.spec.cameras))
        ]
        seen = EnvObservation(
            images=jnp.stack([_as_policies_see(frame.rgb) for frame in frames], 1),
            state=jax.vmap(self._proprioception)(data),
            instruction=self.instruction_ids(states),
        )
        return seen, jnp.stack([_as_policies_see(frame.geom) for frame in frames], 1)

    def _kinematics(self, state: LiberoState) -> mjx.Data:
        with jax.default_matmul_precision("highest"):
            data = self._data.replace(qpos=state.qpos)
            return mjx.kinematics(self._placed(state.fixtures), data)

    def _camera(self, index: int, data: mjx.Data) -> Camera:
        """The camera in each world, leading axis [E]."""
        camera, body = self._cameras[index], self._camera_bodies[index]
        local = np.empty(9)
        mujoco.mju_quat2Mat(local, np.asarray(camera.quat))
        xpos, xmat = data.xpos[:, body], data.xmat[:, body]
        with jax.default_matmul_precision("highest"):
            return Camera(
                xpos=xpos + xmat @ jnp.asarray(camera.pos),
                xmat=xmat @ jnp.asarray(local.reshape(3, 3), jnp.float32),
                fovy_rad=jnp.full(len(xpos), np.deg2rad(camera.fovy_deg), jnp.float32),
            )

    def _proprioception(self, data: mjx.Data) -> jax.Array:
        """float32 [8]: place and axis-angle of the hand, positions of the fingers."""
        w, vector = data.xquat[self._hand, 0], data.xquat[self._hand, 1:]
        sine = jnp.linalg.norm(vector)
        # The angle may exceed pi, as in libero_host.axis_angle.
        turn = vector * (2.0 * jnp.arctan2(sine, w) / jnp.maximum(sine, 1e-12))
        return jnp.concatenate([data.site_xpos[self._arm.hand], turn, data.qpos[self._fingers]])

    def instruction_ids(self, states: LiberoState) -> jax.Array:
        """int32 [E], index into `spec.instructions`: the task."""
        return states.task

    def scene(self, key: jax.Array, task: jax.Array) -> LiberoState:
        """Like `reset`, with the arm's joints turned at random."""
        start, turn = jax.random.split(key)
        state = self.reset(start, task)
        joints = self._arm.qpos
        noise = jax.random.uniform(turn, (len(joints),), minval=-1.0) * _LOOK_NOISE_RAD
        return dataclasses.replace(state, qpos=state.qpos.at[joints].add(noise))

    def observe_target(self, states: LiberoState) -> tuple[EnvObservation, jax.Array]:
        """`observe`, and the pixels of the objects that the task moves, bool [E, C, h, w]."""
        seen, geom = self._observe(states)
        is_target = jnp.asarray(self._is_target)[self._goal_index(states)]
        hit = jax.vmap(lambda row, ids: row[jnp.maximum(ids, 0)])(is_target, geom)
        return seen, hit & (geom >= 0)

    @functools.cached_property
    def _experts(self) -> list[Expert]:
        """One per goal. Planning takes seconds, and only demonstrations need it."""
        return [make_expert(task, self.model) for task in self._exemplars]

    def expert_action(self, state: LiberoState) -> jax.Array:
        """float32 [7], see libero_expert.

        Raises:
          ValueError: there is no plan for one of the goals.
        """
        data = self._kinematics(state)
        actions = jnp.stack([expert.action(data) for expert in self._experts])
        return actions[self._goal_index(state)]

    def _goal_index(self, state: LiberoState) -> jax.Array:
        return jnp.asarray(self._goal_of)[jnp.asarray(self._place_of)[state.task]]


def _target_bodies(terms: Sequence[predicates.GoalTerm], model: mujoco.MjModel) -> np.ndarray:
    """Bodies of the objects that a goal speaks of, and what hangs on them, int [n]."""
    names: list[str] = []
    for term in terms:
        if isinstance(term, predicates.JointsAt):
            names += [model.body(model.joint(name).bodyid[0]).name for name in term.joints]
        else:
            names.append(term.object)
    found = {model.body(name).id for name in names}
    for body in range(1, model.nbody):  # parents come before children
        if model.body_parentid[body] in found:
            found.add(body)
    return np.asarray(sorted(found))


def _as_policies_see(image: jax.Array) -> jax.Array:
    """Mirrors images [E, h, w, ...] left to right, as `libero_host` shows them."""
    return image[:, :, ::-1]
