"""MJX, imported without the message that the optional warp backend is missing."""

import contextlib
import io
from typing import Any

import jax

with contextlib.redirect_stdout(io.StringIO()):
    import mujoco.mjx as mjx

__all__ = ["mjx", "own_device"]


def own_device() -> Any:
    """The `jax.Device` where models and data belong.

    MJX would take the first device of all, which may be another process's where a learner has
    several.
    """
    return jax.local_devices()[0]
