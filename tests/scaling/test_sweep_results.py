"""Medians, spreads, and what a sweep says follows from them."""

import itertools
import math
import random

import numpy as np
import pytest
from sweep_parts import make_result

from jaxvla.scaling.sweep_results import (
    ENOUGH_REPEATS,
    TrialResult,
    conclusions,
    is_faster,
    limit_text,
    rank,
)


def test_medians_and_spreads():
    result = make_result("colocated=4", 3.0, 1.0, 10.0, 2.0)
    assert result.median("env_steps_per_s") == np.median([3, 1, 10, 2])
    assert result.spread("env_steps_per_s") == (1.0, 10.0)
    assert math.isnan(make_result("colocated=4").median("env_steps_per_s"))


def test_a_reason_of_waiting_that_a_run_did_not_have_is_zero_there():
    result = make_result("colocated=4", 1.0, 1.0, 1.0)
    name = "utilisation/learning/waiting_on/checkpoint_fraction"
    result.repeats[1][name] = 0.3
    assert result.median(name) == 0.0 and result.spread(name) == (0.0, 0.3)


def test_trials_are_ranked_by_their_median():
    slow = make_result("colocated=4", 1.0, 100.0, 2.0)
    fast = make_result("colocated=2", 5.0, 4.0, 3.0)
    failed = TrialResult(
        layout="colocated=1", overrides={}, num_updates=1, samples_per_update=1, failed="x"
    )
    assert [x.layout for x in rank([slow, failed, fast])] == ["colocated=2", "colocated=4"]


def test_few_runs_tell_nothing():
    fast, slow = make_result("colocated=4", 9.0, 9.0), make_result("colocated=2", 1.0, 1.0)
    assert not is_faster(fast, slow)
    text = " ".join(conclusions([slow, fast]))
    assert "not distinguishable from colocated=2 (2 of the 3 repeats that telling takes)" in text


def test_overlapping_runs_tell_nothing():
    best = make_result("colocated=4", 10.0, 11.0, 12.0)
    close = make_result("simulation=1 serving=1 learning=2", 9.0, 10.5, 11.5)
    far = make_result("simulation+serving=2 learning=2", 5.0, 8.0, 6.0)
    lines = conclusions([far, close, best])
    assert lines[0] == ("Of all trials, colocated=4 is fastest: 11.0 [10.0, 12.0] env steps/s.")
    assert lines[1] == (
        "It is not distinguishable from simulation=1 serving=1 learning=2 (their repeats overlap); "
        "it is 83% faster than simulation+serving=2 learning=2, 25% in the closest pair of runs."
    )
    apart = conclusions([far, best])[1]
    assert apart.startswith("It is 83% faster than simulation+serving=2 learning=2, 25% in")


def test_the_chance_that_equal_trials_are_told_apart():
    """All runs of one above all of the other: 1 in binomial(2n, n), by trying all orders."""
    n = ENOUGH_REPEATS
    orders = list(itertools.permutations(range(2 * n)))
    told = sum(min(order[:n]) > max(order[n:]) for order in orders)
    assert told / len(orders) == pytest.approx(1 / math.comb(2 * n, n)) == 1 / 20
    values = random.Random(0).sample(range(100), 2 * n)
    one, other = make_result("colocated=4", *values[:n]), make_result("colocated=2", *values[n:])
    assert is_faster(one, other) == (min(values[:n]) > max(values[n:]))


def test_what_limits_a_trial():
    apart = make_result(
        "simulation=1 serving=1 learning=2", 1.0, simulation=0.4, serving=0.6, learning=0.93
    )
    assert limit_text(apart) == "learning limits it, 93% busy; serving waits 40% for requests"
    shared = make_result(
        "simulation+serving=2 learning=2", 1.0, simulation=0.95, serving=0.6, learning=0.9
    )
    assert limit_text(shared) == (
        "simulation limits it, 95% busy on devices that it shares with serving; "
        "serving waits 40% for requests"
    )


def test_conclusions_by_number_of_devices():
    results = [
        make_result("colocated=2", 10.0, 10.0, 10.0),
        make_result("colocated=4", 15.0, 15.0, 15.0),
        make_result("simulation+serving=1 learning=1", 9.0, 9.0, 9.0),
    ]
    lines = conclusions(results)
    starts = [line.split(" ")[1:3] for line in lines if line.startswith("Of ")]
    assert starts == [["2", "devices,"], ["4", "devices,"], ["all", "trials,"]]


def test_when_all_have_failed():
    failed = make_result("colocated=4")
    failed.failed = "exit code 1: no memory"
    assert conclusions([failed]) == [
        "Of all trials, none gave numbers.",
        "colocated=4 failed: exit code 1: no memory.",
    ]
