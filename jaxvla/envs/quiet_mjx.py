"""MJX, imported without the message that the optional warp backend is missing."""

import contextlib
import io

with contextlib.redirect_stdout(io.StringIO()):
    import mujoco.mjx as mjx

__all__ = ["mjx"]
