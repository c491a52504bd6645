"""Settings of runs with a process for every program."""

import dataclasses
import pathlib

import pytest

from jaxvla import config as c
from jaxvla.cluster import parse_resources, weights_children, weights_parent
from jaxvla.config import ConfigError
from jaxvla.main import load_config
from jaxvla.runtime.cluster import check_cluster
from jaxvla.validation import validate


@pytest.mark.parametrize(
    ("text", "amounts"),
    [
        ("", {}),
        ("CPU=8", {"CPU": 8.0}),
        ("CPU=8,GPU=0.5", {"CPU": 8.0, "GPU": 0.5}),
        ("TPU=4, TPU-v5e-8-head=1", {"TPU": 4.0, "TPU-v5e-8-head": 1.0}),
    ],
)
def test_resources(text: str, amounts: dict[str, float]):
    assert parse_resources(text) == amounts


@pytest.mark.parametrize("text", ["CPU", "CPU=", "=1", "CPU=-1", "CPU=1,CPU=2", "1=CPU", "CPU=x"])
def test_wrong_resources(text: str):
    with pytest.raises(ValueError, match="RESOURCE=AMOUNT"):
        parse_resources(text)


def _config(**runtime: object) -> c.ExperimentConfig:
    config = load_config("configs/debug.py")
    return dataclasses.replace(config, runtime=c.RuntimeConfig(**runtime))  # pyright: ignore


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"kind": "cluster"}, "runtime.kind"),
        ({"kind": "ray", "placement": "NEAR"}, "runtime.placement"),
        ({"kind": "ray", "host": "a b"}, "runtime.host"),
        ({"kind": "processes", "host": "0.0.0.0"}, "runtime.host"),
        ({"kind": "processes", "host": "node"}, "runtime.host"),
        ({"kind": "processes", "address": "auto"}, "runtime.address"),
        ({"kind": "ray", "learner_resources": "GPU"}, "runtime.learner_resources"),
        ({"kind": "ray", "tls_directory": "/nowhere"}, "runtime.tls_directory"),
        ({"kind": "ray", "max_restarts": -1}, "runtime.max_restarts"),
        ({"kind": "ray", "weights_fanout": -1}, "runtime.weights_fanout"),
        ({"kind": "ray", "silence_s": 0.0}, "runtime.silence_s"),
        ({"kind": "ray", "restart_backoff_s": 0.0}, "runtime.restart_backoff_s"),
    ],
)
def test_settings_that_cannot_work_are_named(settings: dict[str, object], field: str):
    with pytest.raises(ConfigError, match=f"config.{field}"):
        validate(_config(**settings))


LAYOUT = "simulation+serving=4@0 learning=8@0"


@pytest.mark.parametrize(
    ("settings", "layout", "message"),
    [
        ({}, LAYOUT, None),
        ({"learner_processes": 4}, "simulation+serving=2@0 learning=8@0:fsdp8", None),
        ({"learner_processes": 0}, LAYOUT, "runtime.learner_processes = 0: must be > 0"),
        (
            {"kind": "local"},
            LAYOUT,
            "runtime.learner_processes = 2: must be 1 with kind local, one process. "
            "Fix: --config.runtime.learner_processes=1",
        ),
        (
            {"learner_processes": 6},
            LAYOUT,
            "runtime.learner_processes = 6: must divide the 8 learning devices. "
            "Fix: --config.runtime.learner_processes=2",
        ),
        (
            {},
            "colocated=8",
            "meshes.layout = 'colocated=8': simulation may have 4 devices at most, those of one "
            "learner process, which evaluates. Fix: --config.meshes.layout='simulation+serving=4@0 "
            "learning=8@0'",
        ),
        ({}, "simulation=1@0 serving=8@0 learning=8@0", "serving may have 4 devices at most"),
        ({"meeting_s": 0.0}, LAYOUT, "runtime.meeting_s = 0.0: must be in (0, 3600]"),
        ({"follower_resources": "TPU"}, LAYOUT, "runtime.follower_resources = 'TPU'"),
    ],
)
def test_a_learner_of_several_processes(
    settings: dict[str, object], layout: str, message: str | None
):
    config = _config(**({"kind": "processes", "learner_processes": 2} | settings))
    config.meshes.layout = layout
    if message is None:
        validate(config)
        return
    with pytest.raises(ConfigError) as raised:
        validate(config)
    assert message in str(raised.value)


def test_the_warm_start_is_made_by_one_process(tmp_path: pathlib.Path):
    config = _config(kind="processes", learner_processes=2)
    with pytest.raises(ConfigError, match="learner_processes = 2: the warm start is made by one"):
        check_cluster(config, tmp_path)
    (tmp_path / "checkpoints" / "0.orbax-checkpoint-tmp").mkdir(parents=True)  # not complete
    with pytest.raises(ConfigError, match="the warm start"):
        check_cluster(config, tmp_path)
    (tmp_path / "checkpoints" / "0").mkdir()
    check_cluster(config, tmp_path)
    config.warm_start.num_steps = 0
    check_cluster(config, tmp_path / "new")


def test_one_process_has_no_tree_of_weights():
    with pytest.raises(ConfigError) as raised:
        validate(_config(kind="local", weights_fanout=2))
    assert (
        "runtime.weights_fanout = 2: must be 0 with kind local, one process. "
        "Fix: --config.runtime.weights_fanout=0"
    ) in str(raised.value)
    validate(_config(kind="processes", weights_fanout=2))


@pytest.mark.parametrize(
    ("fanout", "parents"),
    [
        (0, [None] * 7),
        (1, [None, 0, 1, 2, 3, 4, 5]),
        (2, [None, None, 0, 0, 1, 1, 2]),
        (3, [None, None, None, 0, 0, 0, 1]),
        (9, [None] * 7),
    ],
)
def test_the_tree_of_weights(fanout: int, parents: list[int | None]):
    assert [weights_parent(i, fanout) for i in range(7)] == parents
    for parent in range(7):
        children = [i for i in range(7) if parents[i] == parent]
        assert list(weights_children(parent, fanout, 7)) == children


@pytest.mark.parametrize("kind", ["local", "processes", "ray"])
def test_settings_that_can(kind: str):
    validate(_config(kind=kind))


def test_tls_needs_both_files(tmp_path: pathlib.Path):
    (tmp_path / "cert.pem").touch()
    with pytest.raises(ConfigError, match=r"lacks key\.pem"):
        validate(_config(kind="ray", tls_directory=str(tmp_path)))
    (tmp_path / "key.pem").touch()
    validate(_config(kind="ray", tls_directory=str(tmp_path)))


def test_simulators_share_the_groups_evenly():
    config = _config()
    config.simulation.num_groups, config.simulation.num_simulators = 4, 3
    with pytest.raises(ConfigError, match=r"config\.simulation\.num_simulators = 3"):
        validate(config)
    config.simulation.num_simulators = 2
    validate(config)


def test_servers_of_a_cluster_are_not_parts_of_one_mesh():
    config = _config(kind="processes")
    config.meshes.layout = "simulation=1 serving=2 learning=1"
    config.serving.num_servers, config.serving.split_devices = 2, True
    with pytest.raises(ConfigError, match=r"config\.serving\.split_devices"):
        validate(config)
