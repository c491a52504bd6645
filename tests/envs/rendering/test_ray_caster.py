"""The ray caster against mujoco.Renderer: the tabletop scene and scenes of every geom type.

Pixels are compared one by one. What is allowed to differ are silhouettes: a rasteriser draws
round bodies as polyhedra and decides a pixel whose centre lies on an edge by its own rule.
"""

import ctypes.util
import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from compiled_tabletop import CompiledTabletop
from gl_reference import Scene, render_all
from jax.sharding import Mesh, PartitionSpec

from jaxvla.envs import tabletop_scene
from jaxvla.envs.rendering.ray_caster import Frames, RayCaster, ScenePoses
from jaxvla.envs.tabletop import COLORS, TabletopState

needs_gl = pytest.mark.skipif(
    ctypes.util.find_library("OSMesa") is None,
    reason="OSMesa is not installed (apt-get install libosmesa6)",
)
CAMERAS = ("base", "wrist")
SIZE = 128
NUM_TABLETOPS, NUM_MIXED = 6, 6

MIXED = """
<mujoco>
  <visual>
    <headlight ambient="0.3 0.28 0.26" diffuse="0.3 0.3 0.3" specular="0 0 0"/>
    <map znear="0.005" zfar="30"/>
    <quality offsamples="0" numslices="128" numstacks="64"/>
  </visual>
  <statistic extent="1" center="0 0 0"/>
  <asset>
    <texture type="skybox" builtin="flat" rgb1="0.2 0.4 0.6" rgb2="0.2 0.4 0.6"
             width="8" height="48"/>
    <mesh name="solid" vertex="0 0 0.13  0.1 0 -0.05  -0.06 0.1 -0.05  -0.06 -0.1 -0.05
                               0.09 0.1 0.04  -0.1 0 0.06"/>
    <material name="matt" rgba="0.3 0.8 0.5 1" specular="0" shininess="0"/>
  </asset>
  <worldbody>
    <light directional="true" dir="-0.4 0.3 -0.85" ambient="0.05 0.05 0.05"
           diffuse="0.4 0.3 0.2" specular="0 0 0" castshadow="false"/>
    <light directional="true" dir="0.7 0.1 -0.5" ambient="0 0 0"
           diffuse="0.1 0.2 0.3" specular="0 0 0" castshadow="false"/>
    <light directional="true" dir="0 0 -1" diffuse="1 1 1" active="false" castshadow="false"/>
    <camera name="base" pos="0.6 -0.5 0.55" xyaxes="0.64 0.77 0 -0.44 0.36 0.82" fovy="50"/>
    <geom type="plane" size="0.4 0.3 0.1" pos="0 0 -0.2" rgba="0.7 0.7 0.6 1"/>
    <geom type="plane" size="2 2 0.1" pos="0 0.45 0" euler="80 0 10" rgba="0.4 0.4 0.5 1"/>
    {bodies}
    <body name="hand" pos="0.2 0 0.4">
      <freejoint/>
      <geom type="box" size="0.02 0.02 0.02" mass="1"/>
      <camera name="wrist" pos="0 0 -0.05" xyaxes="0 1 0 -1 0 0" fovy="75"/>
    </body>
  </worldbody>
</mujoco>"""
FLAT = [getattr(mujoco.mjtGeom, f"mjGEOM_{name}") for name in ("PLANE", "BOX", "MESH")]
_BODY = """
    <body><freejoint/><geom type="{type}" {size} mass="1" rgba="{rgba} 1" {extra}/></body>"""
_SIZES = {
    "sphere": 'size="0.09"',
    "capsule": 'size="0.05 0.1"',
    "ellipsoid": 'size="0.12 0.06 0.09"',
    "cylinder": 'size="0.07 0.08"',
    "box": 'size="0.1 0.05 0.08"',
    "mesh": 'mesh="solid"',
}


# --- scenes -------------------------------------------------------------------------------


def mixed_scene(seed: int) -> Scene:
    """A body of every type in random colours and poses, on a bounded plane."""
    rng = np.random.default_rng(seed)
    kinds = [*_SIZES]
    colors = [" ".join(f"{c:.2f}" for c in rng.uniform(0.2, 0.9, 3)) for _ in kinds]
    bodies = "".join(
        _BODY.format(type=kind, size=_SIZES[kind], rgba=rgba, extra='material="matt"')
        for kind, rgba in zip(kinds, colors, strict=True)
    )
    # Hidden: a group that viewers leave out, and a transparent body.
    bodies += _BODY.format(type="box", size='size="1 1 1"', rgba="1 0 0", extra='group="3"')
    bodies += '<geom type="sphere" size="0.5" rgba="1 0 0 0"/>'
    num_bodies = len(kinds) + 2
    places = rng.uniform([-0.3, -0.3, -0.15], [0.3, 0.3, 0.2], (num_bodies, 3))
    turns = rng.normal(size=(num_bodies, 4))
    places[-1] = (0.0, 0.0, 0.6)
    turns[-1] = (1.0, 0.05, 0.05, 0.3)
    turns /= np.linalg.norm(turns, axis=1, keepdims=True)
    return Scene(
        xml=MIXED.format(bodies=bodies),
        qpos=np.concatenate([places, turns], 1).ravel().tolist(),
        mocap_pos=[],
        geom_rgb=None,
        cameras=list(CAMERAS),
        size=SIZE,
    )


@pytest.fixture(scope="module")
def worlds(tabletop: CompiledTabletop) -> TabletopState:
    """Tabletop worlds of all tasks, blocks turned and lifted, hands anywhere."""
    keys = jax.random.split(jax.random.key(11), 8)
    states = quick_jit(jax.vmap(tabletop.env.scene))(keys, jnp.arange(8) % 3)
    rng = np.random.default_rng(0)
    qpos = np.array(states.qpos)
    blocks = qpos[:, 5:].reshape(8, 3, 7)  # a view
    blocks[:, :, 2] += rng.uniform(0.0, 0.1, (8, 3))
    blocks[:, :, 3:] = rng.normal(size=(8, 3, 4))
    blocks[:, :, 3:] /= np.linalg.norm(blocks[:, :, 3:], axis=-1, keepdims=True)
    qpos[:, 3:5] = rng.uniform(0.0, tabletop_scene.FINGER_OPEN_M, (8, 1))
    return states.replace(qpos=jnp.asarray(qpos))


def tabletop_scenes(tabletop: CompiledTabletop, worlds: TabletopState) -> list[Scene]:
    """The same worlds for MuJoCo."""
    model = tabletop.env.model
    own = RayCaster(model, cameras=CAMERAS, size=SIZE).geom_rgb
    scenes = []
    for row in range(NUM_TABLETOPS):
        colors = own.copy()
        for i, color in enumerate(np.asarray(worlds.color[row])):
            colors[model.geom(f"block_{i}").id] = list(COLORS.values())[color]
        is_push = tabletop.env.spec.tasks[int(worlds.task[row])] == "push"
        zone = [*np.asarray(worlds.zone[row], float), 0.001 if is_push else -1.0]
        scenes.append(
            Scene(
                xml=tabletop_scene.scene_xml(),
                qpos=np.asarray(worlds.qpos[row], float).tolist(),
                mocap_pos=[zone],
                geom_rgb=colors.astype(float).tolist(),
                cameras=list(CAMERAS),
                size=SIZE,
            )
        )
    return scenes


def poses_of(data: mujoco.MjData) -> ScenePoses:
    """Poses as the ray caster takes them."""

    def matrices(x: np.ndarray) -> jax.Array:
        return jnp.asarray(x.reshape(-1, 3, 3), jnp.float32)

    return ScenePoses(
        geom_xpos=jnp.asarray(data.geom_xpos, jnp.float32),
        geom_xmat=matrices(data.geom_xmat),
        cam_xpos=jnp.asarray(data.cam_xpos, jnp.float32),
        cam_xmat=matrices(data.cam_xmat),
    )


def stack(trees: list[ScenePoses]) -> ScenePoses:
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


# Compiles several times faster, computes the same.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Worlds of one model: what the ray caster is given and what both renderers show."""

    caster: RayCaster
    render: Callable[[ScenePoses, jax.Array], Frames]
    """`caster.render_batch`, compiled."""
    poses: ScenePoses
    colors: jax.Array
    frames: Frames
    """numpy arrays [E, C, ...]."""
    reference: dict[str, np.ndarray]
    """[E, C, ...]; empty without GL."""
    types: np.ndarray
    """MuJoCo's type of every geom."""


def make_batch(scenes: list[Scene], reference: list[dict[str, np.ndarray]]) -> Batch:
    """Renders scenes that share a model but for poses and colours."""
    loaded = [scene.load() for scene in scenes]
    caster = RayCaster(loaded[0][0], cameras=CAMERAS, size=SIZE)
    poses = stack([poses_of(data) for _, data in loaded])
    colors = jnp.asarray(
        np.stack(
            [
                RayCaster(model, cameras=CAMERAS, size=SIZE).geom_rgb
                if scene.geom_rgb is None
                else np.float32(scene.geom_rgb)
                for scene, (model, _) in zip(scenes, loaded, strict=True)
            ]
        )
    )
    render = quick_jit(caster.render_batch)
    return Batch(
        caster=caster,
        render=render,
        poses=poses,
        colors=colors,
        frames=jax.tree.map(np.asarray, render(poses, colors)),
        reference={kind: np.stack([r[kind] for r in reference]) for kind in reference[0]}
        if reference
        else {},
        types=loaded[0][0].geom_type,
    )


@pytest.fixture(scope="module")
def images(
    tabletop: CompiledTabletop, worlds: TabletopState, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, np.ndarray]]:
    """What MuJoCo shows: the tabletop worlds, then the mixed scenes. Empty without GL."""
    if ctypes.util.find_library("OSMesa") is None:
        return []
    scenes = tabletop_scenes(tabletop, worlds) + [mixed_scene(i) for i in range(NUM_MIXED)]
    return render_all(scenes, tmp_path_factory.mktemp("gl"))


@pytest.fixture(scope="module")
def tables(tabletop: CompiledTabletop, worlds: TabletopState, images: list) -> Batch:
    return make_batch(tabletop_scenes(tabletop, worlds), images[:NUM_TABLETOPS])


@pytest.fixture(scope="module")
def mixed(images: list) -> Batch:
    return make_batch([mixed_scene(i) for i in range(NUM_MIXED)], images[NUM_TABLETOPS:])


@pytest.fixture(params=["tables", "mixed"])
def batch(request: pytest.FixtureRequest) -> Batch:
    return request.getfixturevalue(request.param)


def interior(segmentation: np.ndarray) -> np.ndarray:
    """Pixels whose four neighbours see the same geom."""
    inside = np.ones(segmentation.shape, bool)
    for axis in (-1, -2):
        for shift in (-1, 1):
            inside &= segmentation == np.roll(segmentation, shift, axis)
    return inside


# --- against MuJoCo -----------------------------------------------------------------------


@needs_gl
@pytest.mark.parametrize(("name", "allowed"), [("tables", 4e-4), ("mixed", 4e-4)])
def test_every_pixel_sees_the_same_geom(
    request: pytest.FixtureRequest, name: str, allowed: float
) -> None:
    batch = request.getfixturevalue(name)
    ours, theirs = batch.frames.segmentation, batch.reference["segmentation"]
    differs = ours != theirs
    assert differs.mean() < allowed
    # All of them on silhouettes, and everything has been seen somewhere.
    assert not (differs & interior(theirs) & interior(ours)).any()
    np.testing.assert_array_equal(np.unique(ours), np.unique(theirs))
    assert len(np.unique(theirs)) >= 9


@needs_gl
def test_depth_is_the_same(batch: Batch) -> None:
    ours, theirs = batch.frames.depth, batch.reference["depth"]
    seen = batch.frames.segmentation
    same = interior(batch.reference["segmentation"]) & interior(seen) & (seen >= 0)
    assert same.mean() > 0.5
    error = np.abs(ours[same] - theirs[same]) / theirs[same]
    # Round bodies are polyhedra to the rasteriser; on flat ones there is only the rounding of
    # its depth buffer, which grows with distance.
    assert error.max() < 3e-3
    flat = np.isin(batch.types[seen[same]], FLAT)
    assert flat.any() and not flat.all()
    assert error[flat].max() < 2e-4
    assert np.median(error[flat]) < 1e-6
    assert np.isinf(ours[seen < 0]).all()


@needs_gl
def test_colors_are_the_same(batch: Batch) -> None:
    same = interior(batch.reference["segmentation"]) & interior(batch.frames.segmentation)
    ours, theirs = batch.frames.rgb.astype(int), batch.reference["rgb"].astype(int)
    error = np.abs(ours - theirs).max(-1)[same]
    # In steps of 1/255. Exceptions are pixels on an edge between two faces of one body.
    assert (error > 2).mean() < 1e-4
    assert np.quantile(error, 0.999) <= 1


# --- batches ------------------------------------------------------------------------------


def assert_equal_frames(actual: Frames, expected: Frames) -> None:
    np.testing.assert_array_equal(actual.segmentation, expected.segmentation)
    np.testing.assert_allclose(actual.depth, expected.depth, rtol=1e-6)
    error = np.abs(np.asarray(actual.rgb, int) - np.asarray(expected.rgb, int))
    assert error.max() <= 1  # the rounding of x.5


def test_worlds_of_a_batch_do_not_influence_each_other(batch: Batch) -> None:
    order = np.array([3, 3, 0, 5, 1, 3])
    poses = jax.tree.map(lambda x: x[order], batch.poses)
    shuffled = batch.render(poses, batch.colors[order])
    expected = jax.tree.map(lambda x: x[order], batch.frames)
    assert_equal_frames(shuffled, expected)


TINY = """
<mujoco>
  <asset>
    <texture name="half" type="2d" builtin="checker" rgb1="0.2 0.4 0.6" rgb2="0.4 0.8 1"
             width="16" height="16"/>
    <material name="checked" texture="half"/>
    <mesh name="solid" vertex="0 0 0.1  0.1 0 0  0 0.1 0  -0.1 -0.1 0"/>
  </asset>
  <worldbody>
    <light directional="true" dir="0 0 -1" ambient="0.2 0.2 0.2" diffuse="0.5 0.5 0.5"/>
    <camera name="top" pos="0 0 2" fovy="45"/>
    <geom name="floor" type="plane" size="1 1 0.1" material="checked"/>
    <body pos="0 0 0.3"><freejoint/><geom name="ball" size="0.2" rgba="1 0 0 1"/></body>
    {extra}
  </worldbody>
</mujoco>"""


def tiny(extra: str = "") -> mujoco.MjModel:
    return mujoco.MjModel.from_xml_string(TINY.format(extra=extra))


@pytest.fixture(scope="module")
def balls() -> tuple[RayCaster, ScenePoses, jax.Array, Frames]:
    """Four worlds with a ball over a floor, one camera: quick to compile."""
    model = tiny()
    caster = RayCaster(model, cameras=("top",), size=16)
    data = mujoco.MjData(model)
    poses = []
    for x in (-0.4, -0.1, 0.2, 0.5):
        data.qpos[0] = x
        mujoco.mj_forward(model, data)
        poses.append(poses_of(data))
    stacked = stack(poses)
    colors = jnp.stack([jnp.roll(jnp.asarray(caster.geom_rgb), i, 1) for i in range(4)])
    return caster, stacked, colors, quick_jit(caster.render_batch)(stacked, colors)


def test_one_world_is_rendered_like_a_batch(balls: tuple) -> None:
    caster, poses, colors, frames = balls
    one = quick_jit(caster.render)(jax.tree.map(lambda x: x[2], poses), colors[2])
    assert_equal_frames(one, jax.tree.map(lambda x: x[2], frames))


def test_render_can_be_vmapped(balls: tuple) -> None:
    caster, poses, colors, frames = balls
    assert_equal_frames(quick_jit(jax.vmap(caster.render))(poses, colors), frames)


def test_devices_render_their_own_worlds(balls: tuple) -> None:
    caster, poses, colors, frames = balls
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("data",))
    rows = PartitionSpec("data")
    render = jax.shard_map(
        caster.render_batch, mesh=mesh, in_specs=(rows, rows), out_specs=rows, check_vma=False
    )
    sharded = quick_jit(render)(poses, colors)
    assert sharded.rgb.sharding.spec[0] == "data"
    assert_equal_frames(sharded, frames)


# --- what the scene says ------------------------------------------------------------------


def test_default_colors_are_the_models(balls: tuple) -> None:
    caster, poses, _, _ = balls
    np.testing.assert_allclose(caster.geom_rgb[1], [1.0, 0.0, 0.0])
    # A textured geom shows its texture's mean: half of the checker is twice as bright.
    np.testing.assert_allclose(caster.geom_rgb[0], [0.3, 0.6, 0.8], atol=2e-3)
    frames = quick_jit(caster.render)(jax.tree.map(lambda x: x[0], poses))
    # Face on, the floor gets all of the light's 0.2 + 0.5 and the headlight's default 0.1 + 0.4.
    corner = np.asarray(frames.rgb[0, 0, -1], int)
    np.testing.assert_allclose(corner, 255 * 1.2 * caster.geom_rgb[0], atol=1)


def test_hidden_geoms_are_not_seen() -> None:
    extra = """
      <geom name="group" type="sphere" size="1" pos="0 0 1" group="3"/>
      <geom name="clear" type="sphere" size="1" pos="0 0 1" rgba="1 1 1 0"/>"""
    model = tiny(extra)
    caster = RayCaster(model, cameras=("top",), size=16)
    shown = [mujoco.mj_id2name(model, mujoco.mjtObj.mjOBJ_GEOM, g.id) for g in caster._geoms]
    assert shown == ["floor", "ball"]


@pytest.mark.parametrize(("near_m", "is_seen"), [(0.005, True), (0.03, False)])
def test_what_is_too_near_is_cut_off(near_m: float, is_seen: bool) -> None:
    # The top of the bead is 1 cm below the camera.
    model = tiny('<geom name="bead" size="0.02" pos="0 0 1.97" rgba="0 1 0 1"/>')
    model.vis.map.znear = near_m / model.stat.extent
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    caster = RayCaster(model, cameras=("top",), size=16)
    seen = quick_jit(caster.render)(poses_of(data)).segmentation
    assert bool((seen == model.geom("bead").id).any()) == is_seen


def test_unknown_camera_is_refused() -> None:
    with pytest.raises(ValueError, match="no camera 'front'; cameras: top"):
        RayCaster(tiny(), cameras=("front",), size=16)


def test_unsupported_geom_is_refused() -> None:
    model = tiny('<geom name="odd" type="box" size="1 1 1"/>')
    model.geom_type[model.geom("odd").id] = mujoco.mjtGeom.mjGEOM_SDF
    with pytest.raises(ValueError, match="'odd': type mjGEOM_SDF cannot be rendered"):
        RayCaster(model, cameras=("top",), size=16)


def test_too_many_triangles_are_refused() -> None:
    model = tiny('<geom type="mesh" mesh="solid"/>')
    RayCaster(model, cameras=("top",), size=16, max_triangles=4)
    with pytest.raises(ValueError, match="4 triangles, more than max_triangles=3"):
        RayCaster(model, cameras=("top",), size=16, max_triangles=3)
