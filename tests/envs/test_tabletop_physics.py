"""One control step of the tabletop env against C MuJoCo on the same model.

C MuJoCo computes in float64, MJX in float32. What to expect (measured):

  free motion   3e-8 m after 100 control steps: the same physics. The blocks rest on the table,
                twelve contacts, all the while.
  a grip        2e-5 m per control step, re-started from the same state: line contacts between
                capsules and boxes agree.
  pushing       3e-6 m per control step in the median while the fingers are less than 6 mm deep
                in a block, centimetres where they are deeper: there the two choose different
                faces to push the capsule out of. Landing blocks differ too, for MJX keeps only
                the contacts with the plane that lie within 1 mm of the deepest.
  stops         a joint stop acts or not by the sign of a distance of 1e-9 m: 3e-4 m.

Contacts make motion chaotic besides: whole episodes are compared by their outcome only.
"""

import jax
import mujoco
import numpy as np
from compiled_tabletop import NUM_WORLDS, CompiledTabletop

from jaxvla.envs import tabletop_scene as scene
from jaxvla.envs.tabletop import LIFT_HEIGHT_M, TabletopState

TIP_AT_ZERO_M = 0.2 - scene.TIP_BELOW_HAND_M


class CSimulation:
    """The env's physics in C MuJoCo, one world at a time."""

    def __init__(self, model: mujoco.MjModel):
        self.model, self.data = model, mujoco.MjData(model)
        self._blocks = {model.geom(f"block_{i}").id for i in range(scene.NUM_BLOCKS)}
        self._fingers = {model.geom(f"finger_{side}").id for side in ("left", "right")}

    def load(self, states: TabletopState, row: int) -> None:
        """Starts from world `row` of `states`."""
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:] = states.qpos[row]
        # The stop at 0.035 m is no float32: rounding up would put the finger beyond it.
        self.data.qpos[3:5] = np.clip(self.data.qpos[3:5], 0.0, scene.FINGER_OPEN_M)
        self.data.qvel[:] = states.qvel[row]
        self.data.qacc_warmstart[:] = states.qacc_warmstart[row]

    def step(self, set_point: np.ndarray, grip: float) -> tuple[int, float]:
        """One control step.

        Returns:
          In how many of its physics steps a finger touched a block, and how deep (m).
        """
        opening = 0.5 * (1.0 - np.clip(grip, -1.0, 1.0)) * scene.FINGER_OPEN_M
        hand = np.asarray(set_point, np.float64) - [0.0, 0.0, TIP_AT_ZERO_M]
        self.data.ctrl[:] = [*hand, opening, opening]
        num_touches, deepest = 0, 0.0
        for _ in range(scene.SUBSTEPS):
            mujoco.mj_step(self.model, self.data)
            depths = [-c.dist for c in self.data.contact if self._is_touch(c)]
            num_touches += bool(depths)
            deepest = max([deepest, *depths])
        return num_touches, deepest

    def _is_touch(self, contact: mujoco.MjContact) -> bool:
        geoms = {int(contact.geom1), int(contact.geom2)}
        return bool(geoms & self._blocks) and bool(geoms & self._fingers)


def test_free_motion_is_the_same_physics(tabletop: CompiledTabletop) -> None:
    states = tabletop.reset(0, 0)
    states = states.replace(qpos=states.qpos.at[:, 3:5].set(0.02))  # off the fingers' stops
    worlds = [CSimulation(tabletop.env.model) for _ in range(NUM_WORLDS)]
    for row, world in enumerate(worlds):
        world.load(states, row)
    rng = np.random.default_rng(0)
    for _ in range(20):
        action = rng.uniform(-1.0, 1.0, (NUM_WORLDS, 4)).astype(np.float32)
        action *= np.float32([1.0, 1.0, 1.0, 0.5])
        action[:, 2] = np.abs(action[:, 2])  # away from the blocks
        for _ in range(5):
            states = tabletop.step(states, action)
            set_points = np.asarray(states.set_point)
            for row, world in enumerate(worlds):
                num_touches, _ = world.step(set_points[row], action[row, 3])
                assert num_touches == 0
    assert np.ptp(states.qpos[:, :2], axis=0).min() > 0.1  # the hands went places
    expected = np.stack([world.data.qpos for world in worlds])
    np.testing.assert_allclose(states.qpos, expected, atol=1e-6, rtol=0)
    expected = np.stack([world.data.qvel for world in worlds])
    np.testing.assert_allclose(states.qvel, expected, atol=1e-5, rtol=0)


def step_errors(tabletop: CompiledTabletop, task: str, seed: int) -> dict[str, np.ndarray]:
    """The expert's episodes, every control step repeated in C from the state before it.

    Returns:
      Per control step and world [T * E]: touches and depth (see CSimulation.step), and the
      largest errors of hand, fingers and blocks (m, or parts of a unit quaternion).
    """
    run = tabletop.run_expert(task, seed)
    world = CSimulation(tabletop.env.model)
    samples = []
    for t in range(len(run.actions)):
        before = jax.tree.map(lambda x, t=t: x[t], run.path)
        for row in range(NUM_WORLDS):
            world.load(before, row)
            contact = world.step(run.path.set_point[t + 1, row], run.actions[t, row, 3])
            error = np.abs(world.data.qpos - run.path.qpos[t + 1, row])
            samples.append((*contact, error[:3].max(), error[3:5].max(), error[5:].max()))
    names = ("num_touches", "depth_m", "hand", "fingers", "blocks")
    return dict(zip(names, np.array(samples).T, strict=True))


def test_a_grip_is_the_same_physics(tabletop: CompiledTabletop) -> None:
    errors = step_errors(tabletop, "lift", seed=0)
    held = errors["num_touches"] == scene.SUBSTEPS
    assert held.sum() > 100
    assert errors["depth_m"][held].max() < 6e-3
    for name, atol in (("hand", 1e-5), ("fingers", 1e-5), ("blocks", 5e-5)):
        assert errors[name][held].max() < atol, name
    # Before the grip: the blocks rest, the fingers meet their stops.
    free = errors["num_touches"] == 0
    assert errors["blocks"][free].max() < 1e-6
    assert errors["fingers"][free].max() < 5e-4


def test_a_typical_push_is_the_same_physics(tabletop: CompiledTabletop) -> None:
    errors = step_errors(tabletop, "push", seed=0)
    touched = errors["num_touches"] == scene.SUBSTEPS
    shallow = touched & (errors["depth_m"] < 6e-3)
    assert shallow.sum() > 30
    assert np.median(errors["blocks"][shallow]) < 2e-5
    assert np.median(errors["blocks"][errors["num_touches"] == 0]) < 1e-6
    # The hand is driven, not pushed about, whatever the blocks do.
    assert errors["hand"].max() < 0.01


def test_c_mujoco_lifts_with_the_same_commands(tabletop: CompiledTabletop) -> None:
    run = tabletop.run_expert("lift", seed=0)
    world = CSimulation(tabletop.env.model)
    start = jax.tree.map(lambda x: x[0], run.path)
    highest_m = np.zeros(NUM_WORLDS)
    for row in range(NUM_WORLDS):
        world.load(start, row)
        block = world.data.body(f"block_{start.target[row]}")
        for t in range(len(run.actions)):
            world.step(run.path.set_point[t + 1, row], run.actions[t, row, 3])
            highest_m[row] = max(highest_m[row], block.xpos[2])
    lifted = highest_m > scene.BLOCK_HALF_M + LIFT_HEIGHT_M
    np.testing.assert_array_equal(lifted, run.solved)
    assert lifted.any()
