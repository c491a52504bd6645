"""The controller's own small parts; whole runs are in tests/integration."""

import jax
import jax.numpy as jnp

from jaxvla.runtime.controller import _losses_first


def test_the_losses_of_a_warm_start_come_first() -> None:
    @jax.jit
    def step() -> dict[str, jax.Array]:
        return {
            "loss/grounding": jnp.float32(0.25),
            "loss/actions": jnp.float32(1.5),
            "grad_norm": jnp.float32(12.0),
        }

    line = _losses_first(jax.device_get(step()))
    assert line == "loss/actions 1.500, loss/grounding 0.250, grad_norm 12.000"
