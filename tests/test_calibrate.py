"""KL budgets: the statistic against its definition, the search against known curves, both signs, honest failure."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
import pytest
import torch

from making import generator, hook_count, random_direction, weights_digest
from ws import world
from ws.base.errors import UserError
from ws.edit.condition import Context
from ws.edit.steering import steer
from ws.measure import calibrate
from ws.measure.calibrate import interval, to_budget
from ws.measure.divergence import (
    Divergence,
    distinct_ngrams,
    divergences,
    greedy,
    kl,
    mean_distinct,
    prompt_divergence,
)
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


def seen_at(alpha: float, spent: float, distinct: float = 1.0) -> Divergence:
    """Every prompt spends the same at every position."""
    return Divergence(alpha, spent, spent, spent, distinct, ((spent,),) * len(PROMPTS))


def curve(
    monkeypatch: pytest.MonkeyPatch, spent: Callable[[float], float], distinct: Callable[[float], float] = lambda _: 1.0
) -> list[float]:
    """Replace the measurement by functions of |alpha|; returns the list of strengths that get tried."""
    tried: list[float] = []

    def measured(_m: object, _e: object, alphas: Sequence[float], _p: object, *, tokens: int = 0) -> list[Divergence]:
        tried.extend(alphas)
        return [seen_at(alpha, spent(abs(alpha)), distinct(abs(alpha))) for alpha in alphas]

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
    curve(monkeypatch, lambda a: 0.3 * a / (1 + a), distinct=lambda _: 0.1)
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
    with pytest.raises(UserError, match="the KL budget is") as caught:
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
    assert found.as_record()["tolerance"] == found.tolerance


def test_a_budget_below_what_rounding_spends_ends_and_is_said(qwen: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = curve(monkeypatch, lambda a: 1e-3 + a**2)
    found = to_budget(qwen, random_direction(qwen), 1e-4, PROMPTS)
    assert not found.converged and found.reached.p95 == pytest.approx(1e-3, rel=1e-6) and len(tried) < 60


def test_each_sign_says_for_itself_whether_it_was_reached(qwen: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(_m: object, _e: object, alphas: Sequence[float], _p: object, *, tokens: int = 0) -> list[Divergence]:
        return [seen_at(a, a**2) if a > 0 else seen_at(a, 0.3 * abs(a) / (1 + abs(a)), 0.1) for a in alphas]

    curve(monkeypatch, lambda a: a)
    monkeypatch.setattr(calibrate, "divergences", measured)
    both = {sign: to_budget(qwen, random_direction(qwen), 0.5, PROMPTS, sign=sign) for sign in (1, -1)}
    assert both[1].converged and not both[-1].converged


@pytest.mark.parametrize("sign", [1, -1])
def test_a_coherent_strength_within_tolerance_is_not_passed_over_for_an_incoherent_one(
    qwen: ChatModel, monkeypatch: pytest.MonkeyPatch, sign: int
) -> None:
    """The text repeats itself at 4, where its KL happens to be the budget to the digit."""
    curve(monkeypatch, lambda a: {1.0: 0.52, 4.0: 0.5}.get(a, a**2), lambda a: 0.02 if a >= 4 else 0.9)
    found = to_budget(qwen, random_direction(qwen), 0.5, PROMPTS, sign=sign)
    assert (found.alpha, found.converged) == (sign, True)


@pytest.mark.parametrize(
    ("breaks", "alpha"),
    [(1.9, math.sqrt(3.0)), (0.26, None), (1.5, None), (1e-3, None)],
)
def test_the_budget_is_sought_among_coherent_strengths_only(
    qwen: ChatModel, monkeypatch: pytest.MonkeyPatch, breaks: float, alpha: float | None
) -> None:
    """Where the text breaks down before the budget is spent, the last coherent strength is the nearest there is.

    The KL of incoherent texts passes the budget from above: it would be found there, too.
    """
    tried = curve(monkeypatch, lambda a: a**2 if a < breaks else 6 / a, lambda a: 0.9 if a < breaks else 0.02)
    found = to_budget(qwen, random_direction(qwen), 3.0, PROMPTS)
    assert found.reached.distinct == 0.9 and len(tried) < 40
    assert found.converged == (alpha is not None)
    assert found.alpha == pytest.approx(breaks if alpha is None else alpha, rel=0.02)
    assert (found.alpha_low is None) == (alpha is None)


@pytest.mark.parametrize(
    ("text", "share"), [([1, 2, 3, 4], 1.0), ([1, 1, 1, 1], 0.5), (["a", "b", "a", "b", "a"], 2 / 3), ([1, 2], 1.0)]
)
def test_distinct_trigrams_are_those_of_one_text(text: list[int], share: float) -> None:
    assert distinct_ngrams(text) == pytest.approx(share)
    assert mean_distinct([text] * 5) == pytest.approx(share), "a reply given five times repeats nothing within itself"
    assert mean_distinct([text, [1, 2, 3]]) == pytest.approx((share + 1) / 2)


def test_kl_is_its_definition_and_never_negative() -> None:
    logits = torch.randn(2, 7, 50, generator=generator(0), dtype=torch.float64)
    p, q = logits.log_softmax(-1)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )
    torch.testing.assert_close(kl(p, q), expected)
    near = p.float()
    off = near + 1e-7 * torch.randn(near.shape, generator=generator(1))
    assert (kl(near, off) >= 0).all() and (near.exp() * (near - off)).sum(-1).min() < 0


def test_neutral_prompts_are_held_out() -> None:
    every = calibrate.neutral_prompts()
    assert len(every) >= 10 and calibrate.neutral_prompts(3) == every[:3]
    trained = {entry.user for entry in world.talk() if not entry.held_out}
    assert not trained & set(every)
    with pytest.raises(UserError, match=f"{len(every) + 1} neutral prompts were requested.*from 1 to {len(every)}"):
        calibrate.neutral_prompts(len(every) + 1)


# -------------------------------------------------------------------- how sure a strength is


def along(base: Sequence[Sequence[float]], alphas: Sequence[float], power: float = 2.0) -> list[Divergence]:
    """KL that grows with a power of |alpha| at every position; `base` holds it at alpha 1, per prompt."""
    return [
        Divergence(alpha, 0.0, 0.0, 0.0, 1.0, tuple(tuple(abs(alpha) ** power * v for v in one) for one in base))
        for alpha in alphas
    ]


@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_prompts_that_agree_leave_no_doubt(sign: int, power: float) -> None:
    measured = along([[0.5] * 4] * 8, [sign * a for a in (0.5, 4.0, 2.0, 1.0)], power)
    assert interval(measured, 0.9) == pytest.approx([sign * 1.8 ** (1 / power)] * 2)


def test_limits_are_ordered_as_numbers_and_the_same_every_time() -> None:
    base = np.exp(np.random.default_rng(0).normal(size=(12, 20)))
    low, high = interval(along(base, (0.1, 0.2, 0.4, 0.8)), 0.5)
    assert 0.1 < low < high < 0.8
    mirrored = interval(along(base, (-0.1, -0.2, -0.4, -0.8)), 0.5)
    assert mirrored == pytest.approx((-high, -low))
    assert interval(along(base, (0.8, 0.1, 0.4, 0.2)), 0.5) == (low, high)


def test_a_draw_that_crosses_outside_of_what_was_measured_counts_as_its_end() -> None:
    base = [[0.01] * 5] * 4 + [[50.0] * 5] * 4
    assert interval(along(base, (0.5, 1.0)), 0.5, seed=1) == pytest.approx((0.5, 0.5))
    assert interval(along(base, (1e-3, 2e-3)), 0.5) == pytest.approx((2e-3, 2e-3))


@pytest.mark.parametrize("between", [0.3, 0.6])
def test_intervals_hold_the_true_strength_about_as_often_as_they_say(between: float) -> None:
    """16 prompts of 30 positions, log-normal KL: prompts differ by `between`, positions within a prompt by 1.5."""
    percentile = math.exp(NormalDist().inv_cdf(0.95) * math.hypot(between, 1.5))
    truth, random, held, trials = math.sqrt(0.5 / percentile), np.random.default_rng(0), 0, 200
    strengths = [truth * factor for factor in (0.25, 0.5, 0.9, 1.1, 2.0, 4.0)]
    for number in range(trials):
        base = np.exp(random.normal(0, between, (16, 1)) + random.normal(0, 1.5, (16, 30)))
        low, high = interval(along(base, strengths), 0.5, resamples=300, seed=number)
        held += low <= truth <= high
    assert 0.90 <= held / trials <= 0.99


def test_a_calibration_says_how_sure_it_is(qwen: ChatModel) -> None:
    found = to_budget(qwen, random_direction(qwen, relative_norm=0.2), 0.01, PROMPTS, sign=-1, tokens=8)
    record = found.as_record(with_history=True)
    assert found.converged and found.alpha_low <= found.alpha <= found.alpha_high < 0
    assert (record["alpha_low"], record["alpha"], record["alpha_high"]) == (
        found.alpha_low, found.alpha, found.alpha_high,
    )  # fmt: skip
    assert [seen["alpha"] for seen in record["history"]] == [seen.alpha for seen in found.history]
    json.dumps(record)
    alone = to_budget(qwen, random_direction(qwen, relative_norm=0.2), 0.01, PROMPTS[:1], tokens=8)
    assert alone.alpha_low is None and alone.alpha_high is None
