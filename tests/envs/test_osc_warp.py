"""Control steps in MuJoCo Warp against C MuJoCo. Warp runs on CPUs too, slowly."""

import importlib.util

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from small_arm import REST, arm_xml, start_worlds

from jaxvla.envs import osc
from jaxvla.envs.osc_host import HostPhysics
from jaxvla.envs.osc_warp import WarpPhysics

HAS_WARP = importlib.util.find_spec("warp") is not None
E = 3


def load(xml: str) -> tuple[mujoco.MjModel, osc.Arm, np.ndarray]:
    model = mujoco.MjModel.from_xml_string(xml)
    return model, osc.find_arm(model, rest_rad=tuple(REST)), np.array([model.body("link1").id])


def with_floor(xml: str) -> str:
    """The ball falls on a floor that is near."""
    floor = '<geom type="plane" size="1 1 .1" pos="0 0 0.96" contype="1" conaffinity="1"/>'
    ball = '<geom size="0.05" mass="0.3" contype="1" conaffinity="1" condim="3"/>'
    return xml.replace("<worldbody>", f"<worldbody>{floor}").replace(
        '<geom size="0.05" mass="0.3"/>', ball
    )


@pytest.mark.skipif(HAS_WARP, reason="warp is installed")
def test_without_warp_the_error_names_the_extra() -> None:
    model, arm, link = load(arm_xml())
    with pytest.raises(ValueError, match=r"jaxvla\[warp\]"):
        WarpPhysics(model, arm, link, pairs_per_world=4, contacts_per_world=4)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not HAS_WARP, reason="warp is not installed (pip install 'jaxvla[warp]')")
def test_batches_follow_mujoco_contacts_and_fixtures_included() -> None:
    model, arm, link = load(with_floor(arm_xml()))
    random = np.random.default_rng(0)
    worlds, actions = start_worlds(model, E, random), random.uniform(-1.2, 1.2, (E, 7))
    poses = np.tile(np.concatenate([model.body_pos[link], model.body_quat[link]], -1), (E, 1, 1))
    poses[:, 0, 2] += np.linspace(0.0, 0.4, E)
    expected = HostPhysics(model, arm, link).control_steps(worlds, poses, actions)
    physics = WarpPhysics(model, arm, link, pairs_per_world=4, contacts_per_world=4)
    arguments = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (worlds, poses, actions))
    actual = jax.jit(jax.vmap(physics.control_step))(*arguments)
    ball = model.joint("ball").qposadr[0] + 2
    assert (expected.qpos[:, ball] < 1.0099).all()  # on the floor, else 12 mm lower
    assert (expected.qpos[:, ball] > 1.005).all()
    for name in ("qpos", "goal_position", "goal_rotation", "gripper", "xpos", "geom_xmat"):
        np.testing.assert_allclose(
            getattr(actual, name), getattr(expected, name), atol=2e-5, err_msg=name
        )
    np.testing.assert_allclose(actual.qvel, expected.qvel, atol=1e-3)
    np.testing.assert_array_equal(actual.contact_overflow, 0)
    alone = jax.jit(physics.control_step)(*jax.tree.map(lambda x: x[1], arguments))
    np.testing.assert_allclose(alone.qpos, expected.qpos[1], atol=2e-5)
