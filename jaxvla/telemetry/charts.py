"""Charts as inline SVG: pure functions from data to text, the same for the same data.

Values that are not finite are left out: lines break, bars say "no data", and so does a chart that
has none at all. Marks carry their exact value as a tooltip.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jaxvla.telemetry.axes import Axis, short_number
from jaxvla.telemetry.drawing import (
    CHAR,
    FAINT,
    PALETTE,
    Canvas,
    amount,
    bar,
    colors_of,
    dash_of,
    dot,
    ink_on,
    px,
    rect,
    shade_of,
    shorten,
    text_at,
    tipped,
    whisker,
)
from jaxvla.telemetry.html import Html

Point = tuple[float, float]
"""x, y."""

_MAX_POINTS = 300
"""Points of a line; of more, the extremes of neighbours stay."""
_MAX_DOTS = 40
"""Points of a line that are shown as dots."""
_MAX_LABELLED = 16
"""Points of a scatter chart with text beside them."""


def line_chart(
    series: Mapping[str, Sequence[Point]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    band: Mapping[str, Sequence[tuple[float, float, float]]] | None = None,
    y_limits: tuple[float, float] | None = None,
    x_ticks: Sequence[float] | None = None,
    is_log_x: bool = False,
    is_log_y: bool = False,
    is_percent: bool = False,
) -> Html:
    """Lines over a common axis.

    Args:
      series: name -> (x, y) in the order to be joined.
      title, x_label, y_label: plain text, with units.
      band: name of a series -> (x, low, high), shaded in its colour: intervals, spreads.
      y_limits: to be shown at least, e.g. (0, 1) of a rate.
      x_ticks: instead of round ones, e.g. numbers of devices.
      is_log_x, is_log_y: logarithmic axes, which leave out values <= 0.
      is_percent: y are fractions, labelled as percentages.

    Raises:
      ValueError: a band belongs to no series.
    """
    bands = band or {}
    if strangers := sorted(set(bands) - set(series)):
        raise ValueError(f"bands of no series: {', '.join(strangers)}")
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    xs += [x for points in bands.values() for x, _, _ in points]
    ys += [y for points in bands.values() for _, *ends in points for y in ends]
    canvas = Canvas(title, list(series) if len(series) > 1 else [])
    if not canvas.can_show(xs, is_log=is_log_x) or not canvas.can_show(ys, is_log=is_log_y):
        return canvas.empty()
    x, y = canvas.axes(
        xs,
        ys,
        x_label=x_label,
        y_label=y_label,
        y_limits=y_limits,
        x_ticks=x_ticks,
        is_log=(is_log_x, is_log_y),
        is_percent=is_percent,
        is_snug=True,
    )
    colors = colors_of(series)
    for name, ends in bands.items():
        canvas.add(_band(ends, x, y, colors[name]))
    for index, (name, points) in enumerate(series.items()):
        canvas.add(*_line(name, points, x, y, colors[name], dash_of(index)))
    return canvas.svg()


def scatter(
    points: Mapping[str, Sequence[tuple[float, float, str]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    is_log_x: bool = False,
    is_log_y: bool = False,
) -> Html:
    """Labelled points, in a colour per series.

    Args:
      points: name of a series -> (x, y, label); labels stand beside the points while these are
        few, and in the tooltips.
      title, x_label, y_label: plain text, with units.
      is_log_x, is_log_y: logarithmic axes, which leave out values <= 0.
    """
    every = [point for group in points.values() for point in group]
    xs, ys = [x for x, _, _ in every], [y for _, y, _ in every]
    canvas = Canvas(title, list(points) if len(points) > 1 else [])
    if not canvas.can_show(xs, is_log=is_log_x) or not canvas.can_show(ys, is_log=is_log_y):
        return canvas.empty()
    is_log = is_log_x, is_log_y
    x, y = canvas.axes(xs, ys, x_label=x_label, y_label=y_label, is_log=is_log)
    colors = colors_of(points)
    shown = [
        (name, x(at), y(value), label, f"{label}: {short_number(at)}, {short_number(value)}")
        for name, group in points.items()
        for at, value, label in group
        if x.can_show(at) and y.can_show(value)
    ]
    for name, left, top, _, tip in shown:
        canvas.add(dot(left, top, 5, colors[name], tip))
    for _, left, top, label, _ in shown if len(shown) <= _MAX_LABELLED else ():
        # Away from the nearer edge, so that the text stays inside.
        is_left = left < (x.start_px + x.end_px) / 2
        anchor, at = ("start", left + 8) if is_left else ("end", left - 8)
        canvas.add(text_at(at, top - 6, shorten(label, 220), anchor=anchor, size=11))
    return canvas.svg()


def bar_chart(
    values: Mapping[str, float],
    *,
    title: str,
    value_label: str,
    intervals: Mapping[str, tuple[float, float]] | None = None,
    limits: tuple[float, float] | None = None,
    is_percent: bool = False,
) -> Html:
    """Horizontal bars from zero, each with its value at its end.

    Args:
      values: label -> length of the bar.
      title, value_label: plain text, with units.
      intervals: label -> (low, high), drawn as a whisker; labels without one have none.
      limits: of the value axis, to be shown at least.
      is_percent: values are fractions.
    """
    ends = intervals or {}
    canvas = Canvas(title, [], rows=list(values), right=64)
    lengths = [0.0, *values.values(), *(x for interval in ends.values() for x in interval)]
    if not canvas.can_show(list(values.values())):
        return canvas.empty()
    x = canvas.value_axis(lengths, value_label, limits, is_percent)
    for row, (label, value) in enumerate(values.items()):
        middle = canvas.row_middle(row)
        if not math.isfinite(value):
            canvas.add(text_at(x(0.0) + 6, middle + 4, "no data", more=FAINT))
            continue
        text = amount(value, is_percent=is_percent)
        interval = [e for e in ends.get(label, ()) if math.isfinite(e)]
        between = " to ".join(amount(e, is_percent=is_percent) for e in interval)
        tip = f"{label}: {text}" + (f" [{between}]" if interval else "")
        canvas.add(bar(x(0.0), x(value), middle, PALETTE[0], tip))
        if len(interval) == 2:
            canvas.add(whisker(x(interval[0]), x(interval[1]), middle))
        end = max(x(e) for e in (0.0, value, *interval))
        canvas.add(text_at(end + 5, middle + 4, text, size=11))
    return canvas.svg()


def stacked_bars(
    rows: Mapping[str, Mapping[str, float]],
    *,
    title: str,
    value_label: str,
    limits: tuple[float, float] | None = None,
    is_percent: bool = False,
    parts: Sequence[str] = (),
) -> Html:
    """Horizontal bars of parts laid end to end, in a colour per part.

    Args:
      rows: label -> part -> value >= 0. What is not finite has no length.
      title, value_label: plain text, with units.
      limits: of the value axis, to be shown at least.
      is_percent: values are fractions.
      parts: order of colours, legend and pieces; those that are not named follow in the order in
        which they first appear.

    Raises:
      ValueError: a negative value.
    """
    for label, row in rows.items():
        if negative := [f"{part} = {value}" for part, value in row.items() if value < 0]:
            raise ValueError(f"stacked bar {label!r} has a negative part: {', '.join(negative)}")
    present = dict.fromkeys(part for row in rows.values() for part in row)
    names = list(dict.fromkeys([*(part for part in parts if part in present), *present]))
    colors = colors_of(names)
    canvas = Canvas(title, names, rows=list(rows), is_bar=True)
    lengths = [
        {part: row[part] for part in names if math.isfinite(row.get(part, math.nan))}
        for row in rows.values()
    ]
    if not any(lengths):
        return canvas.empty()
    sums = [sum(row.values()) for row in lengths]
    x = canvas.value_axis([0.0, *sums], value_label, limits, is_percent)
    for index, (label, row) in enumerate(zip(rows, lengths, strict=True)):
        middle, start = canvas.row_middle(index), 0.0
        for part, value in row.items():
            text, shade = amount(value, is_percent=is_percent), shade_of(names.index(part))
            left, right = x(start), x(start + value)
            tip = f"{label}, {part}: {text}"
            canvas.add(bar(left, right, middle, colors[part], tip, shade))
            if right - left > CHAR * len(text) + 4:
                ink = f' fill="{ink_on(colors[part])}"' if shade == 1 else ""
                center = (left + right) / 2
                canvas.add(text_at(center, middle + 4, text, anchor="middle", size=11, more=ink))
            start += value
        if not row:
            canvas.add(text_at(x(0.0) + 6, middle + 4, "no data", more=FAINT))
    return canvas.svg()


def histogram(
    values: Sequence[float],
    bins: Sequence[float],
    *,
    title: str,
    x_label: str,
    y_label: str = "count",
    weights: Sequence[float] | None = None,
    marks: Mapping[str, float] | None = None,
    x_ticks: Sequence[float] | None = None,
) -> Html:
    """Counts per bin.

    Args:
      values: those that are not finite are not counted.
      bins: ascending edges; all bins but the last are half open.
      title, x_label, y_label: plain text, with units.
      weights: how often each value counts; None: once.
      marks: text -> x of a dashed vertical line, e.g. a bound.
      x_ticks: instead of round ones.

    Raises:
      ValueError: edges do not ascend, or a value lies outside of them and would be hidden.
    """
    edges = np.asarray(bins, np.float64)
    if edges.size < 2 or not np.all(np.diff(edges) > 0):
        raise ValueError(f"histogram bins {list(bins)} do not ascend")
    data = np.asarray(values, np.float64)
    amounts = np.ones_like(data) if weights is None else np.asarray(weights, np.float64)
    is_finite = np.isfinite(data)
    data, amounts = data[is_finite], amounts[is_finite]
    if data.size and not edges[0] <= data.min() <= data.max() <= edges[-1]:
        raise ValueError(f"values {data.min()}..{data.max()} beyond bins {edges[0]}..{edges[-1]}")
    canvas = Canvas(title, [], headroom=14 if marks else 0)
    if not data.size:
        return canvas.empty()
    counts, _ = np.histogram(data, edges, weights=amounts)
    x, y = canvas.axes(
        [*edges.tolist(), *(marks or {}).values()],
        [0.0, *counts.tolist()],
        x_label=x_label,
        y_label=y_label,
        x_ticks=x_ticks,
        is_snug=True,
    )
    for (left, right), count in zip(itertools.pairwise(edges.tolist()), counts, strict=True):
        tip = f"{short_number(left)} to {short_number(right)}: {short_number(count)}"
        box = rect(x(left) + 0.5, y(count), x(right) - x(left) - 1, y(0.0) - y(count), PALETTE[0])
        canvas.add(tipped(box, tip))
    for text, at in (marks or {}).items():
        place = f"M{px(x(at))} {px(y.start_px)}V{px(y.end_px)}"
        stroke = f'stroke="{PALETTE[5]}" stroke-width="2" stroke-dasharray="5 4"'
        canvas.add(f'<path d="{place}" fill="none" {stroke}/>')
        canvas.add(text_at(x(at), y.end_px - 4, text, anchor="middle", size=11))
    return canvas.svg()


def _line(
    name: str, points: Sequence[Point], x: Axis, y: Axis, color: str, dash: str
) -> Iterator[str]:
    """A line that breaks where a value is missing, and the marks of its points."""
    runs = [
        _thinned(list(run))
        for is_shown, run in itertools.groupby(
            points, lambda point: x.can_show(point[0]) and y.can_show(point[1])
        )
        if is_shown
    ]
    for run in runs:
        if len(run) > 1:
            places = " ".join(f"{px(x(a))},{px(y(b))}" for a, b in run)
            yield (
                f'<polyline points="{places}" fill="none" stroke="{color}" stroke-width="2" '
                f'stroke-linejoin="round"{dash}/>'
            )
    is_sparse = sum(map(len, runs)) <= _MAX_DOTS
    for run in runs:
        is_visible = is_sparse or len(run) == 1
        for a, b in run:
            tip = f"{name}: {short_number(b)} at {short_number(a)}"
            yield dot(x(a), y(b), 3 if is_visible else 4, color, tip, is_visible=is_visible)


def _thinned(points: list[Point]) -> list[Point]:
    """At most about `_MAX_POINTS` points: first, last, and the extremes of equal stretches."""
    if len(points) <= _MAX_POINTS:
        return points
    num_stretches = _MAX_POINTS // 2 - 1
    inner = range(1, len(points) - 1)
    kept = {0, len(points) - 1}
    for k in range(num_stretches):
        stretch = inner[k * len(inner) // num_stretches : (k + 1) * len(inner) // num_stretches]
        kept |= {pick(stretch, key=lambda i: points[i][1]) for pick in (min, max)}
    return [points[i] for i in sorted(kept)]


def _band(ends: Sequence[tuple[float, float, float]], x: Axis, y: Axis, color: str) -> str:
    """The area between two lines. Of one or two points, whose interval says nothing about what
    lies between them, only these; empty without any."""
    shown = [
        (at, low, high)
        for at, low, high in ends
        if x.can_show(at) and y.can_show(low) and y.can_show(high)
    ]
    if len(shown) < 3:
        return "".join(
            f'<path d="M{px(x(at))} {px(y(low))}V{px(y(high))}" stroke="{color}" '
            'stroke-width="5" stroke-opacity="0.4"/>'
            for at, low, high in shown
        )
    there = [f"{px(x(at))},{px(y(high))}" for at, _, high in shown]
    back = [f"{px(x(at))},{px(y(low))}" for at, low, _ in reversed(shown)]
    return f'<polygon points="{" ".join(there + back)}" fill="{color}" fill-opacity="0.2"/>'
