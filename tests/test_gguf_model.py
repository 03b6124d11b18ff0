"""Whole models as GGUF: the stored values, and what is refused. For llama.cpp itself see tests/test_llama_cpp.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from making import assert_one_line, copy_changed, edit_json, random_direction
from ws.base.errors import BaseMismatchError, UnsupportedFeatureError, UserError
from ws.commands.cli import _main
from ws.edit.steering import steer
from ws.export.gguf_layout import gguf_rows
from ws.export.gguf_model import write_gguf_model
from ws.export.gguf_tokenizer import splitting_rule
from ws.model import loading, sources
from ws.model.loading import ChatModel
from ws.pocket import tiny

gguf = pytest.importorskip("gguf")


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    reader = gguf.GGUFReader(path)
    tensors = {t.name: torch.from_numpy(t.data.copy()).reshape(*reversed(t.shape.tolist())) for t in reader.tensors}
    return tensors, {name: field.contents() for name, field in reader.fields.items()}


NAMES = {
    "llama": {
        "model.embed_tokens.weight": "token_embd.weight",
        "lm_head.weight": "output.weight",
        "model.layers.1.self_attn.q_proj.weight": "blk.1.attn_q.weight",
        "model.layers.1.self_attn.o_proj.weight": "blk.1.attn_output.weight",
        "model.layers.2.mlp.down_proj.weight": "blk.2.ffn_down.weight",
        "model.norm.weight": "output_norm.weight",
    },
    "qwen3": {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.1.self_attn.k_proj.weight": "blk.1.attn_k.weight",
        "model.layers.1.self_attn.q_norm.weight": "blk.1.attn_q_norm.weight",
    },
    "gemma3": {
        "model.layers.1.self_attn.k_proj.weight": "blk.1.attn_k.weight",
        "model.layers.1.post_attention_layernorm.weight": "blk.1.post_attention_norm.weight",
        "model.layers.1.pre_feedforward_layernorm.weight": "blk.1.ffn_norm.weight",
    },
    "gpt2": {
        "transformer.wpe.weight": "position_embd.weight",
        "transformer.h.1.attn.c_attn.weight": "blk.1.attn_qkv.weight",
        "transformer.h.1.attn.c_attn.bias": "blk.1.attn_qkv.bias",
        "transformer.h.1.mlp.c_proj.weight": "blk.1.ffn_down.weight",
        "transformer.h.1.ln_1.weight": "blk.1.attn_norm.weight",
    },
}


@pytest.mark.parametrize("number_format", ["f16", "f32"])
@pytest.mark.parametrize("architecture", list(NAMES))
def test_the_stored_values_are_the_merged_weights_in_the_order_of_llama_cpp(
    tiny_folders: dict[str, Path], tmp_path: Path, architecture: str, number_format: Any
) -> None:
    model = loading.load(str(tiny_folders[architecture]))
    direction = random_direction(model, relative_norm=0.1)
    write_gguf_model({direction: -2.0}, tiny_folders[architecture], tmp_path / "m.gguf", number_format=number_format)
    tensors, fields = read(tmp_path / "m.gguf")
    assert fields["general.architecture"] == architecture and len(tensors) == len(
        dict(model.network.named_parameters())
    )
    with steer(model, direction, -2.0):
        for parameter, label in NAMES[architecture].items():
            value = model.network.get_parameter(parameter).detach().clone()
            if "c_" in parameter and value.ndim == 2:
                value = value.T
            if architecture == "gemma3" and "norm" in parameter:
                value = value + 1
            wanted = gguf_rows(value, parameter.removesuffix(".weight"), model.network.config)
            halved = number_format == "f16" and value.ndim == 2 and "wpe" not in parameter
            assert tensors[label].dtype == (torch.float16 if halved else torch.float32)
            assert torch.equal(tensors[label], wanted.to(tensors[label].dtype)), label


def test_the_file_says_how_the_model_works_and_how_it_speaks(tmp_path: Path) -> None:
    model = loading.load("pocket-gemma")
    write_gguf_model({}, Path(sources.find("pocket-gemma").place), tmp_path / "m.gguf")
    _, fields = read(tmp_path / "m.gguf")
    wanted = {
        "block_count": 6, "embedding_length": 128, "feed_forward_length": 384, "attention.head_count": 4,
        "attention.head_count_kv": 2, "attention.key_length": 32, "attention.sliding_window": 4096,
        "rope.freq_base": 1e6, "rope.freq_base_swa": 1e4, "context_length": 1024, "vocab_size": 2048,
    }  # fmt: skip
    assert {name: fields[f"gemma3.{name}"] for name in wanted} == wanted
    assert fields["tokenizer.ggml.pre"] == "gpt-2" and fields["tokenizer.ggml.eos_token_id"] == 2
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.ggml.tokens"][:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert fields["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1], "control tokens, then words"
    assert fields["tokenizer.chat_template"] == model.chat.tokenizer.chat_template


@pytest.mark.parametrize(
    ("architecture", "changes", "said"),
    [
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rotary"),
        ("llama", {"hidden_act": "gelu"}, "activation gelu"),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 8,
                   "layer_types": ["sliding_attention"] * 4}, "windows"),
        ("gemma3", {"layer_types": ["full_attention"] * 4}, "windows"),
        ("gemma3", {"query_pre_attn_scalar": 99}, "scale of attention"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "capped"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale of attention"),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_compute_differently_is_refused(
    tiny_folders: dict[str, Path], tmp_path: Path, architecture: str, changes: dict[str, Any], said: str
) -> None:
    def change(folder: Path) -> None:
        edit_json(folder / "config.json", lambda config: config.update(changes))

    folder = copy_changed(tiny_folders[architecture], tmp_path / "changed", change)
    with pytest.raises(UnsupportedFeatureError) as caught:
        write_gguf_model({}, folder, tmp_path / "m.gguf")
    assert_one_line(caught.value, said, "merged")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("architecture", ["phi3", "qwen3-moe", "qwen3-biases"])
def test_other_architectures_are_refused(tmp_path: Path, architecture: str) -> None:
    tiny.make(architecture, tmp_path / "base")
    with pytest.raises(UnsupportedFeatureError, match=r"phi3|qwen3_moe|biases"):
        write_gguf_model({}, tmp_path / "base", tmp_path / "m.gguf")


def specification(tokenizer: ChatModel) -> dict[str, Any]:
    return dict(json.loads(tokenizer.chat.tokenizer.backend_tokenizer.to_str()))


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found.update(pre_tokenizer={"type": "Whitespace"}),
        lambda found: found["pre_tokenizer"].update(add_prefix_space=True),
        lambda found: found["model"].update(byte_fallback=True),
        lambda found: found["model"].update(ignore_merges=True),
        lambda found: found["model"].update(type="Unigram"),
        lambda found: found.update(normalizer={"type": "Lowercase"}),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_read_differently_is_refused(
    qwen: ChatModel, change: Callable[[dict[str, Any]], None]
) -> None:
    found = specification(qwen)
    assert splitting_rule(found, "x") == "gpt-2"
    change(found)
    with pytest.raises(UnsupportedFeatureError, match="tokenizer of x"):
        splitting_rule(found, "x")


def test_rows_without_a_token_are_unused_and_tokens_without_a_row_are_refused(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    model = loading.load(str(tiny_folders["qwen3"]))
    model.network.resize_token_embeddings(1030)
    model.network.save_pretrained(tmp_path / "wide")
    model.chat.tokenizer.save_pretrained(tmp_path / "wide")
    write_gguf_model({}, tmp_path / "wide", tmp_path / "wide.gguf")
    _, fields = read(tmp_path / "wide.gguf")
    assert fields["tokenizer.ggml.tokens"][1029] == "[UNUSED1029]" and fields["tokenizer.ggml.token_type"][1029] == 5
    model.network.resize_token_embeddings(1000)
    model.network.save_pretrained(tmp_path / "narrow")
    model.chat.tokenizer.save_pretrained(tmp_path / "narrow")
    with pytest.raises(UserError) as caught:
        write_gguf_model({}, tmp_path / "narrow", tmp_path / "narrow.gguf")
    assert_one_line(caught.value, "1023", "1000")


def test_numbers_beyond_f16_and_another_base_are_refused(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    model = loading.load(str(tiny_folders["qwen3"]))
    direction = random_direction(model)
    with pytest.raises(UserError, match="f32"):
        write_gguf_model({direction: 1e7}, tiny_folders["qwen3"], tmp_path / "m.gguf")
    with pytest.raises(BaseMismatchError):
        write_gguf_model({direction: 1.0}, tiny_folders["llama"], tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_the_command_writes_a_direction_merged_into_its_base_with_a_card(
    qwen: ChatModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random_direction(qwen, relative_norm=0.1).save(tmp_path / "d.safetensors")
    arguments = ["export", str(tmp_path / "d.safetensors"), "--format", "gguf", "--alpha", "0.5", "--model", qwen.name]
    assert _main([*arguments, "--gguf-type", "f32", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["alpha"] == 0.5 and record["exact"] and record["number_format"] == "f32"
    assert "llama-cli -m d-gguf-alpha0.5.gguf" in (tmp_path / "d-gguf-alpha0.5.md").read_text()
    tensors, _ = read(tmp_path / "d-gguf-alpha0.5.gguf")
    assert tensors["blk.1.attn_q.weight"].dtype == torch.float32


def test_the_command_writes_a_plain_base(
    qwen: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _main(["export", "pocket", "--format", "gguf"]) == 0
    assert "alpha +0" in capsys.readouterr().out
    folder = copy_changed(Path(qwen.name), tmp_path / "base", lambda _: None)
    assert _main(["export", str(folder), "--format", "gguf", "--out", str(tmp_path / "b.gguf")]) == 0
    pocket, plain = read(tmp_path / "pocket-f16.gguf")[0], read(tmp_path / "b.gguf")[0]
    assert pocket["token_embd.weight"].shape == (2048, 128)
    assert torch.equal(plain["token_embd.weight"], qwen.network.get_input_embeddings().weight.half())
    assert _main(["export", "pocket", "--format", "peft"]) == 2
