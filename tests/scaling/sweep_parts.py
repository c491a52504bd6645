"""A config, trials and runs of sweeps, for tests without processes."""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from jaxvla import config as c
from jaxvla.config import ConfigError
from jaxvla.layout import parse_layout
from jaxvla.scaling.layouts import Constraints
from jaxvla.scaling.sweep_plan import Plan, Trial, plan_sweep
from jaxvla.scaling.sweep_results import TrialResult
from jaxvla.scaling.trial_run import Measurement, TrialFailedError


class Env(c.EnvConfig):
    """Of no env."""


class Model(c.ModelConfig):
    """Of no model."""


class Algorithm(c.AlgorithmConfig):
    """Of no algorithm."""


def make_config(**sweep: Any) -> c.ExperimentConfig:
    """8 envs a group, 2 trajectories of 4 chunk queries an update."""
    return c.ExperimentConfig(
        name="x",
        env=Env(name="m:E"),
        model=Model(name="m:M"),
        algorithm=Algorithm(name="m:A"),
        simulation=c.SimulationConfig(envs_per_group=8, segment_length=4),
        sweep=c.SweepConfig(**sweep),
    )


def make_plan(config: c.ExperimentConfig, num_devices: int = 4) -> Plan:
    """The plan of a sweep of that config."""

    def reconfigure(changes: Mapping[str, str]) -> c.ExperimentConfig:
        own = make_config()
        for name, text in changes.items():
            section, _, field = name.rpartition(".")
            holder = getattr(own, section) if section else own
            kind = type(getattr(holder, field))
            if kind is int and not text.isdigit():
                raise ConfigError(name, text, "must be an integer", "a digit")
            value = {bool: text == "True", tuple: ()}.get(kind)
            setattr(holder, field, kind(text) if value is None else value)
        return own

    return plan_sweep(
        config,
        num_devices=num_devices,
        reconfigure=reconfigure,
        constraints=Constraints(config=config, keep=config.sweep.keep),
    )


def make_trial(layout: str, **overrides: str) -> Trial:
    """A trial of few updates."""
    return Trial(
        layout=parse_layout(layout),
        overrides=overrides,
        first_update=1,
        last_update=4,
        num_updates=6,
        samples_per_update=64,
    )


def make_result(layout: str, *speeds: float, **busy: float) -> TrialResult:
    """Runs that differ in throughput only."""
    result = TrialResult.of(make_trial(layout))
    utilisation = {f"utilisation/{role}/busy_fraction": x for role, x in busy.items()}
    waiting = {"utilisation/serving/waiting_on/requests_fraction": 1 - busy.get("serving", 1.0)}
    result.repeats = [
        {"env_steps_per_s": x, "duration_s": 10.0, **utilisation, **waiting} for x in speeds
    ]
    return result


class FakeRuns:
    """In the place of processes: remembers what was run, and answers from a script."""

    def __init__(self, **answers: list[float | str | BaseException]):
        """Args: first role of a layout -> the answers of its runs: seconds that one took, or why
        it failed, or what it raises."""
        self.answers = answers
        self.order: list[tuple[str, pathlib.Path]] = []

    def run(self, trial: Trial, directory: pathlib.Path) -> Measurement:
        """See `TrialRunner.run`."""
        name = re.split("[=+]", trial.layout.text)[0]
        self.order.append((name, directory))
        answer = self.answers[name].pop(0)
        if isinstance(answer, BaseException):
            raise answer
        if isinstance(answer, str):
            raise TrialFailedError(answer)
        return {"env_steps_per_s": 100.0 / answer, "duration_s": answer}
