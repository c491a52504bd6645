"""What a sweep tries: layouts times settings, checked before anything starts. No jax."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from jaxvla.config import ConfigError, ExperimentConfig, field_names, override
from jaxvla.layout import Layout, LayoutError, parse_layout
from jaxvla.registry import nearest
from jaxvla.scaling.layouts import RULES, Constraints, survey_layouts
from jaxvla.transport.staleness import credit_rule
from jaxvla.validation import validate

ALL = "all"
_LAYOUT = "meshes.layout"
_CLOSED = {
    _LAYOUT: "layouts have a setting of their own, sweep.layouts",
    "name": "it names the work directory",
    "learning.num_updates": "it follows from sweep.warmup_updates and sweep.measured_updates",
    "runtime.kind": "trials are threads of one process",
    "telemetry.trace": "latencies are read from the trace",
}
_CLOSED_SECTIONS = ("sweep", "warm_start", "finetune", "evaluation", "checkpoint", "websocket")
"""What no trial uses."""

Reconfigure = Callable[[Mapping[str, str]], ExperimentConfig]
"""Settings by name, as on the command line -> the config with them.

Raises:
  ConfigError: a value has the wrong type.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One layout with one combination of settings."""

    layout: Layout
    overrides: dict[str, str]
    """Setting -> value, one per axis, in the order of the axes."""
    first_update: int
    """At its end the measurement begins."""
    last_update: int
    """At its end the measurement stops."""
    num_updates: int
    """Updates to run. Simulators make no more trajectories than these need, so what is measured
    ends before the queue runs dry."""
    samples_per_update: int
    """Chunk queries; where segments are as long as the longest episode (-1), trajectories' envs."""

    @property
    def title(self) -> str:
        """Its layout and settings in one line, by which sweep.json knows it."""
        return " ".join([self.layout.text, *(f"{k}={v}" for k, v in self.overrides.items())])

    def settings(self) -> dict[str, str]:
        """All settings in which its run differs from the config of the sweep: no time goes into
        anything but asynchronous RL."""
        return self.overrides | {
            _LAYOUT: self.layout.text,
            "learning.num_updates": str(self.num_updates),
            "warm_start.num_steps": "0",
            "warm_start.num_grounding_steps": "0",
            "evaluation.num_episodes": "0",
            "evaluation.interval": "0",
            "checkpoint.interval": str(self.num_updates + 1),
            "telemetry.writers": "()",
            "telemetry.trace": "True",
        }


@dataclass(kw_only=True, slots=True)
class Plan:
    """All trials of a sweep."""

    trials: list[Trial] = field(default_factory=list)
    pruned: dict[int, Counter[str]] = field(default_factory=dict)
    """Number of devices -> reason -> layouts that "all" does not try."""
    impossible: list[tuple[Trial, ConfigError]] = field(default_factory=list)
    """Settings that cannot work together, and why."""


def plan_sweep(
    config: ExperimentConfig,
    *,
    num_devices: int,
    reconfigure: Reconfigure,
    constraints: Constraints,
) -> Plan:
    """All trials of a sweep.

    Args:
      config: valid.
      num_devices: devices that every trial has.
      reconfigure: applies settings to the config.
      constraints: of the layouts that "all" stands for.

    Raises:
      ConfigError: a setting of the sweep cannot work, a layout or a value of an axis can work in
        no trial, or there are more trials than allowed.
    """
    sweep, plan = config.sweep, Plan()
    if config.runtime.kind != "local":
        fix = override("runtime.kind", "local")
        raise ConfigError("runtime.kind", config.runtime.kind, "a sweep has threads only", fix)
    axes = parse_axes(sweep.axes, list(field_names(config)))
    layouts = _layouts(config, num_devices, constraints, plan)
    choices = [[(name, value) for value in values] for name, values in axes.items()]
    for layout in layouts:
        for combination in itertools.product(*choices):
            _add(plan, config, layout, dict(combination), reconfigure)
    _require_used(plan, layouts, choices)
    if len(plan.trials) > sweep.max_trials:
        raise ConfigError(
            "sweep.max_trials",
            sweep.max_trials,
            f"there are {len(plan.trials)} trials",
            f"{override('sweep.max_trials', len(plan.trials))}, or fewer layouts or axes",
        )
    return plan


def parse_axes(axes: Sequence[str], known: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Setting -> values to try, of texts such as "simulation.envs_per_group=8,16".

    Args:
      axes: the texts.
      known: names of all settings.

    Raises:
      ConfigError: a text is malformed, or its setting is unknown, not to be swept, or in two axes.
    """
    found: dict[str, tuple[str, ...]] = {}
    example = override("sweep.axes", ("simulation.envs_per_group=8,16",))

    def refuse(allowed: str) -> ConfigError:
        return ConfigError("sweep.axes", tuple(axes), allowed, example)

    for text in axes:
        name, equals, rest = text.partition("=")
        values = tuple(_split(rest))
        if not equals or not all(values):
            raise refuse(f"{text!r} is not SETTING=VALUE,VALUE")
        if name not in known:
            raise refuse(f"there is no setting {name!r}{nearest(name, list(known))}")
        if name in _CLOSED or name.partition(".")[0] in _CLOSED_SECTIONS:
            raise refuse(f"{name} cannot be swept: {_CLOSED.get(name, 'no trial uses it')}")
        if name in found or len(set(values)) < len(values):
            what = name if name in found else f"a value of {name}"
            raise refuse(f"{what} is given twice")
        found[name] = values
    return found


def _split(text: str) -> list[str]:
    """At commas that are not within brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _layouts(
    config: ExperimentConfig, num_devices: int, constraints: Constraints, plan: Plan
) -> list[Layout]:
    """Those of the sweep, each once; counts pruned ones in the plan."""
    sweep, found = config.sweep, []
    if not sweep.layouts:
        fix = override("sweep.layouts", (ALL,))
        raise ConfigError("sweep.layouts", (), "there is nothing to try", fix)
    for name in sweep.keep:
        if name not in RULES:
            fix = override("sweep.keep", tuple(RULES))
            raise ConfigError("sweep.keep", sweep.keep, f"must be of {', '.join(RULES)}", fix)
    for text in sweep.layouts:
        if text == ALL:
            for count in _device_counts(config, num_devices):
                survey = survey_layouts(count, constraints)
                plan.pruned[count] = survey.pruned
                found += survey.kept
        else:
            found.append(_parse(config, text, num_devices))
    if not found:
        fix = override("sweep.layouts", (f"colocated={num_devices}",))
        reasons = "; ".join(
            f"{n} {r}" for counts in plan.pruned.values() for r, n in counts.items()
        )
        raise ConfigError("sweep.layouts", sweep.layouts, f"none can work ({reasons})", fix)
    return list({str(sorted(x.roles.items())): x for x in reversed(found)}.values())[::-1]


def _device_counts(config: ExperimentConfig, num_devices: int) -> tuple[int, ...]:
    """Those that "all" fills, each once."""
    counts = config.sweep.num_devices or (num_devices,)
    for count in counts:
        if not 1 <= count <= num_devices:
            raise ConfigError(
                "sweep.num_devices",
                counts,
                f"each must be in [1, {num_devices}], the devices that trials have",
                f"{override('sweep.num_devices', (num_devices,))}, or on CPU "
                f"{override('sweep.host_devices', max(1, *counts))}",
            )
    return tuple(dict.fromkeys(counts))


def _parse(config: ExperimentConfig, text: str, num_devices: int) -> Layout:
    fix = override("sweep.layouts", (f"colocated={num_devices}",))
    try:
        layout = parse_layout(text)
    except LayoutError as error:
        raise ConfigError("sweep.layouts", config.sweep.layouts, str(error), fix) from error
    if layout.num_devices > num_devices:
        raise ConfigError(
            "sweep.layouts",
            config.sweep.layouts,
            f"{text!r} needs {layout.num_devices} devices, trials have {num_devices}",
            f"{fix}, or on CPU {override('sweep.host_devices', layout.num_devices)}",
        )
    return layout


def _add(
    plan: Plan,
    config: ExperimentConfig,
    layout: Layout,
    overrides: dict[str, str],
    reconfigure: Reconfigure,
) -> None:
    """One more trial, if it can work."""
    trial = Trial(
        layout=layout,
        overrides=overrides,
        first_update=1,
        last_update=2,
        num_updates=2,
        samples_per_update=1,
    )
    try:
        own = reconfigure(trial.settings())
        validate(own)
    except ConfigError as error:
        plan.impossible.append((trial, error))
        return
    samples = _samples_per_update(own)
    work = config.sweep.measured_updates * _samples_per_update(config)
    # Simulators may be so many updates ahead: until they are, and once they have made the last
    # trajectory, what the learner consumes is not what they make.
    ahead = credit_rule(own).bound + 1
    first = max(config.sweep.warmup_updates, ahead)
    last = first + math.ceil(work / samples)
    plan.trials.append(
        replace(
            trial,
            first_update=first,
            last_update=last,
            num_updates=last + ahead,
            samples_per_update=samples,
        )
    )


def _samples_per_update(config: ExperimentConfig) -> int:
    """Chunk queries; without the length of segments that follows from the env."""
    simulation = config.simulation
    length = max(simulation.segment_length, 1)
    return config.learning.trajectories_per_update * simulation.envs_per_group * length


def _require_used(plan: Plan, layouts: list[Layout], choices: list[list[tuple[str, str]]]) -> None:
    """Refuses a layout, or a value of an axis, that is in no trial: nobody asked for that."""
    used = {trial.layout.text for trial in plan.trials}
    for layout in layouts:
        if layout.text not in used:
            raise next(e for trial, e in plan.impossible if trial.layout.text == layout.text)
    for name, value in itertools.chain(*choices):
        if not any(trial.overrides[name] == value for trial in plan.trials):
            raise next(e for trial, e in plan.impossible if trial.overrides[name] == value)
