"""The errors that a user can mend.

Everything that bad input or a bad environment can cause ends in a `UserError`: one line that names the
thing, the place and the remedy. The command line prints that line and exits with 2; the Python API lets it
through as an ordinary exception. Anything else that escapes is a defect of this package.
"""

from __future__ import annotations


class UserError(Exception):
    """Bad input or environment; the message is one line with thing, place and remedy."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        message = f"{problem.rstrip('.')}. {remedy}".strip() if remedy else problem
        super().__init__(" ".join(message.split()))


class BaseMismatchError(UserError):
    """A Direction or a run folder belongs to another base model."""


class UnsupportedFeatureError(UserError):
    """A feature has no exact form here; never approximated in silence."""
