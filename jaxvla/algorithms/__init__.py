"""Algorithms by name."""

from jaxvla.registry import Registry

ALGORITHMS = Registry(
    "algorithm",
    {"ppo": "jaxvla.algorithms.ppo:PPO", "grpo": "jaxvla.algorithms.grpo:GRPO"},
)
