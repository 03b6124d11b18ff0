"""Blocks as GitHub-flavoured Markdown. Nothing in a text can become a tag; texts of models cannot become links."""

from __future__ import annotations

import re
from collections.abc import Sequence

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


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """GitHub-flavoured Markdown; figures are linked by file name, other charts are tables of their values."""
    return "\n\n".join([f"# {_safe(title)}", *(_markdown(block) for block in blocks)]) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(text):
            return f"## {_safe(text)}"
        case Paragraph(text, note, strong):
            return f"**{_safe(text)}**" if strong else f"*{_safe(text)}*" if note else _safe(text)
        case Bullets(items):
            return "\n".join(f"- {_safe(item)}" for item in items)
        case Figure(file, alternative, caption):
            return f"![{_safe(alternative)}]({file.name})" + _caption(caption)
        case Tiles(tiles):
            return "\n".join(_safe(f"- {one.label}: **{one.value}** {one.detail}".rstrip()) for one in tiles)
        case Samples(columns, rows):
            return _texts(["prompt", *columns], [[prompt, *answers] for prompt, answers in rows])
        case Table(header, rows, caption):
            return markdown_table(header, rows) + _caption(caption)
        case Texts(header, rows, caption):
            return _texts(header, rows) + _caption(caption)
        case LineChart() | BarChart() | Heat():
            table = values_of(block)
            return f"**{_safe(block.title)}**\n\n" + markdown_table(table.header, table.rows) + _caption(block.caption)
        case Grid(blocks):
            return "\n\n".join(map(_markdown, blocks))
        case Details(title, blocks):
            return "\n\n".join([f"### {_safe(title)}", *map(_markdown, blocks)])
        case Tabs(_, tabs):
            return "\n\n".join(_markdown(Details(name, blocks)) for name, blocks in tabs)


def _caption(text: str) -> str:
    return f"\n\n*{_safe(text)}*" if text else ""


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; characters that would break a cell are escaped."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(_safe(cell).replace("|", "\\|").replace("\n", "<br>") for cell in cells) + " |"

    return "\n".join([line(header), "|" + "---|" * len(header), *(line(row) for row in rows)])


def _texts(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts that may hold anything: their Markdown is escaped too."""
    return markdown_table(header, [[re.sub(r"([\\`*_\[\]~])", r"\\\1", cell) for cell in row] for row in rows])


def _safe(text: str) -> str:
    """A text in which nothing opens an HTML tag or a comment."""
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)
