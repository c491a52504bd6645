"""Stage samples from the files of a run: trace.json, metrics.jsonl and config.json. No jax.

The first updates are warm-up: nothing that begins before their end counts. Threads are read as the
programs work (`simulation.simulator`, `serving.server`, `learning.learner`): a simulator waits for
a ticket, then for answers, and steps its groups; a policy server waits for requests and infers; a
learner waits for trajectories, trains and publishes.
"""

import bisect
import itertools
import json
import pathlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxvla.layout import ROLES
from jaxvla.scaling.measurements import STAGES, StageSamples
from jaxvla.scaling.trace_tracks import Span, Track, overlapping_fraction, read_tracks

NUM_WARMUP = 2
"""Default of `measure`: compilation and first touches of memory are over by then."""
_PAUSES = ("checkpoint", "evaluation")
"""What the learner waits for between updates and no prediction repeats."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFiles:
    """What a run has left behind."""

    config: Mapping[str, Any]
    """The resolved config, by section."""
    records: Sequence[Mapping[str, float]]
    """Of metrics.jsonl, one per update."""
    tracks: Sequence[Track]
    platform: str
    """Of its devices: cpu, cuda, tpu, ..."""
    cores: int
    """Processor cores of its machine; 0 if it does not say."""


def read_run(workdir: pathlib.Path) -> RunFiles:
    """The files of a work directory.

    Raises:
      ValueError: one is missing or is not what a training run writes.
    """
    for name in ("config.json", "metrics.jsonl"):
        if not (workdir / name).is_file():
            raise ValueError(f"{workdir / name}: no such file. Fix: name a run of --job=train")
    try:
        written = json.loads((workdir / "config.json").read_text())
        records = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
        platform = str(written["devices"][0]).partition(":")[0].lower()
        return RunFiles(
            config=written["config"],
            records=[x for x in records if "rate/env_steps_per_s" in x],
            tracks=read_tracks(workdir / "trace.json"),
            platform="cpu" if "cpu" in platform else platform,
            cores=int(written.get("cores") or 0),
        )
    except (json.JSONDecodeError, KeyError, IndexError) as error:
        raise ValueError(f"{workdir}: not the files of a run ({error!r})") from error


def measure(run: RunFiles, *, num_warmup: int = NUM_WARMUP) -> StageSamples:
    """Samples of one run, see `StageSamples.checked` for what is too few.

    Args:
      run: all programs in one process.
      num_warmup: first updates that do not count.

    Raises:
      ValueError: the run is too short, or its trace does not tell what is needed.
    """
    learning = [x for x in run.tracks if x.program == "learning"]
    if len(learning) != 1:
        raise ValueError(
            f"the trace has {len(learning)} learners, must be 1. Fix: --config.runtime.kind=local"
        )
    shape = _Shape.of(run.config)
    updates = list(_updates(learning[0], shape))
    if len(updates) <= num_warmup:
        raise ValueError(
            f"the run made {len(updates)} updates, {num_warmup} of them warm-up. "
            f"Fix: --config.learning.num_updates={num_warmup + 200}"
        )
    start_s = updates[num_warmup - 1].end_s if num_warmup else -np.inf
    found = _Found()
    for update in updates[num_warmup:]:
        update.add_to(found, shape)
    serving = [x for x in run.tracks if x.program == "serving"]
    for track in serving:
        _read_server(track, start_s, shape, found)
    ends_s = sorted(x.end_s for track in serving for x in track.spans if x.name == "infer")
    for track in run.tracks:
        if track.program == "simulation":
            _read_simulator(track, start_s, shape, found, ends_s)
    return found.samples(
        env_steps_per_query=_env_steps_per_query(run.records, num_warmup, shape),
        weight_bytes=_weight_bytes(run.records, shape),
        cores=_cores(run.tracks, start_s),
        overlap=overlapping_fraction(run.tracks, start_s),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shape:
    """Sizes that the config gives."""

    num_envs: int
    """Of a group."""
    segment_length: int
    trajectories_per_update: int
    is_streamed: bool
    buckets: tuple[int, ...]
    num_servers: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "_Shape":
        simulation, serving = config["simulation"], config["serving"]
        return cls(
            num_envs=simulation["envs_per_group"],
            segment_length=simulation["segment_length"],
            trajectories_per_update=config["learning"]["trajectories_per_update"],
            is_streamed=config["schedule"]["stream_microbatches"],
            buckets=tuple(serving["buckets"]),
            num_servers=serving.get("num_servers", 1),
        )

    @property
    def queries(self) -> int:
        """Chunk queries of a trajectory."""
        return self.num_envs * self.segment_length

    def bucket(self, rows: int) -> int:
        """The compiled size that a batch was padded to."""
        return self.buckets[bisect.bisect_left(self.buckets, rows)]


@dataclass(kw_only=True)
class _Found:
    """Samples on their way."""

    tables: defaultdict[str, defaultdict[int, list[float]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    lists: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def samples(self, **rest: Any) -> StageSamples:
        """As arrays."""

        def table(name: str) -> dict[int, np.ndarray]:
            found = self.tables[name]
            return {rows: np.asarray(found[rows], np.float64) for rows in sorted(found)}

        def array(name: str) -> np.ndarray:
            return np.asarray(self.lists[name], np.float64)

        names = ("chunk_s", "service_s", "value_s", "train_s", "gradient_s")
        arrays = ("begin_s", "finish_s", "reset_s", "after_s", "answer_s", "swap_s", "apply_s")
        arrays += ("publish_s", "between_s", "num_chunks", "num_values")
        return StageSamples(
            **{name: table(name) for name in names},
            **{name: array(name) for name in arrays},
            **rest,
        )


# ------------------------------------------------------------------------------ learner


@dataclass(kw_only=True)
class _Update:
    """The spans of one update."""

    trained: list[Span] = field(default_factory=list)
    published_s: float | None = None
    paused_s: float = 0.0
    following_s: float | None = None
    """When the learner waits for trajectories again; None after the last update."""

    @property
    def end_s(self) -> float:
        """When its training ended."""
        return self.trained[-1].end_s

    def add_to(self, found: _Found, shape: _Shape) -> None:
        """Books what it took."""
        lengths_s = [span.length_s for span in self.trained]
        if shape.is_streamed:
            found.tables["gradient_s"][shape.queries] += lengths_s[:-1]
            found.lists["apply_s"].append(lengths_s[-1])
        else:
            queries = shape.queries * shape.trajectories_per_update
            found.tables["train_s"][queries].append(lengths_s[0])
        if self.published_s is not None:
            found.lists["publish_s"].append(self.published_s)
        if self.following_s is not None:
            spent_s = (self.published_s or 0.0) + self.paused_s
            found.lists["between_s"].append(self.following_s - self.end_s - spent_s)


def _updates(track: Track, shape: _Shape) -> Iterator[_Update]:
    """Whole updates of a learner, in order."""
    size = shape.trajectories_per_update + 1 if shape.is_streamed else 1
    update = _Update()
    for span in track.spans:
        if span.waits_for("trajectories") and len(update.trained) == size:
            update.following_s = span.start_s
            yield update
            update = _Update()
        elif span.name == "train":
            update.trained.append(span)
        elif span.name == "publish":
            update.published_s = span.length_s
        elif any(span.waits_for(reason) for reason in _PAUSES):
            update.paused_s += span.length_s
    if len(update.trained) == size:
        yield update


# ------------------------------------------------------------------------------- server


def _read_server(track: Track, start_s: float, shape: _Shape, found: _Found) -> None:
    """Books batches and swaps of a policy server."""
    spans = track.spans
    for before, span, after in zip(spans, spans[1:], spans[2:], strict=False):
        if before.start_s < start_s or not before.waits_for("requests"):
            continue
        if span.waits_for("requests"):  # woken for weights alone
            found.lists["swap_s"].append(span.start_s - before.end_s)
        elif span.name == "infer":
            if "rows" not in span.args:
                raise ValueError(
                    "spans of the policy server do not say how many rows a batch had: the run is "
                    "older than that. Fix: run it again"
                )
            name = "value_s" if span.args["kind"] == "value" else "service_s"
            bucket = shape.bucket(span.args["rows"])
            found.tables[name][bucket].append(span.end_s - before.end_s)
            if after.waits_for("requests"):
                found.lists["after_s"].append(after.start_s - span.end_s)


# ---------------------------------------------------------------------------- simulator


def _read_simulator(
    track: Track, start_s: float, shape: _Shape, found: _Found, ends_s: Sequence[float]
) -> None:
    """Books the whole segments of a simulator's thread."""
    spans = track.spans
    tickets = [i for i, span in enumerate(spans) if span.waits_for("learner")]
    for first, last in itertools.pairwise(tickets):
        if spans[first].end_s >= start_s:
            _read_segment(spans[first : last + 1], shape, found, ends_s)


def _read_segment(
    spans: Sequence[Span], shape: _Shape, found: _Found, ends_s: Sequence[float]
) -> None:
    """Books one segment of one or more groups, from its wait for tickets to the next such wait."""
    chunks_s: list[float] = []
    num_groups, num_rounds, num_values, finish_s = _num_groups(spans), 0, 0, 0.0
    mark_s, stepped = spans[0].end_s, -1
    for span in spans[1:]:
        if span.name == "simulate":
            chunks_s.append(span.end_s - mark_s)
            stepped += 1
        elif span.name == "reset":
            finish_s += span.start_s - mark_s
            found.lists["reset_s"].append(span.length_s / num_groups)
        elif span.waits_for("inference"):
            _end_round(stepped, span.start_s - mark_s, chunks_s, found, num_groups)
            num_rounds, num_values = num_rounds + (stepped > 0), num_values + (stepped == 0)
            finish_s += (span.start_s - mark_s) * (stepped == 0)
            stepped = 0
            index = bisect.bisect_right(ends_s, span.end_s) - 1
            if index >= 0 and ends_s[index] >= span.start_s:
                found.lists["answer_s"].append(span.end_s - ends_s[index])
        else:  # the next ticket
            num_rounds, num_values = num_rounds + (stepped > 0), num_values + (stepped == 0)
            finish_s += span.start_s - mark_s
        mark_s = span.end_s
    found.tables["chunk_s"][shape.num_envs] += chunks_s
    found.lists["finish_s"] += [finish_s / num_groups] * num_groups
    found.lists["num_chunks"].append(num_rounds)
    found.lists["num_values"].append(num_values)


def _num_groups(spans: Sequence[Span]) -> int:
    """Groups that the thread moves: most chunk steps between two waits."""
    most, stepped = 1, 0
    for span in spans:
        stepped = stepped + 1 if span.name == "simulate" else 0
        most = max(most, stepped)
    return most


def _end_round(
    stepped: int, rest_s: float, chunks_s: list[float], found: _Found, num_groups: int
) -> None:
    """What a thread does before it asks goes to the last chunk step, or begins the segment."""
    if stepped < 0:
        found.lists["begin_s"] += [rest_s / num_groups] * num_groups
    elif stepped > 0:
        chunks_s[-1] += rest_s


# ------------------------------------------------------------------------------ figures


def _env_steps_per_query(
    records: Sequence[Mapping[str, float]], num_warmup: int, shape: _Shape
) -> np.ndarray:
    """From the rates of the updates' windows."""
    queries = shape.queries * shape.trajectories_per_update
    values = [
        after["rate/env_steps_per_s"] * (after["time_s"] - before["time_s"]) / queries
        for before, after in itertools.pairwise(records)
    ]
    return np.asarray(values[max(num_warmup - 1, 0) :], np.float64)


def _weight_bytes(records: Sequence[Mapping[str, float]], shape: _Shape) -> int:
    """Of the last publication, to one policy server."""
    return int(records[-1]["weights/bytes"]) // shape.num_servers


def _cores(tracks: Sequence[Track], start_s: float) -> dict[str, float]:
    """Processor seconds per second of every stage; empty if a span does not tell."""
    spent: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for track in tracks:
        for span in track.spans:
            if span.name in STAGES and span.start_s >= start_s:
                if "cpu_s" not in span.args:
                    return {}
                spent[span.name][0] += span.args["cpu_s"]
                spent[span.name][1] += span.length_s
    return {name: cpu_s / length_s for name, (cpu_s, length_s) in spent.items() if length_s}


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What a run achieved after its warm-up, to be compared with what is simulated."""

    env_steps_per_s: float
    staleness_mean: float
    staleness_max: int
    busy: Mapping[str, float]
    """Role -> share of its threads' time, weighted by the length of the updates."""


def figures(run: RunFiles, *, num_warmup: int = NUM_WARMUP) -> Figures:
    """Of a run, over the updates after `num_warmup`.

    Raises:
      ValueError: there are none, or `num_warmup` is 0, for the first update has no beginning.
    """
    if not 1 <= num_warmup < len(run.records):
        raise ValueError(
            f"num_warmup = {num_warmup} of {len(run.records)} updates, must be at least 1 and less"
        )
    window = run.records[num_warmup - 1 :]
    spans_s = np.diff([record["time_s"] for record in window])

    def mean(name: str) -> float:
        values = np.asarray([record[name] for record in window[1:]], np.float64)
        return float(values @ spans_s / spans_s.sum())

    return Figures(
        env_steps_per_s=mean("rate/env_steps_per_s"),
        # Not by time: every update consumes as many trajectories.
        staleness_mean=float(np.mean([x["queue/staleness/mean"] for x in window[1:]])),
        staleness_max=int(max(x["queue/staleness/max"] for x in run.records)),
        busy={role: mean(f"utilisation/{role}/busy_fraction") for role in ROLES},
    )
