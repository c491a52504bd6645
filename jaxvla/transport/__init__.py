"""How trajectories reach the learner and how weights reach the policy servers."""

from jaxvla.registry import Registry

TRANSPORTS = Registry("transport", {"in_process": "jaxvla.transport.in_process:InProcessQueue"})
"""Trajectory queues by name."""
