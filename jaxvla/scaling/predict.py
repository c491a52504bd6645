"""Scaling tables of a measured run: what 8 to 256 devices would make of it. All simulated.

    python -m jaxvla.scaling.predict --run=WORKDIR [--run=WORKDIR ...] [--devices=8,16,32,...]
                                     [--set=schedule.FIELD=VALUE ...] [--updates=7] [--warmup=2]
                                     [--cores=N] [--seed=0] [--json=FILE]

The first run is the one that is scaled; the others, of the same model on the same machine, add
samples: other batch sizes, other group sizes. `--set` changes the schedule or the serving section
of what is scaled, not of what was measured. Where stages share devices or processor cores, measure
with --config.schedule.overlap_training=False --config.schedule.overlap_rollout=False: stage costs
are then those of the stages alone, and how they slow each other is simulated.
"""

import argparse
import copy
import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxvla.config import UsageError
from jaxvla.layout import parse_layout
from jaxvla.scaling.cost_model import BANDS, Base, Deployment, best_num_learning, deploy
from jaxvla.scaling.measurements import StageSamples, merged
from jaxvla.scaling.run_samples import NUM_WARMUP, RunFiles, measure, read_run
from jaxvla.scaling.simulate import simulate
from jaxvla.scaling.system import System, system_of

DEVICES = (8, 16, 32, 64, 128, 256)
MOST_OVERLAP = 0.05
"""Share of the busy time in which stages may have run side by side where they share devices."""
_SETTABLE = ("schedule", "serving")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """A row of a table. Simulated."""

    mode: str
    """weak or strong."""
    deployment: str
    """replicated or separate."""
    num_devices: int
    num_learning: int
    """Devices that only train; 0 where replicated."""
    band: str
    """Of the assumptions: low, mid or high."""
    env_steps_per_s: float
    efficiency: float
    """Env steps/s per device, divided by those of the first row of this table."""
    staleness_mean: float
    staleness_max: int
    busy: Mapping[str, float]
    """Role -> share of its threads' time."""


def base_of(
    runs: Sequence[RunFiles], *, settings: Sequence[str] = (), num_cores: float = 0.0
) -> Base:
    """What is scaled: the first run's config with changed settings, and the samples of all runs.

    Args:
      runs: of one model on one machine.
      settings: as "schedule.max_staleness=2".
      num_cores: of the machine; 0: as the first run says.

    Raises:
      ValueError: too few samples, or samples of stages that slowed each other.
    """
    samples = merged([measure(run) for run in runs]).checked()
    run, config = runs[0], with_settings(runs[0].config, settings)
    system = system_of(
        config,
        platform=run.platform,
        num_cores=cores_of(run, num_cores),
        num_warmup=1,
    )
    check_alone(system, samples)
    algorithm = config["algorithm"]
    is_streamed = config["schedule"]["stream_microbatches"]
    return Base(
        system=system,
        samples=samples,
        steps_per_update=1
        if is_streamed
        else algorithm["num_epochs"] * algorithm["num_minibatches"],
        trajectory_bytes=trajectory_bytes(config),
        devices_per_unit=parse_layout(config["meshes"]["layout"]).num_devices,
    )


def cores_of(run: RunFiles, given: float) -> float:
    """Cores of the machine; raises ValueError if nobody tells."""
    if run.platform == "cpu" and not (given or run.cores):
        raise ValueError("the run does not say how many cores its machine had. Fix: --cores=2")
    return given or run.cores


def check_alone(system: System, samples: StageSamples) -> None:
    """Refuses samples of stages that slowed each other by an unknown amount.

    Raises:
      ValueError: they share devices and overlapped, or nobody knows how many cores they need.
    """
    roles = [
        {name for names in devices for name in names}
        for devices in (system.group_devices, system.server_devices, (system.learner_devices,))
    ]
    is_shared = len(set.union(*roles)) < sum(len(names) for names in roles)
    if is_shared and samples.overlap > MOST_OVERLAP:
        raise ValueError(
            f"stages that share devices overlapped for {samples.overlap:.0%} of the time: their "
            "times are not their own. Fix: measure a run with "
            "--config.schedule.overlap_training=False --config.schedule.overlap_rollout=False"
        )
    if system.cores and not samples.cores:
        raise ValueError(
            "the spans of the run do not tell processor seconds: it is older than that. "
            "Fix: run it again"
        )


def with_settings(config: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """A config with some fields changed.

    Raises:
      ValueError: a setting is not SECTION.FIELD=VALUE, or no field that may be set here.
    """
    changed = copy.deepcopy(dict(config))
    for setting in settings:
        name, _, text = setting.partition("=")
        section, _, field = name.partition(".")
        if section not in _SETTABLE or field not in changed[section]:
            raise ValueError(
                f"--set={setting}: {name!r} is no field of {' or '.join(_SETTABLE)}. "
                "Fix: --set=schedule.max_staleness=2"
            )
        try:
            changed[section][field] = json.loads(text.lower())
        except json.JSONDecodeError as error:
            raise ValueError(f"--set={setting}: {text!r} is no value ({error})") from error
    return changed


def trajectory_bytes(config: Mapping[str, Any]) -> float:
    """Of the images of a trajectory, which are nearly all of it: uint8, 3 channels."""
    simulation, model = config["simulation"], config["model"]
    size = config["env"].get("image_size") or model.get("image_size", 224)
    frames = simulation["envs_per_group"] * simulation["segment_length"]
    return 3.0 * size**2 * model.get("num_cameras", 2) * frames


def predictions(
    base: Base, devices: Sequence[int], *, num_warmup: int, num_updates: int, seed: int
) -> Iterator[Prediction]:
    """Rows of all tables, table by table.

    Raises:
      ValueError: a number of devices is not a multiple of the measured machine's.
    """
    units = [_units(base, count) for count in devices]
    system = dataclasses.replace(base.system, num_warmup=num_warmup, num_updates=num_updates)
    base = dataclasses.replace(base, system=dataclasses.replace(system, is_endless=True))
    for mode in ("weak", "strong"):
        for kind in ("replicated", "separate"):
            for band in BANDS:
                yield from _table(base, units, mode, kind, band, seed)


def _table(
    base: Base, units: Sequence[int], mode: str, kind: str, band: str, seed: int
) -> Iterator[Prediction]:
    """One table; it ends where the envs of a group can no longer be divided."""
    first = 0.0
    for count in units:
        shrink = count // units[0] if mode == "strong" else 1
        if base.system.envs_per_group % shrink or count % units[0]:
            return
        num_learning = best_num_learning(base, count, BANDS[band]) if kind == "separate" else 0
        if kind == "separate" and not num_learning:
            continue
        deployment = Deployment(num_units=count, num_learning=num_learning, shrink=shrink)
        result = simulate(*deploy(base, deployment, BANDS[band]), seed=seed)
        per_unit = result.env_steps_per_s / count
        first = first or per_unit
        yield Prediction(
            mode=mode,
            deployment=kind,
            num_devices=count * base.devices_per_unit,
            num_learning=num_learning * base.devices_per_unit,
            band=band,
            env_steps_per_s=result.env_steps_per_s,
            efficiency=per_unit / first,
            staleness_mean=result.staleness_mean,
            staleness_max=result.staleness_max,
            busy=result.busy,
        )


def _units(base: Base, num_devices: int) -> int:
    if num_devices < 1 or num_devices % base.devices_per_unit:
        raise ValueError(
            f"--devices: {num_devices} is no multiple of the {base.devices_per_unit} devices of "
            f"the measured machine. Fix: --devices={8 * base.devices_per_unit}"
        )
    return num_devices // base.devices_per_unit


def lines(rows: Sequence[Prediction]) -> Iterator[str]:
    """Tables as text. Env steps/s under low, mid and high assumptions, the rest under mid."""
    for mode in ("weak", "strong"):
        for kind in ("replicated", "separate"):
            found = [x for x in rows if (x.mode, x.deployment) == (mode, kind)]
            if not found:
                continue
            yield f"{mode} scaling, {kind} (simulated)"
            yield (
                f"{'devices':>8}{'learning':>9}{'env steps/s':>12}{'low':>10}{'high':>10}"
                f"{'efficiency':>11}{'staleness':>10}{'max':>4}   busy: simulation serving learning"
            )
            for mid in (x for x in found if x.band == "mid"):
                yield _line(mid, [x for x in found if x.num_devices == mid.num_devices])
            yield ""


def _line(mid: Prediction, same: Sequence[Prediction]) -> str:
    rates = {x.band: x.env_steps_per_s for x in same}
    busy = "".join(f"{mid.busy[role]:>9.0%}" for role in ("simulation", "serving", "learning"))
    return (
        f"{mid.num_devices:>8}{mid.num_learning:>9}{mid.env_steps_per_s:>12.1f}"
        f"{rates.get('low', 0.0):>10.1f}{rates.get('high', 0.0):>10.1f}{mid.efficiency:>11.1%}"
        f"{mid.staleness_mean:>10.2f}{mid.staleness_max:>4}{'':>8}{busy}"
    )


def main(argv: Sequence[str]) -> int:
    """Prints the tables; returns the exit code of the contract."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=pathlib.Path, action="append", required=True)
    parser.add_argument("--devices", default=",".join(map(str, DEVICES)))
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--updates", type=int, default=7, help="of a simulated run")
    parser.add_argument("--warmup", type=int, default=2, help="first updates not counted")
    parser.add_argument("--cores", type=float, default=0.0, help="of the machine, if it has no GPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args(argv[1:])
    try:
        _predict(options)
    except (ValueError, UsageError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    return 0


def _predict(options: argparse.Namespace) -> None:
    devices = [int(count) for count in options.devices.split(",")]
    runs = [read_run(workdir.expanduser()) for workdir in options.run]
    base = base_of(runs, settings=options.settings, num_cores=options.cores)
    rows = list(
        predictions(
            base,
            devices,
            num_warmup=options.warmup,
            num_updates=options.updates,
            seed=options.seed,
        )
    )
    sys.stdout.write("\n".join(lines(rows)) + "\n")
    if options.json:
        report = {
            "label": "simulated",
            "runs": [str(workdir) for workdir in options.run],
            "settings": options.settings,
            "warmup_updates": NUM_WARMUP,
            "samples": base.samples.counts(),
            "assumptions": {name: dataclasses.asdict(x) for name, x in BANDS.items()},
            "seed": options.seed,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
