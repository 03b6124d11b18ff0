"""Run folders kept in another place (`--store`): a folder, NFS, `s3://bucket/path`, or whatever fsspec can open.

Runs work in a folder of their own machine and are copied. Every copied folder has a `manifest.json` with the digests of
its files, written last. A copy that was cut short is harmless: a stage whose record does not match its files is built
again.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from ws.base import console
from ws.base.errors import UserError
from ws.base.store import atomic_file, digest

MANIFEST = "manifest.json"
EVERY = 20.0
"""Seconds between copies of a folder that is being worked in."""


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
            raise UserError(f"{self.url} needs another package ({error})", "For s3:// install s3fs.") from error
        except ValueError as error:
            raise UserError(f"--store {self.url} cannot be used ({error})",
                            "Give a folder, or a URL such as s3://bucket/sweeps.") from error  # fmt: skip
        return system, place.rstrip("/")

    def require_writable(self) -> None:
        """Write and delete a small file there, before any work."""
        system, place = self._remote
        probe = f"{place}/.writable-{threading.get_native_id()}"
        with self._told("write to"):
            system.makedirs(place, exist_ok=True)
            system.pipe_file(probe, b"")
            system.rm_file(probe)

    def pull(self, folder: Path, *, only: Sequence[str] = ()) -> None:
        """Bring a folder up to date with the store; files that the store does not have stay. `only` names the files."""
        known = self._manifest(folder)
        with self._told("read from"):
            for name, known_digest in known.items():
                target = folder / name
                if (only and name not in only) or (target.is_file() and digest(target) == known_digest):
                    continue
                with atomic_file(target) as temporary:
                    self._system.get_file(self._there(folder, name), str(temporary))

    def put(self, files: Sequence[Path]) -> None:
        """Copy single files."""
        with self._told("write to"):
            for file in files:
                self._system.makedirs(str(PurePosixPath(self._there(file, "")).parent.parent), exist_ok=True)
                self._system.put_file(str(file), self._there(file, "").rstrip("/"))

    def push(self, folder: Path, *, is_shared: bool = False) -> None:
        """Bring the store up to date with a folder: records of stages after all other files, the manifest last.

        Files that the folder does not have are deleted in the store, unless others write there too (`is_shared`).
        """
        if not folder.is_dir():
            return
        inside = {file.relative_to(folder): file for file in folder.rglob("*") if file.is_file()}
        order = sorted((name for name in inside if _is_kept(name)), key=lambda name: ("stages" in name.parts, name))
        names = {name.as_posix(): inside[name] for name in order}
        known = self._manifest(folder)
        found = dict(known) if is_shared else {}
        with self._told("write to"):
            for name, file in names.items():
                with contextlib.suppress(FileNotFoundError):  # a finished stage has just removed its pieces
                    found[name] = digest(file)
                    if known.get(name) != found[name]:
                        self._system.makedirs(str(PurePosixPath(self._there(folder, name)).parent), exist_ok=True)
                        self._system.put_file(str(file), self._there(folder, name))
            if found != known:
                self._system.pipe_file(self._there(folder, MANIFEST), json.dumps(found, indent=1).encode())
            for name in known.keys() - found.keys():
                with contextlib.suppress(FileNotFoundError):
                    self._system.rm_file(self._there(folder, name))

    @contextlib.contextmanager
    def working_in(self, folder: Path) -> Iterator[None]:
        """Pull a folder, push it again and again while the block works in it, and once more at its end."""
        self.pull(folder)
        ended = threading.Event()

        def copy() -> None:
            while not ended.wait(EVERY):
                try:
                    self.push(folder)
                except UserError as error:
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

    def _there(self, folder: Path, name: str) -> str:
        return f"{self._remote[1]}/{folder.relative_to(self.root).as_posix()}/{name}"

    def _manifest(self, folder: Path) -> Mapping[str, str]:
        with self._told("read from"):
            try:
                self._system.invalidate_cache()
                content = self._system.cat_file(self._there(folder, MANIFEST))
            except FileNotFoundError:
                return {}
        return dict(json.loads(content))

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


def _is_kept(name: Path) -> bool:
    """Whether a file is copied: not locks, and not what is being written."""
    unfinished = any(part.startswith(".") and part.endswith((".tmp", ".old")) for part in name.parts)
    return not unfinished and name.name not in (".lock", MANIFEST)
