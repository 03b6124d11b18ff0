"""Full checkpoints tensor by tensor: their fingerprint, their difference, and copies with directions baked in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from making import assert_one_line, copy_changed, logits, prompts, random_direction, relative_error
from ws.adapters import checkpoints
from ws.adapters.checkpoints import write_streamed
from ws.algebra.direction import Direction
from ws.base.errors import UserError
from ws.edit.steering import steer
from ws.export import write_merged
from ws.model import loading
from ws.model.loading import ChatModel
from ws.model.weight_files import Checkpoint, Stored

WEIGHTS = "model.safetensors"


def changed_copy(base: Path, target: Path, names: list[str], seed: int, size: float = 0.01) -> Path:
    """A copy of a model folder with Gaussian noise on some tensors."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        fresh = torch.Generator().manual_seed(seed)
        for name in names:
            tensors[name] = tensors[name] + size * torch.randn(tensors[name].shape, generator=fresh)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return copy_changed(base, target, change)


def sharded_copy(base: Path, target: Path) -> Path:
    """The same model in several files with an index."""
    loading.load(str(base)).network.save_pretrained(target, max_shard_size="100KB")
    for file in base.iterdir():
        if file.suffix != ".safetensors" and not (target / file.name).exists():
            (target / file.name).write_bytes(file.read_bytes())
    assert len(list(target.glob("*.safetensors"))) > 2
    return target


NAMES = ["model.layers.1.mlp.up_proj.weight", "model.layers.2.input_layernorm.weight", "model.embed_tokens.weight"]


def test_the_fingerprint_of_files_is_that_of_the_loaded_model(any_model: ChatModel, tmp_path: Path) -> None:
    base = Path(any_model.name)
    assert Checkpoint(base).fingerprint() == any_model.fingerprint
    assert Checkpoint(sharded_copy(base, tmp_path / "s")).fingerprint() == any_model.fingerprint


def test_the_difference_is_exact_and_holds_what_differs_only(qwen: ChatModel, tmp_path: Path) -> None:
    base = Path(qwen.name)
    pos = changed_copy(base, tmp_path / "pos", NAMES, seed=1)
    neg = changed_copy(base, tmp_path / "neg", NAMES[:2], seed=2)
    changed = checkpoints.difference(base, pos, neg, tmp_path / "d.safetensors")
    assert sorted(changed) == sorted(NAMES)
    direction = Direction.load(tmp_path / "d.safetensors")
    assert direction.base == qwen.fingerprint and direction.layers == {NAMES[0]: 1, NAMES[1]: 2}
    sides = [load_file(folder / WEIGHTS) for folder in (pos, neg)]
    for name in NAMES:
        wanted = sides[0][name] - sides[1][name]
        assert torch.equal(direction.materialise(name).reshape(wanted.shape), wanted)


def test_half_of_a_difference_steers_and_bakes(qwen: ChatModel, tmp_path: Path) -> None:
    base = Path(qwen.name)
    pos = changed_copy(base, tmp_path / "pos", NAMES, seed=1)
    checkpoints.difference(base, pos, base, tmp_path / "d.safetensors")
    direction, ids = Direction.load(tmp_path / "d.safetensors"), prompts(qwen)
    with steer(qwen, direction, 1.0):
        steered = logits(qwen.network, ids)
    assert relative_error(steered, logits(loading.load(str(pos)).network, ids)) < 1e-5
    assert relative_error(steered, logits(qwen.network, ids)) > 1e-3


def test_equal_checkpoints_and_other_shapes_are_refused(
    qwen: ChatModel, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    base = Path(qwen.name)
    with pytest.raises(UserError, match="the same weights"):
        checkpoints.difference(base, base, base, tmp_path / "d.safetensors")
    with pytest.raises(UserError, match="architecture"):
        checkpoints.difference(base, tiny_folders["llama"], base, tmp_path / "d.safetensors")
    assert not (tmp_path / "d.safetensors").exists()


def test_half_precision_checkpoints_are_said_to_be_rounded(
    qwen: ChatModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, side in enumerate(("pos", "neg")):
        model = loading.load(qwen.name)
        model.network.get_parameter(NAMES[0]).data.add_(0.01 * (number + 1))
        model.network.bfloat16().save_pretrained(tmp_path / side)
    checkpoints.difference(qwen.name, tmp_path / "pos", tmp_path / "neg", tmp_path / "d.safetensors")
    assert "half precision" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "mentioned"),
    [
        (lambda f: (f / "config.json").unlink(), "not a model folder"),
        (lambda f: (f / WEIGHTS).unlink(), "no safetensors weights"),
        (lambda f: (f / WEIGHTS).write_bytes(b"nonsense"), "cannot be read"),
        (lambda f: (f / "config.json").write_text('{"model_type": "nothing"}'), "because of its configuration"),
    ],
)
def test_a_damaged_folder_is_one_clear_line(qwen: ChatModel, tmp_path: Path, damage: object, mentioned: str) -> None:
    folder = copy_changed(Path(qwen.name), tmp_path / "m", damage)  # type: ignore[arg-type]
    with pytest.raises(UserError) as caught:
        Checkpoint(folder).fingerprint()
    assert_one_line(caught.value, mentioned, str(folder))


# -------------------------------------------------------------------- writing


def test_a_streamed_file_is_what_the_library_reads(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.zeros(0, 4),
        "c": torch.randn(5).bfloat16(),
        "d": torch.tensor(2.5, dtype=torch.float64)[None],
    }
    entries = {name: Stored("", tuple(t.shape), t.dtype) for name, t in tensors.items()}
    write_streamed(tmp_path / "f.safetensors", entries, tensors.__getitem__, {"note": "x"}, "writing")
    read = load_file(tmp_path / "f.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_one_tensor_is_alive_at_a_time(tmp_path: Path) -> None:
    import weakref  # noqa: PLC0415

    alive: list[weakref.ref[torch.Tensor]] = []

    def produce(name: str) -> torch.Tensor:
        assert sum(ref() is not None for ref in alive) <= 1
        tensor = torch.full((64, 64), float(name))
        alive.append(weakref.ref(tensor))
        return tensor

    entries = {str(number): Stored("", (64, 64), torch.float32) for number in range(5)}
    write_streamed(tmp_path / "f.safetensors", entries, produce, {}, "writing")
    assert len(alive) == 5


def test_a_failure_half_way_leaves_no_file(tmp_path: Path) -> None:
    entries = {str(number): Stored("", (2,), torch.float32) for number in range(3)}

    def produce(name: str) -> torch.Tensor:
        if name == "2":
            raise KeyboardInterrupt
        return torch.zeros(2)

    with pytest.raises(KeyboardInterrupt):
        write_streamed(tmp_path / "f.safetensors", entries, produce, {}, "writing")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sharded", [False, True])
def test_a_merged_checkpoint_in_plain_transformers_gives_the_steered_logits(
    any_model: ChatModel, tmp_path: Path, sharded: bool
) -> None:
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    base = sharded_copy(Path(any_model.name), tmp_path / "base") if sharded else Path(any_model.name)
    one, two = (random_direction(any_model, seed=seed, relative_norm=0.1) for seed in (0, 1))
    record = write_merged({one: 0.5, two: -1.0}, base, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
    ids = prompts(any_model)
    with steer(any_model, {one: 0.5, two: -1.0}):
        steered = logits(any_model.network, ids)
    assert relative_error(logits(merged, ids), steered) < 1e-5
    names = {file.name for file in (tmp_path / "merged").iterdir()}
    assert {file.name for file in base.iterdir()} <= names
    assert json.loads((tmp_path / "merged" / "weight_steering_export.json").read_text()) == record


def test_a_merged_checkpoint_keeps_the_dtype_with_one_rounding(qwen: ChatModel, tmp_path: Path) -> None:
    half = loading.load(qwen.name, dtype="bfloat16")
    half.network.save_pretrained(tmp_path / "half")
    direction = random_direction(half, relative_norm=0.05)
    write_merged({direction: 1.0}, tmp_path / "half", tmp_path / "merged")
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("half", "merged"))
    for name, tensor in after.items():
        assert tensor.dtype == torch.bfloat16
        wanted = before[name]
        if name in direction.deltas:
            wanted = (before[name].float() + direction.deltas[name].materialise()).bfloat16()
        assert torch.equal(tensor, wanted)


def test_merging_refuses_another_base_and_the_base_itself(
    qwen: ChatModel, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    direction = random_direction(qwen)
    with pytest.raises(UserError, match="was made on the base model"):
        write_merged({direction: 1.0}, tiny_folders["llama"], tmp_path / "m")
    with pytest.raises(UserError, match="base itself"):
        write_merged({direction: 1.0}, Path(qwen.name), Path(qwen.name))
    assert not (tmp_path / "m").exists()
