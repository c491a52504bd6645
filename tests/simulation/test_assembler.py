"""From chunk steps to a trajectory, against a plain rebuild from the numbers of the rows."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_group import (
    GOES_ON,
    INVALID,
    TERMINATED,
    TRUNCATED,
    final_number,
    number_of,
    numbers,
    observation_of,
    result_of,
    sample_of,
    value_of,
)

from jaxvla.algorithms.returns import next_values
from jaxvla.simulation.assembler import SegmentAssembler

OUTCOMES = st.sampled_from([GOES_ON, GOES_ON, TERMINATED, TRUNCATED, TRUNCATED, INVALID])


@st.composite
def segments(draw: st.DrawFn) -> tuple[np.ndarray, list[int]]:
    """Outcomes int [T, E] and versions [T]."""
    T, E = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    outcome = draw(st.lists(OUTCOMES, min_size=T * E, max_size=T * E))
    versions = draw(st.lists(st.integers(0, 9), min_size=T, max_size=T))
    return np.asarray(outcome).reshape(T, E), versions


def fill(
    outcome: np.ndarray,
    versions: Sequence[int] | None = None,
    *,
    first: int = 0,
    place: Callable[[Any], Any] = lambda x: x,
) -> SegmentAssembler:
    """An assembler that was told of chunks `first`, `first + 1`, ... with these outcomes."""
    assembler = SegmentAssembler()
    for t, row in enumerate(outcome):
        number = numbers(first + t, len(row))
        assembler.add(
            place(observation_of(number)),
            sample_of(number),
            versions[t] if versions else 0,
            place(result_of(first + t, row)),
        )
    return assembler


def queries_of(assembler: SegmentAssembler, outcome: np.ndarray) -> list[np.ndarray]:
    """Numbers of the observations whose value is asked for, part by part."""
    following = observation_of(numbers(*outcome.shape))
    return [number_of(query) for query in assembler.bootstrap_queries(following)]


def finish(assembler: SegmentAssembler, outcome: np.ndarray) -> Any:
    """The Trajectory, with the critic's answers."""
    return assembler.finish([value_of(number) for number in queries_of(assembler, outcome)])


def table(outcome: np.ndarray) -> np.ndarray:
    """int32 [T, E], what the policy read."""
    return np.stack([numbers(t, outcome.shape[1]) for t in range(len(outcome))])


@settings(max_examples=100, deadline=None)
@given(segments())
def test_every_step_is_in_its_place(segment: tuple[np.ndarray, list[int]]) -> None:
    outcome, versions = segment
    trajectory = finish(fill(outcome, versions), outcome)
    number, sample = table(outcome), sample_of(table(outcome).ravel())
    np.testing.assert_array_equal(number_of(trajectory.observation), number)
    for actual, flat in (
        (trajectory.trace["noise"], sample.trace["noise"]),
        (trajectory.trace["choice"], sample.trace["choice"]),
        (trajectory.behavior_log_prob, sample.log_prob),
        (trajectory.value, sample.value),
    ):
        np.testing.assert_array_equal(actual, flat.reshape(actual.shape))
        assert actual.shape[:2] == outcome.shape and actual.dtype == flat.dtype
    np.testing.assert_array_equal(trajectory.reward, number / 16)
    np.testing.assert_array_equal(trajectory.policy_version.T, [versions] * number.shape[1])


@settings(max_examples=100, deadline=None)
@given(segments())
def test_masks(segment: tuple[np.ndarray, list[int]]) -> None:
    outcome, _ = segment
    trajectory = finish(fill(outcome), outcome)
    np.testing.assert_array_equal(trajectory.terminated, outcome == TERMINATED)
    np.testing.assert_array_equal(trajectory.valid, outcome != INVALID)
    # What is invalid cuts the episode as a time limit does.
    cut = (outcome == TRUNCATED) | (outcome == INVALID)
    np.testing.assert_array_equal(trajectory.truncated, cut)
    for mask in (trajectory.terminated, trajectory.truncated, trajectory.valid):
        assert mask.dtype == bool


@settings(max_examples=100, deadline=None)
@given(segments())
def test_values_are_asked_for_once_each_and_in_order(
    segment: tuple[np.ndarray, list[int]],
) -> None:
    outcome, _ = segment
    following, *parts = queries_of(fill(outcome), outcome)
    np.testing.assert_array_equal(following, numbers(*outcome.shape))
    ends = final_number(table(outcome))[outcome == TRUNCATED]  # row by row: in order of time
    np.testing.assert_array_equal(np.concatenate([*parts, ends[:0]]), ends)
    E = outcome.shape[1]
    assert [len(part) for part in parts] == [
        min(E, len(ends) - start) for start in range(0, len(ends), E)
    ]


def test_ends_that_nobody_shows_are_not_asked_about() -> None:
    outcome = np.array([[TRUNCATED, GOES_ON], [GOES_ON, TRUNCATED]])
    assembler = SegmentAssembler()
    for t, row in enumerate(outcome):
        number = numbers(t, 2)
        result = result_of(t, row).replace(final_observation=None)
        assembler.add(observation_of(number), sample_of(number), 0, result)
    (following,) = queries_of(assembler, outcome)
    trajectory = assembler.finish([value_of(following)])
    np.testing.assert_array_equal(trajectory.truncated, outcome == TRUNCATED)
    np.testing.assert_array_equal(trajectory.bootstrap_value, [[0.0, 0.0], value_of(following)])


@settings(max_examples=30, deadline=None)
@given(segments())
def test_returns_read_the_value_of_what_followed(segment: tuple[np.ndarray, list[int]]) -> None:
    outcome, _ = segment
    trajectory = finish(fill(outcome), outcome)
    actual = next_values(trajectory.value, trajectory.bootstrap_value, trajectory.truncated)
    number = table(outcome)
    next_number = np.concatenate([number[1:], numbers(*outcome.shape)[None]])
    expected = np.where(outcome == TRUNCATED, value_of(number + 1), value_of(next_number))
    # After an invalid step nothing is known; its own value stands in and stays finite.
    expected = np.where(outcome == INVALID, value_of(number), expected)
    is_read = outcome != TERMINATED
    np.testing.assert_array_equal(np.asarray(actual)[is_read], expected[is_read])
    assert trajectory.bootstrap_value.dtype == np.float32
    assert np.isfinite(trajectory.bootstrap_value).all()


@settings(max_examples=100, deadline=None)
@given(segments())
def test_books_of_a_segment(segment: tuple[np.ndarray, list[int]]) -> None:
    outcome, versions = segment
    assembler = fill(outcome, versions)
    episodes, expected, num_steps, num_useful = assembler.episodes(), [], 0, 0
    overflow = 0
    for t, row in enumerate(outcome):
        result = result_of(t, row)
        num_steps += int(result.num_steps.sum())
        overflow += int(result.contact_overflow.sum())
        num_useful += sum(n for n, x in zip(result.num_steps, row, strict=True) if x != INVALID)
        expected += [
            (result.task[e], result.success[e], result.episode_return[e], result.episode_steps[e])
            for e in range(len(row))
            if row[e] in (TERMINATED, TRUNCATED)
        ]
    columns = (episodes.task, episodes.success, episodes.return_, episodes.length)
    assert list(zip(*(x.tolist() for x in columns), strict=True)) == expected
    num_invalid = (outcome == INVALID).sum()
    assert assembler.counts() == (num_steps, num_useful, outcome.size, num_invalid, overflow)
    assert assembler.versions() == (min(versions), max(versions))


def test_an_episode_over_two_segments_is_booked_where_it_ends() -> None:
    first = np.array([[GOES_ON, TERMINATED], [GOES_ON, GOES_ON]])
    second = np.array([[GOES_ON, TRUNCATED], [TERMINATED, GOES_ON]])
    lengths = [fill(x, first=t).episodes().length.tolist() for t, x in ((0, first), (2, second))]
    assert lengths == [[2 + 3], [10 + 3, 12 + 3]]


def test_more_time_limits_than_envs() -> None:
    """The values of five ends in parts of two go back to where the episodes ended."""
    outcome = np.array([[TRUNCATED, TRUNCATED], [TRUNCATED, TERMINATED], [TRUNCATED, TRUNCATED]])
    assembler = fill(outcome)
    assert [x.tolist() for x in queries_of(assembler, outcome)] == [[12, 14], [1, 3], [5, 9], [11]]
    bootstrap = finish(assembler, outcome).bootstrap_value
    expected = value_of(np.array([[1, 3], [5, 0], [9, 11]]))
    np.testing.assert_array_equal(bootstrap[outcome == TRUNCATED], expected[outcome == TRUNCATED])


def test_a_segment_of_one_chunk() -> None:
    outcome = np.array([[GOES_ON, TERMINATED, TRUNCATED, INVALID]])
    trajectory = finish(fill(outcome), outcome)
    np.testing.assert_array_equal(
        trajectory.bootstrap_value[0, [0, 2, 3]], value_of(np.array([8, 5, 6]))
    )
    assert trajectory.reward.shape == (1, 4)


def test_observations_of_a_device_stay_there() -> None:
    """Small arrays come to the host at once; pictures never do."""
    outcome = np.array([[TRUNCATED, GOES_ON], [INVALID, TERMINATED]])
    device = jax.devices()[1]
    on_device = fill(outcome, place=lambda x: jax.device_put(jax.tree.map(jnp.asarray, x), device))
    trajectory = finish(on_device, outcome)
    for leaf in jax.tree.leaves(trajectory.observation):
        assert isinstance(leaf, jax.Array) and leaf.devices() == {device}
    expected = finish(fill(outcome), outcome)
    jax.tree.map(np.testing.assert_array_equal, trajectory, expected)
    for leaf in jax.tree.leaves(trajectory.replace(observation=None)):
        assert isinstance(leaf, np.ndarray)


def test_a_trajectory_shares_no_memory_with_its_parts() -> None:
    """Groups and servers may write into their arrays again."""
    outcome = np.array([[GOES_ON, TRUNCATED]])
    number = numbers(0, 2)
    parts = observation_of(number), sample_of(number), result_of(0, outcome[0])
    assembler = SegmentAssembler()
    assembler.add(parts[0], parts[1], 0, parts[2])
    trajectory = finish(assembler, outcome)
    for ours in jax.tree.leaves(trajectory):
        assert not any(np.shares_memory(ours, theirs) for theirs in jax.tree.leaves(parts))


@pytest.mark.parametrize("answered", [1, 2])
def test_every_query_must_be_answered(answered: int) -> None:
    outcome = np.array([[TRUNCATED, TRUNCATED], [TRUNCATED, GOES_ON]])
    assembler = fill(outcome)
    values = [value_of(number) for number in queries_of(assembler, outcome)]
    assert len(values) == 3
    with pytest.raises(ValueError):
        assembler.finish(values[:answered])
