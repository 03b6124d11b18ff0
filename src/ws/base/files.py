"""Files that are never half-written, and digests of content.

A file or folder is made under a temporary name, flushed to disk and renamed, so a kill at any moment leaves the old one
or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ws.base.errors import UserError

if TYPE_CHECKING:
    import polars as pl


def content_key(*parts: Any) -> str:
    """A short stable digest of JSON-like content (dataclasses and paths included)."""
    return hashlib.blake2b(canonical_json(parts).encode(), digest_size=12).hexdigest()


def canonical_json(content: Any) -> str:
    """JSON with sorted keys and no spaces, equal for equal content."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), default=_plain)


def _plain(content: Any) -> Any:
    if is_dataclass(content) and not isinstance(content, type):
        return asdict(content)
    if isinstance(content, Path):
        return str(content)
    raise TypeError(f"{type(content).__name__} has no JSON form")


def tensors_key(tensors: Mapping[str, Any]) -> str:
    """Digest of named tensors: names, shapes and every number, as fp32."""
    hasher = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        values = tensors[name].detach().cpu().float().contiguous()
        hasher.update(f"{name}{tuple(values.shape)}".encode())
        hasher.update(values.numpy().data)
    return hasher.hexdigest()


def digest(path: Path) -> str:
    """Digest of a file's bytes, or of all files in a folder with their relative names."""
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.is_file())
        return content_key([[str(p.relative_to(path)), digest(p)] for p in inside])
    hasher = hashlib.blake2b(digest_size=12)
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`. On success flush and rename it, else remove it.

    Something other than an ordinary file, such as a device, is never replaced.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path} exists and is not an ordinary file", "Give another place.")
    _make_folder(path.parent)
    temporary = _beside(path)
    try:
        with _problems_of_the_system(path):
            yield temporary
        _flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder next to `path`. On success it replaces the whole of `path`.

    A link stands for the folder that it points to. Something other than a folder, such as a file or a device, is never
    replaced, nor is a mount point.
    """
    path = path.resolve() if path.is_symlink() else path
    require_replaceable(path)
    _make_folder(path.parent)
    recover_folder(path)
    temporary = _beside(path)
    shutil.rmtree(temporary, ignore_errors=True)
    _make_folder(temporary)
    try:
        with _problems_of_the_system(path):
            yield temporary
        for inside in temporary.rglob("*"):
            if inside.is_file():
                _flush(inside)
        move_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_replaceable(folder: Path) -> None:
    """Raise unless a new folder can take this place: nothing is there, or a folder that can be renamed."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} exists and is not a folder", "Give another place.")
    if folder.is_mount():
        raise UserError(f"{folder} is a mount point, which cannot be replaced", "Give a folder inside it.")


def is_unfinished(name: str) -> bool:
    """Whether a file or folder of this name is being written, or is about to be deleted."""
    return name.startswith(".") and (name.endswith(_ASIDE) or _LEFT.search(name) is not None)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, FileNotFoundError, NotADirectoryError) as error:
        place = folder.parent if folder.name.endswith(_TEMPORARY) else folder
        raise UserError(f"{place} cannot hold files ({error.strerror})", "Give another place.") from error


_PROCESS = f"{os.getpid()}-{secrets.token_hex(4)}"
"""A name of this process that no process on another machine has, for folders that several machines share."""


def _beside(path: Path) -> Path:
    """The temporary name under which a file or folder is made."""
    return path.with_name(f".{path.name}.{_PROCESS}{_TEMPORARY}")


def move_folder(source: Path, target: Path) -> None:
    """Replace the folder `target` with `source`. A kill at any moment leaves one of the two complete.

    The old folder is renamed first and deleted last; `recover_folder` completes an interrupted move.
    """
    recover_folder(target)
    if target.exists():
        target.rename(_aside(target))
    source.rename(target)
    recover_folder(target)


def recover_folder(target: Path) -> None:
    """Complete an interrupted `move_folder`: delete the old folder if the new one is in place, else put it back."""
    aside = _aside(target)
    if not aside.exists():
        return
    if target.exists():
        shutil.rmtree(aside)
    else:
        aside.rename(target)


def tidy(folder: Path) -> None:
    """Complete interrupted moves below a folder, and remove what killed processes left. Nobody may be writing there."""
    for aside in folder.rglob(f".*{_ASIDE}"):
        recover_folder(aside.with_name(aside.name.removeprefix(".").removesuffix(_ASIDE)))
    for left in [one for one in folder.rglob(f".*{_TEMPORARY}") if is_unfinished(one.name)]:
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


_TEMPORARY = ".tmp"
_LEFT = re.compile(r"\.\d+-[0-9a-f]+\.tmp$")
"""How a temporary name of any process ends, and a user's own name hardly."""
_ASIDE = ".ws-old"
"""How an old folder is called while a new one takes its place; a user's own `.NAME.old` is none of ours."""


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}{_ASIDE}")


@contextmanager
def _problems_of_the_system(path: Path) -> Iterator[None]:
    """Turn an operating system error that a Rust library raises as its own type (a full disk) into an OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error


_UMASK = os.umask(0)
os.umask(_UMASK)  # it can only be read by setting it
_PRIVATE = 0o600
"""Mode of files that safetensors makes; in a folder that people share, others may read the rest."""


def _flush(path: Path) -> None:
    if stat.S_IMODE(path.stat().st_mode) == _PRIVATE:
        path.chmod(0o666 & ~_UMASK)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(content, indent=1, default=_plain, allow_nan=False) + "\n")


def write_table(path: Path, table: pl.DataFrame) -> None:
    """Write a parquet file atomically."""
    with atomic_file(path) as temporary:
        table.write_parquet(temporary)


def read_json(path: Path, remedy: str = "Delete it and run again.") -> Any:
    """Read JSON; a damaged file is an error that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error})", remedy) from error
