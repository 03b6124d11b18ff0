"""Commands for the embedded model: pocket build, check, card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitSubcommandPrefixes, subcommand

from ws.base import console


@dataclass(frozen=True)
class PocketBuild:
    """Train the embedded model. Continues where it was interrupted."""

    architecture: Literal["qwen3", "gemma3"] = "qwen3"
    """Architecture of the model: qwen3 for pocket, gemma3 for pocket-gemma."""
    seed: int = 0
    """Seed of the corpus, the initial weights and the order of rows."""
    steps: int | None = None
    """Number of training steps; the recipe's number if left out."""
    out: Path = Path("pocket-build")
    """Model folder to write. To replace the shipped weights, copy it over their folder."""
    compile: bool = True
    """Speed up training with torch.compile, if a C++ compiler is installed."""

    def run(self) -> None:
        """Build, then check."""
        from dataclasses import replace  # noqa: PLC0415

        from ws.pocket import card  # noqa: PLC0415
        from ws.pocket.build import Recipe, build  # noqa: PLC0415

        recipe = Recipe.of(self.architecture, self.seed)
        recipe = recipe if self.steps is None else replace(recipe, steps=self.steps)
        build(recipe, self.out, workspace=self.out.with_name(self.out.name + ".unfinished"),
              compiled=None if self.compile else False)  # fmt: skip
        card.finish_build(self.out)
        console.say(f"model       {self.out}")
        console.say_next(console.command("pocket", "check", "--model", self.out))


@dataclass(frozen=True)
class PocketCheck:
    """Measure the embedded model and check its thresholds. The exit code is 2 if it misses one."""

    model: str = "pocket"
    """Name of an embedded model, or a model folder."""
    json: bool = False
    """Print the metrics as JSON and nothing else."""

    def run(self) -> None:
        """Print the metrics."""
        from ws.pocket import card  # noqa: PLC0415

        card.report_check(self.model, self.json)


@dataclass(frozen=True)
class PocketCard:
    """Print the model card: the behaviours planted in the model, its training, its thresholds, and its limits."""

    model: str = "pocket"
    """Name of an embedded model, or a model folder."""

    def run(self) -> None:
        """Print the card as Markdown."""
        from ws.pocket import card  # noqa: PLC0415

        console.say(card.text(self.model))


@dataclass(frozen=True)
class Pocket:
    """Build, check or describe the embedded model."""

    action: OmitSubcommandPrefixes[
        Annotated[PocketBuild, subcommand("build")]
        | Annotated[PocketCheck, subcommand("check")]
        | Annotated[PocketCard, subcommand("card")]
    ]

    def run(self) -> None:
        """Run the action."""
        self.action.run()
