"""Environments by name."""

from jaxvla.registry import Registry

ENVS = Registry(
    "env",
    {
        "tabletop": "jaxvla.envs.tabletop:Tabletop",
        "libero_mjx": "jaxvla.envs.libero_mjx:LiberoMjx",
        "libero_host": "jaxvla.envs.libero_host:LiberoHost",
    },
)
