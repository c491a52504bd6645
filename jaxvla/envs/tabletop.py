"""Tabletop manipulation in MJX: reach, push and lift one of several coloured blocks.

The instruction names a colour; colours and positions are drawn anew every episode, so a
policy needs both the images and the sentence. Reward is 1 at success, else 0.

  reach   touch the top of the named block with the finger tips
  push    move the named block into the white zone
  lift    raise the named block

Actions, float32 [4] in [-1, 1]: hand motion (x, y, z) as a fraction of MAX_MOVE_M per
control step, and grip (-1 opens, +1 closes).
"""

import dataclasses
import functools
from dataclasses import dataclass

import flax.struct
import jax
import jax.numpy as jnp
import mujoco
import numpy as np

from jaxvla.config import ConfigError, EnvConfig
from jaxvla.envs import tabletop_expert
from jaxvla.envs import tabletop_scene as scene
from jaxvla.envs.base import EnvState
from jaxvla.envs.quiet_mjx import mjx, own_device
from jaxvla.envs.rendering.ray_caster import RayCaster, ScenePoses
from jaxvla.types import EnvObservation, EnvSpec

TASKS = {
    "reach": ("reach the {} block", 32),
    "push": ("push the {} block to the white zone", 80),
    "lift": ("lift the {} block", 64),
}
"""Task -> (sentence, time limit in control steps)."""

COLORS = {
    "red": (0.95, 0.05, 0.05),
    "green": (0.05, 0.80, 0.05),
    "blue": (0.05, 0.05, 0.95),
}

CONTROL_HZ = 1.0 / (scene.PHYSICS_DT_S * scene.SUBSTEPS)
MAX_MOVE_M = 0.02
"""Longest motion of the hand's set point per control step and axis."""
REACH_TOLERANCE_M = 0.03
"""Greatest distance from the finger tips to the centre of the block's top that counts."""
LIFT_HEIGHT_M = 0.06
"""Height of the block's centre above its resting place that counts as lifted."""

_GRID = 3
"""Blocks and zone start in different cells of a _GRID x _GRID grid, so they never overlap."""
_CELL_M = 2 * scene.REACH_M / _GRID
_JITTER_M = 0.5 * _CELL_M - scene.BLOCK_HALF_M - 0.01


@dataclass(kw_only=True, slots=True)
class TabletopConfig(EnvConfig):
    """Tasks and images of the tabletop env."""

    name: str = "tabletop"
    tasks: tuple[str, ...] = ("reach", "push", "lift")
    """Which tasks episodes draw from, uniformly."""
    image_size: int = 64
    """Pixels per side of both cameras."""

    def validate(self) -> None:
        """Raises ConfigError on an unknown task or a bad image size."""
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown or not self.tasks:
            names = ", ".join(TASKS)
            raise ConfigError(
                "env.tasks", self.tasks, f"tasks are {names}", "--config.env.tasks=\"('reach',)\""
            )
        if not 16 <= self.image_size <= 512:
            raise ConfigError(
                "env.image_size", self.image_size, "16 to 512 px", "--config.env.image_size=64"
            )


@flax.struct.dataclass(kw_only=True)
class TabletopState(EnvState):
    """The physics state and the episode's draw. Everything else is recomputed."""

    qpos: jax.Array
    """float32 [nq]: hand x y z, fingers, then position and quaternion of each block."""
    qvel: jax.Array
    """float32 [nv]."""
    qacc_warmstart: jax.Array
    """float32 [nv], the solver's starting point; part of the state for exact resumes."""
    set_point: jax.Array
    """float32 [3], commanded position of the finger tips, metres."""
    zone: jax.Array
    """float32 [2], centre of the white zone, metres."""
    color: jax.Array
    """int32 [blocks], index into COLORS."""
    target: jax.Array
    """int32 [], the block that the instruction names."""


class Tabletop:
    """Implements GroundedEnv; see the module docstring.

    What is traced slowly is jitted by itself: every function that uses it shares the trace.
    """

    def __init__(self, config: TabletopConfig):
        self.config = config
        self.model = mujoco.MjModel.from_xml_string(scene.scene_xml())
        self._mjx_model = mjx.put_model(self.model, own_device(), impl="jax")
        self._data = mjx.make_data(self._mjx_model, own_device(), impl="jax")
        cameras = ("base", "wrist")
        self._renderer = RayCaster(self.model, cameras=cameras, size=config.image_size)
        self._block_qpos = np.asarray(
            [self.model.joint(f"block_{i}").qposadr[0] for i in range(scene.NUM_BLOCKS)]
        )
        self._block_geoms = np.asarray(
            [self.model.geom(f"block_{i}").id for i in range(scene.NUM_BLOCKS)]
        )
        self.task_ids = tuple(range(len(config.tasks)))
        self.spec = EnvSpec(
            cameras=cameras,
            image_size=config.image_size,
            state_dim=4,
            state_low=(-scene.REACH_M, -scene.REACH_M, 0.0, 0.0),
            state_high=(scene.REACH_M, scene.REACH_M, 0.25, scene.FINGER_OPEN_M),
            action_dim=4,
            action_names=("x", "y", "z", "grip"),
            tasks=config.tasks,
            instructions=tuple(
                TASKS[task][0].format(color) for task in config.tasks for color in COLORS
            ),
            max_episode_steps=tuple(TASKS[task][1] for task in config.tasks),
            control_hz=CONTROL_HZ,
        )

    def reset(self, key: jax.Array, task: jax.Array) -> TabletopState:
        """Draws positions, colours and the named block; the world starts at rest."""
        cells, jitter, colors, target, hand = jax.random.split(key, 5)
        cell = jax.random.permutation(cells, _GRID * _GRID)[: scene.NUM_BLOCKS + 1]
        corner = jnp.stack([cell // _GRID, cell % _GRID], -1).astype(jnp.float32)
        center = (corner + 0.5) * _CELL_M - scene.REACH_M
        place = center + jax.random.uniform(jitter, center.shape, minval=-1.0) * _JITTER_M
        tip = jax.random.uniform(
            hand,
            (3,),
            minval=jnp.asarray([-0.08, -0.08, 0.14]),
            maxval=jnp.asarray([0.08, 0.08, 0.2]),
        )
        return TabletopState(
            qpos=self._initial_qpos(tip, place[:-1]),
            qvel=jnp.zeros(self.model.nv),
            qacc_warmstart=jnp.zeros(self.model.nv),
            set_point=tip,
            zone=place[-1],
            color=jax.random.permutation(colors, len(COLORS))[: scene.NUM_BLOCKS],
            target=jax.random.randint(target, (), 0, scene.NUM_BLOCKS),
            task=jnp.asarray(task, jnp.int32),
            num_steps=jnp.zeros((), jnp.int32),
            reward=jnp.zeros(()),
            terminated=jnp.zeros((), bool),
            truncated=jnp.zeros((), bool),
            success=jnp.zeros((), bool),
            contact_overflow=jnp.zeros((), jnp.int32),  # not counted here
        )

    def scene(self, key: jax.Array, task: jax.Array) -> TabletopState:
        """Like `reset`, with the hand somewhere on its way to the named block."""
        reset_key, way_key = jax.random.split(key)
        state = self.reset(reset_key, task)
        top = self.block(state) + jnp.asarray([0.0, 0.0, scene.BLOCK_HALF_M])
        tip = state.set_point + jax.random.uniform(way_key) * (top - state.set_point)
        hand = tip - jnp.asarray([0.0, 0.0, _TIP_AT_ZERO_M])
        qpos = state.qpos.at[:3].set(hand)
        return dataclasses.replace(state, qpos=qpos, set_point=tip)

    def _initial_qpos(self, tip: jax.Array, places: jax.Array) -> jax.Array:
        hand = tip - jnp.asarray([0.0, 0.0, _TIP_AT_ZERO_M])
        fingers = jnp.full((2,), scene.FINGER_OPEN_M)
        height = jnp.full((scene.NUM_BLOCKS, 1), scene.BLOCK_HALF_M)
        upright = jnp.tile(jnp.asarray([1.0, 0.0, 0.0, 0.0]), (scene.NUM_BLOCKS, 1))
        blocks = jnp.concatenate([places, height, upright], -1).ravel()
        return jnp.concatenate([hand, fingers, blocks])

    @functools.partial(jax.jit, static_argnums=0)
    def step(self, state: TabletopState, action: jax.Array) -> TabletopState:
        """Moves the set point, runs the physics for one control step, checks success."""
        action = jnp.clip(action, -1.0, 1.0)
        low, high = jnp.asarray(self.spec.state_low[:3]), jnp.asarray(self.spec.state_high[:3])
        set_point = jnp.clip(state.set_point + action[:3] * MAX_MOVE_M, low, high)
        opening = 0.5 * (1.0 - action[3]) * scene.FINGER_OPEN_M
        hand = set_point - jnp.asarray([0.0, 0.0, _TIP_AT_ZERO_M])
        data = self._data.replace(
            qpos=state.qpos,
            qvel=state.qvel,
            qacc_warmstart=state.qacc_warmstart,
            ctrl=jnp.concatenate([hand, opening[None], opening[None]]),
        )
        data = jax.lax.fori_loop(0, scene.SUBSTEPS, lambda _, d: mjx.step(self._mjx_model, d), data)
        state = dataclasses.replace(
            state,
            qpos=data.qpos,
            qvel=data.qvel,
            qacc_warmstart=data.qacc_warmstart,
            set_point=set_point,
            num_steps=state.num_steps + 1,
        )
        success = self._success(state)
        limit = jnp.asarray(self.spec.max_episode_steps)[state.task]
        return dataclasses.replace(
            state,
            reward=success.astype(jnp.float32),
            terminated=success,
            truncated=~success & (state.num_steps >= limit),
            success=success,
        )

    def tip(self, state: TabletopState) -> jax.Array:
        """float32 [3], point between the finger tips, metres."""
        return state.qpos[:3] + jnp.asarray([0.0, 0.0, _TIP_AT_ZERO_M])

    def block(self, state: TabletopState) -> jax.Array:
        """float32 [3], centre of the block that the instruction names, metres."""
        first = jnp.asarray(self._block_qpos)[state.target]
        return jax.lax.dynamic_slice(state.qpos, (first,), (3,))

    def _success(self, state: TabletopState) -> jax.Array:
        tip, block = self.tip(state), self.block(state)
        top = block + jnp.asarray([0.0, 0.0, scene.BLOCK_HALF_M])
        checks = {
            "reach": jnp.linalg.norm(tip - top) < REACH_TOLERANCE_M,
            "push": jnp.max(jnp.abs(block[:2] - state.zone)) < _ZONE_HALF_M,
            "lift": block[2] - scene.BLOCK_HALF_M > LIFT_HEIGHT_M,
        }
        return jnp.stack([checks[task] for task in self.config.tasks])[state.task]

    def is_finite(self, state: TabletopState) -> jax.Array:
        """bool [], False when the physics of this world has blown up."""
        return jnp.isfinite(state.qpos).all() & jnp.isfinite(state.qvel).all()

    def observe(self, states: TabletopState) -> EnvObservation:
        """Renders both cameras of every world; leading axis [E]."""
        return self.observe_target(states)[0]

    @functools.partial(jax.jit, static_argnums=0)
    def observe_target(self, states: TabletopState) -> tuple[EnvObservation, jax.Array]:
        """Also the pixels of the named block, see GroundedEnv."""
        frames = self._renderer.render_batch(
            jax.vmap(self._poses)(states), jax.vmap(self._colors)(states)
        )
        opening = states.qpos[:, 3:5].mean(-1, keepdims=True)
        seen = EnvObservation(
            images=frames.rgb,
            state=jnp.concatenate([jax.vmap(self.tip)(states), opening], -1),
            instruction=self.instruction_ids(states),
        )
        target = jnp.asarray(self._block_geoms)[states.target]
        return seen, frames.segmentation == target[:, None, None, None]

    def _poses(self, state: TabletopState) -> ScenePoses:
        is_shown = jnp.asarray([task == "push" for task in self.config.tasks])[state.task]
        zone = jnp.append(state.zone, jnp.where(is_shown, 0.001, -1.0))[None]
        data = self._data.replace(qpos=state.qpos, mocap_pos=zone)
        data = mjx.camlight(self._mjx_model, mjx.kinematics(self._mjx_model, data))
        return ScenePoses(
            geom_xpos=data.geom_xpos,
            geom_xmat=data.geom_xmat,
            cam_xpos=data.cam_xpos,
            cam_xmat=data.cam_xmat,
        )

    def _colors(self, state: TabletopState) -> jax.Array:
        palette = jnp.asarray(list(COLORS.values()))
        own = jnp.asarray(self._renderer.geom_rgb)
        return own.at[self._block_geoms].set(palette[state.color])

    def instruction_ids(self, states: TabletopState) -> jax.Array:
        """int32 [E], index into `spec.instructions` of each running episode."""
        color = jnp.take_along_axis(states.color, states.target[:, None], -1)[:, 0]
        return states.task * len(COLORS) + color

    def expert_action(self, state: TabletopState) -> jax.Array:
        """float32 [4], scripted action for the running task; see tabletop_expert."""
        opening = state.qpos[3:5].mean()
        actions = []
        for task in self.config.tasks:
            goal, grip = tabletop_expert.goal(
                task, self.tip(state), state.set_point, self.block(state), state.zone, opening
            )
            move = jnp.clip((goal - state.set_point) / MAX_MOVE_M, -1.0, 1.0)
            actions.append(jnp.append(move, grip))
        return jnp.stack(actions)[state.task]


_TIP_AT_ZERO_M = 0.2 - scene.TIP_BELOW_HAND_M
"""Height of the finger tips when the hand's slide joints read 0."""
_ZONE_HALF_M = 0.045
