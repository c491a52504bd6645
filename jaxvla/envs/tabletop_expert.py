"""Scripted experts of the tabletop tasks: memoryless functions of the true state.

Each returns where the finger tips' set point should go and the grip command; the caller
turns that into a motion command. They are good, not perfect, and serve as the source of
demonstrations and as an upper reference in benchmarks.
"""

import jax
import jax.numpy as jnp

from jaxvla.envs import tabletop_scene as scene

_OPEN, _CLOSE = -1.0, 1.0
_TRAVEL_Z_M = 0.085
"""Tip height that clears every block."""
_GRASP_Z_M = 0.015
_PUSH_Z_M = 0.02
_NEAR_M = 0.012
"""Horizontal error below which the tips may descend."""
_GRASPED_M = 0.027
"""Finger opening at or below which a block of the scene's size is held."""
_PUSH_GAP_M = scene.BLOCK_HALF_M + 0.025
"""Distance behind the block's centre at which a push starts."""


def goal(
    task: str,
    tip: jax.Array,
    set_point: jax.Array,
    block: jax.Array,
    zone: jax.Array,
    opening: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Next way-point of the finger tips.

    Args:
      task: "reach", "push" or "lift".
      tip: float32 [3], point between the finger tips, metres.
      set_point: float32 [3], commanded tip position, metres.
      block: float32 [3], centre of the named block, metres.
      zone: float32 [2], centre of the zone, metres.
      opening: float32 [], finger opening, metres.

    Returns:
      (way-point float32 [3] in metres, grip command float32 [] in [-1, 1]).
    """
    if task == "reach":
        return _reach(set_point, block)
    if task == "push":
        return _push(set_point, block, zone)
    return _lift(tip, set_point, block, opening)


def _descend_over(set_point: jax.Array, xy: jax.Array, z: float | jax.Array) -> jax.Array:
    """Travels above `xy`, then goes straight down to height `z`."""
    is_over = jnp.linalg.norm(set_point[:2] - xy) < _NEAR_M
    height = jnp.where(is_over, z, jnp.maximum(_TRAVEL_Z_M, z))
    return jnp.append(xy, height)


def _reach(set_point: jax.Array, block: jax.Array) -> tuple[jax.Array, jax.Array]:
    top = block[2] + scene.BLOCK_HALF_M
    error = jnp.linalg.norm(set_point[:2] - block[:2])
    # A cone above the block: come down while closing in.
    height = top + jnp.clip(error - _NEAR_M, 0.0, _TRAVEL_Z_M - 0.05)
    return jnp.append(block[:2], height), jnp.asarray(_OPEN)


def _push(set_point: jax.Array, block: jax.Array, zone: jax.Array) -> tuple[jax.Array, jax.Array]:
    # The closed fingers are a rod, which pushes reliably only square to a face of the block:
    # cover the longer side of the way first, then the other.
    way = zone - block[:2]
    along_x = jnp.abs(way[0]) > jnp.abs(way[1])
    direction = jnp.where(along_x, jnp.asarray([1.0, 0.0]), jnp.asarray([0.0, 1.0]))
    direction = direction * jnp.sign(jnp.sum(direction * way))
    start = block[:2] - direction * _PUSH_GAP_M
    offset = set_point[:2] - block[:2]
    ahead = jnp.sum(offset * direction)
    lateral = jnp.linalg.norm(offset - ahead * direction)
    is_low = set_point[2] < _PUSH_Z_M + 0.005
    is_pushing = is_low & (ahead < 0.0) & (lateral < _NEAR_M)
    is_at_start = jnp.linalg.norm(set_point[:2] - start) < _NEAR_M
    forward = jnp.append(
        block[:2] + direction * (jnp.sum(direction * way) - scene.BLOCK_HALF_M), _PUSH_Z_M
    )
    # Leave the table before going round to another side of the block.
    rise = jnp.append(set_point[:2], _TRAVEL_Z_M)
    is_high = set_point[2] > _TRAVEL_Z_M - 0.005
    approach = jnp.where(is_high | is_at_start, _descend_over(set_point, start, _PUSH_Z_M), rise)
    return jnp.where(is_pushing, forward, approach), jnp.asarray(_CLOSE)


def _lift(
    tip: jax.Array, set_point: jax.Array, block: jax.Array, opening: jax.Array
) -> tuple[jax.Array, jax.Array]:
    grasp_z = block[2] - scene.BLOCK_HALF_M + _GRASP_Z_M
    is_around = (jnp.linalg.norm(tip[:2] - block[:2]) < _NEAR_M) & (tip[2] < grasp_z + 0.015)
    is_held = is_around & (opening < _GRASPED_M)
    down = _descend_over(set_point, block[:2], grasp_z)
    up = jnp.append(set_point[:2], _TRAVEL_Z_M + 0.05)
    return jnp.where(is_held, up, down), jnp.where(is_around, _CLOSE, _OPEN)
