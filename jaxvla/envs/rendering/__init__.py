"""Camera images: a ray caster in JAX that runs wherever JAX does."""
