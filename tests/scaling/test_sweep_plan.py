"""What a sweep tries, and what it refuses before anything starts."""

import math
from typing import Any

import pytest
from sweep_parts import make_config, make_plan

from jaxvla.config import ConfigError
from jaxvla.layout import parse_layout
from jaxvla.scaling.sweep_plan import parse_axes

_KNOWN = ["seed", "name", "simulation.envs_per_group", "serving.buckets", "meshes.layout"]
_KNOWN += ["sweep.repeats", "evaluation.interval", "learning.num_updates"]


def test_layouts_times_axes():
    plan = make_plan(
        make_config(
            layouts=("colocated=4", "simulation=1 serving=1 learning=2"),
            axes=("simulation.envs_per_group=8,16", "schedule.max_staleness=0,1,2"),
        )
    )
    assert len(plan.trials) == 12 and not plan.impossible
    assert plan.trials[1].title == (
        "colocated=4 simulation.envs_per_group=8 schedule.max_staleness=1"
    )
    assert len({trial.title for trial in plan.trials}) == 12
    settings = plan.trials[-1].settings()
    assert settings["simulation.envs_per_group"] == "16"
    assert settings["meshes.layout"] == "simulation=1 serving=1 learning=2"
    for name in ("warm_start.num_steps", "evaluation.num_episodes", "evaluation.interval"):
        assert settings[name] == "0"
    assert int(settings["checkpoint.interval"]) > int(settings["learning.num_updates"])


def test_all_trials_make_as_many_chunk_queries():
    config = make_config(
        layouts=("colocated=4",),
        axes=("simulation.envs_per_group=4,8,12,32", "learning.trajectories_per_update=2,4"),
        warmup_updates=3,
        measured_updates=6,
    )
    work = 6 * 2 * 8 * 4
    for trial in make_plan(config).trials:
        envs = int(trial.overrides["simulation.envs_per_group"])
        per_update = int(trial.overrides["learning.trajectories_per_update"]) * envs * 4
        assert trial.samples_per_update == per_update
        assert trial.first_update == 3
        assert trial.last_update == 3 + math.ceil(work / per_update)


def test_what_is_measured_lies_between_filling_and_emptying_the_queue():
    config = make_config(
        layouts=("colocated=4",),
        axes=("schedule.max_staleness=0,3", "schedule.window=1,4"),
        warmup_updates=2,
        measured_updates=5,
    )
    # S + ceil((W - 1) / P) + 1 updates of simulation ahead, with P = 2 trajectories an update.
    expected = {("0", "1"): 1, ("0", "4"): 3, ("3", "1"): 4, ("3", "4"): 6}
    for trial in make_plan(config).trials:
        ahead = expected[tuple(trial.overrides.values())]  # pyright: ignore[reportArgumentType]
        assert trial.first_update == max(2, ahead)
        assert trial.last_update == trial.first_update + 5
        assert trial.num_updates == trial.last_update + ahead


def test_all_stands_for_those_worth_trying_of_each_number_of_devices():
    plan = make_plan(make_config(layouts=("all",), num_devices=(2, 4)))
    assert {trial.layout.num_devices for trial in plan.trials} == {2, 4}
    assert set(plan.pruned) == {2, 4}
    assert plan.pruned[4]["the same parts in another order"] > 0
    more = make_plan(make_config(layouts=("all",), keep=("tensor",), max_trials=100))
    fewer = make_plan(make_config(layouts=("all",)))
    assert {x.title for x in fewer.trials} < {x.title for x in more.trials}
    # A layout that is named as well is tried once.
    both = make_plan(make_config(layouts=("simulation=4@0 serving=4@0 learning=4@0", "all")))
    assert len(both.trials) == len(fewer.trials)


def test_combinations_that_cannot_work_are_left_out():
    plan = make_plan(
        make_config(layouts=("colocated=4", "colocated=1"), axes=("simulation.envs_per_group=6,8",))
    )
    assert [trial.title for trial in plan.trials] == [
        "colocated=4 simulation.envs_per_group=8",
        "colocated=1 simulation.envs_per_group=6",
        "colocated=1 simulation.envs_per_group=8",
    ]
    ((trial, error),) = plan.impossible
    assert trial.title == "colocated=4 simulation.envs_per_group=6"
    assert error.name == "simulation.envs_per_group"


@pytest.mark.parametrize(
    ("sweep", "name", "complaint"),
    [
        ({"layouts": ()}, "sweep.layouts", "nothing to try"),
        ({"layouts": ("colocated=4:pipe2",)}, "sweep.layouts", "no axis 'pipe'"),
        ({"layouts": ("colocated=8",)}, "sweep.layouts", "needs 8 devices, trials have 4"),
        ({"layouts": ("colocated=3",)}, "simulation.envs_per_group", "multiple of"),
        ({"num_devices": (2, 8)}, "sweep.num_devices", r"each must be in \[1, 4\]"),
        ({"num_devices": (0,)}, "sweep.num_devices", r"each must be in \[1, 4\]"),
        ({"keep": ("data",)}, "sweep.keep", "must be of order, tensor, fsdp"),
        ({"max_trials": 2}, "sweep.max_trials", r"there are \d+ trials"),
        ({"axes": ("simulation.envs_per_group=8,7",)}, "simulation.envs_per_group", "multiple"),
        ({"axes": ("simulation.envs_per_group=8,x",)}, "simulation.envs_per_group", "an integer"),
        ({"axes": ("simulation.envs=8",)}, "sweep.axes", "did you mean"),
    ],
)
def test_mistakes(sweep: dict[str, Any], name: str, complaint: str):
    given = {"layouts": ("colocated=4",)} if "axes" in sweep else {}
    with pytest.raises(ConfigError, match=complaint) as caught:
        make_plan(make_config(**given, **sweep))
    assert caught.value.name == name
    assert "Fix: " in str(caught.value)


def test_devices_that_no_layout_fits():
    config = make_config(layouts=("all",))
    config.simulation.envs_per_group = config.learning.trajectories_per_update = 1
    with pytest.raises(ConfigError, match=r"none can work \(.*\d+ envs do not divide"):
        make_plan(config)


def test_programs_in_processes_of_their_own_are_refused():
    config = make_config()
    config.runtime.kind = "ray"
    with pytest.raises(ConfigError, match=r"Fix: --config\.runtime\.kind=local"):
        make_plan(config)


@pytest.mark.parametrize(
    ("axes", "values"),
    [
        (("seed=1,2",), {"seed": ("1", "2")}),
        (("seed= 1 , 2",), {"seed": ("1", "2")}),
        (("serving.buckets=(8,16),(4,),()",), {"serving.buckets": ("(8,16)", "(4,)", "()")}),
        (("seed=3", "serving.buckets=8"), {"seed": ("3",), "serving.buckets": ("8",)}),
        ((), {}),
    ],
)
def test_axes(axes: tuple[str, ...], values: dict[str, tuple[str, ...]]):
    assert parse_axes(axes, _KNOWN) == values


@pytest.mark.parametrize(
    ("axes", "complaint"),
    [
        (("seed",), "is not SETTING=VALUE,VALUE"),
        (("seed=",), "is not SETTING=VALUE,VALUE"),
        (("seed=1,,2",), "is not SETTING=VALUE,VALUE"),
        (("seeds=1",), "did you mean 'seed'"),
        (("seed=1", "seed=2"), "seed is given twice"),
        (("seed=1,1",), "a value of seed is given twice"),
        (("meshes.layout=colocated=1",), "sweep.layouts"),
        (("name=a,b",), "it names the work directory"),
        (("learning.num_updates=1",), "sweep.measured_updates"),
        (("sweep.repeats=1",), "no trial uses it"),
        (("evaluation.interval=1",), "no trial uses it"),
    ],
)
def test_axes_that_are_none(axes: tuple[str, ...], complaint: str):
    with pytest.raises(ConfigError, match=complaint):
        parse_axes(axes, _KNOWN)


def test_layouts_of_trials_are_parsed():
    plan = make_plan(make_config(layouts=("learning=2 simulation+serving=2",)))
    assert plan.trials[0].layout == parse_layout("learning=2 simulation+serving=2")
