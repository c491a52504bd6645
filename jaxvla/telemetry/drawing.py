"""What charts are drawn with: a canvas with title, legend and axes, and the marks on it, as SVG.

Text and axes take the colour of the page around them, so a chart reads in light and in dark.
Series have the colours of Okabe and Ito, which people with any colour vision can tell apart
(https://jfly.uni-koeln.de/color/); beyond eight they are dashed as well.
"""

import itertools
from collections.abc import Iterable, Sequence

from jaxvla.telemetry.axes import Axis, can_show, fit_axis, short_number
from jaxvla.telemetry.html import Html, escape

PALETTE = (
    "#0072b2",  # blue
    "#e69f00",  # orange
    "#009e73",  # green
    "#cc79a7",  # purple
    "#56b4e9",  # sky
    "#d55e00",  # vermillion
    "#8c8c8c",  # grey, for black, which a dark page would hide
    "#c2b000",  # yellow, darker than Okabe and Ito's, for white pages
)

FAINT = ' fill-opacity="0.6"'
"""Attribute of text that says that there is nothing."""

WIDTH = 560
CHAR = 6.8
"""Width of a character of size 12, on average."""
_HEIGHT = 290
_RIGHT = 16
_LEGEND_ROW = 17
_BAR_ROW = 26
_MAX_LABEL = 230
"""Widest label of a bar, in pixels."""
_MAX_LEGEND = 400
"""Widest name in a legend, in pixels."""


class Canvas:
    """A drawing with a title, a legend and room for the rest."""

    def __init__(
        self,
        title: str,
        legend: Sequence[str],
        *,
        rows: Sequence[str] = (),
        is_bar: bool = False,
        right: float = _RIGHT,
        headroom: float = 0.0,
    ):
        """Args:
        title: plain text.
        legend: names of series or parts in the order of their colours.
        rows: labels of horizontal bars, which the height then follows.
        is_bar: the legend shows boxes instead of lines.
        right: margin in pixels.
        headroom: pixels above the axes, for text of the caller's.
        """
        self._title = title
        self._rows = rows
        entries, legend_height = _legend(legend, is_bar=is_bar)
        self.top = 30 + legend_height + headroom
        self.bottom = self.top + _BAR_ROW * len(rows) + 4 if rows else _HEIGHT - 42
        widest = max((len(row) for row in rows), default=0) * CHAR
        self.left = min(widest, _MAX_LABEL) + 14 if rows else 62.0
        self.right = WIDTH - right
        self._height = self.bottom + 42
        shown = shorten(title, WIDTH * 0.8)
        bold = ' font-weight="600"'
        heading = text_at(WIDTH / 2, 18, shown, anchor="middle", size=14, more=bold)
        self._parts = [heading, *entries]

    def add(self, *parts: str) -> None:
        """Draws on top of what is there."""
        self._parts += [part for part in parts if part]

    @staticmethod
    def can_show(values: Sequence[float], *, is_log: bool = False) -> bool:
        """Whether there is anything to draw."""
        return any(can_show(value, is_log=is_log) for value in values)

    def axes(
        self,
        xs: Sequence[float],
        ys: Sequence[float],
        *,
        x_label: str,
        y_label: str,
        y_limits: tuple[float, float] | None = None,
        x_ticks: Sequence[float] | None = None,
        is_log: tuple[bool, bool] = (False, False),
        is_percent: bool = False,
        is_snug: bool = False,
    ) -> tuple[Axis, Axis]:
        """Draws and returns the x and the y axis."""
        x = fit_axis(
            xs,
            start_px=self.left,
            end_px=self.right,
            is_log=is_log[0],
            is_snug=is_snug,
            max_ticks=8,
            ticks=x_ticks,
        )
        y = fit_axis(
            ys,
            start_px=self.bottom,
            end_px=self.top,
            limits=y_limits,
            is_log=is_log[1],
            is_percent=is_percent,
        )
        self._x_axis(x, x_label)
        for value, label in zip(y.ticks, y.labels(), strict=True):
            self.add(rule(self.left, self.right, y(value), y(value)))
            at = self.left - 6, y(value) + 4
            self.add(text_at(*at, label, anchor="end", size=11, more=' class="y"'))
        middle = (self.top + self.bottom) / 2
        turned = f' transform="rotate(-90 14 {px(middle)})"'
        self.add(text_at(14, middle, y_label, anchor="middle", more=turned))
        return x, y

    def value_axis(
        self,
        values: Sequence[float],
        label: str,
        limits: tuple[float, float] | None,
        is_percent: bool,
    ) -> Axis:
        """Draws the labels of the rows and the axis of their values, which it returns."""
        x = fit_axis(
            values,
            start_px=self.left,
            end_px=self.right,
            limits=limits,
            is_percent=is_percent,
        )
        self._x_axis(x, label)
        for row, name in enumerate(self._rows):
            at = self.left - 8, self.row_middle(row) + 4
            self.add(tipped(text_at(*at, shorten(name, _MAX_LABEL), anchor="end"), name))
        return x

    def row_middle(self, row: int) -> float:
        """Vertical pixel of a bar."""
        return self.top + 2 + _BAR_ROW * (row + 0.5)

    def empty(self) -> Html:
        """The drawing without data."""
        middle = (self.top + self.bottom) / 2
        self.add(text_at(WIDTH / 2, middle, "no data", anchor="middle", more=FAINT))
        return self.svg()

    def svg(self) -> Html:
        """The whole drawing."""
        size = f'width="{WIDTH}" height="{px(self._height)}"'
        box = f'viewBox="0 0 {WIDTH} {px(self._height)}"'
        return Html(
            f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" {size} {box} role="img" '
            f'aria-label="{escape(self._title)}" font-family="system-ui, sans-serif" '
            'fill="currentColor">\n' + "\n".join(self._parts) + "\n</svg>"
        )

    def _x_axis(self, x: Axis, label: str) -> None:
        for value, text in zip(x.ticks, x.labels(), strict=True):
            self.add(rule(x(value), x(value), self.top, self.bottom))
            at = x(value), self.bottom + 15
            self.add(text_at(*at, text, anchor="middle", size=11, more=' class="x"'))
        self.add(rule(self.left, self.right, self.bottom, self.bottom, opacity=0.7))
        self.add(text_at((self.left + self.right) / 2, self.bottom + 34, label, anchor="middle"))


# ------------------------------------------------------------------------------- colours


def colors_of(names: Iterable[str]) -> dict[str, str]:
    """Name -> colour, by position."""
    return dict(zip(names, itertools.cycle(PALETTE), strict=False))


def shade_of(index: int) -> float:
    """Opacity that tells parts of the same colour apart."""
    return (1.0, 0.5, 0.25)[index // len(PALETTE) % 3]


def dash_of(index: int) -> str:
    """Attribute that tells series of the same colour apart."""
    patterns = ("", "7 4", "2 3", "9 3 2 3")
    pattern = patterns[index // len(PALETTE) % len(patterns)]
    return f' stroke-dasharray="{pattern}"' if pattern else ""


def ink_on(color: str) -> str:
    """Black or white, whichever has more contrast on a colour "#rrggbb".

    By relative luminance, https://www.w3.org/TR/WCAG22/#dfn-relative-luminance.
    """
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return "#000000" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "#ffffff"


# --------------------------------------------------------------------------------- marks


def px(value: float) -> str:
    """A coordinate, to a tenth of a pixel."""
    return f"{round(value, 1) + 0.0:.1f}".removesuffix(".0")


def amount(value: float, *, is_percent: bool) -> str:
    """A value as it is shown beside a mark."""
    return f"{100 * value:.3g}%" if is_percent else short_number(value)


def shorten(text: str, width_px: float) -> str:
    """Text that fits, without its middle when it must: both ends of a path tell something."""
    room = int(width_px / CHAR)
    if len(text) <= room:
        return text
    tail = room // 2
    return f"{text[: room - tail - 1]}…{text[-tail:]}"


def text_at(
    x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, more: str = ""
) -> str:
    """Text whose baseline begins, ends or has its middle at a point.

    Args:
      x, y: pixels.
      text: plain.
      anchor: start, middle or end.
      size: in pixels.
      more: further attributes, with a blank before each.
    """
    return (
        f'<text x="{px(x)}" y="{px(y)}" text-anchor="{anchor}" font-size="{size}"{more}>'
        f"{escape(text)}</text>"
    )


def tipped(mark: str, tip: str) -> str:
    """A mark with a tooltip."""
    return f"<g><title>{escape(tip)}</title>{mark}</g>"


def rect(
    left: float, top: float, width: float, height: float, color: str, opacity: float = 1.0
) -> str:
    """A filled box; sizes below zero count as zero."""
    shade = f' fill-opacity="{opacity}"' if opacity < 1 else ""
    return (
        f'<rect x="{px(left)}" y="{px(top)}" width="{px(max(width, 0.0))}" '
        f'height="{px(max(height, 0.0))}" fill="{color}"{shade}/>'
    )


def bar(
    from_px: float, to_px: float, middle: float, color: str, tip: str, opacity: float = 1.0
) -> str:
    """A horizontal bar with a tooltip."""
    left, width = min(from_px, to_px), abs(to_px - from_px)
    return tipped(rect(left, middle - 9, width, 18, color, opacity), tip)


def whisker(low_px: float, high_px: float, middle: float) -> str:
    """An interval across a bar."""
    low, high = px(low_px), px(high_px)
    top, bottom = px(middle - 5), px(middle + 5)
    path = f"M{low} {px(middle)}H{high}M{low} {top}V{bottom}M{high} {top}V{bottom}"
    return f'<path d="{path}" fill="none" stroke="currentColor" stroke-width="1.5"/>'


def rule(x1: float, x2: float, y1: float, y2: float, *, opacity: float = 0.15) -> str:
    """A thin straight line: grid or axis."""
    ends = f'x1="{px(x1)}" x2="{px(x2)}" y1="{px(y1)}" y2="{px(y2)}"'
    return f'<line {ends} stroke="currentColor" stroke-opacity="{opacity}"/>'


def dot(x: float, y: float, radius: float, color: str, tip: str, *, is_visible: bool = True) -> str:
    """A round mark with a tooltip; an invisible one only carries that."""
    shown = "" if is_visible else ' fill-opacity="0"'
    return tipped(
        f'<circle cx="{px(x)}" cy="{px(y)}" r="{px(radius)}" fill="{color}"{shown}/>', tip
    )


def _legend(names: Sequence[str], *, is_bar: bool) -> tuple[list[str], float]:
    """Swatches and names in rows, and their height in pixels."""
    parts: list[str] = []
    colors, x, row = list(colors_of(names).values()), 16.0, 0
    for index, name in enumerate(names):
        shown = shorten(name, _MAX_LEGEND)
        width = 24 + CHAR * len(shown) + 14
        if x > 16 and x + width > WIDTH:
            x, row = 16.0, row + 1
        y = 34 + _LEGEND_ROW * row
        look = f' stroke-opacity="{shade_of(index)}"' if is_bar else dash_of(index)
        stroke = f'stroke="{colors[index % len(colors)]}" stroke-width="{10 if is_bar else 3}"'
        parts.append(
            f'<path d="M{px(x)} {px(y)}h18" fill="none" {stroke}{look}/>'
            + tipped(text_at(x + 23, y + 4, shown), name)
        )
        x += width
    return parts, _LEGEND_ROW * (row + 1) + 2 if names else 0
