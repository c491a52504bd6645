"""The enumeration of layouts, against one that knows nothing of forms, orders or roles."""

import collections
import itertools
import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvla import config as c
from jaxvla.config import ConfigError
from jaxvla.layout import AXES, ROLES, Layout, RoleLayout, parse_layout, write_layout
from jaxvla.scaling.layouts import (
    REASONS,
    Constraints,
    enumerate_layouts,
    role_layouts,
    survey_layouts,
)
from jaxvla.validation import validate, validate_devices

_EVERYTHING = ("order", "tensor", "fsdp")


class _Env(c.EnvConfig):
    """Of no env: only batch sizes matter here."""


class _Model(c.ModelConfig):
    """The same of a model."""


class _Algorithm(c.AlgorithmConfig):
    """The same of an algorithm."""


def _config(envs: int = 8, per_update: int = 2, **serving: object) -> c.ExperimentConfig:
    return c.ExperimentConfig(
        name="x",
        env=_Env(name="m:E"),
        model=_Model(name="m:M"),
        algorithm=_Algorithm(name="m:A"),
        simulation=c.SimulationConfig(envs_per_group=envs),
        learning=c.LearningConfig(trajectories_per_update=per_update),
        serving=c.ServingConfig(**serving),  # pyright: ignore[reportArgumentType]
    )


def _is_valid(config: c.ExperimentConfig, text: str, num_devices: int) -> bool:
    config.meshes = c.MeshesConfig(layout=text)
    try:
        validate(config)
    except ConfigError:
        return False
    validate_devices(config, num_devices)
    return True


def _meshes(role: str, count: int) -> list[dict[str, int]]:
    """By trying all sizes of all axes."""
    every = itertools.product(range(1, count + 1), repeat=len(AXES[role]))
    return [dict(zip(AXES[role], x, strict=True)) for x in every if math.prod(x) == count]


def _is_enumerated(sets: dict[str, frozenset[int]], num_devices: int) -> bool:
    """Of sets of devices: what the module's docstring says of them."""
    everything = frozenset(range(num_devices))
    if frozenset().union(*sets.values()) != everything:
        return False
    if all(a == b or not a & b for a, b in itertools.combinations(sets.values(), 2)):
        return True
    for role in ROLES:
        first, second = (sets[other] for other in ROLES if other != role)
        if sets[role] == everything and not first & second and first | second == everything:
            return True
    return False


def _brute_force(num_devices: int) -> list[dict[str, RoleLayout]]:
    """Every role on every run of devices with every mesh."""
    runs = [range(a, b) for a, b in itertools.combinations(range(num_devices + 1), 2)]
    found = []
    for places in itertools.product(runs, repeat=len(ROLES)):
        where = dict(zip(ROLES, places, strict=True))
        if not _is_enumerated({r: frozenset(x) for r, x in where.items()}, num_devices):
            continue
        for axes in itertools.product(*(_meshes(r, len(x)) for r, x in where.items())):
            meshes = zip(where.items(), axes, strict=True)
            found += [
                {r: RoleLayout(first=x.start, num_devices=len(x), axes=a) for (r, x), a in meshes}
            ]
    return found


def _text(roles: dict[str, RoleLayout]) -> str:
    return " ".join(
        f"{name}={x.num_devices}@{x.first}:" + ",".join(f"{a}{n}" for a, n in x.axes.items())
        for name, x in roles.items()
    )


def _key(layout: Layout) -> str:
    return _text(layout.roles)


@pytest.mark.parametrize("num_devices", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize(
    "config",
    [
        _config(),
        _config(envs=6, per_update=1),
        _config(envs=12, num_servers=2, split_devices=True),
        _config(envs=4, per_update=3, buckets=(4, 8), max_batch=8),
    ],
    ids=["8 envs", "6 envs", "two servers apart", "buckets"],
)
def test_all_feasible_layouts_are_found_and_the_rest_is_counted(
    num_devices: int, config: c.ExperimentConfig
):
    every = _brute_force(num_devices)
    valid = {_text(x) for x in every if _is_valid(config, _text(x), num_devices)}
    survey = survey_layouts(num_devices, Constraints(config=config, keep=_EVERYTHING))
    kept = [_key(layout) for layout in survey.kept]
    assert len(kept) == len(set(kept))
    assert set(kept) == valid
    assert survey.total == len(every)
    assert set(survey.pruned) <= set(REASONS[:3])


@pytest.mark.parametrize("num_devices", [2, 4, 6, 8])
def test_one_order_of_the_same_parts_is_kept(num_devices: int):
    """Which devices have which roles is all that matters, not where they lie."""

    def signature(layout: Layout) -> tuple:
        shared = collections.Counter(
            tuple(r for r, x in layout.roles.items() if device in x.devices)
            for device in range(num_devices)
        )
        axes = tuple(tuple(x.axes.values()) for x in layout.roles.values())
        return frozenset(shared.items()), axes

    every = survey_layouts(num_devices, Constraints(config=_config(), keep=_EVERYTHING))
    one = survey_layouts(num_devices, Constraints(config=_config(), keep=("tensor", "fsdp")))
    assert {signature(x) for x in every.kept} == {signature(x) for x in one.kept}
    assert len({signature(x) for x in one.kept}) == len(one.kept)
    assert one.total == every.total


def test_without_a_limit_of_memory_no_model_is_split():
    layouts = enumerate_layouts(8, Constraints(config=_config()))
    assert [x.text for x in layouts] == [
        "colocated=8",
        "simulation=4 serving=4 learning=8@0",
        "simulation=4 learning=4 serving=8@0",
        "serving=4 learning=4 simulation=8@0",
        "simulation+serving=4 learning=4",
        "simulation=4 serving+learning=4",
        "simulation+learning=4 serving=4",
        "simulation=2 serving=2 learning=4",
        "simulation=2 serving=4 learning=2",
        "simulation=4 serving=2 learning=2",
    ]


def _memory(role: str, mesh: RoleLayout) -> int:
    """12 in the learner, split by fsdp and tensor; 4 in a server, split by tensor."""
    if role == "learning":
        return 12 // (mesh.axes["fsdp"] * mesh.axes["tensor"])
    return 4 // mesh.axes["tensor"] if role == "serving" else 0


def test_models_are_split_as_little_as_memory_asks_for():
    config = _config()
    constraints = Constraints(config=config, memory=_memory, device_memory=6)
    apart = [x for x in enumerate_layouts(8, constraints) if x.placement == "disaggregated"]
    assert [x.text for x in apart] == [
        "simulation=2 serving=2 learning=4:fsdp2",
        "simulation=2 serving=4 learning=2:fsdp2",
        "simulation=4 serving=2 learning=2:fsdp2",
    ]
    # Together with a server of 4 bytes, 2 are left for the learner.
    together = [x for x in enumerate_layouts(8, constraints) if x.placement == "colocated"]
    assert {x.text for x in together} == {"colocated=8:fsdp8"}


@pytest.mark.parametrize("limit", [1, 3, 4, 6, 9, 15, 16])
@pytest.mark.parametrize("num_devices", [4, 8])
def test_memory_of_all_roles_of_a_device_adds_up(num_devices: int, limit: int):
    config = _config()
    constraints = Constraints(
        config=config, memory=_memory, device_memory=limit, keep=("tensor", "fsdp")
    )
    survey = survey_layouts(num_devices, constraints)
    unlimited = survey_layouts(num_devices, Constraints(config=config, keep=("tensor", "fsdp")))

    def most(layout: Layout) -> int:
        return max(
            sum(_memory(r, x) for r, x in layout.roles.items() if device in x.devices)
            for device in range(num_devices)
        )

    assert [x.text for x in survey.kept] == [x.text for x in unlimited.kept if most(x) <= limit]


def test_whole_hosts():
    config = _config(envs=24, per_update=1)
    survey = survey_layouts(8, Constraints(config=config, devices_per_host=4, keep=_EVERYTHING))
    free = survey_layouts(8, Constraints(config=config, keep=_EVERYTHING))

    def lies_well(devices: range) -> bool:
        hosts = {device // 4 for device in devices}
        return len(hosts) == 1 or len(devices) == 4 * len(hosts)

    good = [x for x in free.kept if all(lies_well(r.devices) for r in x.roles.values())]
    assert {_key(x) for x in survey.kept} == {_key(x) for x in good}
    assert len(good) < len(free.kept)
    # Which order is kept depends on the hosts: 2, 4, 2 would lie across both.
    kept = [x.text for x in enumerate_layouts(8, Constraints(config=config, devices_per_host=4))]
    assert "simulation=2 learning=2 serving=4" in kept
    assert not any(text.startswith("simulation=2 serving=4") for text in kept)


_SIZES = st.integers(1, 12)


@settings(max_examples=60, deadline=None)
@given(
    num_devices=_SIZES,
    envs=st.sampled_from([1, 2, 4, 6, 8, 12, 16, 24, 60]),
    per_update=st.integers(1, 4),
    num_servers=st.integers(1, 2),
    split=st.booleans(),
    per_host=st.sampled_from([0, 1, 2, 4]),
    limit=st.integers(0, 20),
    keep=st.sets(st.sampled_from(_EVERYTHING)),
)
def test_every_layout_can_be_run(
    num_devices: int,
    envs: int,
    per_update: int,
    num_servers: int,
    split: bool,
    per_host: int,
    limit: int,
    keep: set[str],
):
    config = _config(envs, per_update, num_servers=num_servers, split_devices=split)
    survey = survey_layouts(
        num_devices,
        Constraints(
            config=config,
            devices_per_host=per_host,
            memory=_memory,
            device_memory=limit,
            keep=tuple(keep),
        ),
    )
    assert len({_key(x) for x in survey.kept}) == len(survey.kept)
    for layout in survey.kept:
        assert parse_layout(layout.text).roles == layout.roles
        assert layout.num_devices == num_devices
        assert _is_valid(config, layout.text, num_devices), layout.text
    assert set(survey.pruned) <= set(REASONS)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_written_layout_is_read_back(data: st.DataObject):
    roles = {}
    for role in ROLES:
        count = data.draw(_SIZES)
        axes = data.draw(st.sampled_from(_meshes(role, count)))
        first = data.draw(st.integers(0, 6))
        roles[role] = RoleLayout(first=first, num_devices=count, axes=axes)
    layout = write_layout(roles)
    assert parse_layout(layout.text).roles == roles == layout.roles


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("count", [1, 6, 8, 12])
def test_meshes_of_a_role(role: str, count: int):
    def tuples(meshes: list[dict[str, int]]) -> list[tuple[int, ...]]:
        return sorted(tuple(x[axis] for axis in AXES[role]) for x in meshes)

    found = [x.axes for x in role_layouts(role, count)]
    assert tuples(found) == tuples(_meshes(role, count))


def test_a_pod_is_enumerated_in_little_time():
    survey = survey_layouts(256, Constraints(config=_config(envs=256)))
    assert {x.num_devices for x in survey.kept} == {256}
    assert survey.total > 10**7 > len(survey.kept) > 3


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: enumerate_layouts(0, Constraints(config=_config())), "num_devices = 0"),
        (lambda: enumerate_layouts(2, Constraints(config=_config(), keep=("x",))), "no rule 'x'"),
        (
            lambda: enumerate_layouts(2, Constraints(config=_config(buckets=(4,)))),
            "serving.buckets",
        ),
    ],
)
def test_mistakes(call: Callable[[], object], complaint: str):
    with pytest.raises(ValueError, match=complaint):
        call()
