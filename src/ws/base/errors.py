"""Errors that a user can fix.

Bad input or a bad environment raises a `UserError`: one line that names the thing, the place and the remedy. The
command line prints that line and exits with code 2. The Python API raises it as an ordinary exception. Any other
exception is a bug in this package.
"""

from __future__ import annotations


class UserError(Exception):
    """Bad input or environment; the message is one line with thing, place and remedy."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem = problem
        message = f"{problem.rstrip('.')}. {remedy}".strip() if remedy else problem
        super().__init__(" ".join(message.split()))


class FolderInUseError(UserError):
    """Another process works in the folder."""


class BaseMismatchError(UserError):
    """A Direction or a run folder belongs to a different base model."""


class UnsupportedFeatureError(UserError):
    """A feature has no exact form here. It is refused, never approximated."""
