"""Run folders: resumable, keyed by content.

A stage is done if its record (`stages/<name>.json`) exists, lists the same inputs, and its output files are unchanged.
The key of a stage contains the digests of the files that it reads, so a changed input rebuilds exactly the stages that
depend on it. A long stage keeps its progress in `Shards`: small atomic files that a rerun reuses.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ws.base import console, environment
from ws.base.errors import BaseMismatchError, FolderInUseError, UserError
from ws.base.files import atomic_file, canonical_json, content_key, digest, read_json, tidy, write_json

if TYPE_CHECKING:
    import polars as pl


def read_config(folder: Path) -> dict[str, Any]:
    """The settings and facts of a run. Nothing but the command that made the run can write a damaged file again."""
    file, remedy = folder / "config.json", "Repeat the ws replicate command that made this run."
    found = read_json(file, remedy)
    if not isinstance(found, dict):
        raise UserError(f"{file} is not a JSON object", remedy)
    return found


def read_table(path: Path, run: Path, **options: Any) -> pl.DataFrame:
    """A table of a run; a file that is missing or damaged is an error that names it. options: of `polars.read_csv`."""
    import polars  # noqa: PLC0415 - heavy import, late

    try:
        return polars.read_parquet(path) if path.suffix == ".parquet" else polars.read_csv(path, **options)
    except (OSError, polars.exceptions.PolarsError) as error:
        problem = f"{path} is {'damaged' if path.is_file() else 'missing'}"
        raise UserError(problem, f"Make it again with: {console.command('report', run)}") from error


class Shards:
    """Finished pieces of an unfinished stage, one atomic file each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        """The path of the piece `name`, which need not exist."""
        return self.folder / name

    def has(self, name: str) -> bool:
        """Whether the piece `name` is complete."""
        return self.path(name).is_file()

    def discard(self) -> None:
        """Remove all pieces, once their stage is done."""
        shutil.rmtree(self.folder, ignore_errors=True)


class StageResult(NamedTuple):
    """`built` is False if the stage was done already; `seconds` is the time that building it took."""

    built: bool
    seconds: float


REPRODUCE_FILE = "reproduce.json"
"""Everything that decided a run: settings, versions, and the digests of the inputs and outputs of every stage."""


def stage_records(folder: Path) -> dict[str, dict[str, Any]]:
    """The records of the finished stages of a run folder, by name."""
    return {file.stem: _record(file) for file in sorted((folder / "stages").glob("*.json"))}


def _record(file: Path) -> dict[str, Any]:
    remedy = f"Delete it, then: {console.command('report', file.parents[1])}"
    found, parts = read_json(file, remedy), {"key": str, "inputs": dict, "outputs": dict, "seconds": float | int}
    if not isinstance(found, dict) or not all(isinstance(found.get(part), kind) for part, kind in parts.items()):
        raise UserError(f"{file} is not the record of a stage", remedy)
    return found


class RunFolder:
    """One run's folder with its identity, stage records and lock.

    `identity` describes the run (model fingerprint, behaviour ...). A folder with a different identity is refused.
    `settings` are those of the run, for `reproduce.json`; None keeps the ones that it has.
    """

    settings: Mapping[str, Any] | None = None

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.identity = json.loads(canonical_json(dict(identity)))
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot create the run folder {path}: {error.strerror}", "Choose another folder with --out."
            ) from error
        self._lock = _lock(path)
        try:
            tidy(path)  # the lock says that nobody writes here
            self._check_identity()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock; the folder can be opened again."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _check_identity(self) -> None:
        file = self.path / "identity.json"
        if not file.exists():
            write_json(file, self.identity)
            return
        known = read_json(file)
        if not isinstance(known, dict):
            raise UserError(f"{file} is damaged: it holds no values by name", "Delete it and run again.")
        for name, value in self.identity.items():
            if known.get(name) != value:
                raise BaseMismatchError(
                    f"{self.path} holds a run with a different {name} ({_short(known.get(name))}, not {_short(value)})",
                    "Choose another folder with --out, or delete this one.",
                )

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def build(
        self,
        stage: str,
        inputs: Mapping[str, Any],
        outputs: Sequence[str],
        make: Callable[[Shards], None],
        siblings: Iterable[Path] = (),
    ) -> StageResult:
        """Run `make` unless the stage is done for these inputs, here or in one of the sibling run folders.

        `inputs`: all that the result depends on, file contents as digests. `outputs`: names inside the folder that
        `make` writes atomically. `make` gets `Shards` that survive a kill and are keyed by the inputs.
        """
        record_file, key = self._record_file(stage), content_key(stage, inputs)
        if self.is_done(stage, inputs):
            self._tidy(stage, inputs)
            return StageResult(False, _record(record_file)["seconds"])
        if changed := self.changed_inputs(stage, inputs):
            console.say(f"{stage}: rebuilding, because {', '.join(changed)} changed")
        record_file.unlink(missing_ok=True)
        shards = self.shards(stage, inputs)
        started = time.perf_counter()
        if not self._copied(stage, key, siblings):
            make(shards)
        seconds = time.perf_counter() - started
        missing = [name for name in outputs if not (self.path / name).exists()]
        if missing:
            raise RuntimeError(f"stage {stage} did not write {missing}")
        write_json(record_file, {
            "stage": stage,
            "key": key,
            "inputs": json.loads(canonical_json(inputs)),
            "outputs": {name: digest(self.path / name) for name in outputs},
            "seconds": round(seconds, 3),
            "environment": environment.described(),
        })  # fmt: skip
        self._tidy(stage, inputs)
        return StageResult(True, round(seconds, 3))

    def _tidy(self, stage: str, inputs: Mapping[str, Any]) -> None:
        """What follows the record of a stage; a kill may come between, so it is also done for a finished stage."""
        file = self.path / REPRODUCE_FILE
        known = read_json(file) if file.is_file() else {}
        if known != (collected := self._collected(known)):
            write_json(file, collected)
        self.shards(stage, inputs).discard()

    def _collected(self, known: Mapping[str, Any]) -> Any:
        """What decided the run, for `reproduce.json`; `known` is its content so far.

        The environment is that of the last stage that was built. A stage of another environment keeps its own.
        """
        records = stage_records(self.path)
        environments = {name: record.get("environment") for name, record in records.items()}  # earlier versions: None
        now = environment.described()
        last = now if now in environments.values() else known.get("environment", now)
        stages = {
            name: {"inputs": record["inputs"], "outputs": record["outputs"],
                   **({} if environments[name] == last else {"environment": environments[name]})}
            for name, record in records.items()
        }  # fmt: skip
        settings = known.get("settings") if self.settings is None else self.settings
        whole = {"schema": 1, "identity": self.identity, "settings": settings, "environment": last, "stages": stages}
        return json.loads(canonical_json(environment.without_home(json.loads(canonical_json(whole)))))

    def is_done(self, stage: str, inputs: Mapping[str, Any]) -> bool:
        """Whether the stage is recorded for these inputs and its outputs are unchanged."""
        record_file = self._record_file(stage)
        record = _record(record_file) if record_file.exists() else None
        return record is not None and record["key"] == content_key(stage, inputs) and self._outputs_intact(record)

    def shards(self, stage: str, inputs: Mapping[str, Any]) -> Shards:
        """The finished pieces of a stage for these inputs, kept until the stage is done."""
        return Shards(self.path / ".partial" / f"{stage}-{content_key(stage, inputs)}")

    def _record_file(self, stage: str) -> Path:
        return self.path / "stages" / f"{stage}.json"

    def _copied(self, stage: str, key: str, siblings: Iterable[Path]) -> bool:
        """Copy the outputs from a sibling that has done this stage for the same inputs; False if none has."""
        for sibling in siblings:
            record_file = sibling / "stages" / f"{stage}.json"
            if sibling == self.path or not record_file.is_file():
                continue
            record = _record(record_file)
            if record["key"] == key and all(
                (sibling / name).is_file() and digest(sibling / name) == known
                for name, known in record["outputs"].items()
            ):
                for name in record["outputs"]:
                    with atomic_file(self.path / name) as temporary:
                        shutil.copyfile(sibling / name, temporary)
                return True
        return False

    def _outputs_intact(self, record: Mapping[str, Any]) -> bool:
        return all(
            (self.path / name).exists() and digest(self.path / name) == known
            for name, known in record["outputs"].items()
        )

    def changed_inputs(self, stage: str, inputs: Mapping[str, Any]) -> list[str]:
        """Names of the inputs that differ from the recorded ones; empty if the stage never ran."""
        record_file = self._record_file(stage)
        if not record_file.exists():
            return []
        known = _record(record_file)["inputs"]
        fresh = json.loads(canonical_json(inputs))
        return sorted(name for name in {*known, *fresh} if known.get(name) != fresh.get(name))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:16] + "..."


def _lock(path: Path) -> Any:
    """Hold an advisory lock on the folder for the life of the process; None where there are no locks."""
    try:
        import fcntl  # noqa: PLC0415 - absent on Windows
    except ImportError:
        return None
    try:
        handle = (path / ".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write in {path}: {error.strerror}", "Choose another folder with --out.") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        handle.close()
        raise FolderInUseError(f"another ws process is using {path}", "Wait for it, or use another --out.") from error
    except OSError:  # some network file systems have no locks
        handle.close()
        return None
    return handle
