"""KL budgets: the statistic against its definition, the search against known curves, both signs, honest failure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from making import hook_count, random_direction, weights_digest
from ws import world
from ws.base.errors import UserError
from ws.edit.condition import Context
from ws.edit.steering import steer
from ws.measure import calibrate
from ws.measure.calibrate import Divergence, distinct_trigrams, divergences, greedy, prompt_divergence, to_budget
from ws.model.chat import ask
from ws.model.loading import ChatModel

PROMPTS = ("What do owls eat?", "Say hello.", "Tell me a story about a very old lighthouse by the sea.")


@torch.no_grad()
def by_definition(model: ChatModel, direction: object, alpha: float, tokens: int) -> list[float]:
    """Row by row: greedy under steering, KL of the steered to the base distribution at every step."""
    found = []
    for prompt in PROMPTS:
        row, written = model.chat.prompt(ask(prompt)), []
        for _ in range(tokens):
            ids = torch.tensor([[*row, *written]])
            with steer(model, direction, alpha, mode="runtime"):  # type: ignore[arg-type]
                steered = model.network(input_ids=ids, use_cache=False).logits[0, -1].double().log_softmax(-1)
            base = model.network(input_ids=ids, use_cache=False).logits[0, -1].double().log_softmax(-1)
            found.append(float((steered.exp() * (steered - base)).sum()))
            written.append(int(steered.argmax()))
            if written[-1] in model.chat.stop_ids:
                break
    return found


def test_the_statistic_is_its_definition(any_model: ChatModel) -> None:
    direction = random_direction(any_model, relative_norm=0.5)
    before = weights_digest(any_model.network)
    for alpha, seen in zip((0.5, -1.0), divergences(any_model, direction, (0.5, -1.0), PROMPTS, tokens=6), strict=True):
        values = torch.tensor(by_definition(any_model, direction, alpha, 6), dtype=torch.float64)
        assert seen.alpha == alpha
        assert seen.mean == pytest.approx(float(values.mean()), rel=2e-3, abs=1e-6)
        assert seen.maximum == pytest.approx(float(values.max()), rel=2e-3, abs=1e-6)
        assert seen.p95 == pytest.approx(float(values.quantile(0.95)), rel=2e-3, abs=1e-6)
    assert weights_digest(any_model.network) == before and hook_count(any_model.network) == 0


def test_all_strengths_of_a_batch_give_what_each_gives_alone(qwen: ChatModel) -> None:
    direction = random_direction(qwen, relative_norm=0.5)
    together = divergences(qwen, direction, (0.25, 1.0, -2.0), PROMPTS, tokens=8)
    for seen in together:
        (alone,) = divergences(qwen, direction, (seen.alpha,), PROMPTS, tokens=8)
        assert alone.p95 == pytest.approx(seen.p95, rel=1e-3) and alone.distinct == seen.distinct


def test_no_strength_is_no_divergence(qwen: ChatModel) -> None:
    (seen,) = divergences(qwen, random_direction(qwen), (0.0,), PROMPTS, tokens=5)
    assert seen.maximum == pytest.approx(0.0, abs=1e-6)


def test_greedy_stops_at_the_stop_token_and_keeps_it(qwen: ChatModel) -> None:
    rows = [qwen.chat.prompt(ask(prompt)) for prompt in PROMPTS]
    texts = greedy(qwen, rows, 12)
    for row, text in zip(rows, texts, strict=True):
        written: list[int] = []
        for _ in range(12):
            with torch.no_grad():
                written.append(int(qwen.network(input_ids=torch.tensor([[*row, *written]])).logits[0, -1].argmax()))
            if written[-1] in qwen.chat.stop_ids:
                break
        assert text == written


def test_a_prompt_has_one_divergence(qwen: ChatModel) -> None:
    seen = prompt_divergence(qwen, Context("p", "You are a pirate who loves the sea."), PROMPTS, tokens=6)
    assert seen.p95 > 0 and math.isnan(seen.alpha)
    nothing = prompt_divergence(qwen, Context("none", ""), PROMPTS, tokens=6)
    assert nothing.maximum == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_strength_spends_the_budget(qwen: ChatModel, sign: int) -> None:
    direction = random_direction(qwen, relative_norm=0.2)
    found = to_budget(qwen, direction, 0.01, PROMPTS, sign=sign, tokens=8, tolerance=0.001)
    assert found.converged and math.copysign(1, found.alpha) == sign
    (again,) = divergences(qwen, direction, (found.alpha,), PROMPTS, tokens=8)
    assert again.p95 == pytest.approx(0.01, abs=0.0011)
    assert found.reached in found.history


# -------------------------------------------------------------------- the search on known curves


def curve(monkeypatch: pytest.MonkeyPatch, kl: object, distinct: float = 1.0) -> list[float]:
    """Replace the measurement by a function of |alpha|; returns the list of strengths that get tried."""
    tried: list[float] = []

    def measured(_m: object, _e: object, alphas: Sequence[float], _p: object, *, tokens: int = 0) -> list[Divergence]:
        tried.extend(alphas)
        return [Divergence(a, kl(abs(a)), kl(abs(a)), kl(abs(a)), distinct) for a in alphas]  # type: ignore[operator]

    monkeypatch.setattr(calibrate, "divergences", measured)
    monkeypatch.setattr(calibrate, "greedy", lambda *_: [[1, 2, 3, 4]])
    return tried


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("target", [0.5, 1.0])
def test_quadratic_curves_are_solved_at_any_scale(
    qwen: ChatModel, monkeypatch: pytest.MonkeyPatch, scale: float, target: float
) -> None:
    """IA3 needs thirty times the strength of other families: no upper end of a bracket is built in."""
    tried = curve(monkeypatch, lambda a: (a / scale) ** 2 / (1 + a / scale))
    found = to_budget(qwen, random_direction(qwen), target, PROMPTS, tolerance=0.01)
    assert found.converged and found.reached.p95 == pytest.approx(target, abs=0.01)
    assert len(tried) < 60


def test_a_text_that_breaks_down_before_the_budget_is_spent_is_said(
    qwen: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    curve(monkeypatch, lambda a: 0.3 * a / (1 + a), distinct=0.1)
    found = to_budget(qwen, random_direction(qwen), 0.5, PROMPTS)
    assert not found.converged and found.reached.p95 < 0.3


def test_a_step_that_jumps_over_the_budget_is_said(qwen: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    curve(monkeypatch, lambda a: 0.1 if a < 1.3 else 3.0)
    found = to_budget(qwen, random_direction(qwen), 0.5, PROMPTS)
    assert not found.converged and found.reached.p95 == pytest.approx(0.1)


@pytest.mark.parametrize("target", [0.0, -0.5, math.nan, math.inf])
def test_a_budget_that_nothing_spends_is_refused_before_anything_runs(
    qwen: ChatModel, monkeypatch: pytest.MonkeyPatch, target: float
) -> None:
    tried = curve(monkeypatch, lambda a: a**2)
    with pytest.raises(UserError, match="no strength spends a KL budget of") as caught:
        to_budget(qwen, random_direction(qwen), target, PROMPTS)
    assert "--target 0.5" in str(caught.value) and "\n" not in str(caught.value) and not tried


@pytest.mark.parametrize(("target", "tolerance"), [(2.0, 0.05), (0.5, 0.05), (0.2, 0.02), (0.04, 0.004), (1e-4, 1e-5)])
def test_a_small_budget_is_reached_as_closely_as_a_large_one(
    qwen: ChatModel, monkeypatch: pytest.MonkeyPatch, target: float, tolerance: float
) -> None:
    """0.05 nats alone would take any strength for the one that spends 0.04 nats."""
    curve(monkeypatch, lambda a: a**2)
    found = to_budget(qwen, random_direction(qwen), target, PROMPTS)
    assert found.tolerance == pytest.approx(tolerance) and found.converged
    assert abs(found.alpha**2 - target) <= tolerance
    assert calibrate.as_record(found)["tolerance"] == found.tolerance


def test_a_budget_below_what_rounding_spends_ends_and_is_said(qwen: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = curve(monkeypatch, lambda a: 1e-3 + a**2)
    found = to_budget(qwen, random_direction(qwen), 1e-4, PROMPTS)
    assert not found.converged and found.reached.p95 == pytest.approx(1e-3, rel=1e-6) and len(tried) < 60


def test_each_sign_says_for_itself_whether_it_was_reached(qwen: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(_m: object, _e: object, alphas: Sequence[float], _p: object, *, tokens: int = 0) -> list[Divergence]:
        kl = [a**2 if a > 0 else 0.3 * abs(a) / (1 + abs(a)) for a in alphas]
        return [Divergence(a, v, v, v, 1.0 if a > 0 else 0.1) for a, v in zip(alphas, kl, strict=True)]

    curve(monkeypatch, lambda a: a)
    monkeypatch.setattr(calibrate, "divergences", measured)
    both = {sign: to_budget(qwen, random_direction(qwen), 0.5, PROMPTS, sign=sign) for sign in (1, -1)}
    assert both[1].converged and not both[-1].converged


@pytest.mark.parametrize(
    ("texts", "share"), [([[1, 2, 3, 4]], 1.0), ([[1, 1, 1, 1]], 0.5), ([[1, 2, 3], [1, 2, 3]], 0.5), ([[1, 2]], 1.0)]
)
def test_distinct_trigrams(texts: list[list[int]], share: float) -> None:
    assert distinct_trigrams(texts) == share


def test_neutral_prompts_are_held_out() -> None:
    every = calibrate.neutral_prompts()
    assert len(every) >= 10 and calibrate.neutral_prompts(3) == every[:3]
    trained = {entry.user for entry in world.talk() if not entry.held_out}
    assert not trained & set(every)
    with pytest.raises(UserError, match=f"there are {len(every)} neutral prompts, {len(every) + 1} were asked for"):
        calibrate.neutral_prompts(len(every) + 1)
