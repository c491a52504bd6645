"""Process-wide settings of JAX that follow from the config."""

import pathlib

import jax

from jaxvla.config import ExperimentConfig


def configure(config: ExperimentConfig) -> None:
    """Makes the settings; before anything is compiled."""
    cache = config.runtime.compilation_cache
    if cache:
        directory = pathlib.Path(cache).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(directory))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if config.runtime.matmul_precision != "default":
        jax.config.update("jax_default_matmul_precision", config.runtime.matmul_precision)


def leave_accelerators() -> None:
    """Keeps this process off them: JAX would take most of a GPU's memory, and a TPU for itself.

    To be called before JAX starts its backend.
    """
    jax.config.update("jax_platforms", "cpu")
