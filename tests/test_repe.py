"""Activation steering: capture at the right positions, estimators on planted differences, hooks that come off again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from making import generator, hook_count, logits, prompts, weights_digest
from ws.base.errors import UserError
from ws.baselines import repe
from ws.baselines.repe import ActivationDirection, RepeSettings, States
from ws.comparing import dev_split
from ws.edit.condition import Condition, Edit
from ws.edit.steering import steer
from ws.eval import sycophancy
from ws.fitting import behaviour
from ws.measure import divergence
from ws.measure.probe import Probe, ProbeRow
from ws.measure.score import score
from ws.model import architecture, forward
from ws.model.chat import ask
from ws.model.loading import ChatModel

SYCOPHANCY = behaviour.load("sycophancy")
OWN = sycophancy.headline_probe(SYCOPHANCY)


def hidden_states(model: ChatModel, row: list[int], layer: int) -> Tensor:
    """Output of a decoder layer for one row alone, without padding."""
    found: list[Tensor] = []
    _, blocks = architecture.decoder_layers(model.network)
    handle = blocks[layer].register_forward_hook(
        lambda _m, _i, output: found.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        model.network(input_ids=torch.tensor([row]), use_cache=False)
    handle.remove()
    return found[0][0]


def test_captured_states_are_those_of_the_row_alone_at_its_own_positions(any_model: ChatModel) -> None:
    """Left or right padding must not decide which position is captured (a middle token, in earlier work)."""
    rows = [any_model.chat.prompt(ask(text)) for text in ("Hi.", "A much longer question than the other one?", "So?")]
    spans = [(len(row) - 1, len(row)) for row in rows]
    spans[1] = (2, 5)
    found = repe.capture(any_model, rows, spans, [1, 2])
    for layer in (1, 2):
        for index, (row, (start, stop)) in enumerate(zip(rows, spans, strict=True)):
            alone = hidden_states(any_model, row, layer)[start:stop].mean(dim=0)
            assert torch.allclose(found[layer][index], alone, atol=1e-4)
    assert hook_count(any_model.network) == 0


def test_capture_renders_as_the_probes_do(qwen: ChatModel) -> None:
    settings = RepeSettings(personas=1)
    states = repe.capture_states(qwen, SYCOPHANCY, settings)
    assert sorted(states.pos) == [1, 2] and states.pos[1].shape == (20, 64)
    row = qwen.chat.prompt(ask(SYCOPHANCY.train[3].text, SYCOPHANCY.personas.neg[0]))
    assert torch.allclose(states.neg[2][3], hidden_states(qwen, row, 2)[-1], atol=1e-4)
    assert len(repe.capture_states(qwen, SYCOPHANCY, RepeSettings()).pos[1]) == 100


def test_response_means_need_responses_and_average_them(qwen: ChatModel) -> None:
    settings = RepeSettings(captured="response", personas=1)
    with pytest.raises(UserError, match="responses"):
        repe.capture_states(qwen, SYCOPHANCY, settings)
    states = repe.capture_states(qwen, SYCOPHANCY, settings, [("Is tea good?", "Yes, it is.", "No.")])
    ids, start = qwen.chat.supervised(ask("Is tea good?", SYCOPHANCY.personas.pos[0]), "Yes, it is.")
    assert torch.allclose(states.pos[1][0], hidden_states(qwen, ids, 1)[start:].mean(dim=0), atol=1e-4)


# -------------------------------------------------------------------- estimators on planted states


def planted(shift: Tensor, noise: float = 0.3, count: int = 60) -> States:
    """Both sides share large variation in one direction; `shift` is what tells them apart."""
    fresh = generator(5)
    width = len(shift)
    shared = torch.randn(count, 1, generator=fresh) * 10 * torch.eye(width)[0]
    sides = [
        shared + sign * shift / 2 + noise * torch.randn(count, width, generator=fresh) + 3.0 for sign in (1.0, -1.0)
    ]
    return States({0: sides[0]}, {0: sides[1]})


@pytest.mark.parametrize("estimator", ["mean", "pca_diff", "pca_center", "logistic"])
def test_every_estimator_finds_a_planted_difference_with_its_sign(estimator: str) -> None:
    shift = torch.zeros(12)
    shift[4], shift[7] = 2.0, -1.0
    for turned in (1.0, -1.0):
        vector = repe._estimate(planted(turned * shift), 0, RepeSettings(estimator=estimator))  # type: ignore[arg-type]
        cosine = float(torch.cosine_similarity(vector, turned * shift, dim=0))
        assert cosine > (0.9 if estimator != "logistic" else 0.7)
        assert float(vector.norm()) == pytest.approx(float(shift.norm()), rel=0.1)


def test_the_residual_unit_is_the_mean_norm_of_the_stream() -> None:
    states = planted(torch.ones(12))
    vector = repe._estimate(states, 0, RepeSettings(unit="residual"))
    norms = torch.cat([states.pos[0], states.neg[0]]).norm(dim=1)
    assert float(vector.norm()) == pytest.approx(float(norms.mean()), rel=1e-5)


def test_centring_differences_would_have_lost_the_behaviour() -> None:
    shift = torch.zeros(12)
    shift[4] = 2.0
    states = planted(shift)
    difference = states.pos[0] - states.neg[0]
    centred = torch.linalg.svd(difference - difference.mean(dim=0))[2][0]
    assert abs(float(centred @ shift) / 2.0) < 0.5
    uncentred = repe._estimate(states, 0, RepeSettings(estimator="pca_diff"))
    assert float(torch.cosine_similarity(uncentred, shift, dim=0)) > 0.9


def test_how_far_mean_and_component_agree_is_kept_with_the_direction(qwen: ChatModel) -> None:
    states = repe.capture_states(qwen, SYCOPHANCY, RepeSettings())
    vectors = {
        name: repe.fit(qwen, SYCOPHANCY, RepeSettings(estimator=name), states=states)  # type: ignore[arg-type]
        for name in ("mean", "pca_diff")
    }
    cosines = vectors["mean"].provenance["cosine_of_mean_and_component"]
    assert cosines == vectors["pca_diff"].provenance["cosine_of_mean_and_component"] and sorted(cosines) == [1, 2]
    for layer, cosine in cosines.items():
        mean, component = (vectors[name].vectors[layer] for name in ("mean", "pca_diff"))
        assert cosine == pytest.approx(float(torch.cosine_similarity(mean, component, dim=0)), abs=1e-5)


def test_the_agreement_is_low_where_differences_vary_more_than_they_share() -> None:
    shift = torch.zeros(12)
    shift[4] = 1.0
    loud = planted(shift, noise=0.05)
    assert repe._agreement(loud, 0) > 0.99
    swing = torch.tensor([9.0, -9.0] * 30)[:, None] * torch.eye(12)[2]  # large, and nothing in the mean
    apart = States({0: loud.pos[0] + swing}, loud.neg)
    assert repe._agreement(apart, 0) < 0.5


def test_both_forms_of_components_span_one_line() -> None:
    states = planted(torch.linspace(-1, 1, 12))
    one, other = (repe._estimate(states, 0, RepeSettings(estimator=name)) for name in ("pca_diff", "pca_center"))  # type: ignore[arg-type]
    assert torch.allclose(one, other, atol=1e-5)


def test_increments_add_up_to_the_last_layer(qwen: ChatModel) -> None:
    states = repe.capture_states(qwen, SYCOPHANCY, RepeSettings())
    whole = repe.fit(qwen, SYCOPHANCY, RepeSettings(), states=states)
    steps = repe.fit(qwen, SYCOPHANCY, RepeSettings(form="incremental"), states=states)
    assert torch.allclose(steps.vectors[1] + steps.vectors[2], whole.vectors[2], atol=1e-5)


def test_personas_without_a_difference_are_an_error() -> None:
    with pytest.raises(UserError, match="no difference at layer 0"):
        repe._estimate(States({0: torch.ones(4, 3)}, {0: torch.ones(4, 3)}), 0, RepeSettings())


# -------------------------------------------------------------------- applying


def random_vectors(model: ChatModel, edited: str = "all") -> ActivationDirection:
    width = model.network.get_input_embeddings().weight.shape[1]
    vectors = {layer: torch.randn(width, generator=generator(layer)) for layer in (1, 2)}
    return ActivationDirection(vectors, model.fingerprint, edited)  # type: ignore[arg-type]


def test_vectors_are_added_to_every_layer_and_come_off_again(any_model: ChatModel) -> None:
    effect, ids = random_vectors(any_model), prompts(any_model)
    before, plain = weights_digest(any_model.network), logits(any_model.network, ids)
    row = ids[0].tolist()
    with steer(any_model, effect, 0.0):
        assert torch.equal(logits(any_model.network, ids), plain)
    with steer(any_model, effect, 2.0):
        assert not torch.allclose(logits(any_model.network, ids), plain)
        first = hidden_states(any_model, row, 1)
    assert torch.allclose(first, hidden_states(any_model, row, 1) + 2.0 * effect.vectors[1], atol=1e-4)
    assert torch.equal(logits(any_model.network, ids), plain)
    assert weights_digest(any_model.network) == before and hook_count(any_model.network) == 0


def test_strengths_may_differ_by_row(qwen: ChatModel) -> None:
    effect, ids = random_vectors(qwen), prompts(qwen)
    plain = logits(qwen.network, ids)
    with steer(qwen, effect, torch.tensor([0.0, 1.0, -2.0, 0.0])):
        together = logits(qwen.network, ids)
    assert torch.equal(together[0], plain[0]) and torch.equal(together[3], plain[3])
    for row, alpha in ((1, 1.0), (2, -2.0)):
        with steer(qwen, effect, alpha):
            assert torch.allclose(logits(qwen.network, ids[row : row + 1])[0], together[row], atol=1e-5)


def test_last_token_editing_hits_the_scored_position_and_not_the_padding(qwen: ChatModel) -> None:
    effect = random_vectors(qwen, "last")
    rows = [prompts(qwen, rows=1, tokens=length, seed=length)[0].tolist() for length in (4, 9, 6)]
    last = torch.tensor([len(row) - 1 for row in rows])
    ids = forward.pad_right(rows, qwen.device)
    with torch.no_grad(), steer(qwen, effect, 3.0):
        with forward.scoring_at(last):
            batched = qwen.split.logits_at(ids, torch.arange(3), last)
        alone = [
            qwen.split.logits_at(torch.tensor([row]), torch.tensor([0]), torch.tensor([len(row) - 1])) for row in rows
        ]
    assert torch.allclose(batched, torch.cat(alone), atol=1e-4)


@pytest.mark.parametrize("edited", ["all", "last"])
def test_scores_under_an_activation_direction_do_not_depend_on_the_batch(qwen: ChatModel, edited: str) -> None:
    rows = tuple(
        ProbeRow(str(n), tuple(ask("word " * n + "?")), "My answer: **", label=1 if n % 2 else -1) for n in range(1, 8)
    )
    condition = Condition.of(Edit("repe", random_vectors(qwen, edited)), 1.5)
    tables = [
        score(qwen, [Probe("p", "choice", rows)], [condition], token_budget=budget).sort("row", "edit", "metric")
        for budget in (1, 10_000)
    ]
    assert float((tables[0]["value"] - tables[1]["value"]).abs().max()) < 1e-4  # type: ignore[arg-type]
    edited_rows = tables[0].filter((tables[0]["edit"] == "repe") & (tables[0]["metric"] == "logratio"))
    base_rows = tables[0].filter((tables[0]["edit"] == "none") & (tables[0]["metric"] == "logratio"))
    assert float((edited_rows["value"] - base_rows["value"]).abs().max()) > 1e-3  # type: ignore[arg-type]


def test_minus_one_is_all_layers_of_the_slice(qwen: ChatModel) -> None:
    assert RepeSettings(layer=-1) == RepeSettings() and RepeSettings(layer=-1).name == "RepE mean, all layers"
    assert sorted(repe.fit(qwen, SYCOPHANCY, RepeSettings(layer=-1, personas=1)).vectors) == [1, 2]
    with pytest.raises(UserError, match="layer -2"):
        repe.fit(qwen, SYCOPHANCY, RepeSettings(layer=-2, personas=1))


def test_the_original_is_a_unit_vector_of_one_pair_at_one_layer_and_the_last_token(qwen: ChatModel) -> None:
    options = repe.candidates("original", qwen.layer_count, architecture.DEFAULT_SLICE)
    assert [option.layer for option in options] == list(architecture.layer_slice(qwen.layer_count))
    assert len({option.name for option in options}) == len(options) and "at last" in options[0].name
    states = repe.capture_states(qwen, SYCOPHANCY, RepeSettings(personas=1))
    for option, found in repe.fit_all(qwen, SYCOPHANCY, options).items():
        (vector,) = found.vectors.values()
        difference = (states.pos[option.layer or 0] - states.neg[option.layer or 0]).mean(dim=0)
        assert list(found.vectors) == [option.layer] and found.edited == "last"
        assert torch.allclose(vector, difference / difference.norm(), atol=1e-5)


@pytest.mark.parametrize("name", sorted(set(repe.VARIANTS) - {"response"}))
def test_every_named_variant_can_be_had(qwen: ChatModel, name: str) -> None:
    options = repe.candidates(name, qwen.layer_count, (0.0, 1.0))
    assert len(options) == (qwen.layer_count if name in repe.ONE_LAYER else 1)
    assert {replace(option, layer=None, slice=architecture.DEFAULT_SLICE) for option in options} == {
        repe.VARIANTS[name]
    }
    assert {option.slice for option in options} == {(0.0, 1.0)} and dev_split.STRENGTHS[options[0].unit]


def test_a_variant_of_no_name_is_an_error_that_lists_them(qwen: ChatModel) -> None:
    with pytest.raises(UserError, match=r"no activation steering 'best'.*original"):
        repe.candidates("best", qwen.layer_count, architecture.DEFAULT_SLICE)


def test_directions_fitted_together_are_those_fitted_alone(qwen: ChatModel) -> None:
    options = [
        RepeSettings(personas=1), RepeSettings(personas=1, layer=0), RepeSettings(personas=1, unit="residual"),
        RepeSettings(personas=2), RepeSettings(personas=1, captured="response"),
    ]  # fmt: skip
    responses = [("Is tea good?", "Yes, it is.", "No."), ("Is it late?", "Yes!", "Hardly.")]
    together = repe.fit_all(qwen, SYCOPHANCY, options, responses)
    assert list(together) == options
    for option in options:
        alone = repe.fit(qwen, SYCOPHANCY, option, responses=responses)
        assert list(alone.vectors) == list(together[option].vectors)
        for layer, vector in alone.vectors.items():
            assert torch.allclose(vector, together[option].vectors[layer], atol=1e-5), option


def test_a_seed_takes_the_same_half_of_the_prompts_under_every_persona() -> None:
    rows = torch.arange(3 * 7, dtype=torch.float32)[:, None]
    halves = [States({0: rows, 1: rows + 100}, {0: -rows, 1: rows}).half(seed, 3) for seed in range(6)]
    for half in halves:
        prompts = (half.pos[0][:, 0] % 7).view(3, -1)
        assert prompts.shape == (3, 4) and len(set(prompts[0].tolist())) == 4
        assert torch.equal(prompts, prompts[:1].expand(3, -1))
        assert torch.equal((half.pos[0][:, 0] // 7).view(3, -1)[:, 0], torch.arange(3.0))
        assert torch.equal(half.pos[1], half.pos[0] + 100) and torch.equal(half.neg[0], -half.pos[0])
    assert len({tuple(half.pos[0][:, 0].tolist()) for half in halves}) > 3
    assert len(States({0: rows[:1]}, {0: rows[:1]}).half(0, 1).pos[0]) == 1


def test_seeds_are_estimates_from_halves_of_one_capture(qwen: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    captured, capture = [], repe.capture_states

    def counting(model: ChatModel, behaviour: object, settings: RepeSettings, responses: object = ()) -> States:
        captured.append(settings.captured)
        return capture(model, behaviour, settings, responses)  # type: ignore[arg-type]

    monkeypatch.setattr(repe, "capture_states", counting)
    responses = [(f"Is {n} big?", f"Yes, {n} is big.", f"No, {n} is not.") for n in range(5)]
    options = [
        RepeSettings(personas=2, seed=seed, captured=captured) for captured in ("last", "response")
        for seed in (None, 0, 1)
    ]  # fmt: skip
    found = repe.fit_all(qwen, SYCOPHANCY, options, responses)
    assert captured == ["last", "response"]
    whole, first, second = (found[option].vectors[1] for option in options[:3])
    assert 0.5 < float(torch.cosine_similarity(first, second, dim=0)) < 0.99999
    assert 0.5 < float(torch.cosine_similarity(first, whole, dim=0)) < 0.99999
    # the slow way: only the prompts, or the pairs, of the half
    kept = States({0: torch.arange(20.0)[:, None]}, {0: torch.zeros(20, 1)}).half(0, 1).pos[0][:, 0].int().tolist()
    halved = replace(SYCOPHANCY, train=tuple(SYCOPHANCY.train[index] for index in kept))
    alone = repe.fit(qwen, halved, RepeSettings(personas=2))
    assert len(kept) == 10 and torch.allclose(alone.vectors[1], first, atol=1e-5)
    kept = States({0: torch.arange(5.0)[:, None]}, {0: torch.zeros(5, 1)}).half(0, 1).pos[0][:, 0].int().tolist()
    alone = repe.fit(qwen, SYCOPHANCY, RepeSettings(personas=2, captured="response"),
                     responses=[responses[index] for index in kept])  # fmt: skip
    assert len(kept) == 3 and torch.allclose(alone.vectors[1], found[options[4]].vectors[1], atol=1e-5)


def test_the_form_of_the_paper_is_a_difference_of_response_means_at_one_layer(qwen: ChatModel) -> None:
    options = repe.candidates("paper", qwen.layer_count, architecture.DEFAULT_SLICE)
    assert [option.layer for option in options] == [1, 2] and {option.captured for option in options} == {"response"}
    responses = [("Is tea good?", "Yes, it is.", "No."), ("Is it late?", "Yes!", "Hardly.")]
    fitted = repe.fit_all(qwen, SYCOPHANCY, options, responses)
    for option, direction in fitted.items():
        means: list[Tensor] = []
        for side, personas in enumerate((SYCOPHANCY.personas.pos, SYCOPHANCY.personas.neg)):
            states = []
            for prompt, *answers in responses:
                for persona in personas:
                    ids, start = qwen.chat.supervised(ask(prompt, persona), answers[side])
                    states.append(hidden_states(qwen, ids, option.layer or 0)[start:].mean(dim=0))
            means.append(torch.stack(states).mean(dim=0))
        assert list(direction.vectors) == [option.layer] and direction.unit == "difference"
        assert torch.allclose(direction.vectors[option.layer or 0], means[0] - means[1], atol=1e-4)


def test_the_random_control_has_the_norms_of_the_vectors_and_nothing_else_of_them(qwen: ChatModel) -> None:
    direction = replace(random_vectors(qwen, "last").times(3.0), unit="residual")
    controls = [repe.random_like(direction, seed) for seed in range(8)]
    for control in controls:
        assert (control.base, control.edited, control.unit) == (direction.base, "last", "residual")
        for layer, vector in direction.vectors.items():
            assert float(control.vectors[layer].norm()) == pytest.approx(float(vector.norm()), rel=1e-5)
            assert abs(float(torch.cosine_similarity(control.vectors[layer], vector, dim=0))) < 0.5
    assert len({control.content_key for control in controls}) == 8
    assert not torch.equal(controls[0].vectors[1], controls[0].vectors[2])
    only = repe.random_like(direction.on_layers([2]), 5)
    assert torch.equal(only.vectors[2], controls[5].vectors[2]), "a layer's numbers do not depend on other layers"
    assert controls[3].provenance == {"control": "random", "seed": 3, "like": direction.provenance}


def test_a_vector_of_zeros_has_a_gradient_and_strength_zero_keeps_every_bit(qwen: ChatModel) -> None:
    """What training and the Jacobian need of the same hook that steers."""
    vector = torch.zeros(64, requires_grad=True)
    hidden = torch.randn(2, 3, 64, generator=generator(1))
    hidden[:, 0] = -0.0
    hook = ActivationDirection({1: vector}, qwen.fingerprint)._adding(vector, torch.tensor([0.0, -2.0]))
    moved = hook(qwen.network, (), hidden)
    assert torch.equal(moved[0].signbit(), hidden[0].signbit()) and torch.equal(moved[0], hidden[0])
    (gradient,) = torch.autograd.grad(moved.sum(), vector)
    assert torch.allclose(gradient, torch.full((64,), -2.0 * 3))


def test_strengths_are_tried_in_the_unit_of_the_vectors(qwen: ChatModel) -> None:
    """As many residual norms as differences of the personas would tear the text to pieces."""
    for name, settings in (
        ("difference", RepeSettings(personas=1)),
        ("residual", RepeSettings(personas=1, unit="residual")),
    ):
        fitted = repe.fit_all(qwen, SYCOPHANCY, [settings])
        chosen = dev_split.best_strength(qwen, OWN, name, fitted)
        assert chosen.option == settings and chosen.strength in dev_split.STRENGTHS[settings.unit]
    assert max(dev_split.STRENGTHS["residual"]) <= 1.0 < max(dev_split.STRENGTHS["difference"])


def test_a_layer_that_does_not_exist_is_an_error(qwen: ChatModel) -> None:
    with pytest.raises(UserError, match="layer 9"):
        repe.fit(qwen, SYCOPHANCY, RepeSettings(layer=9))


def test_names_say_what_differs_from_the_default() -> None:
    assert RepeSettings().name == "RepE mean, all layers"
    assert RepeSettings(estimator="logistic", layer=3, edited="last").name == "RepE logistic, layer 3, at last"
    assert RepeSettings(unit="residual").name == "RepE mean, all layers, in residual norms"
    assert RepeSettings(seed=3).name == "RepE mean, all layers, half 3 of the prompts"
    assert replace(repe.ORIGINAL, layer=2).name == "RepE mean, layer 2, at last, of norm 1, 1 persona pair"


def test_an_edit_of_the_last_token_costs_on_texts_what_it_does_while_writing(qwen: ChatModel) -> None:
    """While a text is written every token of it was the last one once: reading it must edit all of them."""
    vector = torch.randn(64, generator=generator(3)) * 4
    effect = ActivationDirection({1: vector}, qwen.fingerprint, edited="last")
    rows = [qwen.chat.prompt(ask(text)) for text in ("Hi.", "A much longer question than the other one?")]
    with steer(qwen, effect, 1.0, mode="runtime"):
        texts = divergence.greedy(qwen, rows, 6)
        for row, text in zip(rows, texts, strict=True):
            with forward.scoring_from(torch.tensor([len(row) - 1])):
                read = logits(qwen.network, torch.tensor([[*row, *text]]))[0, len(row) - 1 : -1]
            assert read.argmax(dim=-1).tolist() == text
    probes = [
        Probe(kind, kind, (ProbeRow("a", tuple(ask("How do I make tea?")), "Boil some water and wait.", "a"),))  # type: ignore[arg-type]
        for kind in ("likelihood", "divergence")
    ]
    table = score(qwen, probes, [Condition.of(Edit("last", effect), 1.0)], mode="runtime")
    edited, base = table.filter(edit="last"), table.filter(edit="none")
    assert (edited.filter(metric="kl")["value"] > 1e-4).all()
    assert edited.filter(metric="nll")["value"].item() != pytest.approx(base.filter(metric="nll")["value"].item())
    prompts = ["Hi.", "What is tea?"]
    (spent,) = divergence.divergences(qwen, effect, [1.0], prompts, tokens=4)
    assert spent.mean > 1e-3 and hook_count(qwen.network) == 0


def test_a_choice_at_the_edge_of_what_was_tried_is_told(qwen: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = repe.fit_all(qwen, SYCOPHANCY, [RepeSettings(personas=1)])
    monkeypatch.setattr(dev_split, "LOW_MASS", 2.0)
    assert dev_split.best_strength(qwen, OWN, "none", fitted).remark == "none admissible"
    monkeypatch.setattr(dev_split, "LOW_MASS", 0.0)
    monkeypatch.setattr(dev_split, "FACTS_LOST", 1.0)
    monkeypatch.setattr(dev_split, "STRENGTHS", {"difference": (0.5,)})
    assert dev_split.best_strength(qwen, OWN, "only", fitted).remark == "the largest tried"
