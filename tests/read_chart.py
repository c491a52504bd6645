"""Reads charts back: values from pixels, by way of the ticks alone."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np

_SVG = "{http://www.w3.org/2000/svg}"
_SUFFIX = {"k": 1e3, "M": 1e6, "G": 1e9, "%": 1e-2}


class ReadChart:
    """A chart as a reader with a ruler sees it."""

    def __init__(self, svg, *, is_log_x=False, is_log_y=False):
        self.root = ElementTree.fromstring(svg)
        assert self.root.tag == f"{_SVG}svg"
        self._is_log = {"x": is_log_x, "y": is_log_y}

    def all(self, tag):
        return self.root.findall(f".//{_SVG}{tag}")

    def texts(self):
        return [text.text or "" for text in self.all("text")]

    def tips(self):
        return [title.text for title in self.all("title")]

    def ticks(self, axis):
        """[(value, pixel)] of the labelled ticks of "x" or "y"."""
        labels = [text for text in self.all("text") if text.get("class") == axis]
        shift = 4 if axis == "y" else 0  # the baseline of a label is below its tick
        return [(number(text.text), float(text.get(axis)) - shift) for text in labels]

    def value(self, axis, pixel):
        """The value at a pixel, interpolated between the outermost ticks."""
        (v0, p0), *_, (v1, p1) = self.ticks(axis)
        part = (float(pixel) - p0) / (p1 - p0)
        if self._is_log[axis]:
            return v0 * (v1 / v0) ** part
        return v0 + part * (v1 - v0)

    def lines(self):
        """Points of each polyline, as values float64 [n, 2]."""
        return [
            np.array([self._point(place) for place in line.get("points").split()])
            for line in self.all("polyline")
        ]

    def area(self):
        """Corners of the only polygon, as values."""
        (polygon,) = self.all("polygon")
        return np.array([self._point(place) for place in polygon.get("points").split()])

    def dots(self):
        """Centres of all circles, as values float64 [n, 2]."""
        circles = self.all("circle")
        return np.array([self._point(f"{c.get('cx')},{c.get('cy')}") for c in circles])

    def boxes(self):
        """(x0, x1, y0, y1) in pixels of each rect."""
        found = []
        for box in self.all("rect"):
            x, y, width, height = (float(box.get(n)) for n in ("x", "y", "width", "height"))
            found.append((x, x + width, y, y + height))
        return found

    def _point(self, place):
        x, y = place.split(",")
        return self.value("x", x), self.value("y", y)


def number(label):
    """The value that a tick label states."""
    match = re.fullmatch(r"(-?[\d.]+(?:e[+-]?\d+)?)([kMG%]?)", label)
    assert match, label
    return float(match[1]) * _SUFFIX.get(match[2], 1.0)
