"""Blocks as one self-contained HTML page: style, pictures and script are inside, and nothing is fetched.

Every text is escaped, and a content policy in the page lets no script run but our own. Without scripts everything can
be read; the script adds sorting of tables, values under the pointer, and unfolding before printing.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ws.report import charts
from ws.report.blocks import (
    BarChart,
    Block,
    Bullets,
    Details,
    Figure,
    Grid,
    Heading,
    Heat,
    LineChart,
    Paragraph,
    Samples,
    Table,
    Tabs,
    Texts,
    Tiles,
    values_of,
)
from ws.report.charts import escape

MANY_COLUMNS, MANY_CHARACTERS = 6, 110
"""Tables with more columns, or longer lines, wrap their cells, so that all columns fit on the page."""
LEAST_SECTIONS = 4
"""A page with this many sections has links to them at its top."""

_STYLE, _SCRIPT = (Path(__file__).parent / name for name in ("style.css", "page.js"))


def to_html(title: str, subtitle: str, blocks: Sequence[Block]) -> str:
    """One self-contained page; figures are embedded."""
    style, script = (file.read_text(encoding="utf-8") for file in (_STYLE, _SCRIPT))
    known = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{known}'"
    writer = _Writer()
    body = "\n".join(writer.write(block) for block in blocks)
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        f'<meta http-equiv=Content-Security-Policy content="{policy}">'
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main>"
        f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>\n{writer.contents()}{body}\n</main>"
        f"<script type=module>{script}</script></body></html>\n"
    )


@dataclass
class _Writer:
    """Writes the blocks of one page in order; remembers its sections and how many groups of tabs it has."""

    sections: list[str] = field(default_factory=list)
    groups: int = 0

    def contents(self) -> str:
        """Links to the sections, if there are many."""
        if len(self.sections) < LEAST_SECTIONS:
            return ""
        links = "".join(f"<a href='#s{place}'>{escape(name)}</a>" for place, name in enumerate(self.sections))
        return f"<nav aria-label=Sections>{links}</nav>\n"

    def all(self, blocks: Sequence[Block]) -> str:
        """Several blocks."""
        return "".join(map(self.write, blocks))

    def write(self, block: Block) -> str:
        """One block as HTML."""
        match block:
            case Heading(text):
                self.sections.append(text)
                return f"<h2 id=s{len(self.sections) - 1}>{escape(text)}</h2>"
            case Paragraph(text, is_note, strong):
                kind = " class=headline" if strong else " class=note" if is_note else ""
                shown = re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))  # a command, as in Markdown
                return f"<p{kind}>{shown}</p>"
            case Bullets(items, warning):
                found = "".join(f"<li>{escape(item)}</li>" for item in items)
                if not warning:
                    return f"<ul>{found}</ul>"
                return f"<section class=warning aria-label=Warnings><b>Read with care</b><ul>{found}</ul></section>"
            case Figure(file, alternative, caption):
                data = base64.b64encode(file.read_bytes()).decode()
                picture = f"<img alt='{escape(alternative)}' src='data:image/png;base64,{data}'>"
                return f"<figure>{picture}{_caption(caption)}</figure>"
            case Tiles(tiles):
                return "<div class=tiles>" + "".join(
                    f"<div><b>{escape(t.value)}</b><span>{escape(t.label)}</span><i>{escape(t.detail)}</i></div>"
                    for t in tiles
                ) + "</div>"  # fmt: skip
            case Table(header, rows, caption):
                return _table(header, rows) + _remark(caption)
            case Texts(header, rows, caption):
                return _table(header, rows, "texts") + _remark(caption)
            case LineChart() | BarChart() | Heat():
                return _chart(block)
            case _:
                return self._arranged(block)

    def _arranged(self, block: Samples | Grid | Details | Tabs) -> str:
        match block:
            case Samples():
                return _samples(block)
            case Grid(blocks):
                lead = " lead" if any(isinstance(one, LineChart) and one.lead for one in blocks) else ""
                return f"<div class='grid{lead}'>{self.all(blocks)}</div>"
            case Details(title, blocks, is_long):
                kind = " class=long" if is_long else ""
                return f"<details{kind}><summary>{escape(title)}</summary>{self.all(blocks)}</details>"
            case Tabs():
                return self._tabs(block)

    def _tabs(self, block: Tabs) -> str:
        """Radio buttons and one panel for each: the style sheet shows the panel of the chosen button."""
        self.groups += 1
        name = f"t{self.groups}"
        buttons = "".join(
            f"<input type=radio name={name} id={name}-{place}{'' if place else ' checked'}>"
            f"<label for={name}-{place}>{escape(title)}</label>"
            for place, (title, _) in enumerate(block.tabs)
        )
        panels = "".join(
            f"<div class=panel><h3>{escape(title)}</h3>{self.all(blocks)}</div>" for title, blocks in block.tabs
        )
        return f"<fieldset class=tabs><legend>{escape(block.label)}</legend>{buttons}{panels}</fieldset>"


def _samples(block: Samples) -> str:
    tones = _tones(len(block.columns)) if block.by_strength else ["plus"] * len(block.columns)
    cards = [
        f"<article class=sample><h3>{escape(prompt)}</h3><div class=replies>" + "".join(
            f"<div class={tone}><b>{escape(name)}</b><p>{escape(answer) or '&nbsp;'}</p></div>"
            for tone, name, answer in zip(tones, block.columns, answers, strict=True)
        ) + "</div></article>"
        for prompt, answers in block.rows
    ]  # fmt: skip
    rest = cards[block.shown :]
    more = f"<details><summary>{len(rest)} more prompts</summary>{''.join(rest)}</details>" if rest else ""
    return "".join(cards[: block.shown]) + more


def _tones(count: int) -> list[str]:
    """Colours of replies from the lowest strength to the highest; the middle one is the base."""
    middle = count // 2
    return ["minus" if place < middle else "plus" if place > middle else "base" for place in range(count)]


def _chart(block: LineChart | BarChart | Heat) -> str:
    title = f"<figcaption>{escape(block.title)}</figcaption>"
    note = _remark(block.caption)
    match block:
        case BarChart():
            return f"<figure class=chart>{title}{charts.bar_chart(block)}{note}</figure>"
        case Heat():
            return f"<figure class=chart>{title}{charts.heat(block)}{note}</figure>"
        case LineChart():
            table = values_of(block)
            values = f"<details class=values><summary>Values</summary>{_table(table.header, table.rows)}</details>"
            lead = " lead" if block.lead else ""
            return f"<figure class='chart{lead}'>{title}{charts.line_chart(block)}{note}{values}</figure>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    head = "".join(f"<th scope=col>{escape(name)}</th>" if name else "<td></td>" for name in header)
    names = [f" data-name='{escape(name)}'" if kind else "" for name in header]
    lines = "".join(
        "<tr>" + "".join(f"<td{name}>{_cell(cell)}</td>" for name, cell in zip(names, row, strict=True)) + "</tr>"
        for row in rows
    )
    longest = sum(max(map(len, column)) for column in zip(header, *rows, strict=True))
    is_wide = len(header) > MANY_COLUMNS or longest > MANY_CHARACTERS
    classes = kind or ("many" if is_wide else "")
    opening = f"<table{f' class={classes}' if classes else ''}>"
    return (
        f"<div class=wide tabindex=0 role=group aria-label='{escape(f'Table: {header[0]}')}'>"
        f"{opening}<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    """A cell that may wrap, but never inside an interval."""
    return re.sub(r"\[[^\]]*\]", lambda interval: interval[0].replace(" ", "&nbsp;"), escape(text))


def _remark(text: str) -> str:
    return f"<p class=note>{escape(text)}</p>" if text else ""


def _caption(text: str) -> str:
    return f"<figcaption>{escape(text)}</figcaption>" if text else ""
