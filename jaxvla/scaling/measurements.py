"""What the stages of a run cost, as samples.

A `StageSamples` holds measured times, not means or fitted curves: whoever predicts draws from
them. `jaxvla.scaling.run_samples` reads them from the files of a run. No jax.

Every moment of a thread goes somewhere. What a thread does between two of its named blocks (keys
of a query, books of an update) is part of the stage that it follows, so that replayed stages add
up to the time that the run took.
"""

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_LOG = logging.getLogger(__name__)

MIN_SAMPLES = 20
"""Fewer of a stage are refused."""
WANTED_SAMPLES = 200
"""Fewer of a stage are warned of: tails are not seen."""

Samples = np.ndarray
"""float64 [n], seconds unless said otherwise."""
Table = Mapping[int, Samples]
"""Rows of a call -> samples."""

STAGES = ("simulate", "infer", "train", "publish")
"""Stages that load devices, under the names of their spans."""
_EMPTY = np.zeros(0)


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSamples:
    """Stage costs of one or several runs on one machine."""

    chunk_s: Table
    """By envs E of the group: one chunk step of one env group, and what the simulator does until
    its next query."""
    begin_s: Samples
    """From a ticket to the first query, per env group."""
    finish_s: Samples
    """From the last answer of a segment to the wait for the next ticket, per env group."""
    reset_s: Samples = field(default_factory=lambda: _EMPTY)
    """Reset of an env group before a trajectory; empty where episodes go on."""
    service_s: Table
    """By bucket: a batch of chunk queries, from the firing to the results."""
    value_s: Table
    """The same of value queries; empty where none are made."""
    after_s: Samples
    """From the results of a batch until the policy server waits for requests again."""
    answer_s: Samples
    """From the results of a batch until a simulator that waited for them goes on."""
    swap_s: Samples
    """What a policy server does when it is woken for new weights."""
    train_s: Table
    """By chunk queries of the update: the training of a whole batch. Empty if streamed."""
    gradient_s: Table
    """By chunk queries of the trajectory: its part of a streamed update. Empty unless streamed."""
    apply_s: Samples = field(default_factory=lambda: _EMPTY)
    """The rest of a streamed update, once all of its trajectories are in."""
    publish_s: Samples
    """The learner's part of a weight publication."""
    pull_s: Samples = field(default_factory=lambda: _EMPTY)
    """From the end of a publication until its weights can be swapped in. Empty in one process."""
    between_s: Samples
    """What else the learner does between two updates; checkpoints and evaluations left out."""
    num_chunks: Samples
    """Chunk steps of a segment."""
    num_values: Samples
    """Rounds of value queries of a segment."""
    env_steps_per_query: Samples
    """Control steps that follow from one chunk query, by update."""
    weight_bytes: int
    """Of one publication to one policy server."""
    cores: Mapping[str, float]
    """Processor cores that a stage of `STAGES` keeps busy while it runs alone. Empty if the run
    did not record processor time."""
    overlap: float
    """Share of the busy time in which several stages ran. Where they share devices or processor
    cores, times of a run with much of it are not those of the stages alone."""

    @property
    def segment_s(self) -> Samples:
        """Length of a segment whose queries are answered at once: one value per `begin_s`, made of
        means but for the number of chunk steps."""
        chunk_s = np.mean(np.concatenate([*self.chunk_s.values()]))
        return self.begin_s + self.finish_s.mean() + chunk_s * self.num_chunks.mean()

    def counts(self) -> dict[str, int]:
        """Stage -> samples of it, by rows where there are several kinds of calls."""
        result = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, np.ndarray):
                result[item.name] = len(value)
            elif isinstance(value, Mapping) and item.name != "cores":
                result |= {f"{item.name}[{rows}]": len(x) for rows, x in value.items()}
        return result

    def checked(self) -> "StageSamples":
        """These samples, without rows that were hardly seen.

        Warns of stages with fewer than `WANTED_SAMPLES`.

        Raises:
          ValueError: a stage that every run has was seen fewer than `MIN_SAMPLES` times.
        """
        tables = {name: _enough(getattr(self, name)) for name in _TABLES}
        result = dataclasses.replace(self, **tables)
        training = "train_s" if self.train_s else "gradient_s"
        needed = ("chunk_s", "service_s", training, *(("value_s",) if self.value_s else ()))
        for name in needed:
            if not tables[name]:
                seen = sum(len(x) for x in getattr(self, name).values())
                raise ValueError(
                    f"{name}: {seen} samples after warm-up, at least {MIN_SAMPLES} of one size are "
                    f"needed and {WANTED_SAMPLES} wanted. Fix: --config.learning.num_updates="
                    f"{WANTED_SAMPLES} in the run that is measured"
                )
            for rows, samples in tables[name].items():
                if len(samples) < WANTED_SAMPLES:
                    _LOG.warning(
                        "%s[%d]: %d samples, %d are wanted",
                        name,
                        rows,
                        len(samples),
                        WANTED_SAMPLES,
                    )
        return result

    def to_data(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return {item.name: _plain(getattr(self, item.name)) for item in dataclasses.fields(self)}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> "StageSamples":
        """The samples of `to_data`.

        Raises:
          ValueError: a field is missing or unknown.
        """
        names = {item.name for item in dataclasses.fields(cls)}
        if names != data.keys():
            raise ValueError(f"samples lack or have too much: {sorted(names ^ data.keys())}")
        values: dict[str, Any] = {}
        for name, value in data.items():
            if name in _TABLES:
                value = {int(rows): np.asarray(x, np.float64) for rows, x in value.items()}
            elif isinstance(value, list):
                value = np.asarray(value, np.float64)
            values[name] = value
        return cls(**values)


_TABLES = ("chunk_s", "service_s", "value_s", "train_s", "gradient_s")


def merged(runs: Sequence[StageSamples]) -> StageSamples:
    """Samples of several runs on one machine, such as one per batch size, as one set.

    The larger of the overlaps counts. Cores are means.

    Raises:
      ValueError: there is no run, or the runs publish weights of different sizes.
    """
    if not runs:
        raise ValueError("no runs to take samples from")
    sizes = {run.weight_bytes for run in runs}
    if len(sizes) > 1:
        raise ValueError(f"runs of different models: they publish {sorted(sizes)} bytes")
    values: dict[str, Any] = {}
    for item in dataclasses.fields(StageSamples):
        parts = [getattr(run, item.name) for run in runs]
        if item.name in _TABLES:
            values[item.name] = _joined(parts)
        elif isinstance(parts[0], np.ndarray):
            values[item.name] = np.concatenate(parts)
    known = [run.cores for run in runs if run.cores]
    cores = {stage: float(np.mean([x[stage] for x in known])) for stage in (known or [{}])[0]}
    return StageSamples(
        **values,
        weight_bytes=runs[0].weight_bytes,
        cores=cores,
        overlap=max(run.overlap for run in runs),
    )


def _joined(tables: Iterable[Table]) -> dict[int, Samples]:
    parts: dict[int, list[Samples]] = {}
    for table in tables:
        for rows, samples in table.items():
            parts.setdefault(rows, []).append(samples)
    return {rows: np.concatenate(parts[rows]) for rows in sorted(parts)}


def _enough(table: Table) -> dict[int, Samples]:
    return {rows: samples for rows, samples in table.items() if len(samples) >= MIN_SAMPLES}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [float(f"{x:.6g}") for x in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(x) for key, x in value.items()}
    return value
