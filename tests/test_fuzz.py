"""Damaged files of every kind: whatever the bytes, reading ends in a result or in one line, with bounded memory."""

from __future__ import annotations

import contextlib
import io
import json
import resource
import shutil
import struct
import sys
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from making import random_direction, save_lora
from test_cli import run
from ws import adapters
from ws.algebra.direction import HEADER_KEY, Direction
from ws.base.errors import UserError
from ws.eval import custom
from ws.fitting import behaviour, data
from ws.model import loading
from ws.model.loading import ChatModel

MEMORY = 400 * 2**20
"""Bytes by which the peak of the process may grow in a test; a damaged length asks for far more."""

FUZZ = settings(
    max_examples=150, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
FEW = settings(FUZZ, max_examples=40)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("../../x"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
edits = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 12), st.binary(max_size=12)), min_size=1, max_size=5)
"""Edits of bytes: where (as a share of the whole), how many bytes go, and what comes instead."""
PIECES = ['"', "'", "[", "]", "{", "}", "=", "\n", "[[x]]", "\\u0000", "{x!r}", "{0}", "{}", "{a.b}", "1e999", "nan",
          "true", "[]", "{}", '""', "-1", "\t", "#", "inf", "1979-05-27", "{claim:>99999999}"]  # fmt: skip
texts = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 40), st.sampled_from(PIECES) | st.text(max_size=6)),
                 min_size=1, max_size=4)  # fmt: skip


lines = st.fixed_dictionaries(dict.fromkeys(("prompt", "response_pos", "response_neg", "label"), json_values))


def edited(content: Any, changes: list[tuple[float, int, Any]]) -> Any:
    for where, length, piece in changes:
        start = int(where * len(content))
        content = content[:start] + piece + content[start + length :]
    return content


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Nothing but a UserError may come out of the block, and memory stays bounded."""
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    with contextlib.suppress(UserError):
        yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before < MEMORY


# ---------------------------------------------------------------- texts


@FUZZ
@given(texts)
def test_any_behaviour_file_is_read_or_refused(tmp_path: Path, changes: list[tuple[float, int, str]]) -> None:
    file = tmp_path / "b.toml"
    file.write_text(edited(behaviour.TEMPLATE.format(name="mine"), changes), encoding="utf-8", errors="ignore")
    with bounded():
        found = behaviour.load(str(file))
        assert found.name.replace("-", "").replace("_", "").isalnum() and found.train and found.probe.items


@FUZZ
@given(edits)
def test_any_bytes_of_a_behaviour_file_are_read_or_refused(
    tmp_path: Path, changes: list[tuple[float, int, bytes]]
) -> None:
    file = tmp_path / "b.toml"
    file.write_bytes(edited(behaviour.TEMPLATE.format(name="mine").encode(), changes))
    with bounded():
        behaviour.load(str(file))


@FUZZ
@given(st.lists(json_values | lines, max_size=3))
def test_any_lines_of_pairs_and_probes_are_read_or_refused(tmp_path: Path, found: list[Any]) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in found))
    subject = behaviour.load("sycophancy")
    with bounded():
        data.read_pairs(file, subject)
    with bounded():
        custom.read(file)


# ---------------------------------------------------------------- directions


@pytest.fixture(scope="module")
def direction_bytes(qwen: ChatModel, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("fuzz") / "d.safetensors"
    random_direction(qwen, layers=[1]).save(file)
    return file.read_bytes()


def use(direction: Direction) -> None:
    """What every command does with a direction that it has read."""
    repr(direction)
    assert direction.layer_numbers == sorted(direction.layer_numbers)
    assert all(delta.is_finite() for delta in direction.deltas.values())
    if direction.is_bound:
        direction.norms_by_layer()


@FUZZ
@given(edits, st.booleans())
def test_any_bytes_of_a_direction_are_read_or_refused(
    direction_bytes: bytes, tmp_path: Path, changes: list[tuple[float, int, bytes]], in_header: bool
) -> None:
    size = 8 + struct.unpack("<Q", direction_bytes[:8])[0]
    head, body = direction_bytes[:size], direction_bytes[size:]
    file = tmp_path / "d.safetensors"
    file.write_bytes(edited(head, changes) + body if in_header else head + edited(body, changes))
    with bounded():
        use(Direction.load(file))


def with_header(content: bytes, change: Mapping[str, Any]) -> bytes:
    """The bytes of a direction with entries of its own header replaced."""
    size = struct.unpack("<Q", content[:8])[0]
    whole = json.loads(content[8 : 8 + size])
    own = {**json.loads(whole["__metadata__"][HEADER_KEY]), **change}
    whole["__metadata__"][HEADER_KEY] = json.dumps(own)
    text = json.dumps(whole).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


@FUZZ
@given(st.dictionaries(st.sampled_from(["format", "base", "layers", "provenance"]), json_values, min_size=1))
def test_any_header_of_a_direction_is_read_or_refused(
    direction_bytes: bytes, tmp_path: Path, change: dict[str, Any]
) -> None:
    file = tmp_path / "d.safetensors"
    file.write_bytes(with_header(direction_bytes, change))
    with bounded():
        use(Direction.load(file))


# ---------------------------------------------------------------- adapters


@pytest.fixture(scope="module")
def adapter(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lora(tiny_folders["qwen3"], tmp_path_factory.mktemp("fuzz") / "adapter")


OPTIONS = ["r", "lora_alpha", "target_modules", "peft_type", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
           "init_lora_weights", "layers_to_transform", "layers_pattern", "modules_to_save", "exclude_modules", "bias",
           "base_model_name_or_path", "fan_in_fan_out", "new_option"]  # fmt: skip


@FUZZ
@given(st.dictionaries(st.sampled_from(OPTIONS), json_values, min_size=1, max_size=3))
def test_any_settings_of_an_adapter_are_read_or_refused(
    adapter: Path, qwen: ChatModel, tmp_path: Path, change: dict[str, Any]
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with bounded():
        adapters.deltas(adapters.read(folder), qwen.network)


@FUZZ
@given(edits, st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]))
def test_any_bytes_of_an_adapter_are_read_or_refused(
    adapter: Path, qwen: ChatModel, tmp_path: Path, changes: list[tuple[float, int, bytes]], name: str
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    (folder / name).write_bytes(edited((adapter / name).read_bytes(), changes))
    with bounded():
        adapters.deltas(adapters.read(folder), qwen.network)


# ---------------------------------------------------------------- GGUF


@pytest.fixture(scope="module")
def gguf(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("fuzz") / "model.gguf"
    assert run("export", tiny_folders["qwen3"], "--format", "gguf", "--out", file) == 0
    return file


@FEW
@given(st.lists(st.tuples(st.integers(0, 2_000), st.integers(0, 4), st.binary(min_size=1, max_size=8)), min_size=1,
                max_size=3), st.floats(0.5, 1))  # fmt: skip
def test_any_bytes_of_a_gguf_are_read_or_refused(
    gguf: Path, tmp_path: Path, changes: list[tuple[int, int, bytes]], keep: float
) -> None:
    content = gguf.read_bytes()
    for start, length, piece in changes:  # the counts, lengths and types are at the beginning
        content = content[:start] + piece + content[start + length :]
    file = tmp_path / "model.gguf"
    file.write_bytes(content[: int(keep * len(content))] if keep < 0.9 else content)
    with bounded(), redirect_stderr(io.StringIO()):
        loading.load(str(file), device="cpu")
