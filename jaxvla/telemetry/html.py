"""Pages in one file: text, tables and charts in HTML that needs nothing from elsewhere.

No script, no font, no style sheet but the one below, so a report opens from a disk, a mail or an
artefact store alike, in light and in dark. Every text is escaped by the function that takes it.
"""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NewType

Html = NewType("Html", str)
"""Markup that is safe to put into a page: made by a function of this module or a chart."""

_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""Characters that XML 1.0 excludes or discourages, https://www.w3.org/TR/xml/#charsets."""

_STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --text: #1c2128; --faint: #636c76;
  --line: #d5dae0; --card: #f6f8fa; --link: #0059a3; }
@media (prefers-color-scheme: dark) { :root { --back: #15181d; --text: #e4e8ec; --faint: #9aa4ae;
  --line: #363d46; --card: #1d2127; --link: #6cb6ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px 20px 48px; max-width: 1240px; background: var(--back);
  color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 32px 0 8px;
  border-bottom: 1px solid var(--line); padding-bottom: 4px; }
p { margin: 8px 0; max-width: 80ch; overflow-wrap: anywhere; } a { color: var(--link); }
.note { color: var(--faint); font-size: 13px; }
.grid { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 460px),
  1fr)); margin: 12px 0; align-items: start; }
.grid > div { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 8px; overflow-x: auto; }
svg.chart { display: block; max-width: 100%; height: auto; margin: auto; }
.facts { display: flex; flex-wrap: wrap; gap: 10px; margin: 16px 0; padding: 0; }
.facts > div { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 8px 14px; } .facts dt { color: var(--faint); font-size: 13px; }
.facts dd { margin: 0; font-size: 19px; font-weight: 600; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; margin: 8px 0; font-size: 14px; }
caption { text-align: left; color: var(--faint); padding-bottom: 4px; }
th, td { text-align: left; padding: 3px 16px 3px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; } td.number, th.number { text-align: right;
  font-variant-numeric: tabular-nums; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px;
  overflow-x: auto; font-size: 13px; } summary { cursor: pointer; color: var(--faint); }
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A part of a page under its own heading."""

    title: str
    """Plain text."""
    blocks: Sequence[Html]
    """From top to bottom."""


def escape(text: str) -> str:
    """Text as it stands in markup, quotes included; characters that XML lacks become U+FFFD."""
    return html.escape(_UNPRINTABLE.sub("�", text), quote=True)


def page(title: str, sections: Sequence[Section]) -> str:
    """A whole document, the same for the same input.

    Args:
      title: of the window and the first heading, plain text.
      sections: those without blocks are left out.
    """
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
        f"<h1>{escape(title)}</h1>",
    ]
    for section in sections:
        if section.blocks:
            heading = f"<h2>{escape(section.title)}</h2>" if section.title else ""
            parts.append("\n".join(["<section>", heading, *section.blocks, "</section>"]))
    return "\n".join([*parts, "</body>\n</html>\n"])


def paragraph(text: str) -> Html:
    """Running text."""
    return Html(f"<p>{escape(text)}</p>")


def note(text: str) -> Html:
    """Running text of less weight, e.g. how to read a chart."""
    return Html(f'<p class="note">{escape(text)}</p>')


def preformatted(text: str) -> Html:
    """Lines as they are, e.g. a command and its output."""
    return Html(f"<pre>{escape(text)}</pre>")


def link(href: str, text: str) -> Html:
    """A paragraph with a link.

    Args:
      href: relative to the page, or https.
      text: what is shown.

    Raises:
      ValueError: `href` has another scheme, which a page of untrusted names must not.
    """
    if re.match(r"(?!https:)[^/?#]*:", href):
        raise ValueError(f"link {href!r} is neither relative nor https")
    return Html(f'<p><a href="{escape(href)}">{escape(text)}</a></p>')


def folded(title: str, block: Html) -> Html:
    """A block that opens on a click."""
    return Html(f"<details><summary>{escape(title)}</summary>\n{block}\n</details>")


def chart_grid(charts: Sequence[Html]) -> Html:
    """Charts side by side, as many as fit."""
    return Html('<div class="grid">' + "\n".join(f"<div>{x}</div>" for x in charts) + "</div>")


def facts(values: Mapping[str, str]) -> Html:
    """The few things to see first: name -> value."""
    items = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in values.items()
    )
    return Html('<dl class="facts">' + "\n".join(items) + "</dl>")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str = "") -> Html:
    """A table. Columns whose every cell begins like a number, or is empty, are set flush right.

    Args:
      header: names of the columns.
      rows: as long as the header each.
      caption: plain text above.

    Raises:
      ValueError: a row has another length.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"table row {list(row)} has {len(row)} cells, want {len(header)}")
    numbers = [all(_is_number(row[i]) for row in rows) for i in range(len(header))]
    lines = [f"<caption>{escape(caption)}</caption>"] if caption else []
    lines.append(_row("th", header, numbers))
    lines += [_row("td", row, numbers) for row in rows]
    return Html('<div class="wide"><table>' + "\n".join(lines) + "</table></div>")


def _is_number(cell: str) -> bool:
    return re.match(r"[+-]?[\d.]|-?$|nan", cell) is not None


def _row(tag: str, cells: Sequence[str], numbers: Sequence[bool]) -> str:
    classes = (' class="number"' if is_number else "" for is_number in numbers)
    cells_ = (f"<{tag}{kind}>{escape(x)}</{tag}>" for x, kind in zip(cells, classes, strict=True))
    return f"<tr>{''.join(cells_)}</tr>"
