"""The two poles of a behaviour. Code and run folders spell them one way: `pos` and `neg`.

A positive alpha moves the model towards `pos`, a negative alpha towards `neg`. The sign of an alpha is a number, or `+`
and `-` in tables. It is never the name of a pole.
"""

from __future__ import annotations

from typing import Literal

Pole = Literal["pos", "neg"]
POLES: tuple[Pole, Pole] = ("pos", "neg")
