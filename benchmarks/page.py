"""The generated parts of docs/performance.md: each is between two equal marks."""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"


def put(text: str, name: str, content: str) -> str:
    """The page with the part between the two marks `<!-- name -->` replaced."""
    mark = f"<!-- {name} -->"
    parts = text.split(mark)
    if len(parts) != 3:
        raise ValueError(f"the page has {len(parts) - 1} marks {mark} instead of 2")
    return f"{parts[0]}{mark}\n{content.strip()}\n{mark}{parts[2]}"


def write(name: str, content: str) -> None:
    """Replace one part of the page on disk."""
    PAGE.write_text(put(PAGE.read_text(encoding="utf-8"), name, content), encoding="utf-8")
