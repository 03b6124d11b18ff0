"""Activation steering: capture at the right positions, estimators on planted differences, hooks that come off again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from making import generator, hook_count, logits, prompts, weights_digest
from ws import architecture, behaviour, forward
from ws.baselines import repe
from ws.baselines.repe import ActivationDirection, RepeSettings, States
from ws.chat import ask
from ws.condition import Condition, Edit
from ws.errors import UserError
from ws.models import ChatModel
from ws.probe import Probe, ProbeRow
from ws.score import score
from ws.steering import steer

SYCOPHANCY = behaviour.load("sycophancy")


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
    assert sorted(states.positive) == [1, 2] and states.positive[1].shape == (20, 64)
    row = qwen.chat.prompt(ask(SYCOPHANCY.train[3].text, SYCOPHANCY.personas.negative[0]))
    assert torch.allclose(states.negative[2][3], hidden_states(qwen, row, 2)[-1], atol=1e-4)
    assert len(repe.capture_states(qwen, SYCOPHANCY, RepeSettings()).positive[1]) == 100


def test_response_means_need_responses_and_average_them(qwen: ChatModel) -> None:
    settings = RepeSettings(captured="response", personas=1)
    with pytest.raises(UserError, match="responses"):
        repe.capture_states(qwen, SYCOPHANCY, settings)
    states = repe.capture_states(qwen, SYCOPHANCY, settings, [("Is tea good?", "Yes, it is.", "No.")])
    ids, start = qwen.chat.supervised(ask("Is tea good?", SYCOPHANCY.personas.positive[0]), "Yes, it is.")
    assert torch.allclose(states.positive[1][0], hidden_states(qwen, ids, 1)[start:].mean(dim=0), atol=1e-4)


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
    norms = torch.cat([states.positive[0], states.negative[0]]).norm(dim=1)
    assert float(vector.norm()) == pytest.approx(float(norms.mean()), rel=1e-5)


def test_centring_differences_would_have_lost_the_behaviour() -> None:
    shift = torch.zeros(12)
    shift[4] = 2.0
    states = planted(shift)
    difference = states.positive[0] - states.negative[0]
    centred = torch.linalg.svd(difference - difference.mean(dim=0))[2][0]
    assert abs(float(centred @ shift) / 2.0) < 0.5
    uncentred = repe._estimate(states, 0, RepeSettings(estimator="pca_diff"))
    assert float(torch.cosine_similarity(uncentred, shift, dim=0)) > 0.9


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


def test_a_layer_that_does_not_exist_is_an_error(qwen: ChatModel) -> None:
    with pytest.raises(UserError, match="layer 9"):
        repe.fit(qwen, SYCOPHANCY, RepeSettings(layer=9))


def test_names_say_what_differs_from_the_default() -> None:
    assert RepeSettings().name == "RepE mean, all layers"
    assert RepeSettings(estimator="logistic", layer=3, edited="last").name == "RepE logistic, layer 3, at last"
