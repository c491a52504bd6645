"""One code path for every placement: the same losses wherever the roles and servers are."""

import json
import math
import pathlib
from typing import Any

import pytest
from tiny_run import (
    LOSSES,
    NO_EVALUATION,
    Run,
    make_blueprint,
    quick_jit,
    require_invariants,
)

from jaxvla import config as c

fast_compilation = pytest.fixture(quick_jit, scope="module", autouse=True)

LOCKSTEP = c.ScheduleConfig(overlap_training=False, overlap_rollout=False)
WIDE: dict[str, Any] = {
    "schedule": LOCKSTEP,
    "simulation": c.SimulationConfig(num_groups=2, envs_per_group=8, segment_length=2),
    "serving": c.ServingConfig(trigger_size=8, max_batch=8, buckets=(8,)),
    "learning": c.LearningConfig(num_updates=3, trajectories_per_update=2),
    "evaluation": NO_EVALUATION,
}
"""Sections of a synchronous run that eight devices can share."""


def losses(run: Run) -> list[list[float]]:
    return [[record[name] for name in LOSSES] for record in run.records()]


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("one"), make_blueprint(**WIDE)).expect(0)


@pytest.mark.parametrize(
    ("layout", "placement"),
    [
        ("colocated=8:data2,fsdp2,tensor2", "colocated"),
        ("simulation=2 serving=2 learning=4:data2,fsdp2", "disaggregated"),
        pytest.param("simulation+serving=4 learning=4:fsdp4", "hybrid", marks=pytest.mark.slow),
        ("simulation=1@0 serving=4@0:tensor2 learning=4@2:fsdp2", "hybrid"),
    ],
)
def test_placements_give_equal_losses(
    on_one_device: Run, tmp_path: pathlib.Path, layout: str, placement: str
) -> None:
    """Synchronous mode; up to the rounding of sums over other numbers of devices."""
    blueprint = make_blueprint(layout=layout, **WIDE)
    assert blueprint.layout.placement == placement
    run = Run(tmp_path, blueprint).expect(0)
    for actual, expected in zip(losses(run), losses(on_one_device), strict=True):
        for x, y in zip(actual, expected, strict=True):
            assert math.isclose(x, y, rel_tol=1e-5, abs_tol=1e-5), (actual, expected)


@pytest.fixture(scope="module")
def with_one_server(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Lockstep, and a batch for each of two groups."""
    one = make_blueprint(
        schedule=LOCKSTEP,
        serving=c.ServingConfig(trigger_size=2, max_batch=2, buckets=(2,)),
        evaluation=NO_EVALUATION,
    )
    return Run(tmp_path_factory.mktemp("server"), one).expect(0)


@pytest.mark.parametrize(
    ("assignment", "is_split"),
    [("round_robin", False), ("greedy", False), ("1,0", False), ("round_robin", True)],
)
def test_two_servers_give_bitwise_what_one_gives(
    with_one_server: Run, tmp_path: pathlib.Path, assignment: str, is_split: bool
) -> None:
    serving = c.ServingConfig(
        num_servers=2,
        assignment=assignment,
        split_devices=is_split,
        trigger_size=2,
        max_batch=2,
        buckets=(2,),
    )
    layout = "simulation=1 serving=2 learning=1" if is_split else "colocated=1"
    blueprint = make_blueprint(
        layout=layout, schedule=LOCKSTEP, serving=serving, evaluation=NO_EVALUATION
    )
    run = Run(tmp_path, blueprint).expect(0)
    assert losses(run) == losses(with_one_server)
    require_invariants(run.records(), 4)


def test_each_server_has_its_part_of_the_devices() -> None:
    serving = c.ServingConfig(num_servers=2, split_devices=True, buckets=(4,), max_batch=4)
    blueprint = make_blueprint(layout="simulation=2 serving=4 learning=2", serving=serving)
    parts = Run(pathlib.Path("unused"), blueprint).controller._parts
    devices = [
        {device.id for leaf in _leaves(sampler.params_shardings) for device in leaf.device_set}
        for sampler in parts.samplers
    ]
    assert devices == [{2, 3}, {4, 5}]
    assert parts.sampler is parts.samplers[0]


def test_servers_on_the_same_devices_share_their_functions() -> None:
    serving = c.ServingConfig(num_servers=2, buckets=(4,), max_batch=4)
    parts = Run(pathlib.Path("unused"), make_blueprint(serving=serving)).controller._parts
    assert parts.samplers[0] is parts.samplers[1]


def _leaves(tree: Any) -> list[Any]:
    return [leaf for child in tree.values() for leaf in child.values()]


def test_an_asynchronous_run_with_two_servers(tmp_path: pathlib.Path) -> None:
    serving = c.ServingConfig(
        num_servers=2, assignment="greedy", trigger_size=2, max_batch=4, buckets=(2, 4)
    )
    blueprint = make_blueprint(serving=serving, evaluation=NO_EVALUATION)
    run = Run(tmp_path, blueprint).expect(0)
    require_invariants(run.records(), 4)
    for record in run.records():
        for role in ("simulation", "serving", "learning"):
            busy = record[f"utilisation/{role}/busy_fraction"]
            waits = [value for name, value in record.items() if f"/{role}/waiting_on/" in name]
            assert 0.0 <= busy <= 1.0 and busy + sum(waits) == pytest.approx(1.0)
    trace = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    programs = {e["pid"]: e["args"]["name"] for e in trace if e["name"] == "process_name"}
    tracks = [
        e["args"]["name"]
        for e in trace
        if e["name"] == "thread_name" and programs[e["pid"]] == "serving"
    ]
    assert sorted(tracks) == ["server_0", "server_1"]


def test_one_env_per_group_on_four_learning_devices(tmp_path: pathlib.Path) -> None:
    """Trajectories of one env each are split over devices once they are joined."""
    sections: dict[str, Any] = {
        "schedule": LOCKSTEP,
        "simulation": c.SimulationConfig(num_groups=4, envs_per_group=1, segment_length=2),
        "serving": c.ServingConfig(trigger_size=4, max_batch=4, buckets=(4,)),
        "learning": c.LearningConfig(num_updates=2, trajectories_per_update=4),
        "evaluation": NO_EVALUATION,
    }
    layouts = ("colocated=1", "simulation=1@0 serving=1@0 learning=4@0:fsdp4")
    one, four = (
        losses(Run(tmp_path / str(i), make_blueprint(layout=layout, **sections)).expect(0))
        for i, layout in enumerate(layouts)
    )
    for actual, expected in zip(four, one, strict=True):
        assert actual == pytest.approx(expected, rel=1e-5, abs=1e-5)
