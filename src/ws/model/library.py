"""transformers at the border: whatever it refuses about a model becomes one line with a remedy.

The library changes with every release and raises whatever it likes. So errors are caught by the part of the model that
they are about, and not by their names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ws.base import console
from ws.base.errors import UserError

_POCKET_WEIGHTS = Path(__file__).parents[1] / "pocket" / "weights"
POCKET_MODELS = {"pocket": _POCKET_WEIGHTS / "qwen3", "pocket-gemma": _POCKET_WEIGHTS / "gemma3"}
"""Models that ship with the package, by name."""
SMOLLM2, SMOLLM2_ON_HUB = "smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"
"""A real chat model by a short name, and its hub id."""

_REMEDIES = {
    "configuration": "Correct config.json there, or save the model again with save_pretrained.",
    "attention": "Use --attention auto.",
    "tokenizer": "Save the tokenizer again with save_pretrained, into the same folder.",
    "weights": "Save it again with save_pretrained.",
    "first forward pass": "Try --attention eager and --dtype float32; if both fail, this model is not supported.",
}
"""Remedies, by the part of the model that the library fails to load."""


@contextmanager
def refusals_told(name: str, place: str, part: str) -> Iterator[None]:
    """Turn any exception of the library within the block into a `UserError` about this part of the model."""
    try:
        with console.library_noise_muted():
            yield
    except UserError:
        raise
    except Exception as error:  # a library that changes with every release raises whatever it likes
        raise explain(name, place, part, error) from error


def explain(name: str, place: str, part: str, error: Exception) -> UserError:
    """One line for an error that the library raised about a part of the model, with the remedy for that part."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    cause = cause if " " in cause else f"{type(error).__name__} {cause}".strip()
    if isinstance(error, ImportError):
        return UserError(f"{name} needs a package for its {part} that is not installed ({cause})", "Install it.")
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return UserError(f"{name} does not fit into memory ({cause})", "Use --dtype bfloat16 or another --device.")
    if Path(place).is_dir():
        return UserError(f"the model in {place} cannot be loaded, because of its {part} ({cause})", _REMEDIES[part])
    if part != "first forward pass" and isinstance(error, OSError):
        return UserError(
            f"model {name!r} is neither {' nor '.join(map(repr, (*POCKET_MODELS, SMOLLM2)))}, a folder, a GGUF file, "
            f"nor a hub id that can be downloaded ({cause})",
            "Check the spelling and the network. Without a network, use "
            f"--model {', '.join(POCKET_MODELS)} or {SMOLLM2}, a local folder, or a GGUF file.",
        )
    return UserError(f"the model {name!r} cannot be loaded, because of its {part} ({cause})", _REMEDIES[part])


def without_weights(
    place: str,
    name: str = "",
    *,
    part: str = "configuration",
    revision: str | None = None,
    trust_remote_code: bool = False,
    **choices: Any,
) -> Any:
    """The network that a model's configuration describes, on the meta device.

    Raises `UserError` about this `part` if the library fails.
    """
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415 - heavy import, late

    with refusals_told(name or place, place, part), torch.device("meta"):
        config = AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=trust_remote_code)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, **choices)
