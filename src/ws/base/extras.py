"""Optional libraries: how to install one that is missing, as a line that works when pasted."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from ws.base.errors import UserError

_CLONE = Path(__file__).parents[3]


def missing(library: str, extra: str) -> UserError:
    """The error for a library of an extra. In a clone, the line installs the clone with its pinned versions."""
    constraints = _CLONE / "constraints.txt"
    in_clone = constraints.is_file() and (_CLONE / "pyproject.toml").is_file()
    what = ["-c", str(constraints), "-e", f"{_CLONE}[{extra}]"] if in_clone else [f"weight-steering[{extra}]"]
    return UserError(
        f"{library} is not installed", f"Run: {shlex.join([sys.executable, '-m', 'pip', 'install', *what])}"
    )
