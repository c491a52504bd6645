"""Configs as plain data."""

import json

import pytest

from jaxvla.config import ExperimentConfig
from jaxvla.config_data import config_from_data, config_to_data
from jaxvla.main import load_config

_CONFIGS = (
    "configs/quickstart.py",
    "configs/tabletop_grpo.py",
    "configs/libero_spatial_mjx.py",
    "configs/pi05_libero_ppo.py:tiny",
)


def _data(config: ExperimentConfig):
    return json.loads(json.dumps(config_to_data(config)))


@pytest.mark.parametrize("source", _CONFIGS)
def test_a_config_comes_back_the_same(source: str):
    config = load_config(source)
    same = config_from_data(_data(config))
    assert same == config
    assert type(same.env) is type(config.env)
    assert type(same.algorithm) is type(config.algorithm)


def _changed(path: str, value: object):
    data = _data(load_config("configs/quickstart.py"))
    *sections, name = path.split(".")
    place = data
    for section in sections:
        place = place[section]
    if value is None:
        del place[name]
    else:
        place[name] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("seed", "1", "config.seed = '1' is no int"),
        ("learning.num_updates", 1.5, "config.learning.num_updates = 1.5 is no int"),
        ("learning.num_updates", True, "config.learning.num_updates = True is no int"),
        ("learning.num_updates", None, "config.learning.num_updates is missing"),
        ("learning.more", 1, "config.learning.more is unknown"),
        ("learning", 3, "config.learning is no section"),
        ("env.class", "os:system", "no EnvConfig"),
        ("env.class", "jaxvla.config:ModelConfig", "no EnvConfig"),
        ("env.class", "no_such_module:Config", "cannot be had"),
        ("env.class", "jaxvla.config:NoSuch", "cannot be had"),
        ("env.class", ":", "cannot be had"),
        ("serving.buckets", 4, "config.serving.buckets = 4 is no list"),
        ("serving.buckets", ["a"], "config.serving.buckets = 'a' is no int"),
    ],
)
def test_wrong_data_is_refused_by_name(path: str, value: object, named: str):
    with pytest.raises(ValueError, match=named):
        config_from_data(_changed(path, value))
