"""Random streams: every key is a function of the run's seed and of counters.

Checkpoints therefore store counters, never keys. A stream is
`fold_in(root, crc32(role))`, then program id, then episode / segment / step.
"""

import zlib

import jax


def root_key(seed: int) -> jax.Array:
    """Typed root key of a run."""
    return jax.random.key(seed)


def stream(root: jax.Array, role: str, *counters: int | jax.Array) -> jax.Array:
    """Key of one role, narrowed by counters in the order given.

    Args:
      root: typed key, shape [].
      role: name of the stream, e.g. "simulation" or "learning".
      *counters: non-negative ints or int32 scalars (may be traced).

    Returns:
      Typed key, shape [].
    """
    key = jax.random.fold_in(root, zlib.crc32(role.encode()) & 0x7FFFFFFF)
    for counter in counters:
        key = jax.random.fold_in(key, counter)
    return key
