"""Behaviour files: behaviour new, check, list."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitSubcommandPrefixes, Positional, subcommand

from ws.base import console
from ws.base.errors import UserError


@dataclass(frozen=True)
class BehaviourNew:
    """Write a commented behaviour file to start from."""

    name: Positional[str]
    """Name of the behaviour; the file is NAME.toml in the current folder."""

    def run(self) -> None:
        """Write the file; never overwrite an existing one."""
        from ws.base.files import write_text  # noqa: PLC0415
        from ws.fitting import behaviour  # noqa: PLC0415

        path = Path(f"{self.name}.toml")
        if path.exists():
            raise UserError(f"{path} already exists", "Choose another name.")
        if not re.fullmatch(r"[\w-]+", self.name):
            raise UserError(f"{self.name!r} is not a valid behaviour name", "Use only letters, digits, - and _.")
        write_text(path, behaviour.TEMPLATE.format(name=self.name))
        console.say(f"wrote {path}; now edit it")
        console.say_next(console.command("behaviour", "check", path))


@dataclass(frozen=True)
class BehaviourCheck:
    """Check a behaviour file and print a summary of its content."""

    file: Positional[str]
    """Name of a shipped behaviour, or a .toml file."""

    def run(self) -> None:
        """Print the summary."""
        from ws.fitting import behaviour  # noqa: PLC0415

        found = behaviour.load(self.file)
        groups = {
            item.group: sum(other.group == item.group for other in found.probe.items) for item in found.probe.items
        }
        listed = ", ".join(f"{count} {name}" for name, count in groups.items())
        console.say(f"{found.name}: {found.summary}")
        console.say(
            f"{len(found.personas.pos)} persona pairs, {len(found.train)} training prompts, probe rows: {listed}"
        )
        console.say_next(console.command("replicate", "--behaviour", self.file))


@dataclass(frozen=True)
class BehaviourList:
    """List the shipped behaviours."""

    def run(self) -> None:
        """Print name and summary of each."""
        from ws.fitting import behaviour  # noqa: PLC0415

        for name in behaviour.names():
            console.say(f"{name:<14} {behaviour.load(name).summary}")


@dataclass(frozen=True)
class BehaviourCommand:
    """Write, check or list behaviour files."""

    action: OmitSubcommandPrefixes[
        Annotated[BehaviourNew, subcommand("new")]
        | Annotated[BehaviourCheck, subcommand("check")]
        | Annotated[BehaviourList, subcommand("list")]
    ]

    def run(self) -> None:
        """Run the action."""
        self.action.run()
