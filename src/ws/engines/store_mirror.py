"""Run folders kept in another place (`--store`): a folder, NFS, `s3://bucket/path`, or whatever fsspec can open.

Runs work in a folder of their own machine and are copied. Every copied folder has a `manifest.json` with the digests of
its files, written last. A copy that was cut short is harmless: a stage whose record does not match its files is built
again. Each machine remembers what it last copied, so that its newer files are never replaced by older ones.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from ws.base import console, extras
from ws.base.errors import UserError
from ws.base.files import atomic_file, digest, is_unfinished, write_json

MANIFEST, COPIED = "manifest.json", ".copied.json"
"""The digests of a folder in the store; and, on each machine, those of its files when they were last copied."""
EVERY = 20.0
"""Seconds between copies of a folder that is being worked in."""
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"}
"""They have no folders; asked for one, some would create a bucket."""


def absolute(url: str) -> str:
    """A store that is a folder as an absolute path; URLs stay as they are."""
    return url if not url or "://" in url else str(Path(url).expanduser().resolve())


@dataclass(frozen=True)
class StoreMirror:
    """Copies folders below `root`, which is local, to and from the same places below `url`."""

    url: str
    root: Path

    @cached_property
    def _remote(self) -> tuple[Any, str]:
        import fsspec  # noqa: PLC0415 - slow import

        try:
            system, place = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            if self.url.startswith("s3"):
                raise extras.missing("s3fs, which opens the store,", "s3") from error
            raise UserError(f"{self.url} needs another package ({error})", "Install it.") from error
        except ValueError as error:
            raise UserError(f"--store {self.url} cannot be used ({error})",
                            "Give a folder, or a URL such as s3://bucket/sweeps.") from error  # fmt: skip
        return system, place.rstrip("/")

    def require_usable(self) -> None:
        """Write and delete a small file there, before any work. Raises if the store is the local folder itself."""
        system, place = self._remote
        if "file" in _protocols(system) and self.root.resolve() in (Path(place), *Path(place).parents):
            raise UserError(f"--store {self.url} lies in --out {self.root}", "Give two different folders.")
        with self.marked():
            pass

    @contextlib.contextmanager
    def marked(self) -> Iterator[str]:
        """The name of a small file in the store that is there while the block runs."""
        name = f".seen-{secrets.token_hex(6)}"
        with self._told("write to"):
            self._make_folder(self._place)
            self._system.pipe_file(f"{self._place}/{name}", b"")
        try:
            yield name
        finally:
            with contextlib.suppress(UserError), self._told("write to"):  # a mark that stays harms nothing
                self._system.rm_file(f"{self._place}/{name}")

    def sees(self, name: str) -> bool:
        """Whether a mark of another machine is here."""
        with self._told("read from"):
            self._system.invalidate_cache()
            return bool(self._system.exists(f"{self._place}/{name}"))

    def pull(self, folder: Path, *, only: Sequence[str] = ()) -> None:
        """Bring a folder up to date with the store. `only` names the files that are wanted.

        Files that the store does not have stay, and so do files that were changed here since they were last copied.
        """
        copied = dict(_stored(folder / COPIED))
        for name, wanted in self._manifest(folder).items():
            target = folder / name
            own = digest(target) if target.is_file() else None
            if only and name not in only:
                continue
            if own == wanted:
                copied[name] = wanted
            if own == wanted or own not in (None, copied.get(name)):
                continue
            with self._told("read from"), contextlib.suppress(FileNotFoundError):  # listed by a copy that was cut short
                with atomic_file(target) as temporary:
                    self._system.get_file(self._there(folder, name), str(temporary))
                copied[name] = wanted
        if copied:
            write_json(folder / COPIED, copied)

    def put(self, files: Sequence[Path]) -> None:
        """Copy single files."""
        with self._told("write to"):
            for file in files:
                self._copy(file, self._there(file.parent, file.name))

    def push(self, folder: Path) -> None:
        """Bring the store up to date with a folder: records of stages after all other files, the manifest last.

        Files that this machine has copied before and no longer has are deleted there. Those of other machines stay.
        """
        names = _files(folder)
        known, copied = self._manifest(folder), _stored(folder / COPIED)
        found = {name: value for name, value in known.items() if name in names or name not in copied}
        mine: dict[str, str] = {}
        with self._told("write to"):
            for name, file in names.items():
                with contextlib.suppress(FileNotFoundError):  # a finished stage has just removed its pieces
                    own = digest(file)
                    if known.get(name) != own:
                        self._copy(file, self._there(folder, name))
                    found[name] = mine[name] = own
            if found != known:
                self._write_manifest(folder, found)
            for name in known.keys() - found.keys():
                with contextlib.suppress(FileNotFoundError):
                    self._system.rm_file(self._there(folder, name))
        if mine and mine != copied:
            write_json(folder / COPIED, mine)

    @contextlib.contextmanager
    def working_in(self, folder: Path) -> Iterator[None]:
        """Pull a folder, push it again and again while the block works in it, and once more at its end."""
        self.pull(folder)
        ended = threading.Event()

        def copy() -> None:
            while not ended.wait(EVERY):
                try:
                    self.push(folder)
                except (UserError, OSError) as error:  # the last copy, below, must succeed
                    console.warn(str(error))

        copier = threading.Thread(target=copy, daemon=True)
        copier.start()
        try:
            yield
        finally:
            ended.set()
            copier.join()
            self.push(folder)

    @property
    def _system(self) -> Any:
        return self._remote[0]

    @property
    def _place(self) -> str:
        return self._remote[1]

    def _there(self, folder: Path, name: str) -> str:
        return f"{self._place}/{folder.relative_to(self.root).as_posix()}/{name}"

    def _make_folder(self, place: str) -> None:
        if not _protocols(self._system) & _OBJECT_STORES:
            self._system.makedirs(place, exist_ok=True)

    def _copy(self, file: Path, place: str) -> None:
        self._make_folder(str(PurePosixPath(place).parent))
        self._system.put_file(str(file), place)

    def _write_manifest(self, folder: Path, content: Mapping[str, str]) -> None:
        """Put the manifest in one step: uploads to object stores are, other places get it under another name first."""
        place, whole = self._there(folder, MANIFEST), json.dumps(content, indent=1).encode()
        if _protocols(self._system) & _OBJECT_STORES:
            self._system.pipe_file(place, whole)
            return
        beside = f"{place}.{secrets.token_hex(4)}.tmp"
        self._make_folder(str(PurePosixPath(place).parent))
        self._system.pipe_file(beside, whole)
        self._system.mv(beside, place)

    def _manifest(self, folder: Path) -> Mapping[str, str]:
        """The digests of the files of a folder in the store; none if it has no manifest, or a damaged one."""
        with self._told("read from"):
            self._system.invalidate_cache()
            try:
                content = self._system.cat_file(self._there(folder, MANIFEST))
            except FileNotFoundError:
                return {}
        return _parsed(content)

    @contextlib.contextmanager
    def _told(self, doing: str) -> Iterator[None]:
        """Turn whatever a storage library raises into one line; their errors have no common type."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            told = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"cannot {doing} {self.url} ({told})", "Check the address and your credentials.") from error


def _protocols(system: Any) -> set[str]:
    return {system.protocol} if isinstance(system.protocol, str) else set(system.protocol)


def _files(folder: Path) -> dict[str, Path]:
    """The files of a folder that are copied, in their order: no locks, and nothing that is being written."""
    found: list[Path] = []
    for file in folder.rglob("*") if folder.is_dir() else ():
        name = file.relative_to(folder)
        unfinished = any(is_unfinished(part) for part in name.parts)
        if not unfinished and name.name not in (".lock", COPIED, MANIFEST) and file.is_file():
            found.append(name)
    return {name.as_posix(): folder / name for name in sorted(found, key=lambda one: ("stages" in one.parts, one))}


def _stored(file: Path) -> Mapping[str, str]:
    return _parsed(file.read_bytes()) if file.is_file() else {}


def _parsed(content: bytes) -> Mapping[str, str]:
    """The digests in a file; none if it is damaged."""
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if isinstance(value, str) and not Path(name).is_absolute()
            and ".." not in Path(name).parts}  # fmt: skip
