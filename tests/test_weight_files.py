"""Only what the library reads counts, all of it, and nothing else.

The loaded model, the fingerprint of its files, differences of checkpoints and exports are about the same tensors,
however the folder stores them and whatever else lies in it. Where they cannot be, each of them says so in one line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from making import assert_one_line, copy_changed, edit_json, logits, prompts, random_direction, relative_error, thin
from ws.adapters import checkpoints
from ws.algebra.delta import Delta
from ws.algebra.direction import Direction
from ws.base.errors import UserError
from ws.edit.steering import steer
from ws.export import merged as merged_export
from ws.export import write_merged, write_peft
from ws.model import loading
from ws.model.loading import ChatModel
from ws.model.weight_files import INDEX, Checkpoint
from ws.pocket import tiny

WEIGHTS = "model.safetensors"
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small models of several architectures, and Llama in several files."""
    root = tmp_path_factory.mktemp("stored")
    for name in ("qwen3", "qwen3-biases", "llama", "gpt2", "gpt-neox", "qwen3-moe"):
        tiny.make(name, root / name, layers=4)
    loading.load(str(root / "llama")).network.save_pretrained(root / "sharded", max_shard_size="100KB")
    for file in (root / "llama").iterdir():
        if file.suffix != ".safetensors" and not (root / "sharded" / file.name).exists():
            (root / "sharded" / file.name).write_bytes(file.read_bytes())
    return {path.name: path for path in root.iterdir()}


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor] | None]) -> None:
    """Store other tensors in the only weight file of a folder."""
    tensors = load_file(folder / WEIGHTS)
    tensors = change(tensors) or tensors
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def renamed(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda tensors: {new if n == old else n: t for n, t in tensors.items()})


def without(part: str) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if part not in n})


def configure(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", lambda config: config.update(changes))


# -------------------------------------------------------------------- leftovers


def vendor_copy(folder: Path) -> None:
    save_file({"tok_embeddings.weight": torch.ones(2, 2)}, folder / "consolidated.safetensors")


def index_of_older_shards(folder: Path) -> None:
    save_file({EMBEDDINGS: torch.ones(2, 2)}, folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {EMBEDDINGS: "model-00001-of-00001.safetensors"}}
    (folder / INDEX).write_text(json.dumps(index))


def half_an_index(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {"model.emb')


def older_shards(folder: Path) -> None:
    save_file(
        {EMBEDDINGS: torch.ones(2, 2), "model.layers.9.x": torch.ones(1)}, folder / "model-00001-of-00099.safetensors"
    )


def other_formats(folder: Path) -> None:
    for name in (
        "pytorch_model.bin",
        "model.gguf",
        "consolidated.00.pth",
        "flax_model.msgpack",
        "tf_model.h5",
        "x.ckpt",
    ):
        (folder / name).write_bytes(b"junk")
    (folder / "pytorch_model.bin.index.json").write_text("{}")


LEFTOVERS = {
    "llama": [vendor_copy, index_of_older_shards, half_an_index, other_formats],
    "sharded": [vendor_copy, older_shards, other_formats],
}


@pytest.mark.parametrize(
    ("name", "leave"),
    [(name, leave) for name, kinds in LEFTOVERS.items() for leave in kinds],
    ids=lambda one: getattr(one, "__name__", one),
)
def test_leftovers_change_nothing_and_are_not_exported(
    models: dict[str, Path], tmp_path: Path, name: str, leave: Callable[[Path], None]
) -> None:
    clean = loading.load(str(models[name]))
    folder = copy_changed(models[name], tmp_path / "m", leave)
    left = {file.name for file in folder.iterdir()} - {file.name for file in models[name].iterdir()}
    model = loading.load(str(folder))
    assert left and Checkpoint(folder).fingerprint() == model.fingerprint == clean.fingerprint
    direction, ids = random_direction(model, relative_norm=0.1), prompts(model)
    record = write_merged({direction: 1.0}, folder, tmp_path / "out")
    reloaded = loading.load(str(tmp_path / "out"))
    with steer(model, direction, 1.0):
        assert relative_error(logits(reloaded.network, ids), logits(model.network, ids)) < 1e-5
    assert record["fingerprint"] == reloaded.fingerprint != model.fingerprint
    exported = {file.name for file in (tmp_path / "out").iterdir()}
    assert exported == {file.name for file in models[name].iterdir()} | {"weight_steering_export.json"}


# -------------------------------------------------------------------- stored in another form than the model's


def with_masks(folder: Path) -> None:
    """As the files of Pythia are."""

    def change(tensors: dict[str, Tensor]) -> None:
        for layer in range(4):
            stem = f"gpt_neox.layers.{layer}.attention"
            tensors[f"{stem}.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
            tensors[f"{stem}.masked_bias"] = torch.tensor(-1e9)
            tensors[f"{stem}.rotary_emb.inv_freq"] = torch.ones(1)

    rewrite(folder, change)


def without_prefix(folder: Path) -> None:
    """As GPT-2 is on the hub."""
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 8, 8).tril() for layer in range(4)}
    rewrite(folder, lambda tensors: {n.removeprefix("transformer."): t for n, t in tensors.items()} | masks)


STORED: dict[str, tuple[str, Callable[[Path], None]]] = {
    "masks": ("gpt-neox", with_masks),
    "no prefix": ("gpt2", without_prefix),
    "experts one by one": ("qwen3-moe", lambda folder: None),
    "tied, head stored too": ("qwen3", lambda f: rewrite(f, lambda t: {**t, HEAD: t[EMBEDDINGS].clone()})),
    "tied, only the head stored": ("qwen3", renamed(EMBEDDINGS, HEAD)),
    "tied, but another head": ("qwen3", lambda f: rewrite(f, lambda t: {**t, HEAD: t[EMBEDDINGS].flip(0)})),
    "in half precision": ("llama", lambda f: rewrite(f, lambda t: {n: x.bfloat16() for n, x in t.items()})),
}


def on_every_kind_of_parameter(model: ChatModel) -> Direction:
    """A direction on every map of two layers, on the embeddings, on stacked experts and on a norm."""
    direction = random_direction(model, relative_norm=0.1)
    deltas: dict[str, Delta] = dict(direction.deltas)
    for number, (name, parameter) in enumerate(model.network.named_parameters()):
        if parameter is model.network.get_input_embeddings().weight:
            deltas[name] = thin(*parameter.shape, rank=2, seed=number, scale=0.01)
        elif parameter.ndim == 3 and ".1." in name:
            deltas[name] = Delta.full(
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            )
        elif parameter.ndim == 1 and ".1." in name:
            deltas[name] = thin(len(parameter), 1, rank=1, seed=number, scale=0.1)
    return Direction(deltas, model.fingerprint)


@pytest.mark.parametrize("form", STORED)
def test_however_weights_are_stored_files_and_model_agree_and_an_export_is_the_steered_model(
    models: dict[str, Path], tmp_path: Path, form: str
) -> None:
    name, change = STORED[form]
    folder = copy_changed(models[name], tmp_path / "m", change)
    model = loading.load(str(folder))
    files = Checkpoint(folder)
    assert files.fingerprint() == model.fingerprint
    for parameter, value in model.network.named_parameters():
        assert torch.equal(files.tensor(parameter).float(), value.float()), parameter
    assert files.parameters().keys() == dict(model.network.named_parameters()).keys()
    direction, ids = on_every_kind_of_parameter(model), prompts(model)
    record = write_merged({direction: 1.0}, folder, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").float().eval()
    with steer(model, direction, 1.0, mode="baked"):
        steered = logits(model.network, ids)
    assert relative_error(logits(plain, ids), steered) < (2e-2 if "half" in form else 1e-5)
    assert relative_error(steered, logits(model.network, ids)) > 3e-2
    assert record["fingerprint"] == loading.load(str(tmp_path / "out")).fingerprint
    checkpoints.difference(folder, tmp_path / "out", folder, tmp_path / "d.safetensors")
    found = Direction.load(tmp_path / "d.safetensors")
    assert found.deltas.keys() == direction.deltas.keys() and found.base == model.fingerprint


# -------------------------------------------------------------------- what does not fit


def shards_cut_off(folder: Path) -> None:
    (folder / INDEX).write_text((folder / INDEX).read_text()[:200])


def shard_lost(folder: Path) -> None:
    min(folder.glob("model-*.safetensors")).unlink()


REFUSED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "fewer layers than stored": ("llama", configure(num_hidden_layers=2), r"18 stored tensors .* model\.layers\.2\."),
    "biases that are switched off": ("qwen3-biases", configure(attention_bias=False), r"16 stored tensors .*\.bias"),
    "a tensor of nobody": ("llama", lambda f: rewrite(f, lambda t: {**t, "x": t[HEAD].clone()}), "for example x"),
    "more layers than stored": ("llama", configure(num_hidden_layers=5), r"lack 9 tensors .* model\.layers\.4\."),
    "an untied head that is not stored": ("qwen3", configure(tie_word_embeddings=False), r"lack 1 .* lm_head\.weight"),
    "another name": ("llama", renamed("model.norm.weight", "x"), "for example x|lack"),
    "another shape": ("llama", configure(intermediate_size=96), r"stored with shape .*128.* describes .*96"),
    "an index cut off": ("sharded", shards_cut_off, r"index\.json is damaged"),
    "an index of nothing": ("sharded", lambda f: (f / INDEX).write_text("[]"), r"index\.json is damaged"),
    "a shard lost": ("sharded", shard_lost, r"lacks model-00001-of-\d+\.safetensors"),
    "an expert lost": ("qwen3-moe", without("1.mlp.experts.3."), r"layers\.1\.mlp\.experts\.(gate_up|down)_proj"),
    "half an expert lost": ("qwen3-moe", without("1.mlp.experts.3.up"), r"layers\.1\.mlp\.experts\.gate_up_proj"),
    "an adapter beside the model": ("llama", lambda f: (f / "adapter_config.json").touch(), "holds both an adapter"),
    "only leftovers": ("llama", lambda f: (f / WEIGHTS).rename(f / "copy.safetensors"), "no safetensors weights"),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_what_does_not_fit_is_one_line_from_the_model_and_from_its_files(
    models: dict[str, Path], tmp_path: Path, fault: str
) -> None:
    name, change, problem = REFUSED[fault]
    folder = copy_changed(models[name], tmp_path / "m", change)
    uses: list[Callable[[], object]] = [
        lambda: loading.load(str(folder)),
        lambda: Checkpoint(folder).fingerprint(),
        lambda: checkpoints.difference(models[name], folder, models[name], tmp_path / "d.safetensors"),
        lambda: write_merged({}, folder, tmp_path / "out"),
    ]
    for use in uses:
        with pytest.raises(UserError) as caught:
            use()
        assert_one_line(caught.value, str(folder))
        assert re.search(problem, str(caught.value)), caught.value
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    ("base", "side", "problem"),
    [
        ("llama", "tied", f"{HEAD} is absent, but in the base"),
        ("tied", "llama", f"{HEAD} has shape"),
        ("llama", "short", "model.layers.3.self_attn.q_proj.weight is absent, but in the base"),
        ("short", "llama", "model.layers.3.self_attn.q_proj.weight has shape"),
    ],
)
def test_sides_with_fewer_or_more_parameters_than_the_base_are_refused_by_name(
    models: dict[str, Path], tmp_path: Path, base: str, side: str, problem: str
) -> None:
    def tie(folder: Path) -> None:
        configure(tie_word_embeddings=True)(folder)
        rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if n != HEAD})

    def shorten(folder: Path) -> None:
        configure(num_hidden_layers=3)(folder)
        rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if ".layers.3." not in n})

    folders = {
        "llama": models["llama"],
        "tied": copy_changed(models["llama"], tmp_path / "tied", tie),
        "short": copy_changed(models["llama"], tmp_path / "short", shorten),
    }
    for pos, neg in ((side, base), (base, side), (side, side)):
        with pytest.raises(UserError) as caught:
            checkpoints.difference(folders[base], folders[pos], folders[neg], tmp_path / "d.safetensors")
        assert_one_line(caught.value, problem, str(folders[side]))


# -------------------------------------------------------------------- where an export goes


def test_an_export_replaces_an_older_one_as_a_whole(models: dict[str, Path], tmp_path: Path) -> None:
    sharded, whole = (loading.load(str(models[name])) for name in ("sharded", "llama"))
    direction = random_direction(sharded, relative_norm=0.1)
    write_merged({direction: 1.0}, models["sharded"], tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    write_merged({direction: -1.0}, models["llama"], tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors*")] == [WEIGHTS]
    assert whole.fingerprint == sharded.fingerprint
    write_peft(direction, sharded.network, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("kind", ["merged", "peft"])
def test_an_export_never_replaces_files_that_are_none(models: dict[str, Path], tmp_path: Path, kind: str) -> None:
    model = loading.load(str(models["llama"]))
    direction = random_direction(model, relative_norm=0.1)

    def write(folder: Path) -> None:
        if kind == "merged":
            write_merged({direction: 1.0}, models["llama"], folder)
        else:
            write_peft(direction, model.network, folder)

    write(tmp_path / "earlier")
    write(tmp_path / "earlier")  # it replaces an export
    for place in ("mine", "earlier"):
        thesis = tmp_path / place / "chapters" / "thesis.tex"
        thesis.parent.mkdir(parents=True)
        thesis.write_text("x")
        with pytest.raises(UserError) as caught:
            write(tmp_path / place)
        assert_one_line(caught.value, str(tmp_path / place), "--out")
        assert thesis.read_text() == "x"
    assert "holds chapters/thesis.tex" in str(caught.value)


def test_an_export_that_is_not_what_was_meant_is_not_left_behind(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loading.load(str(models["llama"]))
    direction = random_direction(model, relative_norm=0.1)
    unedited = Checkpoint(models["llama"]).stored
    written = merged_export.write_streamed
    monkeypatch.setattr(
        merged_export, "write_streamed", lambda path, entries, _, *rest: written(path, entries, unedited, *rest)
    )
    with pytest.raises(UserError, match="is not what was written"):
        write_merged({direction: 1.0}, models["llama"], tmp_path / "out")
    saved = save_file
    monkeypatch.setattr(
        "safetensors.torch.save_file",
        lambda tensors, path, metadata: saved({n: 1.01 * t for n, t in tensors.items()}, path, metadata),
    )
    with pytest.raises(UserError, match="is not what was written"):
        write_peft(direction, model.network, tmp_path / "out")
    assert not list(tmp_path.iterdir())
