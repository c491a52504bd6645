"""The policy's inference functions, compiled ahead of time for a fixed list of batch sizes."""

import bisect
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxvla import sharding
from jaxvla.models.base import Policy
from jaxvla.types import Observation, Params

KINDS = ("explore", "act", "value")
"""explore: sample with log-prob, for training. act: deterministic. value: the critic alone."""


class Sampler:
    """Answers batches of any size up to the largest bucket, without ever compiling again.

    A batch is padded to the smallest bucket that holds it by repeating its last row, and
    the padding is cut off the result. Rows are independent and carry their own RNG keys, so
    a row's result does not depend on what it was batched with; between buckets it may differ
    by rounding.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        mesh: Mesh,
        params_shardings: Any,
        buckets: Sequence[int],
        kinds: Sequence[str] = KINDS,
    ):
        """Prepares the functions; `compile` builds them.

        Args:
          policy: the policy.
          mesh: serving mesh.
          params_shardings: tree of shardings on that mesh.
          buckets: batch sizes, ascending, each divisible by the mesh's data axis.
          kinds: which functions to build.
        """
        self.buckets = tuple(buckets)
        self.params_shardings = params_shardings
        self._kinds = tuple(kinds)
        self._mesh = mesh
        self._rows = sharding.batch_sharding(mesh)
        self._functions = {
            "explore": lambda p, obs, keys: policy.act(p, obs, _wrap(keys), explore=True),
            "act": lambda p, obs, keys: policy.act(p, obs, _wrap(keys), explore=False),
            "value": lambda p, obs, keys: policy.values(p, obs),
        }
        self._compiled: dict[tuple[str, int], Any] = {}

    def compile(self, params: Params, observation: Observation) -> None:
        """Compiles every kind for every bucket.

        Args:
          params: parameters or shape structs.
          observation: one batch of any size; only shapes and dtypes are read.
        """
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)

        def build(kind: str, bucket: int) -> Any:
            rows = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((bucket, *x.shape[1:]), x.dtype), observation
            )
            keys = jax.ShapeDtypeStruct((bucket, _KEY_WORDS), jnp.uint32)
            jitted = jax.jit(
                self._functions[kind],
                in_shardings=(self.params_shardings, self._rows, self._rows),
                out_shardings=self._rows,
            )
            return jitted.lower(params, rows, keys).compile()

        wanted = [(kind, bucket) for kind in self._kinds for bucket in self.buckets]
        with ThreadPoolExecutor(max_workers=2) as pool:
            built = pool.map(lambda pair: build(*pair), wanted)
            self._compiled = dict(zip(wanted, built, strict=True))

    def run(
        self, kind: str, params: Params, observations: Sequence[Observation], keys: np.ndarray
    ) -> tuple[Any, int]:
        """Runs one batch.

        Args:
          kind: one of KINDS.
          params: on the serving mesh, placed like `params_shardings`.
          observations: parts of the batch, to be joined along their first axis.
          keys: uint32 [B, 2], raw keys of all rows (`row_keys`).

        Returns:
          The result as numpy arrays with leading axis B, and the bucket used.

        Raises:
          ValueError: the batch exceeds the largest bucket.
        """
        rows = len(keys)
        index = bisect.bisect_left(self.buckets, rows)
        if index == len(self.buckets):
            raise ValueError(f"a batch of {rows} rows; the largest bucket is {self.buckets[-1]}")
        bucket = self.buckets[index]
        observation, keys = _join(observations, keys, bucket)
        on_mesh = jax.device_put((observation, keys), self._rows)
        result = jax.device_get(self._compiled[kind, bucket](params, *on_mesh))
        return jax.tree.map(lambda x: x[:rows], result), bucket


_KEY_WORDS = 2
"""uint32 words of a threefry key, jax's default generator."""


def row_keys(key: jax.Array, num_rows: int) -> np.ndarray:
    """Raw keys uint32 [num_rows, 2] derived from one typed key, in a form that can travel."""
    return np.asarray(jax.random.key_data(jax.random.split(key, num_rows)))


def _wrap(keys: jax.Array) -> jax.Array:
    return jax.random.wrap_key_data(keys, impl="threefry2x32")


def _join(
    observations: Sequence[Observation], keys: np.ndarray, bucket: int
) -> tuple[Observation, np.ndarray]:
    """Concatenates the parts and pads to the bucket.

    A single part that fills the bucket stays where it is, so that it can move from device
    to device; anything else goes through the host.
    """
    if len(observations) == 1 and len(keys) == bucket:
        return observations[0], keys
    padding = bucket - len(keys)

    def fill(*parts: Any) -> np.ndarray:
        parts = tuple(np.asarray(part) for part in parts)
        return np.concatenate([*parts, np.repeat(parts[-1][-1:], padding, axis=0)])

    return jax.tree.map(fill, *observations), fill(keys)
