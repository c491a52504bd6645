"""Wilson intervals against scipy, and the counting of episodes."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvla.evaluation.statistics import SuccessRate, summarise, table, wilson_interval
from jaxvla.telemetry.metrics import check_name


@settings(deadline=None)  # no timed assertions
@given(counts=st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_equals_scipy(counts):
    k, n = counts
    expected = scipy.stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    # Two float64 evaluations of the same closed form.
    assert wilson_interval(k, n) == pytest.approx((expected.low, expected.high), abs=1e-12)
    low, high = wilson_interval(k, n)
    assert 0.0 <= low <= k / n <= high <= 1.0
    mirrored_low, mirrored_high = wilson_interval(n - k, n)
    assert (1 - high, 1 - low) == pytest.approx((mirrored_low, mirrored_high), abs=1e-12)


def test_wilson_by_hand():
    # p = 0: the interval is [0, z^2 / (n + z^2)] with z = 1.959964, z^2 = 3.841459.
    assert wilson_interval(0, 10) == pytest.approx((0.0, 3.841459 / 13.841459), abs=1e-6)
    # p = 1/2: 1/2 -+ z / (2 sqrt(n + z^2)).
    half = 1.959964 / (2 * math.sqrt(103.841459))
    assert wilson_interval(50, 100) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-6)


@pytest.mark.parametrize(("k", "n"), [(0, 0), (1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(k, n):
    with pytest.raises(ValueError, match="have no success rate"):
        wilson_interval(k, n)


TASKS = ("reach", "push", "KITCHEN_SCENE1_open", "lift")


def result():
    task_ids = np.asarray([0, 0, 1, 1, 1, 2, 1])
    successes = np.asarray([True, False, True, True, False, True, True])
    return summarise(tasks=TASKS, task_ids=task_ids, successes=successes)


def test_episodes_are_counted_by_task():
    counts = {task: (r.num_successes, r.num_episodes) for task, r in result().per_task.items()}
    assert counts == {
        "reach": (1, 2),
        "push": (3, 4),
        "KITCHEN_SCENE1_open": (1, 1),
        "lift": (0, 0),
    }
    assert result().overall == SuccessRate(num_successes=5, num_episodes=7)


def test_record_has_contract_names():
    record = result().record()
    assert all(check_name(name) for name in record)
    low, high = wilson_interval(5, 7)
    assert math.isnan(record.pop("eval/success_rate/lift"))
    assert record == {
        "eval/success_rate": 5 / 7,
        "eval/ci95_low": low,
        "eval/ci95_high": high,
        "eval/episodes": 7,
        "eval/success_rate/reach": 0.5,
        "eval/success_rate/push": 0.75,
        "eval/success_rate/KITCHEN_SCENE1_open": 1.0,
    }


def test_table_lines_up():
    lines = table({"tabletop": result()})
    assert len(lines) == 2 + len(TASKS) + 1
    row = next(line for line in lines if line.startswith("push"))
    assert row.split() == ["push", "4", "0.750", "[0.301,", "0.954]"]
    assert lines[-1].startswith("all tasks") and "0.714" in lines[-1]
    assert len({line.rstrip().rindex("]") for line in lines[2:] if "]" in line}) == 1


def test_a_table_shows_two_envs_side_by_side():
    other = summarise(
        tasks=TASKS, task_ids=np.asarray([0, 0, 1]), successes=np.asarray([True, True, False])
    )
    lines = table({"libero_mjx": result(), "libero_host": other})
    assert lines[0].split() == ["task", "libero_mjx", "libero_host"]
    row = next(line for line in lines if line.startswith("push"))
    assert row.split()[1:3] == ["4", "0.750"] and row.split()[5:7] == ["1", "0.000"]
    assert "0.714" in lines[-1] and "0.667" in lines[-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_ids": np.asarray([0, 4])}, "for 4 tasks"),
        ({"task_ids": np.asarray([0, -1])}, "for 4 tasks"),
        ({"task_ids": np.asarray([0])}, r"want \[n\]"),
        ({"successes": np.asarray([0.3, 1.0])}, "want bool"),
        ({"tasks": ("a", "a")}, "repeat"),
    ],
)
def test_bad_input_is_refused(changes, message):
    good = {"tasks": TASKS, "task_ids": np.asarray([0, 1]), "successes": np.asarray([True, False])}
    with pytest.raises(ValueError, match=message):
        summarise(**(good | changes))
