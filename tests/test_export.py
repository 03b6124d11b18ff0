"""Exports proved by loading them without this package: plain PEFT, and the GGUF reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from families import FAMILIES, make
from making import assert_one_line, logits, prompts, random_direction, relative_error
from ws.adapters import diff
from ws.algebra.direction import Direction
from ws.base.errors import UnsupportedFeatureError, UserError
from ws.commands.cli import _main
from ws.edit.steering import steer
from ws.export import low_rank_form, write_peft
from ws.export.card import card
from ws.export.gguf_lora import gguf_rows, write_gguf
from ws.model import loading
from ws.model.loading import ChatModel

THIN = ("lora", "rslora", "pissa", "delora")


def in_plain_peft(base: str, folder: Path, ids: Tensor) -> Tensor:
    wrapped = peft.PeftModel.from_pretrained(loading.load(base).network, str(folder)).eval()
    return logits(wrapped, ids)


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("family", THIN)
def test_a_low_rank_direction_is_an_exact_adapter_in_plain_peft(
    qwen: ChatModel, tmp_path: Path, family: str, fold: bool
) -> None:
    pos, neg = (make(qwen.network, family, tmp_path / str(s), seed=s, size=3e-2) for s in (1, 2))
    direction, _ = diff.direction(qwen, pos.folder, neg.folder)
    record = write_peft(direction, qwen.network, tmp_path / "out", alpha=-1.5, fold=fold)
    ids = prompts(qwen)
    with steer(qwen, direction, -1.5):
        steered = logits(qwen.network, ids)
    assert record["exact"] and record["energy_kept"] == 1.0
    assert relative_error(in_plain_peft(qwen.name, tmp_path / "out", ids), steered) < 1e-5
    assert relative_error(logits(qwen.network, ids), steered) > 1e-3
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == (1.0 if fold else -1.5)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_the_adapter_loads_on_other_architectures(
    tiny_folders: dict[str, Path], tmp_path: Path, architecture: str
) -> None:
    model = loading.load(str(tiny_folders[architecture]))
    direction = random_direction(model, relative_norm=0.1)
    write_peft(direction, model.network, tmp_path / "out", alpha=2.0)
    ids = prompts(model)
    with steer(model, direction, 2.0):
        steered = logits(model.network, ids)
    assert relative_error(in_plain_peft(model.name, tmp_path / "out", ids), steered) < 1e-5


@pytest.mark.parametrize("family", ["dora", "oft", "boft", "ia3"])
def test_what_is_not_low_rank_is_cut_at_a_stated_rank_and_says_what_it_keeps(
    qwen: ChatModel, tmp_path: Path, family: str
) -> None:
    made = make(qwen.network, family, tmp_path / "1", seed=1, size=3e-2)
    direction = diff.task_vector(qwen, made.folder)
    with pytest.raises(UnsupportedFeatureError, match="--rank"):
        write_peft(direction, qwen.network, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    ids = prompts(qwen)
    with steer(qwen, direction, 1.0):
        steered = logits(qwen.network, ids)
    errors, energies = [], []
    for rank in (4, 32, 64):
        record = write_peft(direction, qwen.network, tmp_path / f"r{rank}", rank=rank)
        errors.append(relative_error(in_plain_peft(qwen.name, tmp_path / f"r{rank}", ids), steered))
        energies.append(record["energy_kept"])
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-5, "rank 64 is the whole of a 64-wide model"
    assert 0 < energies[0] < energies[1] <= energies[2] == pytest.approx(1.0, abs=1e-9)


def test_ranks_may_differ_by_module(qwen: ChatModel, tmp_path: Path) -> None:
    first, second = random_direction(qwen, rank=3, seed=1), random_direction(qwen, rank=5, seed=2).keep(layers=[1])
    direction = (first + second) * 0.05
    write_peft(direction, qwen.network, tmp_path / "out", alpha=1.0, fold=False)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 8 and set(config["rank_pattern"].values()) == {3}
    ids = prompts(qwen)
    with steer(qwen, direction, 1.0):
        steered = logits(qwen.network, ids)
    assert relative_error(in_plain_peft(qwen.name, tmp_path / "out", ids), steered) < 1e-5


def test_a_bias_has_no_place_in_a_lora(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    from ws.pocket import tiny  # noqa: PLC0415

    tiny.make("qwen3-biases", tmp_path / "base", layers=4)
    model = loading.load(str(tmp_path / "base"))
    made = make(model.network, "ia3", tmp_path / "1", seed=1, size=1e-2)
    with pytest.raises(UnsupportedFeatureError, match="bias"):
        write_peft(diff.task_vector(model, made.folder), model.network, tmp_path / "out", rank=8)


def test_alpha_zero_is_refused(qwen: ChatModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="alpha 0"):
        write_peft(random_direction(qwen), qwen.network, tmp_path / "out", alpha=0.0)


# -------------------------------------------------------------------- GGUF

gguf = pytest.importorskip("gguf")


def read_gguf(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    reader = gguf.GGUFReader(path)
    tensors = {t.name: torch.from_numpy(t.data.copy()).reshape(*reversed(t.shape.tolist())) for t in reader.tensors}
    return tensors, {name: field.contents() for name, field in reader.fields.items()}


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gemma3", "gpt2"])
def test_a_gguf_lora_read_back_is_the_direction(
    tiny_folders: dict[str, Path], tmp_path: Path, architecture: str
) -> None:
    model = loading.load(str(tiny_folders[architecture]))
    direction = random_direction(model, rank=3) + random_direction(model, rank=2, seed=9).keep(layers=[1])
    write_gguf(direction, model.network, tmp_path / "lora.gguf", alpha=0.5)
    tensors, fields = read_gguf(tmp_path / "lora.gguf")
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == architecture
    forms = low_rank_form(direction, model.network)
    assert len(tensors) == 2 * len(forms)
    names = gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture), 4)
    for form in forms:
        label = names.get_name(f"{form.module}.weight", try_suffixes=(".weight",))
        up, down = tensors[f"{label}.lora_b"], tensors[f"{label}.lora_a"]
        scale = fields["adapter.lora.alpha"] / up.shape[1]  # what llama.cpp multiplies with
        wanted = gguf_rows(0.5 * form.delta.materialise(), form.module, model.network.config)
        assert relative_error(scale * up @ down, wanted) < 1e-6, label


@pytest.mark.parametrize(("kind", "heads"), [("q_proj", 4), ("k_proj", 2)])
def test_llama_rows_move_to_where_its_rotary_embedding_pairs_neighbours(
    tiny_folders: dict[str, Path], kind: str, heads: int
) -> None:
    config = loading.load(str(tiny_folders["llama"])).network.config
    width = 16
    rows = torch.arange(float(heads * width))[:, None]
    moved = gguf_rows(rows, f"model.layers.0.self_attn.{kind}", config).flatten()
    for head in range(heads):
        for pair in range(width // 2):
            for half in range(2):
                assert moved[head * width + 2 * pair + half] == head * width + half * width // 2 + pair
    assert torch.equal(gguf_rows(rows, "model.layers.0.self_attn.v_proj", config), rows)


def test_an_architecture_without_a_known_row_order_is_refused(qwen: ChatModel, tmp_path: Path) -> None:
    from ws.pocket import tiny  # noqa: PLC0415

    tiny.make("gpt-neox", tmp_path / "base", layers=4)
    model = loading.load(str(tmp_path / "base"))
    with pytest.raises(UnsupportedFeatureError, match="gpt_neox"):
        write_gguf(random_direction(model), model.network, tmp_path / "x.gguf")


# -------------------------------------------------------------------- the command and the card


@pytest.mark.parametrize("kind", ["peft", "merged", "gguf-lora"])
def test_the_command_exports_a_direction_file_with_a_card(
    qwen: ChatModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    made = make(qwen.network, "lora", tmp_path / "1", seed=1, size=3e-2)
    diff.direction(qwen, made.folder, make(qwen.network, "lora", tmp_path / "2", seed=2, size=3e-2).folder)[0].save(
        tmp_path / "d.safetensors"
    )
    assert _main(["export", str(tmp_path / "d.safetensors"), "--format", kind, "--model", qwen.name, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["exact"] and record["alpha"] == 1.0
    name = f"d-{kind}-alpha1"
    text = (tmp_path / f"{name}.md" if kind == "gguf-lora" else tmp_path / name / "README.md").read_text()
    assert qwen.fingerprint in text and "arXiv 2511.05408" in text and name in text
    if kind == "peft":
        assert record["logit_error"]["max"] < 1e-4 and record["logit_error"]["positions"] > 10
        assert "largest logit" in text


@pytest.mark.parametrize(
    ("arguments", "mentioned"),
    [
        (["missing.safetensors"], "missing.safetensors"),
        (["."], "direction.safetensors"),
        (["d.safetensors", "--model", "./nowhere"], "nowhere"),
        (["d.safetensors", "--model", "./nowhere", "--format", "gguf", "--out", "."], ". is a folder, but"),
    ],
)
def test_bad_input_of_the_command_is_one_line(
    qwen: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: list[str], mentioned: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    random_direction(qwen).save("d.safetensors")
    assert _main(["export", *arguments]) == 2
    error = capsys.readouterr().err
    assert mentioned in error and len(error.strip().splitlines()) == 1


def test_a_gguf_export_replaces_an_older_export_and_nothing_else(
    qwen: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    made = make(qwen.network, "lora", tmp_path / "1", seed=1, size=3e-2)
    other = make(qwen.network, "lora", tmp_path / "2", seed=2, size=3e-2)
    diff.direction(qwen, made.folder, other.folder)[0].save("d.safetensors")
    export = ["export", "d.safetensors", "--format", "gguf-lora", "--model", qwen.name, "--out"]
    assert _main([*export, "x.gguf"]) == 0
    assert _main([*export, "x.gguf"]) == 0
    capsys.readouterr()

    Path("x.md").write_text("# My own notes\n")
    Path("notes.gguf").write_text("not a model")
    for place, mentioned in (("x.gguf", "x.md exists"), ("notes.gguf", "no GGUF file")):
        assert _main([*export, place]) == 2
        error = capsys.readouterr().err
        assert mentioned in error and "--out" in error and len(error.strip().splitlines()) == 1
    assert Path("x.md").read_text() == "# My own notes\n"
    assert Path("notes.gguf").read_text() == "not a model"


def test_the_card_tells_what_was_cut(qwen: ChatModel) -> None:
    direction = Direction({}, "abc", {}, {"behaviour": {"name": "x", "positive_means": "does x"}})
    record = {"format": "peft", "alpha": 2.0, "exact": False, "rank": 8, "energy_kept": 0.87}
    text = card(direction, record, base="org/base", place="out")
    assert "cut to rank 8 and keeps 87.00 %" in text and "does x" in text and "alpha +2" in text
    with pytest.raises(UserError) as caught:
        Direction.load("nothing")
    assert_one_line(caught.value, "nothing")


def test_every_family_has_an_export(qwen: ChatModel) -> None:
    assert set(THIN) | {"dora", "oft", "boft", "ia3"} == set(FAMILIES)
