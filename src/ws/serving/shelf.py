"""The shelf: the directions that a chat, a page or a server can mix, by name, all of one base model.

A name is found in this order: directions that are loaded; a run folder or direction file at that path (only for the
person at the keyboard, never for a client of the server); a run of the same model whose behaviour has that name.
"""

from __future__ import annotations

import difflib
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ws.algebra.direction import Direction
from ws.base import console
from ws.base.errors import UserError
from ws.base.store import read_config
from ws.edit.dial import require_turnable
from ws.export.command import DIRECTION_FILE
from ws.model import loading
from ws.model.loading import ChatModel, Dtype
from ws.serving.prefixes import Strengths
from ws.serving.requests import STRONGEST

EXAMPLE = "out/pocket/sycophancy/lora/seed0"
_NAME = re.compile(r"[A-Za-z0-9_][\w.-]{0,63}", re.ASCII)


@dataclass(frozen=True)
class Source:
    """A direction file, with the run folder that it is from (None for a file alone) and a name for it."""

    file: Path
    run: Path | None
    name: str

    @classmethod
    def at(cls, place: Path) -> Source:
        """The direction in a run folder, or the file; raises if there is none."""
        if place.is_dir():
            file = place / DIRECTION_FILE
            if not (place / "config.json").is_file():
                raise UserError(f"{place} is not a run folder", f"Give a folder such as {EXAMPLE}.")
            if not file.is_file():
                raise UserError(f"the run in {place} is not finished", f"Run: {console.command('report', place)}")
            behaviour = read_config(place).get("behaviour")
            name = behaviour.get("name") if isinstance(behaviour, dict) else None
            return cls(file, place, str(name or place.resolve().parents[1].name))
        if not place.is_file():
            raise UserError(f"there is no run folder or direction file {place}", "Make one with ws replicate.")
        return cls(place, None, place.stem)


class Shelf:
    """Directions by name. `root`: the folder that runs of the same model are in, `<out>/<model>`, if known."""

    def __init__(self, model: ChatModel, root: Path | None = None, like: Path | None = None) -> None:
        self.model, self.root = model, root
        self._like = like
        self._directions: dict[str, Direction] = {}
        self._sources: dict[str, Path] = {}
        self._aliases: dict[str, str] = {}
        self._lock = threading.Lock()

    @property
    def directions(self) -> dict[str, Direction]:
        """Loaded directions by name, a copy."""
        with self._lock:
            return dict(self._directions)

    def source(self, name: str) -> Path:
        """The file that a loaded direction is from."""
        return self._sources[name]

    def put(self, name: str, source: Source) -> Direction:
        """Load a direction under a name that is free."""
        require_name(name)
        direction = Direction.load(source.file)
        require_turnable(self.model, direction)
        with self._lock:
            if name in self._directions:
                raise NameTakenError(
                    f"two directions are named {name}: {self._sources[name]} and {source.file}",
                    f"Name one of them: {name}-2={source.run or source.file}",
                )
            self._directions[name], self._sources[name] = direction, source.file
        return direction

    def take(self, name: str) -> Direction:
        """Unload a direction and return it."""
        with self._lock:
            if name not in self._directions:
                raise self._unknown(name)
            del self._sources[name]
            return self._directions.pop(name)

    def strengths(self, mix: Mapping[str, float], *, local: bool = False) -> Strengths:
        """The directions of a mix with their strengths. local: names may be paths, and runs nearby are loaded."""
        found: dict[Direction, float] = {}
        for name, alpha in mix.items():
            direction = self.directions.get(self._aliases.get(name, name))
            if direction is None:
                if not local:
                    raise self._unknown(name)
                self._aliases[name] = self._free(name)
                direction = self.put(self._aliases[name], self._nearby(name))
            found[direction] = found.get(direction, 0.0) + alpha
            if not abs(found[direction]) <= STRONGEST:
                wanted = f"Give a number from {-STRONGEST:g} to {STRONGEST:g}."
                raise UserError(f"the strength of {name!r} is {found[direction]}", wanted)
        return found

    def inside(self, place: str) -> Source:
        """The run or direction file at a path below `root`, given by a client. Raises for any other place."""
        if self.root is None:
            raise UserError("this server has no folder to load directions from", "Start it with a run folder.")
        root, like = self.root.resolve(), "Give a path like honesty/lora/seed0."
        try:
            wanted = (root / place).resolve()
            if not place or Path(place).is_absolute() or not wanted.is_relative_to(root) or wanted == root:
                raise UserError(f"{place!r} is not below the folder of the runs", like)
            if _NAME.fullmatch(place) and wanted.is_dir() and not (wanted / "config.json").is_file():
                return self._of_behaviour(wanted)
            return Source.at(wanted)
        except (OSError, ValueError):  # too long, or with characters that no path has
            raise UserError(f"{place!r:.80} is no path that can be read", like) from None

    def _nearby(self, name: str) -> Source:
        if Path(name).expanduser().exists():
            return Source.at(Path(name).expanduser())
        folder = None if self.root is None else self.root / name
        if _NAME.fullmatch(name) and folder is not None and folder.is_dir():
            return self._of_behaviour(folder)
        raise self._unknown(name)

    def _of_behaviour(self, folder: Path) -> Source:
        """The run of a behaviour with adapter and seed of the first run; else the only one."""
        if self._like is not None and (same := folder / self._like / DIRECTION_FILE).is_file():
            return Source.at(same.parent)
        runs = sorted(file.parent for file in folder.glob(f"*/seed*/{DIRECTION_FILE}"))
        if len(runs) == 1:
            return Source.at(runs[0])
        if not runs:
            raise UserError(f"{folder} holds no finished run", "Make one with ws replicate.")
        raise UserError(f"{folder} holds {len(runs)} runs", f"Name one, such as {runs[0].relative_to(folder.parent)}.")

    def _free(self, name: str) -> str:
        plain = re.sub(r"[^\w.-]", "-", Path(name).name if "/" in name else name).lstrip(".-") or "direction"
        number, free = 2, plain
        while free in self._directions:
            free, number = f"{plain}-{number}", number + 1
        return free

    def _unknown(self, name: str) -> UserError:
        near = difflib.get_close_matches(name, self._directions, 1)
        loaded = f"Did you mean {near[0]}?" if near else f"Loaded: {', '.join(self._directions) or 'none'}."
        return UnknownDirectionError(f"there is no direction {name!r}", loaded)


class NameTakenError(UserError):
    """A name that another direction has."""


class UnknownDirectionError(UserError):
    """A name that is not on the shelf."""


def require_name(name: str) -> None:
    """Raise unless a name is letters, digits and `_ . -`, at most 64 of them."""
    if not _NAME.fullmatch(name):
        raise UserError(f"{name!r} cannot name a direction", "Use letters, digits, _ . and -, at most 64.")


def open_shelf(
    runs: Sequence[str],
    *,
    model: str | None = None,
    dtype: Dtype | None = None,
    device: str | None = None,
    attention: str | None = None,
    trust_remote_code: bool = False,
    cache_memory: int = loading.CACHE_MEMORY,
) -> Shelf:
    """Load the base model of runs or direction files and put them on a shelf. `NAME=PLACE` names one.

    Options that are None come from the first run. Raises `UserError` if the directions belong to different models.
    """
    if not runs:
        raise UserError("no run is given", f"Give one or more: {EXAMPLE}")
    found = []
    for run in runs:
        name, _, place = run.partition("=")
        named = bool(place) and _NAME.fullmatch(name) is not None and not Path(run).exists()
        source = Source.at(Path(place if named else run).expanduser())
        found.append((name if named else source.name, source))
    first = found[0][1]
    stored: dict[str, Any] = {} if first.run is None else _settings(first.run)
    base = model or stored.get("model") or Direction.load(first.file).provenance.get("base", {}).get("name")
    if not base:
        raise UserError(f"{first.file} does not say which model it belongs to", "Give the model with --model NAME.")
    loaded = loading.load(
        str(base), dtype=dtype or stored.get("dtype", "auto"), device=device or stored.get("device", "auto"),
        thinking=stored.get("thinking", "off"), attention=attention or stored.get("attention", "auto"),
        revision=stored.get("revision"), trust_remote_code=trust_remote_code, cache_memory=cache_memory,
    )  # fmt: skip
    home = (first.run or first.file).resolve()
    root = home.parent if first.run is None else home.parents[2]  # <out>/<model>/<behaviour>/<adapter>/seed<k>
    shelf = Shelf(loaded, root, None if first.run is None else home.relative_to(home.parents[1]))
    for name, source in found:
        shelf.put(name, source)
    return shelf


def _settings(run: Path) -> dict[str, Any]:
    from ws.fitting.run_settings import stored_in  # noqa: PLC0415 - imports the whole of fitting

    return dict(stored_in(run))
