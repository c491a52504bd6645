"""Ticks are round, few and enclose the values; pixels follow the values."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvla.telemetry.axes import fit_axis, round_ticks, short_number

_VALUES = st.floats(-1e12, 1e12).filter(lambda x: x == 0 or abs(x) > 1e-12)


def test_known_ticks():
    assert round_ticks(0.0, 1.0, 6) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert round_ticks(-3.0, 14.0, 5) == [-5.0, 0.0, 5.0, 10.0, 15.0]
    assert round_ticks(1200.0, 8300.0, 6) == [0.0, 2000.0, 4000.0, 6000.0, 8000.0, 10000.0]


@settings(deadline=None)
@given(_VALUES, _VALUES, st.integers(2, 12))
def test_ticks_enclose_the_range_and_are_round(a, b, max_ticks):
    low, high = min(a, b), max(a, b)
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        return
    ticks = round_ticks(low, high, max_ticks)
    step = ticks[1] - ticks[0]
    slack = 1e-6 * step
    assert ticks[0] <= low + slack and high - slack <= ticks[-1]
    assert 2 <= len(ticks) <= max_ticks + 1
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-6)
    assert min(abs(mantissa - x) for x in (1, 2, 5)) < 1e-5
    for tick in ticks:
        assert abs(tick / step - round(tick / step)) < 1e-5


@settings(deadline=None)
@given(st.lists(st.floats(1e-6, 1e9), min_size=1), st.integers(2, 10))
def test_logarithmic_axes_enclose_the_values(values, max_ticks):
    axis = fit_axis(values, start_px=0.0, end_px=100.0, is_log=True, max_ticks=max_ticks)
    assert 2 <= len(axis.ticks) <= max_ticks + 1
    for value in values:
        assert -0.01 <= axis(value) <= 100.01
    for tick in axis.ticks:
        assert f"{tick:e}"[0] in "125" and not f"{tick:e}".split("e")[0].strip("125.0")


def test_a_single_value_gets_room_around_it():
    for value in (0.0, 5.0, -3.0, 1e-305, 0.39):
        axis = fit_axis([value], start_px=0.0, end_px=100.0)
        assert 0 <= axis(value) <= 100 and axis.low < axis.high
        assert len(set(axis.labels())) == len(axis.ticks) >= 2


def test_what_cannot_be_shown_is_ignored():
    axis = fit_axis([math.nan, 1.0, math.inf, 2.0, -math.inf], start_px=0.0, end_px=10.0)
    assert (axis.low, axis.high) == (0.0, 2.0)
    assert not axis.can_show(math.nan) and axis.can_show(-1.0)
    logarithmic = fit_axis([0.0, -1.0, 2.0, 20.0], start_px=0.0, end_px=10.0, is_log=True)
    assert (logarithmic.low, logarithmic.high) == (2.0, 20.0)
    assert not logarithmic.can_show(0.0)
    with pytest.raises(ValueError, match="needs a value"):
        fit_axis([math.nan], start_px=0.0, end_px=1.0)


def test_limits_widen_and_never_cut():
    assert fit_axis([0.4], start_px=0.0, end_px=1.0, limits=(0.0, 1.0)).high == 1.0
    assert fit_axis([1.7], start_px=0.0, end_px=1.0, limits=(0.0, 1.0)).high >= 1.7


def test_given_ticks_are_used_as_far_as_they_lie_within():
    axis = fit_axis([8.0, 32.0], start_px=0.0, end_px=9.0, is_snug=True, ticks=[4, 8, 16, 32, 64])
    assert axis.ticks == (8, 16, 32)


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0.0, 1.0], ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        ([0.0, 50_000.0], ["0", "10k", "20k", "30k", "40k", "50k"]),
        ([0.0, 5e-5], ["0", "1e-05", "2e-05", "3e-05", "4e-05", "5e-05"]),
        ([1000.0, 1004.0], ["1000", "1001", "1002", "1003", "1004"]),
    ],
)
def test_labels_have_the_decimals_of_the_step(values, labels):
    assert fit_axis(values, start_px=0.0, end_px=1.0).labels() == labels


def test_percent_labels():
    axis = fit_axis([0.0, 1.0], start_px=0.0, end_px=1.0, is_percent=True)
    assert axis.labels() == ["0%", "20%", "40%", "60%", "80%", "100%"]


def test_short_numbers():
    values = {0.25: "0.25", 812: "812", 12_345.0: "12.35k", 2e-5: "2e-05", math.nan: "-", 0: "0"}
    assert {value: short_number(value) for value in values} == values
