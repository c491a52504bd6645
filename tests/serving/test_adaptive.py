"""The adaptive mode of the batcher, in virtual time."""

import dataclasses
import itertools
import math
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import hypothesis.strategies as st
import pytest
from closed_loop import Loop, Profile, adaptive_loop, fixed_grid
from hypothesis import given, settings

from jaxvla.serving.adaptive import (
    ClosedLoop,
    Measurements,
    Rate,
    Setting,
    Tuner,
    corrected_rates,
    replay,
    service_times,
    sweep,
    triggers,
)
from jaxvla.serving.batcher import Batcher

TIMEOUT_S = 60.0
"""For waits that end at once unless the code is broken."""

# ------------------------------------------------------ against every fixed setting


def knee(flat_s: float, rows: int) -> Callable[[int], float]:
    """GPU-like: flat up to `rows`, then linear."""
    return lambda bucket: flat_s * max(1.0, bucket / rows)


def line(call_s: float, row_s: float) -> Callable[[int], float]:
    """CPU-like."""
    return lambda bucket: call_s + row_s * bucket


def equal(
    count: int, rows: int, think_s: float, sigma: float, service_s: Callable[[int], float]
) -> Profile:
    """Clients that are alike."""
    return Profile(
        rows=(rows,) * count, mean_think_s=(think_s,) * count, sigma=sigma, service_s=service_s
    )


def libero(count: int, flat: float) -> Profile:
    """RL-VLA3's LIBERO runs, per chunk step: all groups simulate 3.05 s, and inference takes
    2.42 s for the whole batch, of which the part `flat` does not depend on the batch size."""
    rows = 128 // count
    service_s = line(2.42 * flat, 2.42 * (1.0 - flat) / (rows * count))
    return equal(count, rows, 3.05, 0.05, service_s)


def in_turn(count: int, flat: float) -> Profile:
    """The same where groups simulate one after the other, as in `scripts/bench_async.py`."""
    apart = libero(count, flat)
    return dataclasses.replace(apart, mean_think_s=(3.05 / count,) * count, is_shared=True)


PROFILES = {
    "GPU, 2 large groups": equal(2, 32, 0.10, 0.15, knee(0.06, 64)),
    "GPU, 4 large groups": equal(4, 32, 0.10, 0.15, knee(0.06, 64)),
    "GPU, 8 large groups": equal(8, 32, 0.10, 0.15, knee(0.06, 128)),
    "GPU, 4 fast groups": equal(4, 32, 0.02, 0.15, knee(0.06, 128)),
    "CPU, 4 groups": equal(4, 8, 0.15, 0.2, line(0.002, 0.004)),
    "CPU, 8 groups": equal(8, 8, 0.15, 0.2, line(0.002, 0.004)),
    "32 single envs, sigma 0.6": equal(32, 1, 0.10, 0.6, knee(0.05, 16)),
    "32 single envs, sigma 1.0": equal(32, 1, 0.10, 1.0, knee(0.05, 16)),
    "32 fast single envs, sigma 1.0": equal(32, 1, 0.02, 1.0, knee(0.05, 16)),
    "LIBERO, 2 groups, linear": libero(2, 0.0),
    "LIBERO, 3 groups, flat": libero(3, 1.0),
    "LIBERO, 4 groups, linear": libero(4, 0.0),
    "LIBERO, 4 groups, half flat": libero(4, 0.5),
    "LIBERO, 6 groups, flat": libero(6, 1.0),
    "LIBERO, 8 groups, linear": libero(8, 0.0),
    "LIBERO, 8 groups, half flat": libero(8, 0.5),
    "LIBERO, 8 groups, flat": libero(8, 1.0),
    "LIBERO, 2 groups in turn, flat": in_turn(2, 1.0),
    "LIBERO, 4 groups in turn, linear": in_turn(4, 0.0),
    "LIBERO, 4 groups in turn, half flat": in_turn(4, 0.5),
    "LIBERO, 4 groups in turn, flat": in_turn(4, 1.0),
    "LIBERO, 8 groups in turn, half flat": in_turn(8, 0.5),
    "LIBERO, 8 groups in turn, flat": in_turn(8, 1.0),
    "one slow client of 8": Profile(
        rows=(4,) * 8, mean_think_s=(1.5, *(0.1,) * 7), sigma=0.2, service_s=knee(0.05, 16)
    ),
}


@pytest.mark.parametrize("name", PROFILES)
def test_adaptive_is_within_5_percent_of_the_best_fixed_setting(name: str) -> None:
    """On the same think times, without the first quarter. `pytest -s` shows the table."""
    profile = PROFILES[name]
    count = len(profile.rows)
    num_requests = (200 if count <= 8 else 100) * count
    run = adaptive_loop(profile).serve(num_requests)
    rates = fixed_grid(profile, num_requests)
    best = max(rates, key=rates.__getitem__)
    adaptive = run.rate(num_requests // 4)
    trigger_rows = statistics.mode(setting.trigger_rows for setting in run.settings)
    sys.stdout.write(
        f"\n{name:<36}rows/s {adaptive:8.2f} adaptive, mostly from {trigger_rows:3d} rows"
        f"{rates[best]:9.2f} best fixed, from {best.trigger_rows:3d} rows or "
        f"{best.max_wait_s:6.3f} s, ratio {adaptive / rates[best]:.3f}, "
        f"worst fixed {min(rates.values()) / rates[best]:.3f} "
    )
    assert adaptive >= 0.95 * rates[best]


@pytest.mark.parametrize("seed", range(12))
def test_also_on_a_workload_that_nobody_chose(seed: int) -> None:
    """Groups of unequal sizes and speeds, and either extreme to start from."""
    draw = random.Random(seed)
    count, step = draw.randint(2, 6), draw.choice([1, 8])
    rows = tuple(step * draw.randint(1, 3) for _ in range(count))
    flat_s = 10 ** draw.uniform(-2.0, 0.5)
    profile = Profile(
        rows=rows,
        mean_think_s=tuple(draw.uniform(0.2, 2.0) for _ in rows),
        sigma=draw.choice([0.05, 0.2, 0.6, 1.0]),
        service_s=draw.choice([knee(flat_s, sum(rows) // 2), line(0.1 * flat_s, flat_s / step)]),
        max_batch=draw.choice([sum(rows), max(rows)]),
        seed=seed,
    )
    tuner = Tuner(buckets=profile.buckets, max_rows=profile.max_rows)
    trigger_rows = draw.choice([min(rows), profile.max_rows])
    loop = Loop(profile, Setting(trigger_rows=trigger_rows, max_wait_s=math.inf), tuner=tuner)
    num_requests = 200 * count
    rates = fixed_grid(profile, num_requests)
    assert loop.serve(num_requests).rate(num_requests // 4) >= 0.95 * max(rates.values())


def test_it_follows_a_server_that_changes() -> None:
    """Linear first, where firing at once is best by far, then flat, where it is worst."""
    before, after = libero(3, 0.0), libero(3, 1.0)
    loop = adaptive_loop(before)
    loop.serve(300)
    assert loop.batcher.setting.trigger_rows == before.rows[0]
    loop.profile = after
    num_before = sum(len(batch.requests) for batch in loop.serve(300).batches)
    assert loop.batcher.setting.trigger_rows == sum(after.rows)
    late = loop.serve(300).rate(num_before)
    assert late >= 0.95 * max(fixed_grid(after, 600).values())


def test_a_client_that_hangs_holds_nobody_up_for_long() -> None:
    """Best is one batch for all; then one of them asks no more, without leaving."""
    profile = libero(3, 1.0)
    loop = adaptive_loop(profile)
    loop.serve(300)
    assert loop.batcher.setting.trigger_rows == sum(profile.rows)
    loop._think_s[0] = itertools.repeat(math.inf)
    loop.serve(100)
    num_before = sum(len(batch.requests) for batch in loop.serve(100).batches)
    others = dataclasses.replace(profile, rows=profile.rows[1:], mean_think_s=(3.05, 3.05))
    best = max(fixed_grid(others, 400).values())
    assert loop.serve(200).rate(num_before) >= 0.95 * best


def test_the_same_observations_give_the_same_settings() -> None:
    first, second = (adaptive_loop(PROFILES["32 single envs, sigma 1.0"]) for _ in range(2))
    settings_ = first.serve(2000).settings
    assert settings_ == second.serve(2000).settings
    assert len(set(settings_)) > 1


def test_the_wait_is_bounded_by_what_the_deadline_leaves() -> None:
    run = adaptive_loop(libero(3, 1.0), longest_wait_s=4.0).serve(300)
    assert run.settings[-1].max_wait_s == 4.0
    run = adaptive_loop(libero(3, 1.0)).serve(300)
    assert 2.42 + 3.05 < run.settings[-1].max_wait_s < 2.42 + 3.05 * 1.25


def test_requests_come_in_while_a_replay_runs() -> None:
    """It runs in the server's thread, without the batcher's lock."""
    num_steps = 0

    class Submitting(Tuner):
        def step(self) -> Setting | None:
            nonlocal num_steps
            num_steps += 1
            with ThreadPoolExecutor(1) as pool:
                pool.submit(lambda: loop.batcher.waiting_rows).result(TIMEOUT_S)
            return super().step()

    profile = PROFILES["CPU, 4 groups"]
    tuner = Submitting(buckets=profile.buckets, max_rows=profile.max_rows)
    loop = Loop(profile, Setting(trigger_rows=8, max_wait_s=0.02), tuner=tuner)
    loop.serve(80)
    # One per 4 requests from the 16th on, then a rest.
    assert num_steps == len(triggers(profile.closed_loop(1))) + 1


# ---------------------------------------------------------------------- the replay


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.integers(1, 3), min_size=1, max_size=6),
    mean_think_s=st.sampled_from([0.1, 1.0, 5.0]),
    max_batch=st.sampled_from([3, 5, 100]),
    trigger=st.floats(0.0, 1.0),
    max_wait_s=st.sampled_from([0.0, 0.3, 2.0, math.inf]),
    seed=st.integers(0, 5),
)
def test_replay_does_what_the_batcher_does(
    rows: list[int],
    mean_think_s: float,
    max_batch: int,
    trigger: float,
    max_wait_s: float,
    seed: int,
) -> None:
    profile = Profile(
        rows=tuple(rows),
        mean_think_s=(mean_think_s,) * len(rows),
        sigma=0.7,
        service_s=line(0.5, 0.2),
        max_batch=max_batch,
        seed=seed,
    )
    trigger_rows = 1 + round(trigger * (profile.max_rows - 1))
    setting = Setting(trigger_rows=trigger_rows, max_wait_s=max_wait_s)
    really = Loop(profile, setting).serve(120).rate(30)
    assert replay(profile.closed_loop(200), setting, 120) == pytest.approx(really, rel=1e-9)


def loop_of(think_s: list[list[float]], service_s: list[float], **options: Any) -> ClosedLoop:
    """One row per request, a bucket for every number of rows."""
    count = len(think_s)
    defaults: Any = {
        "rows": (1,) * count,
        "think_s": tuple(tuple(times) for times in think_s),
        "buckets": tuple(range(1, count + 1)),
        "service_s": tuple(service_s),
        "max_rows": count,
    }
    return ClosedLoop(**(defaults | options))


@pytest.mark.parametrize(
    ("trigger_rows", "max_wait_s", "rate"),
    [
        (2, math.inf, 2 / (3.5 + 2)),  # lockstep: the slower one thinks, both are served
        (1, math.inf, 3 / 7),
        (2, 1.0, 5 / 12),
    ],
)
def test_replay_by_hand(trigger_rows: int, max_wait_s: float, rate: float) -> None:
    """A thinks for 1 s and B for 3.5 s, service takes 2 s whatever the batch.

    Fired at once: B is served to 5.5 and asks at 9; A, who asked at 4, is served to 7.5 and from
    8.5 to 10.5, B to 12.5: again as at 5.5, 7 s later, with two answers to A and one to B.
    Held back for 1 s: both are served from 10 to 12, A from 14 to 16 (asked at 13), B from 16.5
    to 18.5 (asked at 15.5), A to 20.5 (asked at 17), both from 22 (asked at 21.5 and 22).
    """
    loop = loop_of([[1.0], [3.5]], [2.0, 2.0])
    got = replay(loop, Setting(trigger_rows=trigger_rows, max_wait_s=max_wait_s), 4000)
    assert got == pytest.approx(rate, rel=1e-2)


def test_replay_serves_what_was_left_behind_at_once() -> None:
    """Room for one of two: the second batch follows the first, whatever the trigger."""
    loop = loop_of([[1.0], [1.0]], [1.0], buckets=(1,), max_rows=1)
    got = replay(loop, Setting(trigger_rows=1, max_wait_s=math.inf), 4000)
    assert got == pytest.approx(1.0, rel=1e-2)  # the server never rests


def test_replay_uses_the_bucket_that_holds_the_batch() -> None:
    loop = loop_of([[1.0], [1.0], [1.0]], [1.0, 9.0], buckets=(2, 4))
    got = replay(loop, Setting(trigger_rows=3, max_wait_s=math.inf), 4000)
    assert got == pytest.approx(3 / (1.0 + 9.0), rel=1e-2)


# ------------------------------------------------------------------- the candidates


def test_triggers_are_sums_of_requests() -> None:
    loop = loop_of([[1.0]] * 5, [1.0] * 5)
    assert triggers(loop) == [1, 2, 3, 4, 5]
    many = loop_of([[1.0]] * 64, [1.0] * 64, rows=(3,) * 64, max_rows=192)
    found = triggers(many)
    assert {3 * k for k in (1, 2, 3, 4, 5, 6, 7, 8, 62, 63, 64)} <= set(found)
    assert all(b <= max(a + 3, 1.34 * a) for a, b in itertools.pairwise(found))
    assert len(found) < 25
    assert max(triggers(dataclasses.replace(many, max_rows=100))) == 100
    assert triggers(loop_of([[1.0]] * 3, [1.0] * 7, rows=(4, 1, 2), max_rows=7)) == [1, 3, 7]


def finish(steps: Iterator[None]) -> Any:
    """What a sweep returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def test_a_trigger_is_left_only_for_a_clear_gain() -> None:
    """Two like clients and a flat server: in one batch, or in turn at about the same rate."""
    loop = loop_of([[3.0], [3.01]], [1.0, 1.0])
    for trigger_rows in (1, 2):
        present = Setting(trigger_rows=trigger_rows, max_wait_s=0.1)
        assert finish(sweep(loop, present, math.inf)).trigger_rows == trigger_rows
    slow = loop_of([[1.0], [1.5]], [3.0, 3.0])
    present = Setting(trigger_rows=1, max_wait_s=0.1)
    assert finish(sweep(slow, present, math.inf)) == Setting(trigger_rows=2, max_wait_s=4.5)


def test_clients_that_take_turns_for_good_are_brought_together() -> None:
    """Alike to the last bit, and a server whose calls take as long for both: one is served while
    the other waits, until the trigger makes it wait for both."""
    loop = loop_of([[0.25], [0.25]], [10.0, 10.0])
    present = Setting(trigger_rows=1, max_wait_s=0.02)
    in_turn = replay(loop, present, 400, stagger_s=5.0)
    assert in_turn == pytest.approx(1 / 10.0, rel=1e-2)
    assert replay(loop, present, 400) == pytest.approx(2 / 10.25, rel=1e-2)
    assert finish(sweep(loop, present, math.inf)) == Setting(trigger_rows=2, max_wait_s=10.25)


def test_a_bucket_without_a_measurement_counts_with_the_least_it_can_take() -> None:
    """Not less than fewer rows take, nor less per row than more rows do."""
    assert service_times((2, 4, 8), {1: (4.0, 0.0)}) == (2.0, 4.0, 4.0)
    assert service_times((2, 4, 8), {0: (3.0, 0.0), 2: (4.0, 1.0)}) == (3.0, 3.0, 4.0)
    assert service_times((2, 4, 8), {0: (1.0, 0.0), 2: (4.0, 1.0)}) == (1.0, 2.0, 4.0)


def test_of_two_measurements_that_contradict_each_other_the_newer_one_counts() -> None:
    """4 rows cannot take less time than 2 rows; that 2 rows take more per row is no wonder."""
    assert service_times((2, 4), {0: (5.0, 1.0), 1: (4.0, 0.0)}) == (5.0, 5.0)
    assert service_times((2, 4), {0: (5.0, 0.0), 1: (4.0, 1.0)}) == (5.0, 4.0)
    assert service_times((2, 4), {0: (1.0, 1.0), 1: (4.0, 0.0)}) == (1.0, 4.0)


# --------------------------------------------------------------- the measurements


def measurements(*clients: str) -> Measurements:
    seen = Measurements((1, 2, 4), 4)
    for client in clients:
        seen.joined(client)
    return seen


def serve(seen: Measurements, fired_s: float, finished_s: float, *clients: str) -> None:
    """One row per client."""
    seen.fired(kind="explore", rows=len(clients), clients=clients, now_s=fired_s)
    seen.finished(finished_s)


def ask(seen: Measurements, client: str, now_s: float, kind: str = "explore") -> None:
    seen.asked(client, rows=1, kind=kind, now_s=now_s)


def loop_at(seen: Measurements, now_s: float) -> ClosedLoop:
    loop = seen.snapshot(now_s)
    assert loop is not None
    return loop


def test_think_time_runs_from_the_end_of_the_batch_to_the_next_request() -> None:
    seen = measurements("a", "b")
    assert seen.snapshot(0.0) is None
    ask(seen, "a", 0.0)
    ask(seen, "b", 1.0)
    assert seen.snapshot(1.0) is None
    serve(seen, 1.0, 5.0, "a", "b")
    ask(seen, "b", 7.0)
    ask(seen, "a", 8.0)
    loop = loop_at(seen, 8.0)
    assert loop.think_s == ((3.0,), (2.0,)) and loop.rows == (1, 1)
    assert loop.service_s == (2.0, 4.0, 4.0) and loop.longest_wait_s == 4.0 + 3.0
    assert (seen.num_asked, seen.num_clients) == (4, 2)


def test_what_a_client_does_between_leaving_and_joining_is_not_thinking() -> None:
    seen = measurements("a", "b")
    for start_s in (0.0, 10.0):
        ask(seen, "a", start_s)
        ask(seen, "b", start_s)
        serve(seen, start_s, start_s + 1.0, "a", "b")
    for gone in (12.0, 20.0):
        seen.left("a")
        ask(seen, "b", gone)
        serve(seen, gone, gone + 1.0, "b")
        seen.joined("a")
    ask(seen, "a", 30.0)
    assert loop_at(seen, 30.0).think_s == ((9.0,), (9.0, 1.0, 7.0))


def test_a_client_that_leaves_during_its_batch_is_not_awaited() -> None:
    seen = measurements("a")
    for start_s in (0.0, 3.0):
        ask(seen, "a", start_s)
        serve(seen, start_s, start_s + 1.0, "a")
    ask(seen, "a", 6.0)
    seen.fired(kind="explore", rows=1, clients=["a"], now_s=6.0)
    seen.left("a")
    seen.finished(7.0)
    seen.joined("a")
    ask(seen, "a", 100.0)
    assert loop_at(seen, 100.0).think_s == ((2.0, 2.0),)


def test_a_client_may_ask_again_before_the_server_is_back() -> None:
    """Its answer comes a moment before the end of the batch."""
    seen = measurements("a")
    ask(seen, "a", 0.0)
    seen.fired(kind="explore", rows=1, clients=["a"], now_s=0.0)
    ask(seen, "a", 0.9)
    seen.finished(1.0)
    assert loop_at(seen, 1.0).think_s == ((0.0,),)
    serve(seen, 1.0, 2.0, "a")
    ask(seen, "a", 5.0)
    assert loop_at(seen, 5.0).think_s == ((0.0, 3.0),)


def test_clients_that_left_lately_count_once_more() -> None:
    """A snapshot may fall between two segments, where most clients wait for tickets."""
    seen = measurements("a", "b")
    for start_s in (0.0, 3.0):
        ask(seen, "a", start_s)
        ask(seen, "b", start_s)
        serve(seen, start_s, start_s + 1.0, "a", "b")
    seen.left("a")
    assert len(loop_at(seen, 4.0).rows) == 2
    assert len(loop_at(seen, 4.0).rows) == 1


def test_a_client_that_seems_to_hang_is_left_out() -> None:
    seen = measurements("a", "b")
    for start_s in (0.0, 3.0):
        ask(seen, "a", start_s)
        ask(seen, "b", start_s)
        serve(seen, start_s, start_s + 1.0, "a", "b")  # they think for 2 s
    ask(seen, "b", 6.0)
    assert len(loop_at(seen, 8.0).rows) == 2
    assert len(loop_at(seen, 8.1).rows) == 1
    ask(seen, "a", 9.0)
    assert loop_at(seen, 9.0).think_s == ((2.0, 5.0), (2.0, 2.0))


def rate_at(seen: Measurements, now_s: float) -> Rate | None:
    return loop_at(seen, now_s).rate


def test_rate_is_that_of_the_cycles_since_the_snapshot_before() -> None:
    seen = measurements("a", "b")
    for a, b in [(0.0, 1.0), (4.0, 4.0), (10.0, 7.0)]:
        for client, now_s in sorted([("a", a), ("b", b)], key=lambda x: x[1]):
            ask(seen, client, now_s)
            serve(seen, now_s, now_s, client)
    rate = rate_at(seen, 10.0)  # cycles of 4 and 6 s, and of 3 and 3 s
    assert rate is not None
    assert rate.rows_per_s == pytest.approx(1 / 5 + 1 / 3)
    deviation = statistics.stdev([4.0, 6.0]) / 5.0 / math.sqrt(2)
    assert rate.error == pytest.approx(1 / 5 * deviation / rate.rows_per_s)
    assert rate_at(seen, 10.0) is None


def test_a_cycle_holds_no_absence_and_no_other_kind_or_setting() -> None:
    seen = measurements("a")
    for now_s in (0.0, 1.0, 2.0):
        ask(seen, "a", now_s)
        serve(seen, now_s, now_s, "a")
    seen.left("a")
    seen.joined("a")
    ask(seen, "a", 12.0)
    ask(seen, "a", 13.0, "value")
    ask(seen, "a", 24.0)
    assert rate_at(seen, 24.0) == Rate(rows_per_s=1.0, error=0.0)
    for now_s in (25.0, 26.0):
        ask(seen, "a", now_s)
    seen.setting_changed()
    for now_s in (30.0, 33.0, 36.0):
        ask(seen, "a", now_s)
    assert rate_at(seen, 36.0) == Rate(rows_per_s=1 / 3, error=0.0)


def test_a_trigger_is_judged_by_what_it_came_to_where_that_is_known() -> None:
    """Predicted 3/5 rows per second in one batch, 1/2 one by one."""
    loop = loop_of([[3.0]] * 3, [2.0] * 3)
    present = Setting(trigger_rows=3, max_wait_s=5.0)

    def chosen(error: float) -> int:
        rates = {1: 0.5, 2: 0.45, 3: 0.4}
        measured = {t: Rate(rows_per_s=rate, error=error) for t, rate in rates.items()}
        return finish(sweep(loop, present, math.inf, measured)).trigger_rows

    assert finish(sweep(loop, present, math.inf)).trigger_rows == 3
    assert chosen(error=0.0) == 1
    assert chosen(error=1.0) == 3


def test_an_untried_trigger_misses_as_much_as_the_nearest_tried_one() -> None:
    """A measurement as uncertain as the prediction counts half."""
    predicted = {1: 10.0, 2: 20.0, 3: 30.0, 4: 40.0}
    measured = {1: Rate(rows_per_s=5.0, error=0.0), 4: Rate(rows_per_s=30.0, error=0.1)}
    expected = {1: 5.0, 2: 10.0, 3: 0.875 * 30.0, 4: 35.0}
    assert corrected_rates(predicted, measured) == pytest.approx(expected)
    assert corrected_rates(predicted, {}) == predicted


def test_what_a_trigger_came_to_is_forgotten_in_time() -> None:
    """Groups in turn: what it believes of large batches is wrong, and it tries them at times."""
    loop = adaptive_loop(PROFILES["LIBERO, 4 groups in turn, flat"])
    triggers_ = [x.trigger_rows for x in loop.serve(6000).settings]
    tried = [b for a, b in itertools.pairwise(triggers_) if a != b and b >= 96]
    assert len(tried) > 2
    assert sum(x >= 96 for x in triggers_) < 0.1 * len(triggers_)


def test_service_time_is_the_median_of_the_last() -> None:
    seen = measurements("a")
    now_s = 0.0
    for service_s in [50.0] * 20 + [1.0, 2.0, 9.0, 3.0, 4.0, 8.0, 5.0, 90.0, 6.0]:
        ask(seen, "a", now_s)
        serve(seen, now_s, now_s + service_s, "a")
        now_s += service_s + 1.0
    assert loop_at(seen, now_s).service_s[0] == 5.0


def test_think_times_are_the_last_ones() -> None:
    seen = measurements("a")
    now_s = 0.0
    for think_s in range(50):
        ask(seen, "a", now_s)
        serve(seen, now_s, now_s, "a")
        now_s += think_s
    assert loop_at(seen, now_s).think_s == (tuple(float(x) for x in range(17, 49)),)


def test_the_kind_that_is_asked_for_most_is_modelled() -> None:
    seen = measurements("a")
    now_s = 0.0
    for kind, think_s, service_s in [("explore", 2.0, 1.0)] * 3 + [("value", 7.0, 4.0)] * 2:
        ask(seen, "a", now_s, kind)
        seen.fired(kind=kind, rows=1, clients=["a"], now_s=now_s)
        seen.finished(now_s + service_s)
        now_s += service_s + think_s
    loop = loop_at(seen, now_s - 7.0)
    assert loop.service_s[0] == 1.0 and loop.think_s == ((2.0, 2.0),)


def test_buckets_must_hold_the_batches() -> None:
    for buckets in [(), (4, 2, 8), (2, 2, 8), (2, 4)]:
        with pytest.raises(ValueError, match="must ascend and hold 8 rows"):
            Tuner(buckets=buckets, max_rows=8)


def test_clients_in_threads_are_all_served() -> None:
    """With a real clock; what the settings are does not matter to the answers."""
    num_clients, num_rounds = 4, 60
    tuner = Tuner(buckets=(1, 2, 4), max_rows=4)
    batcher = Batcher(trigger_rows=4, max_wait_s=0.001, max_rows=4, capacity_rows=4, tuner=tuner)

    def ask(client: int) -> list[int]:
        name = f"c{client}"
        batcher.register(name)
        answers = [
            batcher.submit(rows=1, client=name, kind="explore", payload=i).result(TIMEOUT_S)
            for i in range(num_rounds)
        ]
        batcher.unregister(name)
        return answers

    def serve() -> None:
        while (batch := batcher.next_batch()) is not None:
            for request in batch.requests:
                request.future.set_result(request.payload)

    with ThreadPoolExecutor(num_clients + 1) as pool:
        server = pool.submit(serve)
        futures = [pool.submit(ask, client) for client in range(num_clients)]
        answers = [future.result(TIMEOUT_S) for future in futures]
        batcher.close("finished")
        server.result(TIMEOUT_S)
    assert answers == [list(range(num_rounds))] * num_clients
    assert tuner.measurements.num_asked == num_clients * num_rounds
