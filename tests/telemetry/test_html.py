"""Pages hold together and nothing in them is taken for markup."""

import pytest
from read_page import read

from jaxvla.telemetry import html as pages
from jaxvla.telemetry.charts import line_chart

EVIL = "<script>alert('1')</script>&\"\x07"


def test_a_page_is_well_formed_and_self_contained():
    chart = line_chart({"a": [(0, 1), (1, 2)]}, title="t", x_label="x", y_label="y")
    blocks = [
        pages.facts({"speed": "584 env steps/s"}),
        pages.paragraph("words"),
        pages.note("words"),
        pages.table(["a", "b"], [["x", "1.5"]], caption="c"),
        pages.chart_grid([chart, chart]),
        pages.folded("config", pages.preformatted("{}")),
        pages.link("videos/a b.mp4", "video"),
    ]
    text = pages.page("run", [pages.Section(title="All", blocks=blocks)])
    seen = read(text).seen
    assert {"svg", "table", "details", "pre", "a", "dl"} <= {tag for tag, _ in seen}
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in seen}
    assert not [attrs for _, attrs in seen if "src" in attrs]
    assert "prefers-color-scheme: dark" in text


def test_every_text_is_escaped():
    blocks = [
        pages.facts({EVIL: EVIL}),
        pages.paragraph(EVIL),
        pages.note(EVIL),
        pages.preformatted(EVIL),
        pages.table([EVIL], [[EVIL]], caption=EVIL),
        pages.link(f"videos/{EVIL}", EVIL),
        pages.folded(EVIL, pages.paragraph(EVIL)),
    ]
    text = pages.page(EVIL, [pages.Section(title=EVIL, blocks=blocks)])
    reader = read(text)
    assert "script" not in {tag for tag, _ in reader.seen}
    shown = [data for _, data in reader.texts if "script" in data]
    assert len(shown) == 14
    assert set(shown) == {EVIL.replace("\x07", "\ufffd")}


def test_links_lead_nowhere_unexpected():
    for href in ("javascript:alert(1)", "http://a.org", "data:text/html,x", "file:///etc"):
        with pytest.raises(ValueError, match="neither relative nor https"):
            pages.link(href, "x")
    pages.link("videos/judge/a:b.mp4", "x")
    pages.link("https://ui.perfetto.dev", "x")


def test_number_columns_are_flush_right_and_rows_must_fit():
    text = pages.table(["metric", "a"], [["speed", "584"], ["success", "0.5 [0.4, 0.6]"]])
    cells = [(attrs.get("class"), tag) for tag, attrs in read(text).seen if tag in ("th", "td")]
    assert cells == [(None, "th"), ("number", "th"), *([(None, "td"), ("number", "td")] * 2)]
    with pytest.raises(ValueError, match="1 cells, want 2"):
        pages.table(["a", "b"], [["x"]])


def test_sections_without_content_are_left_out():
    text = pages.page("run", [pages.Section(title="Videos", blocks=[])])
    assert "Videos" not in text
