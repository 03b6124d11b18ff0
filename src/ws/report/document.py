"""A small document of blocks that renders to Markdown and to one self-contained HTML page."""

from ws.report.blocks import (
    Bar,
    BarChart,
    Block,
    Bullets,
    Details,
    Figure,
    Grid,
    Heading,
    Heat,
    Line,
    LineChart,
    Paragraph,
    Point,
    Samples,
    Table,
    Tabs,
    Texts,
    Tile,
    Tiles,
    values_of,
)
from ws.report.markdown import markdown_table, to_markdown
from ws.report.web_page import to_html

__all__ = [
    "Bar", "BarChart", "Block", "Bullets", "Details", "Figure", "Grid", "Heading", "Heat", "Line", "LineChart",
    "Paragraph", "Point", "Samples", "Table", "Tabs", "Texts", "Tile", "Tiles", "markdown_table", "to_html",
    "to_markdown", "values_of",
]  # fmt: skip
