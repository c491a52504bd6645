"""What Ray's start must leave as it was."""

import signal
import sys
import types
from typing import Any

import pytest

from jaxvla.config import RuntimeConfig
from jaxvla.runtime.ray_cluster import RayLauncher


def test_a_stop_is_still_ours_after_rays_start(monkeypatch: pytest.MonkeyPatch):
    """`ray.init` takes SIGTERM for itself, and would exit without a checkpoint."""
    heard: list[str] = []

    def init(**settings: Any) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: heard.append("ray"))

    ray = types.SimpleNamespace(is_initialized=lambda: False, init=init)
    monkeypatch.setitem(sys.modules, "ray", ray)
    previous = signal.signal(signal.SIGTERM, lambda number, frame: heard.append("jaxvla"))
    try:
        RayLauncher(RuntimeConfig(kind="ray"), ["learner"])
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert heard == ["jaxvla"]
