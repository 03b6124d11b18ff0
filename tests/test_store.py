"""Nothing is half-written, and a stage counts as done only for the inputs and outputs that it recorded."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file

from ws.base import files
from ws.base.errors import BaseMismatchError, UserError
from ws.base.files import atomic_file, atomic_folder, canonical_json, content_key, digest
from ws.base.store import RunFolder, Shards


class Killed(BaseException):
    """Stands for a kill: not an Exception, as a keyboard interrupt is not."""


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# ---------------------------------------------------------------- atomic writes


def test_a_written_file_stands_alone(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "sub" / "a.txt") as temporary:
        temporary.write_text("whole")
        assert not (tmp_path / "sub" / "a.txt").exists()
    assert (tmp_path / "sub" / "a.txt").read_text() == "whole"
    assert listing(tmp_path) == {"sub", "sub/a.txt"}


@pytest.mark.parametrize("error", [ValueError, Killed])
@pytest.mark.parametrize("before", [None, "old"])
def test_a_failed_write_leaves_what_was_there(tmp_path: Path, before: str | None, error: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    if before is not None:
        path.write_text(before)
    with pytest.raises(error), atomic_file(path) as temporary:
        temporary.write_text("ha")
        raise error
    assert listing(tmp_path) == (set() if before is None else {"a.txt"})
    assert before is None or path.read_text() == before


def test_a_written_folder_replaces_the_old_one_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    for name in ("old", "new"):
        with atomic_folder(folder) as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub" / name).write_text(name)
    assert listing(tmp_path) == {"f", "f/sub", "f/sub/new"}


@pytest.mark.parametrize("error", [ValueError, Killed])
@pytest.mark.parametrize("before", [False, True])
def test_a_failed_folder_leaves_what_was_there(tmp_path: Path, before: bool, error: type[BaseException]) -> None:
    folder = tmp_path / "f"
    if before:
        with atomic_folder(folder) as temporary:
            (temporary / "old").write_text("old")
    with pytest.raises(error), atomic_folder(folder) as temporary:
        (temporary / "half").write_text("ha")
        raise error
    assert listing(tmp_path) == ({"f", "f/old"} if before else set())


def test_leftovers_of_a_killed_process_do_not_enter_a_new_folder(tmp_path: Path) -> None:
    leftover = files._beside(tmp_path / "f")
    leftover.mkdir()
    (leftover / "stale").write_text("x")
    with atomic_folder(tmp_path / "f") as temporary:
        (temporary / "fresh").write_text("x")
    assert listing(tmp_path) == {"f", "f/fresh"}


@pytest.mark.parametrize("is_before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("step", range(4))
def test_a_kill_at_any_step_of_a_move_leaves_one_whole_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, is_before: bool
) -> None:
    places = {name: f"run/{name}/part.txt" for name in ("waiting", "pos")}
    for name, file in places.items():
        files.write_text(tmp_path / file, name)
    steps = itertools.count()

    def killed_at_its_step(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            number = next(steps)
            if number == step and is_before:
                raise Killed
            found = real(*arguments, **more)
            if number == step:
                raise Killed
            return found

        return call

    run = tmp_path / "run"
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(Path, "rename", killed_at_its_step(Path.rename))
        patch.setattr(files.shutil, "rmtree", killed_at_its_step(files.shutil.rmtree))
        files.move_folder(run / "waiting", run / "pos")
    RunFolder(run, {}).close()
    is_moved = not (run / "waiting").exists()
    assert (tmp_path / places["pos"]).read_text() == ("waiting" if is_moved else "pos")
    assert {path.name for path in run.iterdir()} - {"pos", "waiting"} == {".lock", "identity.json"}


def test_a_new_folder_outside_of_a_run_recovers_too(tmp_path: Path) -> None:
    files.write_text(tmp_path / ".f.ws-old" / "whole", "old")
    with pytest.raises(Killed), atomic_folder(tmp_path / "f"):
        raise Killed
    assert listing(tmp_path) == {"f", "f/whole"}


def test_what_a_killed_process_left_half_written_goes_when_the_run_is_opened_again(tmp_path: Path) -> None:
    for name in ("run/.pairs.parquet.123-ab.tmp", "run/sub/.pos.7-cd.tmp/part", "beside/.x.1-ef.tmp", "run/.mine.tmp"):
        files.write_text(tmp_path / name, "half")
    RunFolder(tmp_path / "run", {}).close()
    assert listing(tmp_path) == {
        "run", "run/sub", "run/.lock", "run/identity.json", "run/.mine.tmp", "beside", "beside/.x.1-ef.tmp",
    }  # fmt: skip


def test_hidden_folders_of_the_user_are_kept(tmp_path: Path) -> None:
    files.write_text(tmp_path / ".f.old" / "thesis.txt", "precious")
    files.write_text(tmp_path / "f" / "part", "before")
    with atomic_folder(tmp_path / "f") as temporary:
        (temporary / "part").write_text("now")
    files.tidy(tmp_path)
    assert listing(tmp_path) == {"f", "f/part", ".f.old", ".f.old/thesis.txt"}


@pytest.mark.parametrize("kind", ["pipe", "device", "file"])
def test_what_is_not_a_folder_is_not_replaced_by_one(tmp_path: Path, kind: str) -> None:
    place = tmp_path / kind
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "device":
        place = Path(os.devnull)
    else:
        place.write_text("x")
    before = place.lstat()
    with (
        pytest.raises(UserError, match=f"{place} exists and is not a folder. Give another place"),
        atomic_folder(place),
    ):
        raise AssertionError("nothing is made")
    assert place.lstat().st_mode == before.st_mode and place.lstat().st_ino == before.st_ino


@pytest.mark.parametrize("place", ["pipe", os.devnull])
def test_what_is_not_an_ordinary_file_is_not_replaced_by_one(tmp_path: Path, place: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is not an ordinary file"), atomic_file(tmp_path / place):
        raise AssertionError("nothing is made")
    assert (tmp_path / "pipe").is_fifo() and Path(os.devnull).is_char_device()


def test_a_link_stands_for_its_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    for name, target in {"link": "real", "dangling": "new"}.items():
        (tmp_path / name).symlink_to(tmp_path / target)
        with atomic_folder(tmp_path / name) as temporary:
            (temporary / "part").write_text(name)
        assert (tmp_path / name).is_symlink() and (tmp_path / target / "part").read_text() == name


def test_a_place_below_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for kind in (atomic_file, atomic_folder):
        with (
            pytest.raises(UserError, match=r"file/sub cannot hold files \(Not a directory\)"),
            kind(tmp_path / "file/sub/x"),
        ):
            raise AssertionError("nothing is made")


def test_a_mount_point_is_refused_before_anything_is_made() -> None:
    with pytest.raises(UserError, match=r"is a mount point.*Give a folder inside it"), atomic_folder(Path("/")):
        raise AssertionError("nothing is made")


def test_private_files_get_the_mode_of_all_others(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("x")
    with atomic_file(tmp_path / "one") as temporary:
        save_file({"x": torch.zeros(1)}, temporary)
    with atomic_folder(tmp_path / "folder") as temporary:
        save_file({"x": torch.zeros(1)}, temporary / "two")
    modes = {(tmp_path / name).stat().st_mode for name in ("one", "folder/two", "other")}
    assert len(modes) == 1


# ---------------------------------------------------------------- json and digests


@pytest.mark.parametrize("content", [b"{", b"", b"{'a': 1}", b"\xff\xfe"])
def test_broken_json_is_an_error_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.json is not valid JSON"):
        files.read_json(path)


def test_json_is_written_and_read_back(tmp_path: Path) -> None:
    content = {"b": [1, 2.5, None], "a": "ö"}
    files.write_json(tmp_path / "x.json", content)
    assert files.read_json(tmp_path / "x.json") == content


def test_json_that_others_cannot_read_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "x.json", {"a": float("nan")})
    assert listing(tmp_path) == set()


@dataclass(frozen=True)
class Part:
    where: Path
    sizes: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Whole:
    part: Part
    rate: float = 0.5


def test_canonical_json_knows_dataclasses_and_paths_and_sorts_keys() -> None:
    whole = Whole(Part(Path("a/b")))
    assert canonical_json(whole) == '{"part":{"sizes":[1,2],"where":"a/b"},"rate":0.5}'
    assert canonical_json({"b": 1, "a": [Path("x")]}) == '{"a":["x"],"b":1}'


@pytest.mark.parametrize("content", [{1, 2}, object(), Whole])
def test_what_has_no_json_form_is_refused(content: object) -> None:
    with pytest.raises(TypeError, match="has no JSON form"):
        canonical_json(content)


def test_a_content_key_is_stable_across_versions() -> None:
    # stored run folders are found again by these keys
    assert content_key("stage", {"a": 1, "b": [1.5, None]}) == "3b20ed0dd19344c746e10470"


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(_json, _json)
def test_content_keys_are_equal_exactly_for_equal_content(one: Any, other: Any) -> None:
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (content_key(one) == content_key(other)) == same


@pytest.mark.parametrize(
    ("one", "other"),
    [(("ab", "c"), ("a", "bc")), (("a", None), ("a",)), ((1,), ("1",)), ((["a", "b"],), ("a", "b")), ((0.1,), (0.2,))],
)
def test_content_keys_tell_similar_contents_apart(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    assert content_key(*one) != content_key(*other)


def test_a_content_key_ignores_the_order_of_names() -> None:
    assert content_key({"a": 1, "b": 2}) == content_key({"b": 2, "a": 1})


def test_the_digest_of_a_folder_sees_contents_names_and_places(tmp_path: Path) -> None:
    def build(files: dict[str, str]) -> str:
        with atomic_folder(tmp_path / "f") as temporary:
            for name, text in files.items():
                (temporary / name).parent.mkdir(exist_ok=True)
                (temporary / name).write_text(text)
        return digest(tmp_path / "f")

    first = build({"a": "1", "s/b": "2"})
    assert build({"s/b": "2", "a": "1"}) == first
    others = [{"a": "1", "s/b": "3"}, {"a": "1", "s/c": "2"}, {"a": "1", "b": "2"}, {"a": "1"}]
    assert len({first, *map(build, others)}) == 5


# ---------------------------------------------------------------- stages


class Stage:
    """A stage that counts how often it is made."""

    def __init__(self, run: RunFolder) -> None:
        self.run, self.made = run, 0

    def make(self, _: Shards) -> None:
        self.made += 1
        files.write_text(self.run / "out.txt", f"made {self.made}")
        with atomic_folder(self.run / "folder") as temporary:
            (temporary / "in.txt").write_text("inside")

    def build(self, **inputs: Any) -> bool:
        return self.run.build("stage", inputs, ["out.txt", "folder"], self.make).built


def test_a_stage_is_built_once(tmp_path: Path) -> None:
    with RunFolder(tmp_path, {}) as run:
        stage = Stage(run)
        first = run.build("stage", {"a": 1}, ["out.txt", "folder"], stage.make)
        again = run.build("stage", {"a": 1}, ["out.txt", "folder"], stage.make)
    assert (first.built, again.built, stage.made) == (True, False, 1)
    assert again.seconds == first.seconds
    with RunFolder(tmp_path, {}) as run:
        assert not Stage(run).build(a=1)


def test_a_stage_is_rebuilt_when_an_input_changes_and_when_it_changes_back(tmp_path: Path) -> None:
    with RunFolder(tmp_path, {}) as run:
        stage = Stage(run)
        assert [stage.build(a=1), stage.build(a=2), stage.build(a=2), stage.build(a=1)] == [True, True, False, True]


def alter(run: RunFolder) -> None:
    (run / "out.txt").write_text("edited by hand")


def remove(run: RunFolder) -> None:
    (run / "out.txt").unlink()


def alter_inside(run: RunFolder) -> None:
    (run / "folder" / "in.txt").write_text("other")


def add_inside(run: RunFolder) -> None:
    (run / "folder" / "more.txt").write_text("more")


def remove_record(run: RunFolder) -> None:
    (run / "stages" / "stage.json").unlink()


@pytest.mark.parametrize("harm", [alter, remove, alter_inside, add_inside, remove_record])
def test_a_stage_is_rebuilt_when_its_outputs_are_no_longer_what_it_made(
    tmp_path: Path, harm: Callable[[RunFolder], None]
) -> None:
    with RunFolder(tmp_path, {}) as run:
        stage = Stage(run)
        stage.build(a=1)
        harm(run)
        assert stage.build(a=1)
        assert not stage.build(a=1)
        assert listing(run / "folder") == {"in.txt"}


@pytest.mark.parametrize("error", [ValueError, Killed])
def test_a_killed_stage_is_not_done_even_if_its_outputs_are_there(tmp_path: Path, error: type[BaseException]) -> None:
    with RunFolder(tmp_path, {}) as run:
        stage = Stage(run)
        stage.build(a=1)

        def killed(shards: Shards) -> None:
            stage.make(shards)
            raise error

        with pytest.raises(error):
            run.build("stage", {"a": 2}, ["out.txt"], killed)
        assert stage.build(a=2)


def test_the_record_of_the_old_inputs_does_not_survive_a_failed_rebuild(tmp_path: Path) -> None:
    with RunFolder(tmp_path, {}) as run:
        stage = Stage(run)
        stage.build(a=1)

        def killed(_: Shards) -> None:
            raise Killed

        with pytest.raises(Killed):
            run.build("stage", {"a": 2}, ["out.txt"], killed)
        assert stage.build(a=1), "outputs may be half of one and half of the other"


def test_a_stage_that_wrote_less_than_it_promised_is_a_defect(tmp_path: Path) -> None:
    with RunFolder(tmp_path, {}) as run:
        with pytest.raises(RuntimeError, match=r"did not write \['missing'\]"):
            run.build("stage", {}, ["missing"], lambda _: None)
        assert not (tmp_path / "stages" / "stage.json").exists()


def test_shards_survive_a_failure_and_go_with_success(tmp_path: Path) -> None:
    found: list[bool] = []

    def make(shards: Shards) -> None:
        found.append(shards.has("piece"))
        files.write_text(shards.path("piece"), "done")
        if len(found) == 1:
            raise Killed
        files.write_text(tmp_path / "out", "all")

    with RunFolder(tmp_path, {}) as run:
        with pytest.raises(Killed):
            run.build("stage", {"a": 1}, ["out"], make)
        run.build("stage", {"a": 2}, ["out"], make)
        run.build("stage", {"a": 1}, ["out"], make)
        assert found == [False, False, True], "pieces belong to the inputs that they were made for"
        (run / "out").unlink()
        run.build("stage", {"a": 1}, ["out"], make)
        assert found[-1] is False


def test_a_piece_that_is_being_written_is_not_there_yet(tmp_path: Path) -> None:
    shards = Shards(tmp_path / "s")
    with atomic_file(shards.path("piece")) as temporary:
        temporary.write_text("x")
        assert not shards.has("piece")
    assert shards.has("piece")
    shards.discard()
    assert not shards.has("piece")
    shards.discard()


@pytest.mark.parametrize(
    ("fresh", "changed"),
    [
        ({"a": 1, "b": (1, 2)}, []),
        ({"a": 2, "b": (1, 2)}, ["a"]),
        ({"a": 2, "b": (1, 3)}, ["a", "b"]),
        ({"a": 1}, ["b"]),
        ({"a": 1, "b": [1, 2], "c": "new"}, ["c"]),
    ],
)
def test_changed_inputs_are_named(tmp_path: Path, fresh: dict[str, Any], changed: list[str]) -> None:
    with RunFolder(tmp_path, {}) as run:
        assert run.changed_inputs("stage", fresh) == []
        Stage(run).build(a=1, b=(1, 2))
        assert run.changed_inputs("stage", fresh) == changed


# ---------------------------------------------------------------- identity and lock


def test_a_folder_of_another_identity_is_refused_and_the_field_named(tmp_path: Path) -> None:
    RunFolder(tmp_path, {"model": "abc", "behaviour": "x"}).close()
    with pytest.raises(BaseMismatchError, match=r"different model \(abc, not def\)") as caught:
        RunFolder(tmp_path, {"model": "def", "behaviour": "x"})
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(BaseMismatchError, match="different behaviour"):
        RunFolder(tmp_path, {"model": "abc", "behaviour": "y"})
    with pytest.raises(BaseMismatchError, match=r"different more \(None, not 1\)"):
        RunFolder(tmp_path, {"model": "abc", "behaviour": "x", "more": 1})
    RunFolder(tmp_path, {"model": "abc", "behaviour": "x"}).close()


def test_an_identity_with_a_tuple_is_known_again(tmp_path: Path) -> None:
    RunFolder(tmp_path, {"layers": (1, 2)}).close()
    RunFolder(tmp_path, {"layers": (1, 2)}).close()


def test_a_broken_identity_is_an_error_and_leaves_the_folder_unlocked(tmp_path: Path) -> None:
    (tmp_path / "identity.json").write_text("{")
    with pytest.raises(UserError, match=r"identity\.json is not valid JSON"):
        RunFolder(tmp_path, {})
    (tmp_path / "identity.json").unlink()
    RunFolder(tmp_path, {}).close()


def test_a_folder_in_use_is_refused_until_it_is_closed(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with RunFolder(tmp_path, {}), pytest.raises(UserError, match="another ws process is using"):
        RunFolder(tmp_path, {})
    run = RunFolder(tmp_path, {})
    run.close()
    run.close()
    RunFolder(tmp_path, {}).close()


@pytest.mark.parametrize("inside", ["file", "file/run"])
def test_a_place_that_cannot_be_a_folder_is_a_user_error(tmp_path: Path, inside: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot create the run folder") as caught:
        RunFolder(tmp_path / inside, {})
    assert "--out" in str(caught.value)


def test_an_existing_folder_that_cannot_be_locked_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()  # as a read-only folder would, it makes opening the lock file fail
    with pytest.raises(UserError):
        RunFolder(tmp_path, {})


@pytest.mark.parametrize("writer", [atomic_file, atomic_folder])
def test_a_full_disk_that_a_library_reports_in_its_own_way_is_an_os_error(tmp_path: Path, writer: Any) -> None:
    with pytest.raises(OSError, match="No space left") as caught, writer(tmp_path / "weights"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path / "weights")
    with pytest.raises(SafetensorError), writer(tmp_path / "weights"):
        raise SafetensorError("another problem")
    assert not list(tmp_path.iterdir())
