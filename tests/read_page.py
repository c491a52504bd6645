"""Reads pages back."""

import html.parser
import re

from read_chart import ReadChart

_VOID = {"meta"}


class Reader(html.parser.HTMLParser):
    """Checks that tags close in order; keeps tags with their attributes, and text by tag."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.texts = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1], data))


def read(text):
    """What a parser sees of a well-formed page."""
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def charts(text):
    """Title -> chart of a page."""
    found = [ReadChart(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    return {chart.root.get("aria-label"): chart for chart in found}


def facts(text):
    """Name -> value of the headline."""
    return dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text))
