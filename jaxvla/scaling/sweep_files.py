"""sweep.json and sweep.csv: what has been run, kept after every run. No jax."""

import csv
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxvla.config import UsageError
from jaxvla.scaling.sweep_results import TrialResult
from jaxvla.telemetry.writers import replacing, write_json

SWEEP_JSON, SWEEP_CSV = "sweep.json", "sweep.csv"
_FORMAT = 1


def read_results(path: pathlib.Path) -> list[TrialResult]:
    """Trials of a sweep.json."""
    return [TrialResult.read(record) for record in json.loads(path.read_text())["trials"]]


class SweepBook:
    """The results of a sweep in its work directory."""

    def __init__(
        self, workdir: pathlib.Path, conditions: Mapping[str, Any], about: Mapping[str, Any]
    ):
        """Reads what is there; writes nothing.

        Args:
          workdir: of the sweep.
          conditions: what all trials have in common; the same in every part of a sweep.
          about: what else to write, which may change.

        Raises:
          UsageError: the directory has a sweep under other conditions, or a file that is none.
        """
        self._workdir = workdir
        self._conditions = json.loads(json.dumps(conditions))
        self._about = dict(about)
        self._found: dict[str, TrialResult] = {}
        path = workdir / SWEEP_JSON
        if path.exists():
            self._read(path)
        elif workdir.is_dir() and any(workdir.iterdir()):
            raise UsageError(
                f"--workdir={workdir}: is not empty and has no {SWEEP_JSON}. Fix: --workdir=NEW_DIR"
            )

    def _read(self, path: pathlib.Path) -> None:
        new = "Fix: --workdir=NEW_DIR"
        try:
            content = json.loads(path.read_text())
            earlier = content["conditions"]
            results = [TrialResult.read(record) for record in content["trials"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"--workdir: {path} is no sweep of jaxvla: {error!r}. {new}"
            ) from error
        for name, one, other in _differences(earlier, self._conditions):
            raise UsageError(
                f"--workdir: {path} has a sweep with {name} = {one!r}, now it is {other!r}. {new}"
            )
        self._found = {result.title: result for result in results}

    def result(self, fresh: TrialResult) -> TrialResult:
        """What is known of a trial: the same object every time, to be added to."""
        return self._found.setdefault(fresh.title, fresh)

    @property
    def results(self) -> list[TrialResult]:
        """All trials, in order."""
        return list(self._found.values())

    def save(self) -> None:
        """Writes both files."""
        self._workdir.mkdir(parents=True, exist_ok=True)
        trials = [result.record() for result in self.results]
        write_json(
            self._workdir / SWEEP_JSON,
            {"format": _FORMAT, "conditions": self._conditions, **self._about, "trials": trials},
        )
        write_csv(self._workdir / SWEEP_CSV, self.results)


def _differences(one: Any, other: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, one value, other value) of leaves that differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in dict.fromkeys([*one, *other]):
            yield from _differences(one.get(name), other.get(name), f"{prefix}{name}.")
    elif one != other:
        yield prefix.removesuffix("."), one, other


def write_csv(path: pathlib.Path, results: Sequence[TrialResult]) -> None:
    """One row per trial: its layout, a column per axis, then median, smallest and largest value of
    every measurement. A trial without numbers has none."""
    axes = list(dict.fromkeys(name for x in results for name in x.overrides))
    names = list(dict.fromkeys(name for x in results for run in x.repeats for name in run))
    head = ["layout", "placement", "num_devices", *axes, "num_repeats", "failed"]
    columns = [f"{name}{end}" for name in names for end in ("", "_min", "_max")]
    with replacing(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*head, *columns])
        for result in results:
            record = result.record()
            row = [record[name] for name in head[:3]]
            row += [result.overrides.get(name, "") for name in axes]
            row += [len(result.repeats), result.failed or ""]
            for name in names:
                values = (result.median(name), *result.spread(name))
                row += [f"{x:.6g}" if x == x else "" for x in values]
            writer.writerow(row)
