"""A model as an ordinary folder: safetensors, tokenizer with template, configurations, recommended settings.

What is written is read back before the folder appears: the weights must have the same fingerprint, and the tokenizer
must give the same tokens. So the folder can stand for the model everywhere.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ws.base import console
from ws.base.errors import UserError
from ws.base.files import atomic_folder, require_replaceable
from ws.model import loading, sources
from ws.model.chat import Chat
from ws.model.library import refusals_told
from ws.model.loading import ChatModel, Dtype
from ws.model.weight_files import Checkpoint


def convert(name: str, folder: Path, *, dtype: Dtype = "auto", revision: str | None = None) -> ChatModel:
    """Write the model `name` (usually a GGUF file) to a new folder and return it as loaded.

    Raises `UserError` if the folder holds anything, if the model cannot be loaded, and if the copy reads back
    differently; then nothing is written.
    """
    require_empty(folder)
    model = loading.load(name, dtype=dtype, device="cpu", revision=revision)
    source = sources.find(name, revision)
    with atomic_folder(folder) as temporary:
        with console.library_noise_muted():
            model.network.save_pretrained(temporary)
            _own_tokenizer(model.chat).save_pretrained(temporary)
        if source.settings is not None:
            shutil.copyfile(source.settings, temporary / sources.SETTINGS_FILE)
        _require_same(model, temporary)
    return model


def require_empty(folder: Path) -> None:
    """Raise if the place holds anything: a model folder is never overwritten."""
    require_replaceable(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} exists and is not empty", "Give a new folder.")


@contextmanager
def as_folder(name: str) -> Iterator[Path]:
    """The folder with the safetensors of a model that is on this machine.

    A GGUF file is converted to a temporary folder, which is deleted after the block. A hub model is not downloaded:
    one that is not here is a `UserError`.
    """
    source = sources.find(name)
    if source.gguf is not None:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / sources.model_slug(name)
            convert(name, folder)
            yield folder
        return
    yield Path(source.place) if Path(source.place).is_dir() else _downloaded(name)


def _downloaded(name: str) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - heavy import, late

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except Exception as error:  # the library raises many types for a model that is not there
        raise UserError(
            f"the files of {name!r} are not on this machine", "Download it by loading it once, or give a folder."
        ) from error


def _own_tokenizer(chat: Chat) -> Any:
    """The tokenizer with the model's own template or none, not with the plain one that `Chat` puts in its place."""
    if chat.has_own_template:
        return chat.tokenizer
    own = copy.copy(chat.tokenizer)
    own.chat_template = None
    return own


def _require_same(model: ChatModel, folder: Path) -> None:
    from transformers import AutoTokenizer  # noqa: PLC0415 - heavy import, late

    if Checkpoint(folder).fingerprint() != model.fingerprint:
        raise UserError(f"the weights of {model.name} are not what was written", "Check the disk and convert again.")
    with refusals_told(model.name, str(folder), "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if not model.chat.has_own_template:
        tokenizer.chat_template = model.chat.tokenizer.chat_template
    vocabulary = len(model.network.get_input_embeddings().weight)
    written = Chat(tokenizer, model.chat.thinking, model.name, vocabulary=vocabulary, ends=loading.ends(model.network))
    if written.rendering_key != model.chat.rendering_key:
        raise UserError(
            f"the tokenizer of {model.name} gives other tokens when it is read from a folder",
            "Use the GGUF file itself, or the original model.",
        )
