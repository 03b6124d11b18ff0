"""What the library refuses while it loads or first runs a model is one line: the folder, the cause, and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from making import assert_one_line, copy_changed, edit_json, logits, prompts
from ws.adapters.checkpoints import Checkpoint
from ws.base.errors import UserError
from ws.commands import cli
from ws.model import loading
from ws.model.loading import ChatModel
from ws.pocket import bpe, tiny

WEIGHTS = "model.safetensors"
CONFIGURATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "padding outside of the embedding": ({"pad_token_id": tiny.VOCABULARY}, "Padding_idx"),
    "a whole number for a float": ({"initializer_range": 1, "rms_norm_eps": 1}, "expected float, got int"),
    "text for a number": ({"hidden_size": "64"}, "'hidden_size' expected int, got str"),
    "no heads": ({"num_attention_heads": None}, "'num_attention_heads' expected int"),
    "a negative width": ({"intermediate_size": -1}, "negative"),
    "an unknown activation": ({"hidden_act": "swiglu_oai"}, "KeyError 'swiglu_oai'"),
    "an unknown kind of positions": ({"rope_scaling": {"rope_type": "su", "factor": 2.0}}, "'su'"),
    "positions that are no mapping": ({"rope_scaling": "linear"}, "linear"),
    "layer types of another length": ({"layer_types": ["full_attention"]}, "must be equal to the number of"),
    "an unknown layer type": ({"layer_types": ["x"] * 4}, "layer_type"),
}


def changed(model: ChatModel, folder: Path, changes: dict[str, Any]) -> Path:
    change: Callable[[Path], object] = lambda f: edit_json(f / "config.json", lambda c: c.update(changes))  # noqa: E731
    return copy_changed(Path(model.name), folder, change)


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_a_configuration_that_is_refused_is_one_line(
    qwen: ChatModel, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, cause = CONFIGURATIONS[kind]
    folder = changed(qwen, tmp_path / "broken", changes)
    with pytest.raises(UserError) as caught:
        loading.load(str(folder))
    assert_one_line(caught.value, str(folder), "configuration", cause, "Correct config.json")
    with pytest.raises(UserError) as caught:
        Checkpoint(folder).parameters()
    assert_one_line(caught.value, str(folder), cause, "Correct config.json")
    with pytest.raises(SystemExit) as stop:
        cli.main(["diff", "--model", str(folder), "--pos", "x", "--neg", "y", "--out", str(tmp_path / "d")])
    assert stop.value.code == 2 and "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["[]", '"text"', '{"version": "1.0"}', '{"model": 7, "added_tokens": 3}'])
def test_a_tokenizer_that_is_refused_is_one_line(qwen: ChatModel, tmp_path: Path, damage: str) -> None:
    folder = copy_changed(Path(qwen.name), tmp_path / "broken", lambda f: (f / "tokenizer.json").write_text(damage))
    with pytest.raises(UserError) as caught:
        loading.load(str(folder))
    assert_one_line(caught.value, str(folder), "tokenizer", "save_pretrained")


def test_an_attention_that_is_not_there_is_not_blamed_on_the_weights(qwen: ChatModel) -> None:
    with pytest.raises(UserError) as caught:
        loading.load(qwen.name, attention="nonsense")
    assert_one_line(caught.value, qwen.name, "nonsense", "--attention auto")
    assert "save_pretrained" not in str(caught.value)


def test_a_network_that_fails_when_it_runs_is_one_line(qwen: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("no kernel\nfor this")

    monkeypatch.setattr(transformers.Qwen3ForCausalLM, "forward", fail)
    with pytest.raises(UserError) as caught:
        loading.load(qwen.name)
    assert_one_line(caught.value, qwen.name, "first forward pass", "no kernel", "--attention eager")


# ---------------------------------------------------------------- networks that nothing here is exact with


def saved(network: Any, folder: Path) -> str:
    network.save_pretrained(folder)
    bpe.train(tiny.training_texts(), tiny.VOCABULARY, folder / "tokenizer.json")
    bpe.load(folder / "tokenizer.json").save_pretrained(folder)
    return str(folder)


_SMALL: dict[str, Any] = {"vocab_size": tiny.VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
NETWORKS: dict[str, tuple[Callable[[], Any], str]] = {
    "Mamba": (
        lambda: transformers.MambaForCausalLM(transformers.MambaConfig(**_SMALL, state_size=8)),
        "has no key-value cache",
    ),
    "Mamba 2": (
        lambda: transformers.Mamba2ForCausalLM(
            transformers.Mamba2Config(**_SMALL, state_size=8, num_heads=8, head_dim=8, n_groups=1)
        ),
        "has no key-value cache",
    ),
    "BERT": (
        lambda: transformers.BertLMHeadModel(
            transformers.BertConfig(**_SMALL, num_attention_heads=2, intermediate_size=32, is_decoder=False)
        ),
        "decoder-only causal",
    ),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_network_of_another_kind_is_refused_when_it_is_loaded(tmp_path: Path, kind: str) -> None:
    make, said = NETWORKS[kind]
    folder = saved(make(), tmp_path / "model")
    with pytest.raises(UserError) as caught:
        loading.load(folder)
    assert_one_line(caught.value, folder, said)


def test_later_tokens_that_change_earlier_ones_are_found(qwen: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = transformers.Qwen3ForCausalLM.forward

    def looking_ahead(self: Any, **inputs: Any) -> Any:
        found = plain(self, **inputs)
        found.logits = found.logits + found.logits.flip(1)
        return found

    monkeypatch.setattr(transformers.Qwen3ForCausalLM, "forward", looking_ahead)
    with pytest.raises(UserError, match="is not causal"):
        loading.load(qwen.name)


def test_numbers_that_are_not_finite_are_found(qwen: ChatModel, tmp_path: Path) -> None:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        tensors["model.norm.weight"][3] = float("nan")
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    folder = copy_changed(Path(qwen.name), tmp_path / "spoilt", spoil)
    with pytest.raises(UserError) as caught:
        loading.load(str(folder))
    assert_one_line(caught.value, str(folder), "infinite logits in torch.float32", "weights")


# ---------------------------------------------------------------- tokens


def test_a_model_smaller_than_its_tokenizer_is_one_line(qwen: ChatModel, tmp_path: Path) -> None:
    def add(folder: Path) -> None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
        tokenizer.chat_template = bpe.CHAT_TEMPLATE.replace("<|im_start|>", "<|turn|>")
        tokenizer.save_pretrained(folder)

    folder = copy_changed(Path(qwen.name), tmp_path / "model", add)
    with pytest.raises(UserError) as caught:
        loading.load(str(folder))
    assert_one_line(caught.value, str(folder), "<|turn|>", f"{tiny.VOCABULARY} rows", "resize_token_embeddings")


@pytest.mark.parametrize("ends", [[7, 2], 7, [7, tiny.VOCABULARY + 1], None])
def test_all_ends_in_generation_config_end_a_response(qwen: ChatModel, tmp_path: Path, ends: Any) -> None:
    folder = copy_changed(
        Path(qwen.name), tmp_path / "model",
        lambda f: edit_json(f / "generation_config.json", lambda c: c.update(eos_token_id=ends)),
    )  # fmt: skip
    found = loading.load(str(folder)).chat.stop_ids
    assert found == qwen.chat.stop_ids | ({7} if ends else set())


def test_a_missing_padding_token_and_end_in_the_configuration_do_no_harm(qwen: ChatModel, tmp_path: Path) -> None:
    folder = changed(qwen, tmp_path / "model", {"pad_token_id": None, "eos_token_id": None, "bos_token_id": None})
    (folder / "generation_config.json").unlink()
    edit_json(folder / "tokenizer_config.json", lambda c: c.pop("pad_token", None))
    model, ids = loading.load(str(folder)), prompts(qwen)
    assert model.chat.stop_ids == qwen.chat.stop_ids and model.chat.rendering_key == qwen.chat.rendering_key
    assert torch.equal(logits(model.network, ids), logits(qwen.network, ids))


def test_what_identifies_a_model_names_what_it_renders(qwen: ChatModel, tmp_path: Path) -> None:
    assert json.loads(json.dumps(qwen.describe()))["rendering"] == qwen.chat.rendering_key
    other = copy_changed(
        Path(qwen.name), tmp_path / "model",
        lambda f: (f / "chat_template.jinja").write_text("{# a remark #}" + bpe.CHAT_TEMPLATE),
    )  # fmt: skip
    assert loading.load(str(other)).describe()["rendering"] == qwen.chat.rendering_key
