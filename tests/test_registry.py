"""Name tables."""

import sys

import pytest

from jaxvla.algorithms import ALGORITHMS
from jaxvla.envs import ENVS
from jaxvla.models import MODELS
from jaxvla.registry import Registry
from jaxvla.telemetry import WRITERS

_TABLE = Registry("shape", {"counter": "collections:Counter", "broken": "no_such_module:Thing"})


def test_resolves_lazily_and_by_path():
    import collections

    assert _TABLE.get("counter") is collections.Counter
    assert _TABLE.get("collections:OrderedDict") is collections.OrderedDict
    assert list(_TABLE) == ["counter", "broken"]
    assert "counter" in _TABLE and "any.module:Thing" in _TABLE and "circle" not in _TABLE
    assert "no_such_module" not in sys.modules


def test_an_unknown_name_answers_with_the_nearest():
    with pytest.raises(ValueError) as raised:
        _TABLE.get("countr")
    message = "unknown shape 'countr' (did you mean 'counter'?); known: broken, counter"
    assert str(raised.value) == message
    with pytest.raises(ValueError, match=r"unknown shape 'xyz'; known"):
        _TABLE.get("xyz")


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("broken", "cannot be imported: No module named 'no_such_module'"),
        ("collections:Nothing", "collections has no Nothing"),
        ("collections:", "is not of the form package.module:Attribute"),
        (":Counter", "is not of the form"),
        ("collections:Counter.update", "is not of the form"),
        ("../secret:Thing", "is not of the form"),
    ],
)
def test_bad_targets_are_value_errors(name: str, complaint: str):
    with pytest.raises(ValueError, match=complaint):
        _TABLE.get(name)


@pytest.mark.parametrize("registry", [ENVS, MODELS, ALGORITHMS, WRITERS], ids=lambda x: x.kind)
def test_every_entry_of_the_package_can_be_imported(registry: Registry):
    for name in registry:
        assert callable(registry.get(name))
