"""Policies by name."""

from jaxvla.registry import Registry

MODELS = Registry("model", {"pi": "jaxvla.models.pi:PiPolicy"})
