"""Speed of the tabletop env, alone and in training.

    python scripts/benchmark_tabletop.py [--num_envs=32] [--repeats=3] [--out=FILE.json]

Prints and saves: control steps/s of the physics; frames/s of the JAX ray caster and of
mujoco.Renderer, in turn; synchronous and asynchronous training, as bench_real.py does it.
Figures are medians over the repeats.
"""

import argparse
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

from jaxvla.runtime import cpu_settings

cpu_settings.apply()
os.environ.setdefault("MUJOCO_GL", "osmesa")

import importlib.metadata  # noqa: E402
import platform  # noqa: E402

import bench_real  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import mujoco  # noqa: E402
import numpy as np  # noqa: E402

from jaxvla.envs.tabletop import Tabletop, TabletopConfig, TabletopState  # noqa: E402

_ROOT = pathlib.Path(__file__).parents[1]
_STEPS = 16


def main() -> None:
    """Runs all three parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_envs", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--num_updates", type=int, default=8)
    parser.add_argument("--out", type=pathlib.Path, default=_ROOT / "benchmark_tabletop.json")
    options = parser.parse_args()
    env = Tabletop(TabletopConfig())
    states = start(env, options.num_envs)
    report: dict[str, Any] = {"machine": machine(), "num_envs": options.num_envs}
    report["physics_steps_per_s"] = physics(env, states, options.repeats)
    report |= rendering(env, states, options.repeats)
    report["training"] = bench_real.compare("quickstart", options.repeats, options.num_updates)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    packages = ("jax", "mujoco", "mujoco-mjx")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "devices": [str(device) for device in jax.devices()],
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    } | {name: importlib.metadata.version(name) for name in packages}


def start(env: Tabletop, num_envs: int) -> TabletopState:
    """Fresh episodes of all tasks."""
    tasks = jnp.arange(num_envs) % len(env.spec.tasks)
    return jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(0), num_envs), tasks)


def rate(function: Callable[[], Any], amount: int) -> float:
    """`amount` per second of one call, after a warm-up call."""
    begin = time.perf_counter()
    jax.block_until_ready(function())
    return amount / (time.perf_counter() - begin)


def physics(env: Tabletop, states: TabletopState, repeats: int) -> float:
    """Control steps/s with the expert acting, no images."""

    @jax.jit
    def run(states: TabletopState) -> TabletopState:
        def advance(states: TabletopState, _: None) -> tuple[TabletopState, None]:
            return jax.vmap(env.step)(states, jax.vmap(env.expert_action)(states)), None

        return jax.lax.scan(advance, states, None, _STEPS)[0]

    jax.block_until_ready(run(states))
    amount = _STEPS * len(states.task)
    return statistics.median(rate(lambda: run(states), amount) for _ in range(2 * repeats))


def rendering(env: Tabletop, states: TabletopState, repeats: int) -> dict[str, float]:
    """Frames/s of both renderers, measured in turn on the same worlds."""
    observe = jax.jit(env.observe)
    jax.block_until_ready(observe(states))
    size = env.config.image_size
    renderer = mujoco.Renderer(env.model, size, size)
    data = mujoco.MjData(env.model)
    positions = np.asarray(states.qpos)

    def render_all() -> None:
        for qpos in positions:
            data.qpos[:] = qpos
            mujoco.mj_forward(env.model, data)
            for camera in env.spec.cameras:
                renderer.update_scene(data, camera)
                renderer.render()

    render_all()
    amount = len(positions) * len(env.spec.cameras)
    ours, theirs = [], []
    for _ in range(2 * repeats):
        ours.append(rate(lambda: observe(states), amount))
        theirs.append(rate(render_all, amount))
    renderer.close()
    ours_median, theirs_median = statistics.median(ours), statistics.median(theirs)
    return {
        "jax_frames_per_s": ours_median,
        "mujoco_renderer_frames_per_s": theirs_median,
        "render_ratio": ours_median / theirs_median,
    }


if __name__ == "__main__":
    main()
