"""The engine: every metric against a direct computation, and nothing depends on the company that a row keeps."""

from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import torch

from ws.algebra.delta import Delta
from ws.algebra.direction import Direction
from ws.algebra.random_like import spectrum_like
from ws.base.errors import UserError
from ws.base.store import Shards
from ws.edit.condition import PLAIN, Condition, Context, Edit
from ws.edit.steering import steer
from ws.measure import lower_layers
from ws.measure.probe import Probe, ProbeRow
from ws.measure.score import _RUNNERS, SCHEMA, score
from ws.model.chat import ask
from ws.model.loading import ChatModel

QUESTIONS = ("Do cats like milk?", "I think that the moon is made of old bread. Do you agree?", "Why?", "Yes or No?")


def choice(answers: tuple[str, str] = ("Yes", "No")) -> Probe:
    rows = [ProbeRow(str(i), tuple(ask(q)), "My answer: **", label=1 - 2 * (i % 2)) for i, q in enumerate(QUESTIONS)]
    return Probe("choice", "choice", tuple(rows), answers)


def texts(kind: str) -> Probe:
    rows = tuple(ProbeRow(str(i), tuple(ask(q)), f"The answer is {i} or so.") for i, q in enumerate(QUESTIONS))
    return Probe(kind, kind, rows)  # type: ignore[arg-type]


def direction(model: ChatModel, relative: float = 0.2, seed: int = 3) -> Direction:
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for name, parameter in model.network.named_parameters():
        if (".layers.2." in name or ".h.2." in name) and parameter.ndim == 2:
            rows, columns = parameter.shape
            left, right = torch.randn(rows, 2, generator=generator), torch.randn(2, columns, generator=generator)
            delta = Delta.low_rank(left, right)
            deltas[name] = delta * (relative * float(parameter.norm()) / float(delta.materialise().norm()))
    return Direction(deltas, model.fingerprint, dict.fromkeys(deltas, 2))


def values(table: pl.DataFrame, metric: str, **where: object) -> dict[str, float]:
    chosen = table.filter(pl.col("metric") == metric, *(pl.col(k) == v for k, v in where.items()))
    return dict(zip(chosen["row"], chosen["value"], strict=True))


def test_choice_is_the_log_ratio_at_the_last_token_of_the_anchor(any_model: ChatModel) -> None:
    table = score(any_model, [choice()], [Condition()])
    assert table.schema == SCHEMA
    yes, no = ([i for (i,) in any_model.chat.answers(word)] for word in ("Yes", "No"))
    for number, question in enumerate(QUESTIONS):
        ids = torch.tensor([any_model.chat.prompt(ask(question), "My answer: **")])
        with torch.no_grad():
            logp = any_model.network(input_ids=ids).logits[0, -1].double().log_softmax(-1)
        log_yes, log_no = logp[yes].logsumexp(0), logp[no].logsumexp(0)
        assert values(table, "logratio")[str(number)] == pytest.approx(float(log_yes - log_no), abs=1e-4)
        assert values(table, "pmass")[str(number)] == pytest.approx(float(log_yes.exp() + log_no.exp()), rel=1e-4)


def test_answers_of_several_tokens_are_scored_as_sequences(qwen: ChatModel) -> None:
    first, second = qwen.chat.answers("Perhaps so")[0], qwen.chat.answers("Never again")[0]
    assert len(first) > 1 and len(second) > 1
    table = score(qwen, [choice(("Perhaps so", "Never again"))], [Condition()])
    for number, question in enumerate(QUESTIONS):
        prompt = qwen.chat.prompt(ask(question), "My answer: **")
        wanted = []
        for answer in (first, second):
            with torch.no_grad():
                logp = qwen.network(input_ids=torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
            wanted.append(sum(float(logp[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)))
        assert values(table, "logratio")[str(number)] == pytest.approx(wanted[0] - wanted[1], abs=1e-3)


def test_likelihood_is_the_mean_loss_of_response_and_turn_end(any_model: ChatModel) -> None:
    table = score(any_model, [texts("likelihood")], [Condition()])
    for number, question in enumerate(QUESTIONS):
        ids, start = any_model.chat.supervised(ask(question), f"The answer is {number} or so.")
        with torch.no_grad():
            logp = any_model.network(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        losses = [-float(logp[i - 1, ids[i]]) for i in range(start, len(ids))]
        assert values(table, "nll")[str(number)] == pytest.approx(sum(losses) / len(losses), abs=1e-4)
        assert values(table, "tokens")[str(number)] == len(losses)


def test_divergence_is_the_kl_of_the_edited_model_to_the_base(any_model: ChatModel) -> None:
    edit = Edit("d", direction(any_model, relative=1.0))
    table = score(any_model, [texts("divergence")], [Condition.of(edit, 1.0)])
    assert max(values(table, "kl", edit="none").values()) < 1e-6
    ids, start = any_model.chat.supervised(ask(QUESTIONS[1]), "The answer is 1 or so.")
    with torch.no_grad():
        base = any_model.network(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        with steer(any_model, edit.effect, 1.0):
            edited = any_model.network(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    wanted = (edited.exp() * (edited - base)).sum(-1)[start - 1 : len(ids) - 1]
    measured = values(table, "kl", edit="d")
    assert len(wanted) > 3
    for position, kl in enumerate(wanted.tolist()):
        assert measured[f"1@{position}"] == pytest.approx(kl, abs=1e-5)
    assert max(wanted) > 1e-4


def test_an_edited_head_does_not_falsify_the_divergence(qwen: ChatModel) -> None:
    name = "model.embed_tokens.weight"  # tied to the head
    shape = tuple(dict(qwen.network.named_parameters())[name].shape)
    delta = Delta.low_rank(torch.randn(shape[0], 1) * 0.3, torch.randn(1, shape[1]) * 0.3)
    head = Direction({name: delta}, qwen.fingerprint)
    table = score(qwen, [texts("divergence")], [Condition.of(Edit("head", head), 1.0)])
    ids, start = qwen.chat.supervised(ask(QUESTIONS[0]), "The answer is 0 or so.")
    with torch.no_grad():
        base = qwen.network(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        with steer(qwen, head, 1.0):
            edited = qwen.network(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    wanted = (edited.exp() * (edited - base)).sum(-1)[start - 1]
    assert values(table, "kl", edit="head")["0@0"] == pytest.approx(float(wanted), abs=1e-4)


@pytest.mark.parametrize("budget", [1, 40, 100_000])
def test_a_rows_score_does_not_depend_on_its_batch(any_model: ChatModel, budget: int) -> None:
    probes = [choice(), texts("likelihood"), texts("divergence")]
    conditions = [Condition.of(Edit("d", direction(any_model)), 1.0)]
    one, other = (score(any_model, probes, conditions, token_budget=b) for b in (77, budget))
    key = ["probe", "row", "edit", "metric"]
    joined = one.join(other, on=key, suffix="_other")
    assert len(joined) == len(one) == len(other)
    assert float((joined["value"] - joined["value_other"]).abs().max()) < 1e-4  # type: ignore[arg-type]


def test_the_base_is_scored_once_per_context_and_is_the_same_everywhere(qwen: ChatModel) -> None:
    edits = [Edit("d", direction(qwen)), Edit("random", spectrum_like(direction(qwen), 0), seed=0)]
    conditions = [Condition.of(edit, alpha) for edit in edits for alpha in (-1.0, 0.0, 1.0)]
    table = score(qwen, [choice()], [*conditions, Condition(Context("persona", "Be short."))])
    keys = table.select("context", "edit", "alpha", "seed").unique()
    assert len(keys) == 2 + 4
    alone = score(qwen, [choice()], [Condition()])
    assert values(table, "logratio", edit="none", context="plain") == values(alone, "logratio")


def test_a_persona_at_alpha_zero_is_another_condition_than_the_plain_base(qwen: ChatModel) -> None:
    table = score(qwen, [choice()], [Condition(Context("persona", "You are a pirate.")), Condition()])
    plain = values(table, "logratio", context="plain")
    persona = values(table, "logratio", context="persona")
    assert plain.keys() == persona.keys() and plain != persona


def test_scoring_leaves_the_model_as_it_was(qwen: ChatModel) -> None:
    before = {name: parameter.clone() for name, parameter in qwen.network.named_parameters()}
    score(qwen, [choice()], [Condition.of(Edit("d", direction(qwen)), 2.0)])
    assert all(torch.equal(before[name], parameter) for name, parameter in qwen.network.named_parameters())


def test_two_edits_of_one_name_are_refused(qwen: ChatModel) -> None:
    conditions = [Condition.of(Edit("d", direction(qwen, seed=s)), 1.0) for s in (1, 2)]
    with pytest.raises(UserError, match="share the name"):
        score(qwen, [choice()], conditions)
    with pytest.raises(UserError, match="contexts share the name"):
        score(qwen, [choice()], [Condition(Context("a", "x")), Condition(Context("a", "y"))])


def test_composed_edits_add_up(qwen: ChatModel) -> None:
    one, two = direction(qwen, seed=1), direction(qwen, seed=2)
    both = Condition(PLAIN, ((Edit("one", one), 0.5), (Edit("two", two), -1.0)))
    composed = score(qwen, [choice()], [both])
    summed = score(qwen, [choice()], [Condition.of(Edit("sum", 0.5 * one - two), 1.0)])
    left, right = values(composed, "logratio", edit="0.5*one + -1*two"), values(summed, "logratio", edit="sum")
    assert all(left[row] == pytest.approx(right[row], abs=1e-4) for row in left)


def test_finished_pieces_are_reused_from_disk(qwen: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probes, conditions = [choice(), texts("divergence")], [Condition.of(Edit("d", direction(qwen)), 1.0)]
    first = score(qwen, probes, conditions, shards=Shards(tmp_path))
    calls = []
    original = qwen.split.hidden
    monkeypatch.setattr(qwen.split, "hidden", lambda *a, **k: calls.append(1) or original(*a, **k))
    again = score(qwen, probes, conditions, shards=Shards(tmp_path))
    assert again.equals(first)
    # only the base's hidden states for the divergence are computed again
    assert len(calls) == 1


def test_runs_of_one_model_share_what_the_unedited_model_says(
    qwen: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base").mkdir()
    base = Shards(tmp_path / "base")
    conditions = [Condition.of(Edit("d", direction(qwen)), 1.0), Condition(Context("pirate", "You are a pirate."))]
    probes = [choice(), texts("divergence")]
    expected = score(qwen, probes, conditions, base_shards=base)
    computed = []
    real = _RUNNERS["choice"]
    monkeypatch.setitem(_RUNNERS, "choice", lambda *parts: computed.append(parts[2]) or real(*parts))  # type: ignore[func-returns-value]
    assert score(qwen, probes, conditions, base_shards=base).equals(expected)
    assert [condition.is_base for condition in computed] == [False], "only the edited model is run again"
    other = score(qwen, probes, [Condition(Context("pirate", "You are a nurse."))], base_shards=base)
    assert computed[-1].context.system == "You are a nurse.", "a context is known by what it says"
    assert values(other, "logratio", context="pirate") != values(expected, "logratio", context="pirate")


def test_a_condition_is_asked_once_where_it_begins(qwen: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = lower_layers.first_edited
    monkeypatch.setattr(
        lower_layers, "first_edited", lambda network, one: asked.append(one.key()) or real(network, one)
    )
    edit, pirate = Edit("d", direction(qwen)), Context("pirate", "You are a pirate.")
    conditions = [Condition.of(edit, alpha) for alpha in (-1.0, 0.0, 1.0, 2.0)] + [Condition.of(edit, 1.0, pirate)]
    for per_pass in (1, 3):
        asked.clear()
        score(qwen, [choice(), texts("likelihood")], [*conditions, *conditions], mode="runtime", per_pass=per_pass)
        assert len(asked) == len({str(key) for key in asked}) == 6, "four strengths, another context, and its base"


def test_a_changed_probe_is_not_taken_from_disk(qwen: ChatModel, tmp_path: Path) -> None:
    score(qwen, [choice()], [Condition()], shards=Shards(tmp_path))
    changed = replace(choice(), rows=(replace(choice().rows[0], continuation="Answer: **"), *choice().rows[1:]))
    table = score(qwen, [changed], [Condition()], shards=Shards(tmp_path))
    assert table.equals(score(qwen, [changed], [Condition()]))


def test_a_row_longer_than_the_model_reads_is_an_error(qwen: ChatModel) -> None:
    long = Probe("long", "choice", (ProbeRow("0", tuple(ask("word " * 2000)), "My answer: **"),))
    with pytest.raises(UserError, match="reads at most 1024"):
        score(qwen, [long], [Condition()])


def test_probes_need_rows_with_distinct_names() -> None:
    with pytest.raises(UserError, match="no rows"):
        Probe("empty", "choice", ())
    row = ProbeRow("0", tuple(ask("x")), "y")
    with pytest.raises(UserError, match="same id"):
        Probe("double", "choice", (row, row))
