"""Speed of a pi policy: acting, learning, and what caching is worth.

    python scripts/bench_policy.py [--size=tiny|pi0|pi05] [--batch_sizes 1 8 32] [--denoise_steps=4]
                                   [--train_batch=64] [--epochs=4] [--repeats=9] [--json=FILE]

Weights are random. One run measures, in turn, the medians of
  acting     ms per batch of `act`; without the KV cache (vision and language run again in every
             denoise step); without batching (one row after the other)
  learning   ms per PPO minibatch: all parameters; the action expert alone; the action expert on
             encodings that were made once. And of a whole update of some epochs, whose encodings
             are made once per epoch or once at all: the gain of a frozen prefix
and an estimate of the floor of acting: the larger of its FLOPs at the speed of a large matrix
product, and of the weights and caches it reads at the speed of a copy, both measured in the same
run. Weights that fit into a cache may be read faster. The FLOPs are those of matrix products,
counted by hand from the sizes: XLA counts the body of a loop once.
"""

import argparse
import dataclasses
import json
import pathlib
import re
import statistics
import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from jaxvla.runtime import cpu_settings

cpu_settings.apply()

import importlib.metadata  # noqa: E402
import platform  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from jaxvla import config as c  # noqa: E402
from jaxvla.algorithms.ppo import PPOConfig  # noqa: E402
from jaxvla.data.normalization import NormStats  # noqa: E402
from jaxvla.layout import parse_layout  # noqa: E402
from jaxvla.models import flow  # noqa: E402
from jaxvla.models.pi import PiPolicy  # noqa: E402
from jaxvla.models.pi_config import PiConfig, pi0_config, pi05_config, tiny_config  # noqa: E402
from jaxvla.models.tokenizer import ByteTokenizer  # noqa: E402
from jaxvla.runtime.build import Blueprint, Parts  # noqa: E402
from jaxvla.simulation.unroll import TokenTable  # noqa: E402
from jaxvla.types import EnvSpec, Observation, Params  # noqa: E402

_ROOT = pathlib.Path(__file__).parents[1]
_EXPERT = "^PaliGemma/llm/.*_1/|^(action|time|state)_|^value_head/"
_SIZES = {"tiny": tiny_config, "pi0": pi0_config, "pi05": pi05_config}
_ROWS = 8
"""Chunk queries of the trajectory that an update is made of."""


def main() -> None:
    """Measures, prints and saves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(_SIZES), default="tiny")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--denoise_steps", type=int, default=4)
    parser.add_argument("--train_batch", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=pathlib.Path, default=_ROOT / "bench_policy.json")
    options = parser.parse_args()
    if options.train_batch < _ROWS or options.train_batch % _ROWS:
        parser.error(f"--train_batch={options.train_batch}: must be a multiple of {_ROWS}")
    policy = make_policy(options.size, options.denoise_steps)
    params = jax.block_until_ready(jax.jit(policy.init)(jax.random.key(0)))
    speed = machine_speed(policy.config.dtype)
    report: dict[str, Any] = {
        "machine": machine(),
        "size": options.size,
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "prefix_tokens": prefix_tokens(policy.config),
        "denoise_steps": options.denoise_steps,
        **speed,
        "acting": [
            acting(policy, params, rows, options.repeats) | floor(policy, params, rows, speed)
            for rows in options.batch_sizes
        ],
    }
    del params
    report["learning"] = learning(policy, options.train_batch, options.epochs, options.repeats)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    show(report)


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "devices": [device.device_kind for device in jax.devices()],
        "python": platform.python_version(),
    } | {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax")}


def make_policy(size: str, denoise_steps: int) -> PiPolicy:
    """A policy for LIBERO: two cameras, a state of 8, actions of 7 dimensions."""
    spec = make_spec(64 if size == "tiny" else 224)
    config = dataclasses.replace(
        _SIZES[size](), max_tokens=-1, action_horizon=10, num_denoise_steps=denoise_steps
    )
    resolved = config.resolve(spec, num_executed=5, tokenizer=ByteTokenizer())
    stats = NormStats.from_bounds(spec.state_low, spec.state_high, spec.action_dim)
    return PiPolicy(resolved, stats)


def make_spec(image_size: int) -> EnvSpec:
    """An env like LIBERO's."""
    return EnvSpec(
        cameras=("agentview", "wrist"),
        image_size=image_size,
        state_dim=8,
        state_low=(-1.0,) * 8,
        state_high=(1.0,) * 8,
        action_dim=7,
        action_names=tuple("abcdefg"),
        tasks=("task",),
        instructions=("put it on it",),
        max_episode_steps=(240,),
        control_hz=20.0,
    )


def observation_of(policy: PiPolicy, *shape: int) -> Observation:
    """Random images and states, with leading axes of that shape."""
    random = np.random.default_rng(0)

    def fill(struct: Any) -> jax.Array:
        size = (*shape, *struct.shape[1:])
        if struct.dtype == np.uint8:
            return jnp.asarray(random.integers(0, 256, size, np.uint8))
        if struct.dtype == bool:
            return jnp.ones(size, bool)
        return jnp.asarray(random.uniform(0.0, 1.0, size)).astype(struct.dtype)

    return jax.tree.map(fill, policy.observation_spec(1))


def medians_ms(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Of calls made in turn, after one of each."""
    for function in functions.values():
        jax.block_until_ready(function())
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


# ------------------------------------------------------------------------------------ acting


def acting(policy: PiPolicy, params: Params, rows: int, repeats: int) -> dict[str, Any]:
    """ms per batch, with and without the cache and the batch."""
    observation, keys = observation_of(policy, rows), jax.random.split(jax.random.key(1), rows)
    act = jax.jit(lambda p, o, k: policy.act(p, o, k, explore=False))
    plain = jax.jit(lambda p, o, k: act_without_cache(policy, p, o, k))
    singles = [
        (jax.tree.map(lambda x, i=i: x[i : i + 1], observation), keys[i : i + 1])
        for i in range(rows)
    ]
    found = medians_ms(
        {
            "act_ms": lambda: act(params, observation, keys),
            "without_cache_ms": lambda: plain(params, observation, keys),
            "without_batching_ms": lambda: [act(params, *single) for single in singles],
        },
        repeats,
    )
    cached = act(params, observation, keys).actions
    difference = float(jnp.abs(cached - plain(params, observation, keys)).max())
    allowed = 1e-4 if policy.config.dtype == "float32" else 0.1
    if not difference <= allowed:
        raise SystemExit(f"with and without the cache actions differ by {difference:.3g}")
    return {"rows": rows, **found, "difference": difference}


def act_without_cache(
    policy: PiPolicy, params: Params, observation: Observation, keys: jax.Array
) -> jax.Array:
    """The same actions, with vision and language anew in every denoise step."""
    config, count = policy.config, policy.config.num_denoise_steps
    shape = (config.action_horizon, config.action_dim)
    x = flow.draw(keys, shape, config.num_random_steps).initial
    state = policy._model_state(observation)

    def step(x: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
        # Without the barrier XLA moves what does not depend on x out of the loop.
        seen, x = jax.lax.optimization_barrier((observation, x))
        prefix = policy.prefix(params, seen)
        time = jnp.broadcast_to(1.0 - index / count, (len(x),))
        return x - policy.velocity(params, prefix, state, x, time) / count, None

    chunk, _ = jax.lax.scan(step, x, jnp.arange(count))
    return policy._env_actions(chunk, observation)


# ------------------------------------------------------------------------------------- floor


def machine_speed(dtype: str) -> dict[str, float]:
    """FLOP/s of a large matrix product in a dtype, and bytes/s read and written by a copy."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((size, size), dtype)
    multiply, copy = jax.jit(lambda x: x @ x), jax.jit(lambda x: x + 1)
    long = jnp.ones(2**26, jnp.float32)
    found = medians_ms({"matmul": lambda: multiply(a), "copy": lambda: copy(long)}, 9)
    return {
        "peak_flops_per_s": 2.0 * size**3 / (1e-3 * found["matmul"]),
        "copy_bytes_per_s": 2.0 * long.nbytes / (1e-3 * found["copy"]),
    }


def prefix_tokens(config: PiConfig) -> int:
    """Tokens of the images and the prompt."""
    return config.num_cameras * (config.image_size // config.patch_size) ** 2 + config.max_tokens


def floor(
    policy: PiPolicy, params: Params, rows: int, speed: Mapping[str, float]
) -> dict[str, float]:
    """Least time of acting on this machine, and the FLOPs of it."""
    config, steps = policy.config, policy.config.num_denoise_steps
    sizes = {
        name: sum(
            leaf.size
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
            if re.search(pattern, "/".join(str(getattr(k, "key", k)) for k in path))
        )
        for name, pattern in {
            "vision": "^PaliGemma/img/(?!pos_embedding)",
            "language": "^PaliGemma/llm/(?!.*_1/|embedder)",
            "expert": "^PaliGemma/llm/(?!.*norm_1/Dense_0).*_1/|^action_",
            # Conditions of norms, flow time and state: once per row, whatever the tokens.
            "condition": "norm_1/Dense_0|^(time|state)_",
        }.items()
    }
    tokens, patches = prefix_tokens(config), (config.image_size // config.patch_size) ** 2
    suffix = config.action_horizon + (config.state_input == "token")
    heads = config.num_heads * config.head_dim
    flops = rows * (
        config.num_cameras
        * (
            2 * patches * sizes["vision"]
            + 4 * patches**2 * config.vision_width * config.vision_depth
        )
        + 2 * tokens * sizes["language"]
        + 4 * tokens**2 * heads * config.depth
        + steps * 2 * (suffix * sizes["expert"] + sizes["condition"])
        + steps * 4 * suffix * (tokens + suffix) * heads * config.depth
    )
    # Parameters are float32 in memory; what is read again in every step has the compute dtype.
    cache = 2 * config.depth * tokens * config.num_kv_heads * config.head_dim
    again = (steps - 1) * (sizes["expert"] + sizes["condition"]) + rows * steps * cache
    nbytes = 4 * sum(sizes.values()) + again * jnp.dtype(config.dtype).itemsize
    seconds = max(flops / speed["peak_flops_per_s"], nbytes / speed["copy_bytes_per_s"])
    return {"gflops": flops / 1e9, "floor_ms": 1e3 * seconds}


# ---------------------------------------------------------------------------------- learning


def learning(policy: PiPolicy, batch: int, epochs: int, repeats: int) -> dict[str, Any]:
    """ms per minibatch of `batch` samples, and per update of some epochs of one minibatch."""
    envs = batch // _ROWS
    everything = make_parts(policy, envs, ".*", encode_once=False)
    expert = make_parts(policy, envs, _EXPERT, encode_once=False)
    frozen = make_parts(policy, envs, _EXPERT, encode_once=True)
    steps = {
        "all_ms": Update(everything),
        "expert_ms": Update(expert),
        "expert_on_encodings_ms": Update(frozen),
    }
    found = medians_ms({name: update.step for name, update in steps.items()}, repeats)
    whole = medians_ms(
        {
            "update_ms": lambda: Update.run(steps["expert_ms"], epochs),
            "update_encoding_once_ms": lambda: Update.run(steps["expert_on_encodings_ms"], epochs),
        },
        max(3, repeats // 3),
    )
    return {"samples": batch, "epochs": epochs, **found, **whole}


def make_parts(policy: PiPolicy, envs: int, trainable: str, *, encode_once: bool) -> Parts:
    """A run without an env."""
    spec = make_spec(policy.config.image_size)
    config = c.ExperimentConfig(
        name="bench",
        env=c.EnvConfig(name="none", num_executed=5),
        model=policy.config,
        algorithm=PPOConfig(),
        optimizer=c.OptimizerConfig(trainable=trainable),
        simulation=c.SimulationConfig(num_groups=1, envs_per_group=envs, segment_length=_ROWS),
        serving=c.ServingConfig(buckets=(envs,)),
        learning=c.LearningConfig(trajectories_per_update=1, encode_once=encode_once),
    )
    tokens: Any = np.zeros((1, policy.config.max_tokens), np.int32)
    return Parts(
        Blueprint(
            config=config,
            env=SimpleNamespace(spec=spec),
            policy=policy,
            layout=parse_layout("colocated=1"),
            tokenizer=ByteTokenizer(),
            stats=NormStats.from_bounds(spec.state_low, spec.state_high, spec.action_dim),
            table=TokenTable(tokens=tokens, mask=tokens == 0),
        )
    )


class Update:
    """One learner's update on a random trajectory."""

    def __init__(self, parts: Parts):
        training = parts.training(parts.config.optimizer)
        self._functions = training.functions
        self._state = training.init(parts.fresh_params(training))
        random = np.random.default_rng(1)

        def fill(struct: Any) -> jax.Array:
            if struct.dtype in (np.uint8, np.int32):
                return jnp.asarray(random.integers(0, 2, struct.shape).astype(struct.dtype))
            if struct.dtype == bool:
                return jnp.ones(struct.shape, bool)
            return jnp.asarray(random.normal(size=struct.shape).astype(struct.dtype))

        self._trajectory = jax.tree.map(fill, parts.blueprint.trajectory_struct())
        shape = self._trajectory.reward.shape
        self._order = self._functions.draw(jax.random.key(0), shape)
        self._batch = self._prepared()

    def _prepared(self) -> Any:
        return self._functions.prepare(self._state.params, [self._trajectory], jnp.int32(0))

    def step(self) -> Any:
        """One minibatch."""
        self._state, metrics = self._functions.step(
            self._state, self._batch, self._order, jnp.int32(0)
        )
        return metrics

    def run(self, epochs: int) -> Any:
        """What is done once, and all epochs."""
        self._batch = self._prepared()
        return [self.step() for _ in range(epochs)]


# ------------------------------------------------------------------------------------- tables


def show(report: dict[str, Any]) -> None:
    """Markdown."""
    print(
        f"{report['size']}: {report['parameters']:,} parameters, {report['prefix_tokens']} prefix "
        f"tokens, {report['denoise_steps']} denoise steps, on {report['machine']['devices']}; "
        f"matrix product {report['peak_flops_per_s'] / 1e9:.0f} GFLOP/s, copy "
        f"{report['copy_bytes_per_s'] / 1e9:.1f} GB/s\n"
    )
    print("| rows | act ms | rows/s | floor ms | of floor | no KV cache | no batching |")
    print("|---|---|---|---|---|---|---|")
    for row in report["acting"]:
        print(
            f"| {row['rows']} | {row['act_ms']:.1f} | {1e3 * row['rows'] / row['act_ms']:.0f} | "
            f"{row['floor_ms']:.1f} | {row['floor_ms'] / row['act_ms']:.0%} | "
            f"x{row['without_cache_ms'] / row['act_ms']:.2f} | "
            f"x{row['without_batching_ms'] / row['act_ms']:.2f} |"
        )
    found = report["learning"]
    print(
        f"\nminibatch of {found['samples']}: all parameters {found['all_ms']:.0f} ms, expert "
        f"{found['expert_ms']:.0f} ms, expert on encodings "
        f"{found['expert_on_encodings_ms']:.0f} ms\n"
        f"update of {found['epochs']} epochs, expert: {found['update_ms']:.0f} ms, encoding once "
        f"{found['update_encoding_once_ms']:.0f} ms "
        f"(x{found['update_ms'] / found['update_encoding_once_ms']:.2f})"
    )


if __name__ == "__main__":
    main()
