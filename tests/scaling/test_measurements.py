"""Stage samples of a run whose every span is known."""

import dataclasses
import json
import logging
import pathlib

import numpy as np
import pytest
from run_files import (
    AFTER_S,
    BEFORE_S,
    BEGIN_S,
    BETWEEN_S,
    BOOKS_S,
    CHUNK_S,
    CONFIG,
    FINISH_S,
    INFER_S,
    PUBLISH_S,
    TRAIN_S,
    TURN_S,
    UPDATE_S,
    VALUE_S,
    WAKE_S,
    write_run,
)

from jaxvla.scaling.measurements import StageSamples, merged
from jaxvla.scaling.run_samples import figures, measure, read_run
from jaxvla.scaling.simulate import simulate
from jaxvla.scaling.system import system_of
from jaxvla.scaling.trace_tracks import Span, Track, overlapping_fraction


@pytest.fixture
def workdir(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path


def test_every_stage_is_found_with_its_cost(workdir: pathlib.Path):
    samples = measure(write_run(workdir), num_warmup=2)
    exact = pytest.approx
    # What precedes the first of a round's steps goes to it, what follows the last one to that.
    assert list(samples.chunk_s) == [4]
    rounds_s = samples.chunk_s[4].reshape(-1, 2)
    assert rounds_s[:, 0] == exact(BEFORE_S + CHUNK_S)
    assert rounds_s[:, 1] == exact(CHUNK_S + AFTER_S)
    assert samples.begin_s == exact(BEGIN_S)
    assert samples.finish_s == exact(FINISH_S)
    assert samples.service_s[8] == exact(TURN_S / 2 + INFER_S)
    assert samples.value_s[8] == exact(TURN_S / 2 + VALUE_S)
    assert samples.after_s == exact(BOOKS_S)
    assert samples.answer_s == exact(WAKE_S)
    assert samples.train_s[2 * 4 * 2] == exact(TRAIN_S)
    assert samples.publish_s == exact(PUBLISH_S)
    assert samples.between_s == exact(BETWEEN_S)
    assert set(samples.num_chunks) == {2.0}
    assert set(samples.num_values) == {1.0}
    assert samples.cores == exact(dict.fromkeys(("simulate", "infer", "train", "publish"), 2.0))
    assert samples.overlap == 0.0
    assert samples.weight_bytes == 1000


def test_warm_up_does_not_count(workdir: pathlib.Path):
    run = write_run(workdir, num_updates=30)
    for num_warmup in (1, 5):
        samples = measure(run, num_warmup=num_warmup)
        assert len(samples.train_s[16]) == 30 - num_warmup
        # A segment is whole once the next ticket is waited for, which the last one never is.
        assert len(samples.chunk_s[4]) == 4 * (30 - num_warmup - 1)
        assert len(samples.num_chunks) == 30 - num_warmup - 1


def test_replayed_samples_take_as_long_as_the_run(workdir: pathlib.Path):
    """Nothing is lost and nothing counted twice, but for the server's delay to see a request."""
    run = write_run(workdir)
    samples = measure(run)
    system = system_of(run.config, platform=run.platform, num_cores=run.cores, num_warmup=2)
    result = simulate(system, samples)
    unseen_s = 3 * TURN_S / 2
    # Simulators go on once they have new weights, while the learner closes its books.
    assert result.update_s == pytest.approx(UPDATE_S - unseen_s, rel=1e-3)
    assert result.staleness_max == 0
    per_query = 10.0 * (run.records[3]["time_s"] - run.records[2]["time_s"]) / 16
    assert np.median(samples.env_steps_per_query) == pytest.approx(per_query)


def test_figures_of_a_run(workdir: pathlib.Path):
    found = figures(write_run(workdir, num_updates=6), num_warmup=2)
    assert found.env_steps_per_s == pytest.approx(10.0)
    assert found.staleness_mean == pytest.approx(0.25)
    assert found.staleness_max == 1
    assert found.busy == pytest.approx(dict.fromkeys(("simulation", "serving", "learning"), 0.25))


def test_too_few_samples_are_refused_or_warned_of(
    workdir: pathlib.Path, caplog: pytest.LogCaptureFixture
):
    run = write_run(workdir, num_updates=14)
    with pytest.raises(ValueError, match=r"train_s: 12 samples after warm-up, at least 20"):
        measure(run).checked()
    with caplog.at_level(logging.WARNING):
        measure(write_run(workdir, num_updates=30)).checked()
    warned = [record.getMessage() for record in caplog.records]
    assert "train_s[16]: 28 samples, 200 are wanted" in warned
    assert "chunk_s[4]: 108 samples, 200 are wanted" in warned
    with pytest.raises(ValueError, match="made 14 updates, 14 of them warm-up"):
        measure(run, num_warmup=14)


def test_rows_that_were_hardly_seen_are_left_out(workdir: pathlib.Path):
    samples = measure(write_run(workdir))
    some = dataclasses.replace(samples, service_s=samples.service_s | {4: np.ones(19)})
    assert list(some.checked().service_s) == [8]
    enough = dataclasses.replace(samples, service_s=samples.service_s | {4: np.ones(20)})
    assert sorted(enough.checked().service_s) == [4, 8]


def test_samples_of_several_runs_come_together(workdir: pathlib.Path):
    samples = measure(write_run(workdir))
    other = dataclasses.replace(
        samples,
        chunk_s={4: np.full(2, 9.0), 8: np.full(3, 5.0)},
        cores=dict.fromkeys(samples.cores, 4.0),
        overlap=0.5,
    )
    both = merged([samples, other])
    assert {rows: len(x) for rows, x in both.chunk_s.items()} == {
        4: len(samples.chunk_s[4]) + 2,
        8: 3,
    }
    assert len(both.begin_s) == 2 * len(samples.begin_s)
    assert both.cores == pytest.approx(dict.fromkeys(samples.cores, 3.0))
    assert both.overlap == 0.5
    with pytest.raises(ValueError, match="different models"):
        merged([samples, dataclasses.replace(samples, weight_bytes=1)])
    with pytest.raises(ValueError, match="no runs"):
        merged([])


def test_samples_survive_a_file(workdir: pathlib.Path):
    samples = measure(write_run(workdir))
    data = json.loads(json.dumps(samples.to_data()))
    again = StageSamples.from_data(data)
    assert again.to_data() == samples.to_data()
    assert again.chunk_s[4] == pytest.approx(samples.chunk_s[4], rel=1e-5)
    with pytest.raises(ValueError, match="chunk_s"):
        StageSamples.from_data({name: x for name, x in data.items() if name != "chunk_s"})


def test_files_that_do_not_tell_are_refused(workdir: pathlib.Path):
    write_run(workdir)
    text = (workdir / "trace.json").read_text()
    (workdir / "trace.json").write_text(text.replace('"rows"', '"other"'))
    with pytest.raises(ValueError, match="do not say how many rows"):
        measure(read_run(workdir))
    (workdir / "trace.json").write_text("{}")
    with pytest.raises(ValueError, match=r"trace\.json: not a trace"):
        read_run(workdir)
    (workdir / "trace.json").unlink()
    with pytest.raises(ValueError, match=r"telemetry\.trace=True"):
        read_run(workdir)
    (workdir / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match=r"metrics\.jsonl: no such file"):
        read_run(workdir)


def test_streamed_updates(workdir: pathlib.Path):
    """One gradient per trajectory; the rest of the update follows the last one at once."""
    schedule = CONFIG["schedule"] | {"stream_microbatches": True}
    run = write_run(workdir, config=CONFIG | {"schedule": schedule})
    (learner,) = (x for x in run.tracks if x.program == "learning")
    spans: list[Span] = []
    for index in range(25):
        at_s = 200.0 + 10.0 * index
        for name, start_s, end_s in (
            ("wait", 0.0, 2.0),
            ("train", 2.0, 3.0),
            ("wait", 3.5, 4.0),
            ("train", 4.0, 5.0),
            ("train", 5.0, 5.5),
            ("publish", 5.5, 6.0),
        ):
            args = {"on": "trajectories"} if name == "wait" else {"cpu_s": end_s - start_s}
            spans.append(Span(name=name, start_s=at_s + start_s, end_s=at_s + end_s, args=args))
    track = dataclasses.replace(learner, spans=tuple(spans))
    tracks = [track if x is learner else x for x in run.tracks]
    samples = measure(dataclasses.replace(run, tracks=tracks), num_warmup=5)
    assert samples.train_s == {}
    assert samples.gradient_s[8] == pytest.approx(np.ones(40))
    assert samples.apply_s == pytest.approx(np.full(20, 0.5))
    assert samples.between_s == pytest.approx(np.full(19, 4.0))


def test_overlap_is_the_share_of_busy_time():
    def track(*spans: tuple[str, float, float]) -> Track:
        made = tuple(Span(name=n, start_s=a, end_s=b, args={}) for n, a, b in spans)
        return Track(program="learning", thread="learner", spans=made)

    one = track(("train", 0.0, 4.0), ("wait", 4.0, 10.0))
    two = track(("infer", 3.0, 5.0), ("infer", 8.0, 9.0))
    assert overlapping_fraction([one, two], 0.0) == pytest.approx(1.0 / 6.0)
    assert overlapping_fraction([one, two], 3.5) == pytest.approx(0.5 / 2.5)
    assert overlapping_fraction([], 0.0) == 0.0
