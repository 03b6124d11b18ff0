"""Roles, layers and transposition per architecture; what cannot be resolved is an error, never a gap."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from making import assert_one_line
from ws import adapters
from ws.adapters import AdapterSettings
from ws.base.errors import UnsupportedFeatureError, UserError
from ws.model import architecture, loading
from ws.model.architecture import ROLES, Site
from ws.model.loading import ChatModel

WIDTH, INNER, HEADS, KV_HEADS, HEAD = 64, 128, 4, 2, 16
LLAMA_LIKE = {
    "q_proj": (("q",), (HEADS * HEAD, WIDTH)),
    "k_proj": (("k",), (KV_HEADS * HEAD, WIDTH)),
    "v_proj": (("v",), (KV_HEADS * HEAD, WIDTH)),
    "o_proj": (("o",), (WIDTH, HEADS * HEAD)),
    "gate_proj": (("gate",), (INNER, WIDTH)),
    "up_proj": (("up",), (INNER, WIDTH)),
    "down_proj": (("down",), (WIDTH, INNER)),
}
GPT2 = {  # stored as in x out
    "attn.c_attn": (("q", "k", "v"), (WIDTH, 3 * WIDTH)),
    "attn.c_proj": (("o",), (WIDTH, WIDTH)),
    "mlp.c_fc": (("up",), (WIDTH, 4 * WIDTH)),
    "mlp.c_proj": (("down",), (4 * WIDTH, WIDTH)),
}
PREFIX = {"gpt2": "transformer.h"}


def kind_of(model: ChatModel) -> str:
    return model.name.rsplit("tiny-", 1)[1]


def expected_sites(model: ChatModel) -> dict[str, tuple[tuple[str, ...], tuple[int, int]]]:
    return GPT2 if kind_of(model) == "gpt2" else LLAMA_LIKE


def small(kind: str) -> Any:
    """A random model of an architecture that `ws.pocket.tiny` does not make; nothing is saved."""
    import transformers  # noqa: PLC0415 - heavy import, late

    sizes = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    }  # fmt: skip
    match kind:
        case "phi3":
            config = transformers.Phi3Config(**sizes, num_key_value_heads=1, pad_token_id=0)
            return transformers.Phi3ForCausalLM(config)
        case "gpt_neox":
            return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes))
        case "opt":
            config = transformers.OPTConfig(
                vocab_size=96, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2,
                word_embed_proj_dim=32, max_position_embeddings=64,
            )  # fmt: skip
            return transformers.OPTForCausalLM(config)
        case "ctrl":
            config = transformers.CTRLConfig(vocab_size=96, n_embd=32, dff=48, n_layer=2, n_head=2, n_positions=64)
            return transformers.CTRLLMHeadModel(config)
    raise AssertionError(kind)


# -------------------------------------------------------------------- roles, shapes, transposition


def test_every_role_of_every_layer_is_found_with_its_shape(any_model: ChatModel) -> None:
    prefix = PREFIX.get(kind_of(any_model), "model.layers")
    found = architecture.sites(any_model.network)
    assert len(found) == 4 * len(expected_sites(any_model))
    assert [site.layer for site in found] == sorted(site.layer for site in found)
    parameters = dict(any_model.network.named_parameters())
    for site in found:
        ending = next(e for e in expected_sites(any_model) if site.module.endswith("." + e))
        roles, shape = expected_sites(any_model)[ending]
        assert (site.roles, site.shape) == (roles, shape)
        assert site.module.startswith(f"{prefix}.{site.layer}.")
        assert site.parameter == f"{site.module}.weight" and tuple(parameters[site.parameter].shape) == shape
        assert site.kind == ending.rsplit(".", 1)[-1]
        assert site.transposed == (kind_of(any_model) == "gpt2")
        assert site.writes_residual == (roles in (("o",), ("down",)))


def test_transposed_marks_what_multiplies_from_the_right(any_model: ChatModel) -> None:
    modules = dict(any_model.network.named_modules())
    for site in architecture.sites(any_model.network, [2]):
        module = modules[site.module]
        inputs = torch.ones(1, site.shape[0] if site.transposed else site.shape[1])
        weight = module.weight if site.transposed else module.weight.T
        bias = 0 if module.bias is None else module.bias
        assert torch.allclose(module(inputs), inputs @ weight + bias, atol=1e-6)
        assert architecture.is_conv1d(module) == site.transposed
        assert architecture.is_linear_map(module)


def test_norms_and_embeddings_are_no_linear_maps(any_model: ChatModel) -> None:
    for module in any_model.network.modules():
        if isinstance(module, nn.Embedding | nn.LayerNorm) or "Norm" in type(module).__name__:
            assert not architecture.is_linear_map(module)


@pytest.mark.parametrize("role", [role for role in ROLES if role != "gate"])
def test_one_role_selects_the_matrices_that_hold_it(any_model: ChatModel, role: str) -> None:
    found = architecture.sites(any_model.network, [1, 3], [role])
    assert {site.layer for site in found} == {1, 3} and len(found) == 2
    assert all(role in site.roles for site in found)


def test_the_order_of_the_layers_is_that_of_the_request(qwen: ChatModel) -> None:
    assert [site.layer for site in architecture.sites(qwen.network, [3, 0], ["o"])] == [3, 0]


def test_the_layers_are_found_whatever_they_are_called(any_model: ChatModel) -> None:
    name, blocks = architecture.decoder_layers(any_model.network)
    assert name == PREFIX.get(kind_of(any_model), "model.layers")
    assert blocks is any_model.network.get_submodule(name) and len(blocks) == any_model.layer_count == 4


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            "phi3",
            {"qkv_proj": ("q", "k", "v"), "o_proj": ("o",), "gate_up_proj": ("gate", "up"), "down_proj": ("down",)},
        ),
        (
            "gpt_neox",
            {"query_key_value": ("q", "k", "v"), "dense": ("o",), "dense_h_to_4h": ("up",), "dense_4h_to_h": ("down",)},
        ),
    ],
)
def test_fused_matrices_hold_several_roles(kind: str, expected: dict[str, tuple[str, ...]]) -> None:
    network = small(kind)
    found = architecture.sites(network)
    assert {site.kind: site.roles for site in found} == expected and len(found) == 2 * len(expected)
    assert architecture.linear_maps_without_role(network, [0, 1]) == []
    by_role = architecture.sites(network, [1], ["k"])
    assert [site.roles for site in by_role] == [("q", "k", "v")]


# -------------------------------------------------------------------- the slice


@pytest.mark.parametrize(
    ("layers", "low", "high", "expected"),
    [
        (28, 0.3, 0.8, range(8, 22)),
        (4, 0.3, 0.8, range(1, 3)),
        (2, 0.3, 0.8, range(1, 2)),
        (1, 0.3, 0.8, range(1)),
        (12, 0.0, 1.0, range(12)),
        (10, 0.0, 0.1, range(1)),
        (10, 0.9, 1.0, range(9, 10)),
    ],
)
def test_the_slice_is_a_share_of_the_depth(layers: int, low: float, high: float, expected: range) -> None:
    assert architecture.layer_slice(layers, low, high) == expected


def test_the_default_slice_is_the_one_of_the_design() -> None:
    assert architecture.layer_slice(28) == range(8, 22)


@pytest.mark.parametrize(
    ("layers", "low", "high"),
    [(28, 0.5, 0.5), (28, 0.8, 0.3), (28, -0.1, 0.5), (28, 0.5, 1.1), (28, 0.5, 0.51), (0, 0.3, 0.8), (2, 0.3, 0.6)],
)
def test_a_slice_without_layers_is_an_error(layers: int, low: float, high: float) -> None:
    with pytest.raises(UserError) as caught:
        architecture.layer_slice(layers, low, high)
    assert_one_line(caught.value, f"{low:g}-{high:g}", f"of {layers}")


# -------------------------------------------------------------------- errors


@pytest.mark.parametrize("roles", [["nose"], ["q", "nose"], ["Q"], ["q_proj"], [""]])
def test_unknown_roles_are_an_error_that_lists_the_known_ones(any_model: ChatModel, roles: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        architecture.sites(any_model.network, None, roles)
    assert_one_line(caught.value, repr(roles[-1]), " ".join(ROLES))


@pytest.mark.parametrize("layer", [4, -1, 99])
def test_layers_that_do_not_exist_are_an_error(any_model: ChatModel, layer: int) -> None:
    with pytest.raises(UserError) as caught:
        architecture.sites(any_model.network, [0, layer])
    assert_one_line(caught.value, f"layer {layer}", "0 to 3")


@pytest.mark.parametrize("roles", [["gate"], ["q", "gate"]])
def test_a_role_that_the_architecture_lacks_is_an_error(tiny_folders: dict[str, Any], roles: list[str]) -> None:
    network = loading.load(str(tiny_folders["gpt2"])).network
    with pytest.raises(UnsupportedFeatureError) as caught:
        architecture.sites(network, None, roles)
    assert_one_line(caught.value, "GPT2LMHeadModel", "'gate'")


def test_a_model_without_known_roles_is_an_error_that_names_its_linear_maps() -> None:
    network = small("ctrl")
    with pytest.raises(UnsupportedFeatureError) as caught:
        architecture.sites(network)
    assert_one_line(caught.value, "CTRLLMHeadModel", "Wk, Wq, Wv")
    assert "multi_head_attention.Wq" in architecture.linear_maps_without_role(network, [0])


def test_linear_maps_without_a_role_are_listed(any_model: ChatModel) -> None:
    assert architecture.linear_maps_without_role(any_model.network, range(4)) == []
    assert architecture.linear_maps_without_role(small("opt"), [0]) == ["fc1", "fc2", "self_attn.out_proj"]


def test_an_adapter_on_some_of_the_linear_maps_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        adapters.attach(small("opt"), AdapterSettings(rank=2, layers=(0.0, 1.0)), "opt")
    except UserError as error:
        assert_one_line(error, "fc1")
    else:
        assert "fc1" in capsys.readouterr().err


class StandIn(nn.Module):
    """A module tree with a configuration of two layers."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=2)
        for name, part in parts.items():
            self.add_module(name, part)


def blocks(count: int = 2) -> nn.ModuleList:
    return nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(3, 3)}) for _ in range(count))


def test_layers_are_told_from_other_lists() -> None:
    norms = nn.ModuleList(nn.LayerNorm(3) for _ in range(2))
    experts = nn.ModuleList(nn.ModuleDict({"experts": blocks(), "q_proj": nn.Linear(3, 3)}) for _ in range(2))
    for parts, expected in (
        ({"layers": blocks(), "norms": norms}, "layers"),
        ({"layers": blocks(), "heads": blocks(3)}, "layers"),
        ({"layers": experts}, "layers"),
        ({"vision_tower": StandIn(layers=blocks()), "text": StandIn(layers=blocks())}, "text.layers"),
    ):
        assert architecture.decoder_layers(StandIn(**parts))[0] == expected


@pytest.mark.parametrize(
    "parts", [{}, {"layers": blocks(3)}, {"encoder": blocks(), "decoder": blocks()}], ids=["none", "other depth", "two"]
)
def test_layers_that_cannot_be_told_apart_are_an_error(parts: dict[str, nn.Module]) -> None:
    with pytest.raises(UnsupportedFeatureError) as caught:
        architecture.decoder_layers(StandIn(**parts))
    assert_one_line(caught.value, "StandIn", "2 decoder layers")


def test_a_fused_site_that_holds_a_residual_writer_writes_the_residual() -> None:
    assert Site("m", "m.weight", 0, ("gate", "down"), (1, 1), False).writes_residual
    assert not Site("m", "m.weight", 0, ("q", "k"), (1, 1), False).writes_residual
