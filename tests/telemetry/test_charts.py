"""Charts, measured with a ruler: every mark stands where the ticks say it should."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from read_chart import ReadChart

from jaxvla.telemetry.charts import bar_chart, histogram, line_chart, scatter, stacked_bars
from jaxvla.telemetry.drawing import PALETTE, ink_on

_AXES = {"title": "t", "x_label": "x", "y_label": "y"}
_BARS = {"title": "t", "value_label": "v"}
_PIXEL = 0.06
"""Coordinates are rounded to 0.1 pixel."""


def value_of_pixels(chart, axis):
    """How much one pixel is worth on a linear axis."""
    (v0, p0), *_, (v1, p1) = chart.ticks(axis)
    return abs((v1 - v0) / (p1 - p0))


def test_a_line_goes_through_its_points():
    points = [(1, 0.2), (2, 0.45), (5, 0.31), (9, 0.98)]
    chart = ReadChart(line_chart({"success": points}, **_AXES))
    (line,) = chart.lines()
    np.testing.assert_allclose(line[:, 0], [1, 2, 5, 9], atol=2 * value_of_pixels(chart, "x"))
    np.testing.assert_allclose(
        line[:, 1], [0.2, 0.45, 0.31, 0.98], atol=2 * _PIXEL * value_of_pixels(chart, "y")
    )
    assert "success: 0.45 at 2" in chart.tips()


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6).filter(lambda v: v == 0 or abs(v) > 1e-3), min_size=2),
    st.booleans(),
)
def test_lines_of_any_values_read_back(values, is_percent):
    points = list(enumerate(values))
    chart = ReadChart(line_chart({"a": points}, **_AXES, is_percent=is_percent))
    (line,) = chart.lines()
    assert len(line) == len(values)
    (v0, _), *_, (v1, _) = chart.ticks("y")
    # Labels round as well: 12.34k stands for 12,340 +- 5.
    slack = 0.2 * value_of_pixels(chart, "y") + 5e-4 * max(abs(v0), abs(v1))
    np.testing.assert_allclose(line[:, 1], values, atol=slack)


def test_missing_values_break_the_line():
    points = [(0, 1.0), (1, 2.0), (2, math.nan), (3, 1.5), (4, math.inf), (5, 1.0), (6, 0.0)]
    chart = ReadChart(line_chart({"a": points}, **_AXES))
    assert [len(line) for line in chart.lines()] == [2, 2]
    assert len(chart.dots()) == 5  # the lone point is a dot


def test_logarithmic_axes_read_back_and_leave_out_zero():
    points = [(8, 100.0), (64, 1000.0), (512, 0.0), (256, 5e4)]
    svg = line_chart({"a": points}, **_AXES, is_log_x=True, is_log_y=True, x_ticks=[8, 64, 256])
    chart = ReadChart(svg, is_log_x=True, is_log_y=True)
    assert [value for value, _ in chart.ticks("x")] == [8, 64, 256]
    np.testing.assert_allclose(chart.dots(), [[8, 100], [64, 1000], [256, 5e4]], rtol=5e-3)


def test_a_band_has_the_corners_of_its_interval():
    points = [(0, 0.5), (5, 0.5), (10, 0.6)]
    ends = [(0, 0.4, 0.6), (5, 0.3, 0.7), (10, 0.5, 0.9)]
    chart = ReadChart(line_chart({"a": points}, **_AXES, band={"a": ends}))
    want = [[0, 0.6], [5, 0.7], [10, 0.9], [10, 0.5], [5, 0.3], [0, 0.4]]
    np.testing.assert_allclose(chart.area(), want, atol=0.02)
    with pytest.raises(ValueError, match="bands of no series: b"):
        line_chart({"a": []}, **_AXES, band={"b": []})


def test_two_intervals_claim_nothing_about_what_lies_between():
    ends = [(0, 0.4, 0.6), (10, 0.5, 0.9)]
    chart = ReadChart(line_chart({"a": [(0, 0.5), (10, 0.6)]}, **_AXES, band={"a": ends}))
    assert not chart.all("polygon")
    strokes = [path.get("d") for path in chart.all("path")]
    assert len(strokes) == 2
    found = [[chart.value("y", y) for y in d.split(" ")[1].split("V")] for d in strokes]
    np.testing.assert_allclose(found, [[0.4, 0.6], [0.5, 0.9]], atol=0.01)


def test_long_series_keep_their_extremes_and_their_ends():
    values = np.sin(np.arange(5000) / 300)
    values[1234], values[4321] = 7.0, -5.0
    chart = ReadChart(line_chart({"a": list(enumerate(values.tolist()))}, **_AXES))
    (line,) = chart.lines()
    assert len(line) <= 300
    pixel = value_of_pixels(chart, "x")
    assert abs(line[line[:, 1].argmax(), 0] - 1234) < 2 * pixel
    assert abs(line[line[:, 1].argmin(), 0] - 4321) < 2 * pixel
    assert abs(line[0, 0]) < pixel and abs(line[-1, 0] - 4999) < pixel
    assert np.all(np.diff(line[:, 0]) >= 0)


def test_every_series_has_a_colour_or_a_dash_of_its_own_and_a_legend():
    series = {f"run {i}": [(0, i), (1, i)] for i in range(20)}
    chart = ReadChart(line_chart(series, **_AXES))
    looks = [(x.get("stroke"), x.get("stroke-dasharray")) for x in chart.all("polyline")]
    assert len(set(looks)) == 20
    assert set(series) <= set(chart.texts())
    assert {stroke for stroke, _ in looks} == set(PALETTE)


def test_bars_have_lengths_whiskers_and_labels():
    svg = bar_chart(
        {"before": 0.39, "after": 0.89, "never": math.nan},
        **_BARS,
        intervals={"before": (0.33, 0.45)},
        limits=(0, 1),
        is_percent=True,
    )
    chart = ReadChart(svg)
    pixel = value_of_pixels(chart, "x")
    ends = [(chart.value("x", left), chart.value("x", right)) for left, right, *_ in chart.boxes()]
    np.testing.assert_allclose(ends, [(0, 0.39), (0, 0.89)], atol=pixel / 5)
    assert {"before", "after", "never", "39%", "89%", "no data"} <= set(chart.texts())
    assert "before: 39% [33% to 45%]" in chart.tips()
    (whisker,) = [path for path in chart.all("path") if "H" in path.get("d")]
    left, rest = whisker.get("d")[1:].split(" ", 1)
    right = rest.split("H")[1].split("M")[0]
    found = chart.value("x", left), chart.value("x", right)
    np.testing.assert_allclose(found, (0.33, 0.45), atol=pixel / 5)


def test_negative_bars_go_to_the_left_of_zero():
    chart = ReadChart(bar_chart({"a": -2.0, "b": 3.0}, **_BARS))
    (a0, a1, *_), (b0, b1, *_) = chart.boxes()
    np.testing.assert_allclose([chart.value("x", p) for p in (a0, a1)], [-2, 0], atol=0.01)
    np.testing.assert_allclose([chart.value("x", p) for p in (b0, b1)], [0, 3], atol=0.01)


def test_stacked_bars_lie_end_to_end():
    rows = {
        "simulation": {"busy": 0.66, "waiting for inference": 0.29, "waiting for learner": 0.05},
        "serving": {"busy": 0.54, "waiting for requests": math.nan},
    }
    chart = ReadChart(stacked_bars(rows, **_BARS, limits=(0, 1), is_percent=True))
    ends = [(chart.value("x", left), chart.value("x", right)) for left, right, *_ in chart.boxes()]
    want = [(0, 0.66), (0.66, 0.95), (0.95, 1.0), (0, 0.54)]
    np.testing.assert_allclose(ends, want, atol=1e-3)
    fills = [box.get("fill") for box in chart.all("rect")]
    assert fills == [PALETTE[0], PALETTE[1], PALETTE[2], PALETTE[0]]
    legend = {"busy", "waiting for inference", "waiting for learner", "waiting for requests"}
    assert legend <= set(chart.texts())
    with pytest.raises(ValueError, match=r"'a' has a negative part: b = -1"):
        stacked_bars({"a": {"b": -1.0}}, **_BARS)


def test_histograms_count_as_numpy_does():
    values, bins = np.random.default_rng(0).normal(size=500).tolist(), [-5, -1, 0, 0.5, 5]
    chart = ReadChart(histogram([*values, math.nan], bins, **_AXES, marks={"bound": 0.5}))
    counts, _ = np.histogram(values, bins)
    heights = [chart.value("y", top) for *_, top, _ in chart.boxes()]
    np.testing.assert_allclose(heights, counts, atol=value_of_pixels(chart, "y") / 5)
    for (left, right, *_), low, high in zip(chart.boxes(), bins, bins[1:], strict=False):
        pixel = value_of_pixels(chart, "x")
        assert (
            abs(chart.value("x", left) - low) < pixel
            and abs(chart.value("x", right) - high) < pixel
        )
    (mark,) = [path for path in chart.all("path") if path.get("stroke-dasharray")]
    assert abs(chart.value("x", mark.get("d")[1:].split()[0]) - 0.5) < 0.02


def test_histograms_take_weights_and_refuse_to_hide_values():
    chart = ReadChart(histogram([0, 1], [-0.5, 0.5, 1.5], **_AXES, weights=[7, 30]))
    heights = [chart.value("y", top) for *_, top, _ in chart.boxes()]
    np.testing.assert_allclose(heights, [7, 30], atol=0.1)
    with pytest.raises(ValueError, match="beyond bins"):
        histogram([3.0], [0, 1], **_AXES)
    with pytest.raises(ValueError, match="do not ascend"):
        histogram([0.5], [1, 0], **_AXES)


def test_scatter_points_stand_where_they_belong_and_are_labelled():
    points = {"disaggregated": [(1, 100.0, "a"), (4, 350.0, "b")], "colocated": [(8, 420.0, "c")]}
    chart = ReadChart(scatter(points, **_AXES))
    np.testing.assert_allclose(chart.dots(), [[1, 100], [4, 350], [8, 420]], rtol=5e-3)
    assert {"a", "b", "c", "disaggregated", "colocated"} <= set(chart.texts())
    assert "c: 8, 420" in chart.tips()
    fills = [circle.get("fill") for circle in chart.all("circle")]
    assert fills == [PALETTE[0], PALETTE[0], PALETTE[1]]


@pytest.mark.parametrize(
    "svg",
    [
        line_chart({}, **_AXES),
        line_chart({"a": [], "b": [(0, math.nan)]}, **_AXES),
        line_chart({"a": [(1, 0.0)]}, **_AXES, is_log_y=True),
        bar_chart({}, **_BARS),
        bar_chart({"a": math.nan}, **_BARS),
        stacked_bars({}, **_BARS),
        stacked_bars({"a": {}}, **_BARS),
        histogram([], [0, 1], **_AXES),
        scatter({}, **_AXES),
    ],
)
def test_charts_without_data_say_so(svg):
    assert "no data" in ReadChart(svg).texts()


def test_names_are_escaped_and_the_result_is_the_same_every_time():
    name = '<b>&"\x00\ud800'
    series = {name: [(0, 1), (1, 2)], "b": [(0, 2), (1, 1)]}
    first = line_chart(series, title=name, x_label=name, y_label=name)
    assert first == line_chart(series, title=name, x_label=name, y_label=name)
    assert '<b>&"\ufffd\ufffd' in ReadChart(first).texts()
    assert "<b>" not in first
    first.encode()


def test_long_labels_keep_both_ends_and_show_whole_in_the_tooltip():
    name = "simulation=2:data2 serving=2:data1,tensor2 learning=4:data2,fsdp2"
    chart = ReadChart(bar_chart({name: 1.0}, **_BARS))
    (shown,) = [text for text in chart.texts() if "…" in text]
    assert name.startswith(shown.split("…")[0]) and name.endswith(shown.split("…")[1])
    assert name in chart.tips()


def test_text_on_a_colour_is_readable():
    assert ink_on("#0072b2") == "#ffffff"
    assert ink_on("#56b4e9") == ink_on("#ffffff") == "#000000"
