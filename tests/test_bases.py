"""Every registered basis on real layouts: orthonormal, from the right weights and states, or absent with its reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from making import gaussian
from materials import LAYER, RANK, material_of
from ws.base.errors import UserError
from ws.model import loading
from ws.model.loading import ChatModel
from ws.pocket import tiny
from ws.subspace import moments, spans
from ws.subspace.bases import BASES, Material, build, named
from ws.subspace.bases.registry import Basis, basis
from ws.subspace.weights import ResidualWeights, Unavailable


@pytest.fixture(scope="module")
def materials(tiny_folders: dict[str, Path]) -> dict[str, Material]:
    return {name: material_of(loading.load(str(folder))) for name, folder in tiny_folders.items()}


# -------------------------------------------------------------------- all of them


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("name", BASES)
def test_every_basis_is_orthonormal_and_its_projector_idempotent(
    materials: dict[str, Material], architecture: str, name: str
) -> None:
    material = materials[architecture]
    built = build(BASES[name], material)
    if built.reason:
        gated = architecture == "gpt2" and name in ("mlp_gate_read", "gate_kernel", "gate_active_written")
        assert gated or name == "stenographic", built.reason  # a strict intersection may be empty
        return
    assert len(built.spans) == BASES[name].draws
    for span in built.spans:
        assert span.dtype == torch.float32 and span.shape[0] == 64
        assert 1 <= span.shape[1] <= RANK * (2 if "union" in name else 1)
        torch.testing.assert_close(span.T @ span, torch.eye(span.shape[1]), rtol=0, atol=1e-5)
        projector = span @ span.T
        torch.testing.assert_close(projector @ projector, projector, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, one in BASES.items() if "directions" not in one.needs])
def test_bases_of_the_base_model_do_not_depend_on_the_run(materials: dict[str, Material], name: str) -> None:
    material = materials["qwen3"]
    with_run, without = build(BASES[name], material), build(BASES[name], replace(material, run=None, siblings={}))
    assert with_run.reason == without.reason
    assert all(torch.equal(a, b) for a, b in zip(with_run.spans, without.spans, strict=True))
    assert not BASES[name].uses_trained_dW


def test_every_basis_says_how_it_is_made_and_what_it_needs() -> None:
    for one in BASES.values():
        assert one.formula.endswith(".") and len(one.formula) < 200, one.name
        assert one.axis in ("reads", "writes", "mixed") and one.needs
    assert {"weights", "activations", "personas", "attention", "directions", "gradient"} == {
        need for one in BASES.values() for need in one.needs
    }


ABSENT: dict[str, tuple[Callable[[Material], Material], str]] = {
    "taskdiff": (lambda m: replace(m, background=replace(m.background, personas=())), "no personas"),
    "attn_min_taskdiff": (lambda m: replace(m, background=replace(m.background, tokens="sdpa has none")), "sdpa"),
    "gradient_write": (lambda m: replace(m, background=replace(m.background, gradient=None)), "no gradient"),
    "shared_dw": (lambda m: replace(m, siblings={"lora": m.trained.direction}), "only one family"),
    "shared_dw_others": (lambda m: replace(m, siblings={"lora": m.trained.direction}), "only one family"),
    "w_oracle": (lambda m: replace(m, layer=0, _known={}), "does not change o or down of layer 0"),
    "act_oracle_block": (lambda m: replace(m, layer=0, _known={}), "changes nothing here"),
    "steered_fit_block": (lambda m: replace(m, run=None), "needs a trained direction"),
}


@pytest.mark.parametrize("name", ABSENT)
def test_a_basis_that_cannot_be_made_is_listed_with_its_reason(materials: dict[str, Material], name: str) -> None:
    change, reason = ABSENT[name]
    built = build(BASES[name], change(materials["qwen3"]))
    assert reason in built.reason and not built.spans and built.rank == 0


def test_a_model_without_gates_says_so(materials: dict[str, Material]) -> None:
    assert "no gate matrix" in build(BASES["mlp_gate_read"], materials["gpt2"]).reason


# -------------------------------------------------------------------- the registry


def test_wrong_names_are_refused_and_all_means_all() -> None:
    with pytest.raises(UserError, match=r"no basis 'wrote'.*write"):
        named(["wrote"])
    assert named(["all"]) == list(BASES.values())
    assert [one.name for one in named(["write", "write", "taskdiff"])] == ["write", "taskdiff"]


def test_a_new_basis_is_one_function_and_names_are_unique(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BASES, "placeholder", BASES["write"])
    monkeypatch.delitem(BASES, "placeholder")

    @basis("reads", "test")
    def first_axes(m: Material) -> Tensor:
        """The first coordinates."""
        return torch.eye(m.width)[:, : m.rank]

    try:
        assert BASES["first_axes"].formula == "The first coordinates."
        with pytest.raises(ValueError, match="two bases first_axes"):
            basis("reads", "test")(first_axes)
    finally:
        del BASES["first_axes"]


@pytest.mark.parametrize(("made", "problem"), [
    (lambda m: torch.ones(m.width, 2), "not orthonormal"),
    (lambda m: torch.eye(m.width), "at most"),
    (lambda m: torch.eye(m.width + 1)[:, :2], "has shape"),
    (lambda m: torch.full((m.width, 2), float("nan")), "not orthonormal"),
])  # fmt: skip
def test_a_result_that_is_no_basis_is_an_error(materials: dict[str, Material], made: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        build(Basis("broken", "reads", "test", ("weights",), False, 1, made), materials["qwen3"])


# -------------------------------------------------------------------- the weights


@pytest.fixture(scope="module", params=[*tiny.ARCHITECTURES, "phi3", "gpt-neox"])
def uneven(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    """A model of each layout whose norms have gains and biases that are not trivial."""
    folder = tmp_path_factory.mktemp("uneven") / request.param
    tiny.make(request.param, folder, layers=2)
    model = loading.load(str(folder))
    for number, (name, parameter) in enumerate(model.network.named_parameters()):
        if "norm" in name or ".ln_" in name:
            parameter.data.add_(gaussian(*parameter.shape, seed=number, scale=0.3))
    return model


def modules_of(model: ChatModel, layer: int) -> dict[str, nn.Module]:
    return dict(
        model.split.decoder.get_submodule(f"{'h' if 'gpt2' in model.name else 'layers'}.{layer}").named_modules()
    )


def test_reading_matrices_give_what_the_modules_compute_up_to_the_scale_of_the_norm(uneven: ChatModel) -> None:
    weights, modules = ResidualWeights(uneven).layer(1), modules_of(uneven, 1)
    state = gaussian(64, seed=1)
    front = next(modules[n] for n in ("input_layernorm", "ln_1") if n in modules)
    reader = next(modules[n] for n in ("self_attn.q_proj", "self_attn.qkv_proj", "attn.c_attn",
                                       "attention.query_key_value") if n in modules)  # fmt: skip
    with torch.no_grad():
        # the norm's bias and that of the map cancel in the difference of a state and its mirror image
        found = (reader(front(state[None])) - reader(front(-state[None])))[0] / 2
    centred = isinstance(front, nn.LayerNorm)
    scale = (state - state.mean()).square().mean().sqrt() if centred else state.square().mean().sqrt()
    if "attention.query_key_value" in modules:  # heads are interleaved: q, k, v of the first, of the second ...
        found = found.view(4, 3, 16)[:, 0].flatten()
    expected = weights.reads("q") @ state.double()
    torch.testing.assert_close(found[: len(expected)] * scale, expected.float(), rtol=1e-3, atol=1e-4)


def test_writing_matrices_hold_the_norm_behind(uneven: ChatModel) -> None:
    weights, modules = ResidualWeights(uneven).layer(1), modules_of(uneven, 1)
    writer = next(modules[n] for n in ("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h") if n in modules)
    hidden = gaussian(weights.raw["down"].shape[1], seed=2)
    with torch.no_grad():
        written = (writer(hidden[None]) - writer(-hidden[None]))[0] / 2
        expected = weights.writes("down") @ hidden.double()
        if "post_feedforward_layernorm" in modules:
            scale = written.square().mean().sqrt()
            written = modules["post_feedforward_layernorm"](written[None])[0] * scale
    torch.testing.assert_close(written, expected.float(), rtol=1e-3, atol=1e-4)


def test_products_per_head_are_those_of_a_loop_over_heads(uneven: ChatModel) -> None:
    weights = ResidualWeights(uneven).layer(0)
    q, k, v, o = weights.reads("q"), weights.reads("k"), weights.reads("v"), weights.writes("o")
    width = 16
    groups = 4 // (len(k) // width)
    for head in range(4):
        own = head // groups  # the key-value head that this query head uses
        one_q, one_k, one_v = (
            part[number * width : (number + 1) * width] for part, number in ((q, head), (k, own), (v, own))
        )
        gains = [weights.head_norms[n].gain[:, None] if n in weights.head_norms else 1.0 for n in ("q", "k")]
        torch.testing.assert_close(weights.heads.qk[head], (one_q * gains[0]).T @ (one_k * gains[1]))
        torch.testing.assert_close(weights.heads.ov[head], o[:, head * width : (head + 1) * width] @ one_v)
    if groups > 1:  # the sum over heads is not that of a matrix whose rows are repeated one by one
        scrambled = weights.heads.q.flatten(0, 1).T @ (k.repeat_interleave(groups, dim=0))
        assert (weights.heads.qk.sum(0) - scrambled).norm() > 0.1 * scrambled.norm()


def test_the_unembedding_is_read_through_the_final_norm(uneven: ChatModel) -> None:
    view = ResidualWeights(uneven)
    state = gaussian(64, seed=5)
    decoder = uneven.split.decoder
    final = next(getattr(decoder, n) for n in ("norm", "ln_f", "final_layer_norm") if hasattr(decoder, n))
    with torch.no_grad():
        logits = (uneven.split.logits(final(state[None])) - uneven.split.logits(final(-state[None])))[0] / 2
    scale = (state - state.mean() if isinstance(final, nn.LayerNorm) else state).square().mean().sqrt()
    rows = view.head_rows(list(range(view.vocabulary)))
    torch.testing.assert_close(logits * scale, (rows @ state.double()).float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(view.head_gram, rows.T @ rows)


# -------------------------------------------------------------------- what single bases are


def test_singular_bases_are_those_of_a_full_decomposition(materials: dict[str, Material]) -> None:
    m = materials["qwen3"]
    w = m.weights
    cases = {
        "write": torch.linalg.svd(w.writes("o", "down"))[0][:, :RANK],
        "attn_qkv_read": torch.linalg.svd(w.reads("q", "k", "v"))[2][:RANK].T,
        "weak_write": torch.linalg.svd(w.writes("o", "down"))[0][:, -RANK:],
        "attn_ov_write": torch.linalg.svd(w.heads.ov.sum(0))[0][:, :RANK],
        "mlp_roundtrip_write": torch.linalg.svd(w.writes("down") @ w.reads("up"))[0][:, :RANK],
    }
    for name, expected in cases.items():
        (found,) = build(BASES[name], m).spans
        torch.testing.assert_close(spans.principal_cosines(found, expected), torch.ones(RANK, dtype=torch.float64),
                                   rtol=0, atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("name", ["write_not_lm_head_read", "causally_isolated", "write_x_notlogits",
                                  "input_super_not_lm_read"])  # fmt: skip
def test_not_read_means_orthogonal_to_what_is_read(materials: dict[str, Material], name: str) -> None:
    m = materials["qwen3"]
    (found,) = build(BASES[name], m).spans
    broad = torch.linalg.eigh(m.view.head_gram)[1][:, -m.broad :]
    assert float((broad.T @ found.double()).abs().max()) < 1e-5


def shifted(m: Material, shift: Tensor) -> Material:
    """The material with `shift` added to every state under the positive personas behind the layer."""
    pairs = []
    for pos, neg in m.background.personas:
        after = pos.after.clone()
        after[m.layer] += shift
        pairs.append((replace(pos, after=after), neg))
    return replace(m, background=replace(m.background, personas=pairs), _known={})


@pytest.mark.parametrize("name", ["taskdiff", "taskdiff_first_pair", "taskdiff_increments"])
def test_a_contrast_that_all_prompts_share_is_kept(materials: dict[str, Material], name: str) -> None:
    """Centring the differences would remove it."""
    shift = 1000 * gaussian(64, seed=6)
    (found,) = build(BASES[name], shifted(materials["qwen3"], shift)).spans
    assert float((found[:, 0] @ shift / shift.norm()).abs()) > 0.999


def test_the_shared_basis_weighs_families_alike_and_can_leave_one_out(materials: dict[str, Material]) -> None:
    m = materials["qwen3"]
    loud = replace(m, siblings={**m.siblings, "dora": 100 * m.siblings["dora"]}, _known={})
    (one,), (other,) = (build(BASES["shared_dw"], each).spans for each in (m, loud))
    torch.testing.assert_close(one @ one.T, other @ other.T, rtol=0, atol=1e-4)
    (others,) = build(BASES["shared_dw_others"], m).spans
    alone = spans.top_eigenvectors(moments.written(m.view, m.siblings["dora"], LAYER, "o", "down"), RANK)
    torch.testing.assert_close(spans.principal_cosines(others, alone), torch.ones(RANK, dtype=torch.float64),
                               rtol=0, atol=1e-5)  # fmt: skip


def test_the_null_inside_dw_lies_in_its_span_and_draws_differ(materials: dict[str, Material]) -> None:
    m = materials["qwen3"]
    values, vectors = torch.linalg.eigh(m.moment("written"))
    inside = vectors[:, values > 1e-9]
    drawn = build(BASES["null_in_dw"], m).spans
    assert inside.shape[1] == 8  # two factors of rank 4
    for span in drawn:
        assert float((inside.T @ span.double()).norm()) == pytest.approx(RANK**0.5, abs=1e-4)
    assert spans.principal_cosines(drawn[0], drawn[1]).min() < 0.99
    again = build(BASES["null_in_dw"], replace(m, _known={})).spans
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))


def test_attention_sink_has_one_direction_per_head_at_most(materials: dict[str, Material]) -> None:
    m = replace(materials["qwen3"], rank=8, _known={})
    assert build(BASES["attention_sink"], m).rank == 4
    assert build(BASES["chars_clusters"], m).rank <= 7


def test_a_background_is_never_changed_by_building(materials: dict[str, Material]) -> None:
    m = materials["llama"]
    before = copy.deepcopy(m.background.clean)
    for one in BASES.values():
        build(one, m)
    assert torch.equal(before.after, m.background.clean.after)


def test_the_direction_that_is_missing_is_unavailable_not_zero(materials: dict[str, Material]) -> None:
    m = materials["qwen3"]
    with pytest.raises(Unavailable, match="layer 0"):
        moments.written(m.view, m.trained.direction, 0, "o")
