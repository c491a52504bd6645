"""The estimate of memory, against shapes of the parameters."""

import math
import pathlib

import jax
import pytest

from jaxvla.layout import parse_layout
from jaxvla.main import load_config
from jaxvla.runtime.build import Blueprint, draw_blueprint
from jaxvla.runtime.memory import MemoryEstimate
from jaxvla.runtime.memory_use import peak_memory

_DEBUG = pathlib.Path(__file__).parents[2] / "configs" / "debug.py"


@pytest.fixture(scope="module")
def blueprint() -> Blueprint:
    return draw_blueprint(load_config(str(_DEBUG)))


@pytest.fixture(scope="module")
def estimate(blueprint: Blueprint) -> MemoryEstimate:
    return MemoryEstimate(blueprint)


def _params_bytes(blueprint: Blueprint) -> int:
    params = jax.tree.leaves(blueprint.params_struct())
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in params)


def test_a_learner_without_splitting(blueprint: Blueprint, estimate: MemoryEstimate):
    found = estimate.learning(parse_layout("colocated=1").roles["learning"])
    size = _params_bytes(blueprint)
    assert found["parameters"] == found["gradients"] == size
    # AdamW: two moments as large as the parameters, and a few counters.
    assert 2 * size <= found["optimizer state"] <= 2 * size + 1000
    assert found["activations"] > 0


def test_splitting_needs_less(estimate: MemoryEstimate):
    whole, data, fsdp, tensor = (
        estimate.learning(parse_layout(text).roles["learning"])
        for text in ("colocated=1", "colocated=4", "colocated=4:fsdp4", "colocated=4:tensor4")
    )
    for what in ("parameters", "gradients", "optimizer state"):
        assert whole[what] == data[what]  # replicated
        assert whole[what] / 4 <= fsdp[what] < whole[what] / 2
        assert tensor[what] < whole[what]
    assert data["activations"] == whole["activations"] // 4


def test_servers_on_the_same_devices_add_up(blueprint: Blueprint):
    config = load_config(str(_DEBUG))
    config.serving.num_servers = 2
    role = parse_layout("colocated=2").roles["serving"]
    two = MemoryEstimate(draw_blueprint(config))
    assert two.total("serving", role) == 2 * MemoryEstimate(blueprint).total("serving", role)
    config.serving.split_devices = True
    apart = MemoryEstimate(draw_blueprint(config))
    one = parse_layout("colocated=1").roles["serving"]
    assert apart.total("serving", role) == MemoryEstimate(blueprint).total("serving", one)


def test_simulated_worlds_are_not_counted(estimate: MemoryEstimate):
    assert estimate.total("simulation", parse_layout("colocated=1").roles["simulation"]) == 0


def test_what_this_process_has_held():
    found = peak_memory()
    assert found["peak_rss_mib"] > 50
    assert math.isnan(found["peak_device_mib"])  # CPU devices do not say
