"""The command that makes an ordinary model folder of a GGUF file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from ws.base import console
from ws.commands.options import Dtype


@dataclass(frozen=True)
class Convert:
    """Write a GGUF base as an ordinary model folder: safetensors, tokenizer, chat template, configurations."""

    model: Positional[str]
    """A GGUF file, hub_id:file.gguf, or smollm2."""
    folder: Positional[Path]
    """Where to write: a new or an empty folder."""
    dtype: Dtype = "auto"
    """Number format of the weights. auto: float32."""
    revision: str | None = None
    """Branch, tag or commit for hub_id:file.gguf."""
    json: bool = False
    """Print the record as JSON and nothing else."""

    def run(self) -> None:
        """Convert, check what was written, and print the next command."""
        from ws.model.convert import convert  # noqa: PLC0415

        model = convert(self.model, self.folder, dtype=self.dtype, revision=self.revision)
        described = model.describe()
        if self.json:
            console.print_json(json.dumps({"folder": str(self.folder), "model": described}))
            return
        console.say(
            f"model       {self.folder}  ({described['architecture']}, {described['parameters']:,} parameters in "
            f"{described['dtype']}, fingerprint {described['fingerprint']})"
        )
        # a folder of one word could have the name of an embedded model
        place = self.folder if len(self.folder.parts) > 1 else f"./{self.folder}"
        console.say_next(console.command("replicate", "--model", place))
