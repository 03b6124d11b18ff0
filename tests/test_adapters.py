"""Adapter folders to exact deltas: against the formula in fp64 and against PEFT's own merge; what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from making import (
    assert_one_line,
    copy_changed,
    edit_json,
    in_fp64,
    merged_by_peft,
    randomise,
    relative_error,
    save_lora,
    weights_digest,
)
from ws import adapters
from ws.adapters import AdapterSettings, diff
from ws.algebra import spectrum
from ws.algebra.direction import as_matrix
from ws.base.errors import UnsupportedFeatureError, UserError
from ws.model import architecture, loading
from ws.model.loading import ChatModel
from ws.pocket import tiny

RANK, LORA_ALPHA = 4, 6.0
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Saved(NamedTuple):
    """An adapter made by `attach`, as saved, with the factors as they were in memory."""

    base: Path
    folder: Path
    factors: dict[str, Tensor]


@pytest.fixture(scope="module")
def saved(any_model: ChatModel, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A rank-4 LoRA on the default slice of each architecture."""
    base = Path(any_model.name)
    attached = adapters.attach(
        loading.load(str(base)).network, AdapterSettings(rank=RANK, lora_alpha=LORA_ALPHA), "the-base"
    )
    randomise(attached.wrapped, seed=1)
    folder = tmp_path_factory.mktemp("adapter")
    attached.save(folder)
    factors = {name: p.detach().double() for name, p in attached.wrapped.named_parameters() if "lora_" in name}
    return Saved(base, folder, factors)


@pytest.fixture(scope="module")
def plain_lora(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A healthy LoRA folder for the Qwen3 model, to be damaged in copies."""
    return save_lora(tiny_folders["qwen3"], tmp_path_factory.mktemp("lora"))


def weight_norm(model: ChatModel, name: str) -> float:
    return float(dict(model.network.named_parameters())[name].detach().double().norm())


# -------------------------------------------------------------------- the exact form


def test_deltas_are_the_scaled_product_of_the_factors(any_model: ChatModel, saved: Saved) -> None:
    deltas = adapters.deltas(adapters.read(saved.folder), any_model.network)
    sites = {site.parameter: site for site in architecture.sites(any_model.network)}
    for name, delta in deltas.items():
        stem = f"base_model.model.{sites[name].module}"
        b, a = saved.factors[f"{stem}.lora_B.default.weight"], saved.factors[f"{stem}.lora_A.default.weight"]
        product = LORA_ALPHA / RANK * b @ a
        assert delta.rank == RANK
        assert relative_error(in_fp64(delta), product.T if sites[name].transposed else product) < 1e-6
        assert delta.shape == sites[name].shape


def test_deltas_are_what_peft_merges(any_model: ChatModel, saved: Saved) -> None:
    deltas = adapters.deltas(adapters.read(saved.folder), any_model.network)
    merged = merged_by_peft(saved.base, saved.folder)
    assert {name for name, change in merged.items() if change.norm() > 0} == deltas.keys()
    for name, delta in deltas.items():
        scale = weight_norm(any_model, name)
        assert float(merged[name].norm()) > 1e-2 * scale  # a change that could be missed
        assert float((in_fp64(delta) - merged[name]).norm()) <= 1e-6 * scale


def test_exactly_the_slice_and_all_its_roles_are_adapted(any_model: ChatModel, saved: Saved) -> None:
    deltas = adapters.deltas(adapters.read(saved.folder), any_model.network)
    sites = {site.parameter: site for site in architecture.sites(any_model.network)}
    assert {sites[name].layer for name in deltas} == {1, 2}  # 30-80 % of four layers
    is_gpt2 = "gpt2" in any_model.name
    for layer in (1, 2):
        touched = [sites[name] for name in deltas if sites[name].layer == layer]
        assert len(touched) == (4 if is_gpt2 else 7)
        assert {role for site in touched for role in site.roles} == {*architecture.ROLES} - (
            {"gate"} if is_gpt2 else set()
        )


def test_the_folder_records_base_and_settings(saved: Saved) -> None:
    config = adapters.read(saved.folder).config
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == ("the-base", RANK, LORA_ALPHA)
    assert config["fan_in_fan_out"] == ("gpt2" in saved.base.name)


def test_a_fresh_adapter_changes_nothing(qwen: ChatModel, tmp_path: Path) -> None:
    network = loading.load(qwen.name).network
    adapters.attach(network, AdapterSettings(rank=2), "base").save(tmp_path)
    for delta in adapters.deltas(adapters.read(tmp_path), qwen.network).values():
        assert torch.count_nonzero(in_fp64(delta)) == 0 and delta.rank == 2


@pytest.mark.parametrize(
    ("layers", "roles", "expected"),
    [
        ((0.0, 1.0), ("o", "down"), {(layer, role) for layer in range(4) for role in ("o", "down")}),
        ((0.5, 0.75), ("q",), {(2, "q")}),
        ((0.0, 0.25), ("gate", "v"), {(0, "gate"), (0, "v")}),
    ],
)
def test_only_the_chosen_layers_and_roles_are_trainable(
    qwen: ChatModel, layers: tuple[float, float], roles: tuple[str, ...], expected: set[tuple[int, str]]
) -> None:
    network = loading.load(qwen.name).network
    wrapped = adapters.attach(network, AdapterSettings(rank=2, layers=layers, roles=roles), "base").wrapped
    trainable = {name.split(".lora_")[0] for name, p in wrapped.named_parameters() if p.requires_grad}
    sites = {f"base_model.model.{site.module}": site for site in architecture.sites(qwen.network)}
    assert {(sites[name].layer, sites[name].roles[0]) for name in trainable} == expected


# -------------------------------------------------------------------- options of PEFT with an exact form

WITH_EXACT_FORM: dict[str, dict[str, Any]] = {
    "rank per module": {"rank_pattern": {"q_proj": 2, "layers.2.mlp.down_proj": 7}},
    "alpha per module": {"alpha_pattern": {"o_proj": 3, r"model\.layers\.1\.mlp\.(up|down)_proj": 11}},
    "rank-stabilised": {"use_rslora": True},
    "everything at once": {
        "use_rslora": True,
        "rank_pattern": {"self_attn.o_proj": 3},
        "alpha_pattern": {"o_proj": 1, "^model.layers.2.self_attn.q_proj": 20},
    },
    "gaussian start": {"init_lora_weights": "gaussian"},
    "orthogonal start": {"init_lora_weights": "orthogonal"},
    "dropout": {"lora_dropout": 0.3},
    "weight-decomposed": {"use_dora": True},
    "weight-decomposed with patterns": {"use_dora": True, "rank_pattern": {"q_proj": 2}, "use_rslora": True},
    "principal components": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("options", WITH_EXACT_FORM)
def test_options_mean_what_peft_merges(qwen: ChatModel, tmp_path: Path, options: str) -> None:
    base = Path(qwen.name)
    folder = save_lora(base, tmp_path, **WITH_EXACT_FORM[options])
    deltas = adapters.deltas(adapters.read(folder), qwen.network)
    merged = merged_by_peft(base, folder)
    assert {name for name, change in merged.items() if change.norm() > 0} == deltas.keys()
    for name, delta in deltas.items():
        scale = weight_norm(qwen, name)
        assert float(merged[name].norm()) > 1e-2 * scale
        whole = spectrum.dense(delta, as_matrix(qwen.network.get_parameter(name).data))
        assert float((whole - as_matrix(merged[name])).norm()) <= 1e-6 * scale, name


OTHER_KINDS: dict[str, Any] = {
    "IA3 on all kinds": lambda: peft.IA3Config(
        target_modules=["q_proj", "o_proj", "up_proj", "down_proj"], feedforward_modules=["down_proj", "up_proj"]
    ),
    "DeLoRA with patterns": lambda: peft.DeloraConfig(
        r=3, delora_lambda=0.7, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 2},
        lambda_pattern={"down_proj": 0.2},
    ),
    "OFT with exact Cayley": lambda: peft.OFTConfig(
        r=0, oft_block_size=8, target_modules=["q_proj", "up_proj"], use_cayley_neumann=False
    ),
    "OFT with another series": lambda: peft.OFTConfig(
        r=0, oft_block_size=4, target_modules=["q_proj"], num_cayley_neumann_terms=3
    ),
    "OFT by number of blocks": lambda: peft.OFTConfig(r=4, oft_block_size=0, target_modules=["down_proj"]),
    "OFT with shared blocks": lambda: peft.OFTConfig(
        r=0, oft_block_size=8, target_modules=["q_proj", "down_proj"], block_share=True
    ),
    "constrained OFT": lambda: peft.OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj"], coft=True, eps=0.05),
    "BOFT with small blocks": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=["v_proj", "gate_proj"]),
    "BOFT by number of blocks": lambda: peft.BOFTConfig(
        boft_block_size=0, boft_block_num=4, target_modules=["v_proj"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_kinds_of_adapter_mean_what_peft_merges(qwen: ChatModel, tmp_path: Path, kind: str) -> None:
    base = Path(qwen.name)
    wrapped = peft.get_peft_model(loading.load(str(base)).network, OTHER_KINDS[kind]())
    fresh = torch.Generator().manual_seed(3)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=fresh))
    wrapped.save_pretrained(str(tmp_path))
    merged = merged_by_peft(base, tmp_path)
    deltas = adapters.deltas(adapters.read(tmp_path), qwen.network)
    assert {name for name, change in merged.items() if change.norm() > 0} == deltas.keys()
    for name, delta in deltas.items():
        weight = qwen.network.get_parameter(name).data
        assert float(merged[name].norm()) > 1e-3 * float(weight.norm())
        error = spectrum.dense(delta, as_matrix(weight)) - as_matrix(merged[name])
        assert float(error.norm()) <= 1e-6 * float(weight.double().norm()), name


def test_boft_with_more_factors_is_dense_and_exact(qwen: ChatModel, tmp_path: Path) -> None:
    """PEFT needs a CUDA kernel for it; the matrices are built here as its forward pass defines them."""
    from peft.tuners.boft.layer import BOFTLayer  # noqa: PLC0415

    config = peft.BOFTConfig(
        boft_block_size=4, target_modules=["v_proj"], layers_to_transform=[1], layers_pattern="layers"
    )
    peft.get_peft_model(loading.load(qwen.name).network, config).save_pretrained(str(tmp_path))
    name, factors, size = "model.layers.1.self_attn.v_proj", 3, 4
    weight = qwen.network.get_parameter(f"{name}.weight").data.double()
    rows, columns = weight.shape
    fresh = torch.Generator().manual_seed(0)
    blocks = 0.1 * torch.randn(factors, columns // size, size, size, generator=fresh)
    scale = 1 + 0.1 * torch.randn(rows, 1, generator=fresh)
    stem = f"base_model.model.{name}"
    save_file({f"{stem}.boft_R": blocks, f"{stem}.boft_s": scale}, tmp_path / WEIGHTS)
    total = torch.eye(columns, dtype=torch.float64)
    for number in range(factors):
        permutation = torch.zeros(columns, columns, dtype=torch.float64)
        order = BOFTLayer.block_butterfly_perm(None, columns, columns // size // 2**number, size // 2, factors - 1)
        permutation[torch.arange(columns), order] = 1
        skew = (blocks[number] - blocks[number].mT).double() / 2
        eye = torch.eye(size, dtype=torch.float64)
        inside = torch.block_diag(*((eye - q) @ torch.linalg.inv(eye + q) for q in skew))
        total = permutation @ inside @ permutation.T @ total
    wanted = scale.double() * (weight @ total.T) - weight
    (delta,) = adapters.deltas(adapters.read(tmp_path), qwen.network).values()
    assert delta.dense is not None and not delta.needs_weight
    assert relative_error(delta.dense, wanted) < 1e-6


def test_modules_that_were_trained_in_full_are_dense_updates(qwen: ChatModel, tmp_path: Path) -> None:
    base = Path(qwen.name)
    folder = save_lora(base, tmp_path, modules_to_save=["norm", "layers.3.mlp.up_proj"])
    tensors = load_file(folder / WEIGHTS)
    whole = {"model.norm.weight", "model.layers.3.mlp.up_proj.weight", "model.layers.0.self_attn.q_norm.weight"}
    for name in whole:
        tensors[f"base_model.model.{name}"] += 0.05 * torch.randn(tensors[f"base_model.model.{name}"].shape)
    save_file(tensors, folder / WEIGHTS)
    deltas = adapters.deltas(adapters.read(folder), qwen.network)
    merged = merged_by_peft(base, folder)
    assert {name for name, change in merged.items() if change.norm() > 0} == deltas.keys() > whole
    for name in whole:
        dense = deltas[name].dense
        assert dense is not None and torch.equal(dense.double(), as_matrix(merged[name]).float().double())


def test_a_trained_bias_of_b_moves_the_bias_of_the_module(tmp_path: Path) -> None:
    tiny.make("qwen3-biases", tmp_path / "base", layers=4)
    model = loading.load(str(tmp_path / "base"))
    folder = save_lora(tmp_path / "base", tmp_path / "a", lora_bias=True, target_modules=["q_proj", "o_proj"])
    deltas = adapters.deltas(adapters.read(folder), model.network)
    merged = merged_by_peft(tmp_path / "base", folder)
    biases = [name for name in deltas if name.endswith("bias")]
    assert len(biases) == 4 and {n for n, change in merged.items() if change.norm() > 0} == deltas.keys()
    for name, delta in deltas.items():
        scale = float(model.network.get_parameter(name).double().norm())
        assert float((in_fp64(delta) - as_matrix(merged[name])).norm()) <= 1e-6 * scale


def test_patterns_set_the_rank_of_single_modules(qwen: ChatModel, tmp_path: Path) -> None:
    folder = save_lora(Path(qwen.name), tmp_path, **WITH_EXACT_FORM["rank per module"])
    ranks = {name: d.rank for name, d in adapters.deltas(adapters.read(folder), qwen.network).items()}
    assert ranks["model.layers.1.self_attn.q_proj.weight"] == 2
    assert ranks["model.layers.2.mlp.down_proj.weight"] == 7
    assert ranks["model.layers.1.mlp.down_proj.weight"] == RANK


def test_bf16_factors_are_read_as_they_are(qwen: ChatModel, plain_lora: Path, tmp_path: Path) -> None:
    def halve(folder: Path) -> None:
        tensors = {name: t.bfloat16() for name, t in load_file(folder / WEIGHTS).items()}
        save_file(tensors, folder / WEIGHTS)

    folder = copy_changed(plain_lora, tmp_path / "half", halve)
    tensors = load_file(folder / WEIGHTS)
    for name, delta in adapters.deltas(adapters.read(folder), qwen.network).items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        b, a = (tensors[f"{stem}.lora_{side}.weight"].double() for side in "BA")
        assert relative_error(in_fp64(delta), 6 / 4 * b @ a) < 1e-6


# -------------------------------------------------------------------- what is refused by name

WITHOUT_EXACT_FORM: dict[str, dict[str, Any]] = {
    "bias": {"bias": "all"},
    "trained bias of": {"lora_bias": True},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
}


@pytest.mark.parametrize("feature", WITHOUT_EXACT_FORM)
def test_features_without_an_exact_form_are_refused_by_name(qwen: ChatModel, tmp_path: Path, feature: str) -> None:
    folder = save_lora(Path(qwen.name), tmp_path, **WITHOUT_EXACT_FORM[feature])
    with pytest.raises(UnsupportedFeatureError) as caught:
        adapters.deltas(adapters.read(folder), qwen.network)
    assert_one_line(caught.value, str(folder), feature)


@pytest.mark.parametrize("init", ["pissa_niter_4", "olora", "loftq", "corda", "lora_ga"])
def test_starts_that_move_the_base_are_refused(qwen: ChatModel, plain_lora: Path, tmp_path: Path, init: str) -> None:
    folder = copy_changed(
        plain_lora, tmp_path / "a", lambda f: edit_json(f / CONFIG, lambda c: c.update(init_lora_weights=init))
    )
    with pytest.raises(UnsupportedFeatureError) as caught:
        adapters.deltas(adapters.read(folder), qwen.network)
    assert_one_line(caught.value, str(folder), "init_lora_weights", init)


def test_an_option_that_does_not_exist_yet_is_refused(qwen: ChatModel, plain_lora: Path, tmp_path: Path) -> None:
    folder = copy_changed(
        plain_lora, tmp_path / "a", lambda f: edit_json(f / CONFIG, lambda c: c.update(use_tomorrow={"x": 1}))
    )
    with pytest.raises(UnsupportedFeatureError, match="use_tomorrow"):
        adapters.deltas(adapters.read(folder), qwen.network)


def test_a_fully_trained_embedding_that_is_also_the_head_is_refused(qwen: ChatModel, tmp_path: Path) -> None:
    folder = save_lora(Path(qwen.name), tmp_path, modules_to_save=["embed_tokens"])
    tensors = load_file(folder / WEIGHTS)
    tensors["base_model.model.model.embed_tokens.weight"] += 0.1
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(UnsupportedFeatureError) as caught:
        adapters.deltas(adapters.read(folder), qwen.network)
    assert_one_line(caught.value, str(folder), "embed_tokens", "lm_head")


@pytest.mark.parametrize("version", ["0.17.1", "", None])
def test_oft_of_an_older_peft_is_refused(qwen: ChatModel, tmp_path: Path, version: str | None) -> None:
    config = peft.OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj"])
    peft.get_peft_model(loading.load(qwen.name).network, config).save_pretrained(str(tmp_path))
    edit_json(tmp_path / CONFIG, lambda c: c.update(peft_version=version))
    with pytest.raises(UnsupportedFeatureError, match=r"0\.18"):
        adapters.deltas(adapters.read(tmp_path), qwen.network)


def test_other_kinds_of_adapter_are_refused_by_name(qwen: ChatModel, tmp_path: Path) -> None:
    config = peft.VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    peft.get_peft_model(loading.load(qwen.name).network, config).save_pretrained(str(tmp_path))
    with pytest.raises(UnsupportedFeatureError) as caught:
        adapters.deltas(adapters.read(tmp_path), qwen.network)
    assert_one_line(caught.value, str(tmp_path), "VERA", "LORA")


# -------------------------------------------------------------------- damaged folders

Tensors = dict[str, Tensor]
ONE = "base_model.model.model.layers.1.self_attn.q_proj.lora_"


def retensored(change: Callable[[Tensors], object]) -> Callable[[Path], None]:
    """Change the tensors of an adapter folder in place."""

    def damage(folder: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return damage


def reconfigured(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / CONFIG, lambda config: config.update(values))


def renamed(tensors: Tensors) -> None:
    for name in list(tensors):
        tensors[name.replace("q_proj", "quite_other_proj")] = tensors.pop(name)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no configuration": (lambda folder: (folder / CONFIG).unlink(), CONFIG),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS),
    "configuration is no JSON": (lambda folder: (folder / CONFIG).write_text("{'r': 4"), "JSON"),
    "configuration is empty": (lambda folder: (folder / CONFIG).write_text(""), "JSON"),
    "configuration is binary": (lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe\x00"), "JSON"),
    "weights are empty": (lambda folder: (folder / WEIGHTS).write_bytes(b""), WEIGHTS),
    "weights are cut": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-64]), WEIGHTS),
    "no tensors": (retensored(dict.clear), "no adapter tensors"),
    "NaN": (retensored(lambda t: t[ONE + "A.weight"].view(-1)[3:4].fill_(math.nan)), "q_proj"),
    "infinity": (retensored(lambda t: t[ONE + "B.weight"].view(-1)[3:4].fill_(math.inf)), "q_proj"),
    "A without B": (retensored(lambda t: t.pop(ONE + "B.weight")), "lora_B.weight"),
    "B without A": (retensored(lambda t: t.pop(ONE + "A.weight")), "lora_A.weight"),
    "unknown module": (retensored(renamed), "quite_other_proj"),
    "unknown tensor": (retensored(lambda t: t.update({"base_model.model.lora_x": torch.ones(1)})), "lora_x"),
    "wrong number of outputs": (retensored(lambda t: t.update({ONE + "B.weight": torch.ones(63, 4)})), "(63, 64)"),
    "wrong number of inputs": (retensored(lambda t: t.update({ONE + "A.weight": torch.ones(4, 65)})), "(64, 65)"),
}


def assert_refused(qwen: ChatModel, folder: Path, *mentioned: str) -> None:
    with pytest.raises(UserError) as caught:
        adapters.deltas(adapters.read(folder), qwen.network)
    assert_one_line(caught.value, str(folder), *mentioned)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_one_line_that_names_it(
    qwen: ChatModel, plain_lora: Path, tmp_path: Path, damage: str
) -> None:
    change, mentioned = DAMAGES[damage]
    assert_refused(qwen, copy_changed(plain_lora, tmp_path / "damaged", change), mentioned)


def test_a_folder_that_does_not_exist_is_one_line(qwen: ChatModel, tmp_path: Path) -> None:
    assert_refused(qwen, tmp_path / "nowhere")


def test_an_adapter_of_another_architecture_is_refused(
    qwen: ChatModel, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    adapters.attach(loading.load(str(tiny_folders["gpt2"])).network, AdapterSettings(rank=2), "gpt2").save(tmp_path)
    assert_refused(qwen, tmp_path, "the model does not have")


def test_an_adapter_of_other_shapes_is_refused(
    qwen: ChatModel, tiny_folders: dict[str, Path], plain_lora: Path, tmp_path: Path
) -> None:
    def widened(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            tensors[name] = torch.cat([tensor, tensor], dim=1 if "lora_A" in name else 0)

    assert_refused(qwen, copy_changed(plain_lora, tmp_path / "wide", retensored(widened)), "shape", "its weight has")


INSIDE_JSON: dict[str, Callable[[Path], object]] = {
    "a configuration that is a list": lambda folder: (folder / CONFIG).write_text("[]"),
    "no rank": lambda folder: edit_json(folder / CONFIG, lambda config: config.pop("r")),
    "no alpha": lambda folder: edit_json(folder / CONFIG, lambda config: config.pop("lora_alpha")),
    "alpha that is a text": reconfigured(lora_alpha="much"),
    "another rank than the factors": reconfigured(r=5),
    "B of another rank than A": retensored(lambda t: t.update({ONE + "B.weight": torch.ones(64, 3)})),
    "a factor that is no matrix": retensored(lambda t: t.update({ONE + "A.weight": torch.ones(4)})),
}


@pytest.mark.parametrize("damage", INSIDE_JSON)
def test_a_folder_that_contradicts_itself_is_one_line_that_names_it(
    qwen: ChatModel, plain_lora: Path, tmp_path: Path, damage: str
) -> None:
    assert_refused(qwen, copy_changed(plain_lora, tmp_path / "damaged", INSIDE_JSON[damage]))


def test_a_rank_that_contradicts_the_factors_is_an_error(qwen: ChatModel, plain_lora: Path, tmp_path: Path) -> None:
    folder = copy_changed(plain_lora, tmp_path / "damaged", reconfigured(r=5))
    with pytest.raises(UserError, match=r"has rank 5 in the configuration, but its factors have rank 4"):
        adapters.deltas(adapters.read(folder), qwen.network)


# -------------------------------------------------------------------- attach

REFUSED_SETTINGS = {
    "unknown family": (AdapterSettings(family="lorra"), "lorra"),
    "rank 0": (AdapterSettings(rank=0), "rank is 0"),
    "rank beyond a side": (AdapterSettings(family="pissa", rank=500), "rank 500"),
    "blocks that do not divide": (AdapterSettings(family="oft", block_size=7), "7"),
    "no bound": (AdapterSettings(family="delora", delora_lambda=0.0), "delora_lambda"),
    "negative rank": (AdapterSettings(rank=-3), "rank is -3"),
    "unknown role": (AdapterSettings(roles=("q", "nose")), "nose"),
    "empty slice": (AdapterSettings(layers=(0.5, 0.5)), "selects no layer"),
    "slice upside down": (AdapterSettings(layers=(0.8, 0.3)), "selects no layer"),
}


@pytest.mark.parametrize("settings", REFUSED_SETTINGS)
def test_settings_that_make_no_sense_are_refused_and_leave_the_model_alone(qwen: ChatModel, settings: str) -> None:
    chosen, mentioned = REFUSED_SETTINGS[settings]
    before, names = weights_digest(qwen.network), [name for name, _ in qwen.network.named_modules()]
    with pytest.raises(UserError) as caught:
        adapters.attach(qwen.network, chosen, "base")
    assert_one_line(caught.value, mentioned)
    assert weights_digest(qwen.network) == before
    assert [name for name, _ in qwen.network.named_modules()] == names


def test_a_role_that_the_architecture_lacks_is_refused(tiny_folders: dict[str, Path]) -> None:
    network = loading.load(str(tiny_folders["gpt2"])).network
    with pytest.raises(UnsupportedFeatureError, match="'gate'"):
        adapters.attach(network, AdapterSettings(rank=2, roles=("q", "gate")), "gpt2")


def test_peft_adapting_another_set_of_modules_is_an_error_that_unwraps_again(
    qwen: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = loading.load(qwen.name).network
    names = {name for name, _ in network.named_parameters()}
    real = peft.LoraConfig
    monkeypatch.setattr(peft, "LoraConfig", lambda **options: real(**{**options, "target_modules": ["q_proj"]}))
    with pytest.raises(UnsupportedFeatureError, match="not adapt exactly the modules of the slice"):
        adapters.attach(network, AdapterSettings(rank=2), "base")
    assert {name for name, _ in network.named_parameters()} == names


def test_a_folder_is_recognised_by_its_configuration(plain_lora: Path, tmp_path: Path) -> None:
    assert adapters.is_adapter_folder(plain_lora)
    assert not adapters.is_adapter_folder(tmp_path)
    assert json.loads((plain_lora / CONFIG).read_text())["peft_type"] == "LORA"


@pytest.mark.parametrize(
    "change", [{"layers_to_transform": [0]}, {"exclude_modules": ["q_proj"]}, {"target_modules": ["o_proj"]}], ids=str
)
def test_tensors_that_peft_would_not_load_are_refused(
    tiny_folders: dict[str, Path], tmp_path: Path, change: dict[str, Any]
) -> None:
    folder = save_lora(tiny_folders["qwen3"], tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
    model = loading.load(str(tiny_folders["qwen3"]))
    with pytest.raises(UserError, match="PEFT would not load them"):
        diff.task_vector(model, folder)
