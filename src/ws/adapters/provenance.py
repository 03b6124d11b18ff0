"""Check that adapters belong to the base model that they are applied to. A PEFT folder stores only a name of its base.

If that name differs from the name of the model, the weights are compared, if they are on this machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ws.adapters.folder import AdapterFolder
from ws.base import console
from ws.base.errors import BaseMismatchError, UserError
from ws.model import convert
from ws.model.loading import ChatModel
from ws.model.weight_files import Checkpoint


def require_one_base(model: ChatModel, folders: Sequence[AdapterFolder]) -> None:
    """Raise for adapters of a different base than `model`, and for adapters that may have different bases.

    A folder that names no base is accepted. Different names for the same weights give a warning.
    """
    named = [folder for folder in folders if _name(folder)]
    unknown = {folder.path: folder for folder in named if not _has_weights_of(model, folder)}
    for folder in named[1:]:
        first = named[0]
        names_decide = folder.path in unknown or first.path in unknown
        if (names_decide and _name(folder) != _name(first)) or _revisions_differ(first, folder):
            raise BaseMismatchError(
                f"{first.path} was made on the base {_described(first)}, but {folder.path} on {_described(folder)}",
                "Give adapters of one base. If both are the same model, write the same base_model_name_or_path and "
                "revision into both adapter_config.json.",
            )
    if unknown:
        console.warn(
            f"the adapters name the base {_name(next(iter(unknown.values())))}, which is not on this machine: "
            f"cannot check that it is {model.name}"
        )


def _has_weights_of(model: ChatModel, folder: AdapterFolder) -> bool:
    """True if the named base is the model, False if that is unknown; a different base is an error."""
    name = _name(folder)
    if name == model.name or Path(name).expanduser().resolve() == Path(model.name).expanduser().resolve():
        return True
    try:
        with convert.as_folder(name) as base:
            found = Checkpoint(base).fingerprint()
    except UserError:  # not here, or not readable
        return False
    if found != model.fingerprint:
        raise BaseMismatchError(
            f"{folder.path} was made on the base {name}, whose weights differ from those of {model.name}",
            f"Give --model {name}, or adapters of {model.name}.",
        )
    console.warn(f"{folder.path} names the base {name}; it has the same weights as {model.name}")
    return True


def _name(folder: AdapterFolder) -> str:
    return str(folder.config.get("base_model_name_or_path") or "")


def _revisions_differ(one: AdapterFolder, other: AdapterFolder) -> bool:
    revisions = {folder.config.get("revision") for folder in (one, other)} - {None, ""}
    return len(revisions) > 1


def _described(folder: AdapterFolder) -> str:
    revision = folder.config.get("revision")
    return f"{_name(folder)} at revision {revision}" if revision else _name(folder)
