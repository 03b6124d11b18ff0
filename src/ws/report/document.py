"""A small document of blocks that renders to Markdown and to one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Heading:
    """A section title."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    """Plain text; `note` sets it as a remark, `strong` as the headline."""

    text: str
    note: bool = False
    strong: bool = False


@dataclass(frozen=True)
class Bullets:
    """A list of remarks; `warning` marks them."""

    items: Sequence[str]
    warning: bool = False


@dataclass(frozen=True)
class Table:
    """A header and rows of cells; the first column is text, the others are numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Figure:
    """A PNG file in the folder of the document."""

    file: Path
    alternative: str
    caption: str = ""


@dataclass(frozen=True)
class Tile:
    """One number at the top of the page."""

    value: str
    label: str
    detail: str = ""


@dataclass(frozen=True)
class Tiles:
    """A row of tiles."""

    tiles: Sequence[Tile]


@dataclass(frozen=True)
class Samples:
    """The same prompts answered under several strengths: `columns` name them, `rows` are (prompt, answers)."""

    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]


MANY_COLUMNS, MANY_CHARACTERS = 6, 110
"""Tables with more columns, or longer lines, wrap their cells, so that all columns fit on the page."""

_STYLE = Path(__file__).parent / "style.css"

Block = Heading | Paragraph | Bullets | Table | Figure | Tiles | Samples


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """GitHub-flavoured Markdown; figures are linked by file name."""
    return "\n\n".join([f"# {title}", *(_markdown(block) for block in blocks)]) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(text):
            return f"## {text}"
        case Paragraph(text, note, strong):
            return f"**{text}**" if strong else f"*{text}*" if note else text
        case Bullets(items):
            return "\n".join(f"- {item}" for item in items)
        case Figure(file, alternative, caption):
            return f"![{alternative}]({file.name})" + (f"\n\n*{caption}*" if caption else "")
        case Tiles(tiles):
            return "\n".join(f"- {tile.label}: **{tile.value}** {tile.detail}".rstrip() for tile in tiles)
        case Samples(columns, rows):
            return markdown_table(["prompt", *columns], [[prompt, *answers] for prompt, answers in rows])
        case Table(header, rows, caption):
            return markdown_table(header, rows) + (f"\n\n*{caption}*" if caption else "")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; characters that would break a cell are escaped."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", "<br>") for cell in cells) + " |"

    return "\n".join([line(header), "|" + "---|" * len(header), *(line(row) for row in rows)])


def to_html(title: str, subtitle: str, blocks: Sequence[Block]) -> str:
    """One self-contained page; figures are embedded."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE.read_text(encoding='utf-8')}</style></head><body><main>"
        f"<header><h1>{html.escape(title)}</h1><p>{html.escape(subtitle)}</p></header>\n{body}\n</main></body></html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{html.escape(text)}</h2>"
        case Paragraph(text, is_note, strong):
            kind = " class=headline" if strong else " class=note" if is_note else ""
            return f"<p{kind}>{html.escape(text)}</p>"
        case Bullets(items, warning):
            kind = " class=warning" if warning else ""
            return f"<ul{kind}>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>"
        case Figure(file, alternative, caption):
            data = base64.b64encode(file.read_bytes()).decode()
            note = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
            picture = f"<img alt='{html.escape(alternative, quote=True)}' src='data:image/png;base64,{data}'>"
            return f"<figure>{picture}{note}</figure>"
        case Tiles(tiles):
            return "<div class=tiles>" + "".join(
                f"<div><b>{html.escape(t.value)}</b><span>{html.escape(t.label)}</span><i>{html.escape(t.detail)}</i></div>"
                for t in tiles
            ) + "</div>"  # fmt: skip
        case Samples(columns, rows):
            head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
            lines = "".join(
                f"<tr><td class=prompt colspan={len(columns)}>{html.escape(prompt)}</td></tr><tr>"
                + "".join(f"<td>{html.escape(answer) or '&nbsp;'}</td>" for answer in answers)
                + "</tr>"
                for prompt, answers in rows
            )
            table = f"<table class=samples><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
            return f"<div class=wide>{table}</div>"
        case Table(header, rows, caption):
            head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
            lines = "".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows)
            note = f"<p class=note>{html.escape(caption)}</p>" if caption else ""
            longest = sum(max(map(len, column)) for column in zip(header, *rows, strict=True))
            kind = " class=many" if len(header) > MANY_COLUMNS or longest > MANY_CHARACTERS else ""
            return (
                f"<div class=wide><table{kind}><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>{note}"
            )


def _cell(text: str) -> str:
    """A cell that may wrap, but never inside an interval."""
    return re.sub(r"\[[^\]]*\]", lambda interval: interval[0].replace(" ", "&nbsp;"), html.escape(text))
