"""Loading by folder and by hub id, what cannot be loaded, and the fingerprint that says which model it is."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from making import (
    assert_one_line,
    copy_changed,
    edit_json,
    logits,
    prompts,
    random_direction,
)
from ws.base import precision
from ws.base.errors import UserError
from ws.edit.steering import steer
from ws.model import library, loading
from ws.model.fingerprint import fingerprint, forget_fingerprint
from ws.model.loading import ChatModel
from ws.model.sources import model_slug
from ws.pocket import tiny

WEIGHTS = "model.safetensors"


# -------------------------------------------------------------------- loading


def test_a_folder_loads_ready_for_inference(any_model: ChatModel) -> None:
    folder = Path(any_model.name)
    assert any_model.slug == folder.name and any_model.revision is None
    assert any_model.settings == json.loads((folder / "weight_steering.json").read_text())
    assert not any_model.network.training
    assert not any(parameter.requires_grad for parameter in any_model.network.parameters())
    assert any_model.device.type == "cpu" and any_model.network.config._attn_implementation == "grouped"
    assert any_model.parameter_count == sum(p.numel() for p in any_model.network.parameters())


def test_loading_gives_the_saved_numbers(any_model: ChatModel) -> None:
    parameters = dict(any_model.network.named_parameters())
    saved = {
        name: tensor
        for prefix in ("", "transformer.")  # GPT-2's files leave the prefix out
        for name, tensor in ((prefix + k, t) for k, t in load_file(Path(any_model.name) / WEIGHTS).items())
        if name in parameters
    }
    assert saved.keys() == parameters.keys()
    for name, tensor in saved.items():
        assert torch.equal(parameters[name], tensor)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)],
)
def test_the_dtype_is_the_one_asked_for(qwen: ChatModel, dtype: Any, expected: torch.dtype) -> None:
    model = loading.load(qwen.name, dtype=dtype)
    assert model.dtype == expected
    assert {p.dtype for p in model.network.parameters()} == {expected}


@pytest.fixture(scope="module")
def half_folder(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Qwen3 model with its weights saved in bf16."""
    folder = tmp_path_factory.mktemp("half") / "half"
    shutil.copytree(tiny_folders["qwen3"], folder)
    loading.load(str(tiny_folders["qwen3"])).network.bfloat16().save_pretrained(folder)
    assert {tensor.dtype for tensor in load_file(folder / WEIGHTS).values()} == {torch.bfloat16}
    return folder


def test_auto_is_fp32_for_small_models_and_the_checkpoints_own_dtype_above(
    half_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "bfloat16_is_fast", lambda _: True)
    assert loading.load(str(half_folder)).dtype == torch.float32
    monkeypatch.setattr(loading, "SMALL_MODEL", 1000)
    assert loading.load(str(half_folder)).dtype == torch.bfloat16


def test_auto_is_fp32_where_bfloat16_is_emulated(
    half_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loading, "SMALL_MODEL", 1000)
    monkeypatch.setattr(precision, "bfloat16_is_fast", lambda _: False)
    assert loading.load(str(half_folder)).dtype == torch.float32
    assert "emulates bfloat16" not in capsys.readouterr().err
    assert loading.load(str(half_folder), dtype="bfloat16").dtype == torch.bfloat16
    assert "emulates bfloat16" in capsys.readouterr().err


def test_precision_is_judged_by_time_and_accelerators_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    for slower, fast in ((1.5, True), (40.0, False)):
        precision.bfloat16_is_fast.cache_clear()
        monkeypatch.setattr(precision, "_seconds", lambda dtype, s=slower: s if dtype == torch.bfloat16 else 1.0)
        assert precision.bfloat16_is_fast("cpu") is fast
        assert precision.bfloat16_is_fast("cuda")
    precision.bfloat16_is_fast.cache_clear()


def test_a_folder_without_settings_has_none(qwen: ChatModel, tmp_path: Path) -> None:
    folder = copy_changed(Path(qwen.name), tmp_path / "m", lambda f: (f / "weight_steering.json").unlink())
    assert loading.load(str(folder)).settings == {}


def test_describe_says_what_the_model_is(any_model: ChatModel) -> None:
    described = any_model.describe()
    assert json.loads(json.dumps(described)) == described
    assert described.items() >= {
        "name": any_model.name, "architecture": type(any_model.network).__name__, "layers": 4, "dtype": "float32",
        "device": "cpu", "attention": "grouped", "fingerprint": any_model.fingerprint,
    }.items()  # fmt: skip


def test_the_attention_asked_for_is_used(qwen: ChatModel) -> None:
    model = loading.load(qwen.name, attention="sdpa")
    assert model.network.config._attn_implementation == "sdpa"
    ids = prompts(qwen)
    assert torch.allclose(logits(model.network, ids), logits(qwen.network, ids), atol=1e-5)


# -------------------------------------------------------------------- the hub


@pytest.mark.parametrize(
    ("options", "forwarded"),
    [
        ({}, {"revision": None, "trust_remote_code": False}),
        ({"revision": "v2", "trust_remote_code": True}, {"revision": "v2", "trust_remote_code": True}),
    ],
    ids=["defaults", "given"],
)
def test_hub_ids_pass_through_from_pretrained(
    qwen: ChatModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: dict[str, Any], forwarded: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    calls: dict[str, tuple[str, dict[str, Any]]] = {}
    for kind in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        real = getattr(transformers, kind).from_pretrained

        def fake(place: str, kind: str = kind, real: Callable[..., Any] = real, **given: Any) -> Any:
            calls.setdefault(kind, (place, given))  # the model loads its configuration once more by itself
            return real(qwen.name, **{**given, "revision": None, "trust_remote_code": False})

        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", fake)
    model = loading.load("Some-Org/Some.Model-0.6B", **options)
    assert {place for place, _ in calls.values()} == {"Some-Org/Some.Model-0.6B"} and len(calls) == 3
    assert all(given.items() >= forwarded.items() for _, given in calls.values())
    assert calls["AutoModelForCausalLM"][1]["use_safetensors"] is True
    assert (model.name, model.slug) == ("Some-Org/Some.Model-0.6B", "Some-Org_Some.Model-0.6B")
    assert model.revision == options.get("revision") and model.fingerprint == qwen.fingerprint
    assert model.settings == {}


@pytest.mark.parametrize(
    ("name", "slug"),
    [("Qwen/Qwen3-0.6B", "Qwen_Qwen3-0.6B"), ("pocket", "pocket"), ("gpt2", "gpt2"), ("a/b/c", "a_b_c")],
)
def test_slugs_of_names(name: str, slug: str) -> None:
    assert model_slug(name) == slug


def test_slugs_of_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep")
    for name in (str(tmp_path / "deep" / "model"), "./model", "model/", "../deep/model", "model"):
        assert model_slug(name) == "model"
    (tmp_path / "deep" / "pocket").mkdir()
    assert model_slug("pocket") == "pocket"


# -------------------------------------------------------------------- what cannot be loaded


def retensored(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Change the tensors of a model folder in place."""

    def damage(folder: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


UP = "model.layers.1.mlp.up_proj.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config.json": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "safetensors"),
    "weights as a pickle only": (lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"), "safetensors"),
    "config.json is no JSON": (lambda folder: (folder / "config.json").write_text("{nope"), "JSON"),
    "unknown architecture": (lambda f: edit_json(f / "config.json", lambda c: c.update(model_type="xyz")), "xyz"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "cannot be loaded"),
    "tokenizer is no JSON": (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot be loaded"),
}
SILENT: dict[str, Callable[[Path], object]] = {
    "weights are cut": lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100]),
    "weights are empty": lambda folder: (folder / WEIGHTS).write_bytes(b""),
    "a tensor of another shape": retensored(lambda tensors: tensors.update({UP: torch.zeros(3, 3)})),
    "a tensor is missing": retensored(lambda tensors: tensors.pop(UP)),
}


def assert_refused(folder: Path, *mentioned: str) -> None:
    with pytest.raises(UserError) as caught:
        loading.load(str(folder))
    assert_one_line(caught.value, str(folder), *mentioned)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_one_line_with_place_and_remedy(qwen: ChatModel, tmp_path: Path, damage: str) -> None:
    change, mentioned = DAMAGES[damage]
    assert_refused(copy_changed(Path(qwen.name), tmp_path / "damaged", change), mentioned, "save_pretrained")


@pytest.mark.parametrize("damage", SILENT)
def test_damaged_weights_are_one_line_with_place_and_remedy(qwen: ChatModel, tmp_path: Path, damage: str) -> None:
    assert_refused(copy_changed(Path(qwen.name), tmp_path / "damaged", SILENT[damage]))


@pytest.mark.parametrize("name", ["pockett", "no-such-org/no-such-model", "two words", "./nowhere", "/nowhere/at/all"])
def test_unknown_names_are_one_line_with_a_remedy(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        loading.load(name)
    assert_one_line(caught.value, name)
    assert any(remedy in str(caught.value) for remedy in ("Check the spelling", "Check the path"))


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert_refused(tmp_path / "model.safetensors", "--model")


def test_the_embedded_model_without_weights_says_how_to_build_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(library.POCKET_MODELS, "pocket", tmp_path)
    with pytest.raises(UserError) as caught:
        loading.load("pocket")
    assert_one_line(caught.value, "pocket", str(tmp_path), "ws pocket build")


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_devices_that_are_not_there_are_one_line(qwen: ChatModel, device: str) -> None:
    with pytest.raises(UserError) as caught:
        loading.load(qwen.name, device=device)
    assert_one_line(caught.value, device, "--device")


# -------------------------------------------------------------------- the fingerprint


def fresh_fingerprint(network: nn.Module) -> str:
    forget_fingerprint(network)
    return fingerprint(network)


def test_one_checkpoint_has_one_fingerprint_in_fp32_and_bf16(half_folder: Path) -> None:
    loaded = [loading.load(str(half_folder), dtype=dtype) for dtype in ("float32", "bfloat16", "auto")]
    assert [model.dtype for model in loaded] == [torch.float32, torch.bfloat16, torch.float32]
    assert len({model.fingerprint for model in loaded}) == 1


def test_loading_twice_gives_the_same_fingerprint(any_model: ChatModel) -> None:
    assert loading.load(any_model.name).fingerprint == any_model.fingerprint


def test_architectures_and_seeds_have_fingerprints_of_their_own(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    tiny.make("qwen3", tmp_path / "other", seed=1, layers=4)
    folders = [*tiny_folders.values(), tmp_path / "other"]
    assert len({loading.load(str(folder)).fingerprint for folder in folders}) == len(folders)


@pytest.mark.parametrize("relative", [2**-7, -1.0])
def test_one_changed_element_changes_the_fingerprint(any_model: ChatModel, relative: float) -> None:
    network = loading.load(any_model.name).network
    before = fingerprint(network)
    for name, parameter in list(network.named_parameters())[::5]:
        element = parameter.data.view(-1)[-1:]
        old = element.clone()
        element.add_(relative * old if old != 0 else 1e-3)
        assert fresh_fingerprint(network) != before, name
        element.copy_(old)
    assert fresh_fingerprint(network) == before


def test_a_change_below_bf16_does_not_change_the_fingerprint(half_folder: Path) -> None:
    network = loading.load(str(half_folder)).network
    before = fingerprint(network)
    network.get_submodule("model.layers.2.mlp.up_proj").weight.data *= 1 + 2**-10
    assert fresh_fingerprint(network) == before


def test_names_shapes_and_order_of_the_numbers_matter() -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    twins = [linear(weight) for _ in range(2)]
    named = nn.ModuleDict({"a": twins[0]}), nn.ModuleDict({"b": twins[1]})
    assert fingerprint(named[0]) != fingerprint(named[1])
    assert fingerprint(twins[0]) == fingerprint(twins[1])
    others = [linear(weight.reshape(3, 2)), linear(weight.flip(0)), linear(-weight)]
    assert len({fingerprint(module) for module in (twins[0], *others)}) == 4


def test_swapping_two_parameters_changes_the_fingerprint() -> None:
    a, b = torch.ones(2, 2), torch.zeros(2, 2)
    first, second = (nn.ModuleDict({"x": linear(x), "y": linear(y)}) for x, y in ((a, b), (b, a)))
    assert fingerprint(first) != fingerprint(second)


def linear(weight: torch.Tensor) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight.data = weight.clone()
    return module


@pytest.mark.parametrize("mode", ["runtime", "baked"])
def test_steering_does_not_change_who_the_model_is(any_model: ChatModel, mode: Any) -> None:
    before = any_model.fingerprint
    with steer(any_model, random_direction(any_model), 1.0, mode=mode):
        assert any_model.fingerprint == fingerprint(any_model.network) == before


def test_forgetting_recomputes_the_fingerprint(qwen: ChatModel) -> None:
    network = loading.load(qwen.name).network
    before = fingerprint(network)
    network.get_submodule("model.layers.2.mlp.up_proj").weight.data.mul_(2)
    assert fingerprint(network) == before
    assert fresh_fingerprint(network) != before


def test_tying_is_kept(tiny_folders: dict[str, Path]) -> None:
    for kind, tied in (("qwen3", True), ("llama", False), ("gpt2", True)):
        network = loading.load(str(tiny_folders[kind])).network
        shared = network.get_input_embeddings().weight is network.get_output_embeddings().weight
        assert shared == tied


def test_a_negative_cache_is_refused(qwen: ChatModel) -> None:
    with pytest.raises(UserError, match=r"--cache-memory is -1 GiB; it cannot be negative.*Give 0 or more"):
        loading.load(qwen.name, cache_memory=-(2**30))


def test_an_embedded_model_without_weights_says_how_to_build_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(library.POCKET_MODELS, "pocket-gemma", tmp_path / "gemma3")
    with pytest.raises(UserError, match="ws pocket build --architecture gemma3"):
        loading.load("pocket-gemma")


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("weight_steering.json", "[1]", "does not hold settings by name"),
        ("weight_steering.json", '{"train": [1]}', "does not hold settings by name"),
        ("weight_steering.json", '{"judge_for": [1]}', "does not hold settings by name"),
        ("weight_steering.json", '{"judge_for": {"refusal": "none"}}', "does not hold settings by name"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id in generation_config.json is 'x'"),
        ("generation_config.json", '{"eos_token_id": ["x"]}', "eos_token_id in generation_config.json"),
    ],
)
def test_a_file_beside_the_weights_with_the_wrong_content_is_one_line(
    tiny_folders: dict[str, Path], tmp_path: Path, file: str, content: str, told: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folders["qwen3"], folder)
    (folder / file).write_text(content)
    with pytest.raises(UserError, match=re.escape(told)):
        loading.load(str(folder))


def test_weights_that_are_not_plain_floats_are_refused(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folders["qwen3"], folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="unquantized"):
        loading.load(str(folder))
