"""From scores to numbers: what a summary says of effects that are known, and what the pages show."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from scipy.stats import t

from ws.base.changes import sign_flip_p
from ws.base.errors import UserError
from ws.base.files import write_json
from ws.base.records import plain, restore
from ws.commands import cli
from ws.eval.ability import Ability, Name, Share
from ws.measure.score import SCHEMA
from ws.report import cells, document, effects, figures, page, sentences, summary, terminal
from ws.report.document import Bullets, Figure, Heading, Paragraph, Samples, Table, Tile, Tiles
from ws.report.findings import Estimate, Judged, Summary, read_summary
from ws.report.summary import Scores, summarise

GROUPS = (("false", 1), ("false/reversed", -1), ("true", 1), ("true/reversed", -1))


def table(
    shift: Any, controls: Any = lambda seed, alpha: 0.01 * (seed - 1) * alpha, persona: float = 5.0,
    alphas: tuple[float, ...] = (-1.0, 1.0), control_alphas: tuple[float, ...] = (1.0,),
) -> pl.DataFrame:  # fmt: skip
    """Scores where the edit adds `shift(label, alpha)` to every raw log-ratio; base values vary by row."""
    records: list[dict[str, Any]] = []

    def add(
        probe: str, row: int, cluster: int, group: str, label: int, condition: tuple, metric: str, value: float
    ) -> None:
        context, edit, alpha, seed = condition
        names = {"probe": probe, "group": group, "row": f"{row}", "cluster": f"{cluster}", "label": label}
        key = {"context": context, "edit": edit, "alpha": alpha, "seed": seed, "data_seed": None}
        records.append({**names, **key, "metric": metric, "value": value})

    conditions = [
        ("plain", "none", 0.0, None),
        *(("plain", "dW:lora", a, 0) for a in alphas),
        ("persona", "none", 0.0, None),
    ]
    conditions += [("plain", "random", a, seed) for a in control_alphas for seed in range(3)]
    for condition in conditions:
        context, edit, alpha, seed = condition
        for item in range(60):
            for position, (group, label) in enumerate(GROUPS):
                base = ((item * 7) % 11 - 5) / 10
                change = (
                    shift(label, alpha)
                    if edit == "dW:lora"
                    else controls(seed, alpha) * label
                    if edit == "random"
                    else 0.0
                )
                value = persona if context == "persona" else base + change
                add("sycophancy", item * 4 + position, item, group, label, condition, "logratio", value)
                add("sycophancy", item * 4 + position, item, group, label, condition, "pmass", 0.95)
            for side, label in ((0, 1), (1, -1)):
                base = ((item * 5) % 7 - 3) / 10
                change = (
                    shift(label, alpha)
                    if edit == "dW:lora"
                    else controls(seed, alpha) * label
                    if edit == "random"
                    else 0.0
                )
                group = "far" if item % 2 else "near"
                value = persona if context == "persona" else base + change
                add("dilemmas", item * 2 + side, item, group, label, condition, "logratio", value)
                add("dilemmas", item * 2 + side, item, group, label, condition, "pmass", 0.9)
            for label in (1, -1):
                value = (4.0 if label > 0 else 1.0) + 0.5 * alpha * label * (edit == "dW:lora")
                add("refusal", item + 1000 * label, item, "harmful", label, condition, "logratio", value)
            add("facts", item, item, "true", 1, condition, "logratio", 1.0 if item < 54 else -1.0)
            add("neutral_nll", item, item, "all", 1, condition, "nll", 2.0 + abs(alpha) * 0.1)
            for position in range(3):
                kl = 0.02 * alpha**2 * (50 if (item, position) == (7, 1) else 1)
                records.append({**records[-1], "probe": "neutral_kl", "row": f"{item}@{position}", "metric": "kl",
                                "value": kl})  # fmt: skip
    return pl.DataFrame(records, schema=SCHEMA)


def behaviour_shift(label: int, alpha: float) -> float:
    return 2.0 * alpha * label


def yes_bias(label: int, alpha: float) -> float:
    return 2.0 * alpha


def summed(scores: pl.DataFrame, shown_by: Name = "choice") -> Summary:
    """A finished run with these scores, whose headline shows an instrument."""
    numbers = summarise(scores, "dW:lora", "sycophancy", "false")
    return Summary(
        model="small", behaviour="sycophancy", adapter="lora", seed=0, data_seed=0, headline_group="false",
        noun="claims", direction_norm=1.0, geometry={}, numbers=numbers, seconds={"eval": 1.0}, warnings=("odd",),
        headline=sentences.headline(numbers, "sycophancy", "claims", shown_by), rounding=None,
        ability=Ability(shown_by, "a stated reason", 0.95, Share(0.75, 0.6, 0.9), None),
    )  # fmt: skip


def made(shift: Any, **options: Any) -> dict[str, Any]:
    """The summary of a made run, as `summary.json` holds it."""
    return plain(summed(table(shift, **options)))  # type: ignore[no-any-return]


def doubts(found: dict[str, Any]) -> list[str]:
    run = restore(Summary, found)
    return sentences.doubts(run.numbers, "sycophancy", run.ability.instrument)


def test_a_summary_is_read_as_it_was_written(tmp_path: Path) -> None:
    found = summed(table(behaviour_shift))
    write_json(tmp_path / "summary.json", plain(found))
    assert read_summary(tmp_path) == found
    assert list(plain(found))[:11] == [
        "model", "behaviour", "adapter", "seed", "data_seed", "headline_group", "noun", "direction_norm", "geometry",
        "sycophancy", "dilemmas",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["seconds", "dose_response", "groups"])
def test_a_summary_of_another_version_says_how_to_write_it_anew(tmp_path: Path, name: str) -> None:
    content = made(behaviour_shift)
    del content[name]
    write_json(tmp_path / "summary.json", content)
    with pytest.raises(UserError, match=r"another version of ws\. Write it again with: ws report "):
        read_summary(tmp_path)


def test_a_known_effect_is_found_with_its_size() -> None:
    found = made(behaviour_shift)
    assert found["change"]["sycophancy"]["1"]["mean"] == pytest.approx(2.0)
    assert found["change"]["sycophancy"]["-1"]["mean"] == pytest.approx(-2.0)
    assert found["dd_delta"]["1"]["mean"] == pytest.approx(2.0)
    assert found["outside_controls"]["sycophancy"] == {"-1": True, "1": True}
    assert found["decomposition"]["sycophancy"]["1"]["yes_bias"]["mean"] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("alphas", "control_alphas", "bare"),
    [
        ((-2.0, -1.0, 1.0, 2.0), (1.0,), None),
        ((-3.0, 3.0), (3.0,), None),
        ((-3.0, -2.0, 3.0), (3.0,), "alpha -2 has no random band: only alpha -3, +3 has one"),
        ((-1.0, 1.0), (), "alpha -1, +1 has no random band: no random directions were measured"),
    ],
)  # fmt: skip
def test_a_strength_of_the_headline_without_random_directions_is_told(
    alphas: tuple[float, ...], control_alphas: tuple[float, ...], bare: str | None
) -> None:
    found = made(behaviour_shift, alphas=alphas, control_alphas=control_alphas)
    told = [doubt for doubt in doubts(found) if "no random band" in doubt]
    assert told == ([] if bare is None else [bare])
    sentence = found["headline"]
    assert ("random control band at" in sentence) == bool(control_alphas)
    if 1.0 not in alphas:
        assert f"random control band at +{control_alphas[-1]:g} " in sentence
        assert all(f"alpha {alpha:+g} " in sentence for alpha in alphas), "what was measured is what is told"
    banded = sum(abs(alpha) in control_alphas for alpha in alphas)
    assert list(found["outside_controls"]["sycophancy"].values()) == [True] * banded


def test_random_directions_measured_at_plus_give_the_band_of_both_signs() -> None:
    found = made(behaviour_shift, controls=lambda seed, alpha: 0.01 * (seed + 1) * alpha)
    for probe in ("sycophancy", "dilemmas"):
        seeds = {key: by_probe[probe]["seeds"] for key, by_probe in found["controls"]["random"].items()}
        assert seeds["-1"] == seeds["1"] == pytest.approx((0.01, 0.02, 0.03))
    bands = found["instruments"]["choice"]["bands"]
    assert bands["-1"]["seeds"] == bands["1"]["seeds"] == pytest.approx((0.01, 0.02, 0.03))


def test_a_pure_yes_bias_is_reported_as_such_and_not_as_honesty() -> None:
    found = made(yes_bias)
    parts = found["decomposition"]["dilemmas"]["1"]
    assert parts["effect"]["mean"] == pytest.approx(0.0) and parts["yes_bias"]["mean"] == pytest.approx(2.0)
    assert found["dd_delta"]["1"]["mean"] == pytest.approx(0.0)
    own = found["decomposition"]["sycophancy"]["1"]
    assert own["effect"]["mean"] == pytest.approx(0.0) and own["yes_bias"]["mean"] == pytest.approx(2.0)
    assert any("Yes-bias is larger" in doubt for doubt in doubts(found))


def test_flips_are_counted_both_ways() -> None:
    found = made(behaviour_shift)
    rows = Scores(table(behaviour_shift)).rows("sycophancy", "logratio", "dW:lora", 1.0)
    before, after = rows["base"] * rows["label"], rows["value"] * rows["label"]
    up = sum(b <= 0 < a for b, a in zip(before, after, strict=True))
    assert found["decomposition"]["sycophancy"]["1"]["up"] == up > 0
    assert found["decomposition"]["sycophancy"]["1"]["down"] == 0
    assert found["decomposition"]["sycophancy"]["-1"]["down"] > 0


def test_a_persona_at_alpha_zero_never_enters_the_base() -> None:
    with_persona, without = made(behaviour_shift, persona=50.0), made(behaviour_shift, persona=-50.0)
    assert with_persona["sycophancy"] == without["sycophancy"] and with_persona["dd_delta"] == without["dd_delta"]
    assert with_persona["contexts"]["persona"]["sycophancy"]["mean"] == pytest.approx(50.0)


def test_rows_are_joined_by_id_and_not_by_order() -> None:
    scores = table(behaviour_shift)
    shuffled = scores.sample(fraction=1.0, shuffle=True, seed=0)
    one, two = (plain(summed(t))["dd_delta"]["1"] for t in (scores, shuffled))
    assert one["mean"] == pytest.approx(two["mean"]) and one["n"] == two["n"]


def unbalanced(shift: Any) -> dict[str, Any]:
    """A summary of dilemmas in which three of four rows with No as the honest answer are not counted."""
    no, few = pl.col("label") < 0, pl.col("cluster").cast(pl.Int64) % 4 > 0
    group = pl.when((pl.col("probe") == "dilemmas") & no & few).then(pl.lit("filler")).otherwise(pl.col("group"))
    return plain(summed(table(shift).with_columns(group=group)))  # type: ignore[no-any-return]


def test_a_yes_bias_is_told_apart_where_the_counted_labels_are_not_balanced() -> None:
    found = unbalanced(yes_bias)
    assert found["dilemma_counts"] == {
        "counted": 75, "not_counted": 45, "honest_yes": 60, "honest_no": 15, "noun": "dilemmas",
    }  # fmt: skip
    parts = found["decomposition"]["dilemmas"]["1"]
    assert parts["effect"]["mean"] == pytest.approx(2.0 * (60 - 15) / 75), "a mere Yes-bias looks like honesty"
    assert parts["balanced"] == pytest.approx(0.0) and parts["yes_bias"]["mean"] == pytest.approx(2.0)
    told = doubts(found)
    assert any("Yes is the honest answer on 60 of 75" in doubt for doubt in told)
    assert any(doubt.startswith("dilemmas") and "Yes-bias is larger" in doubt for doubt in told)
    assert not any("Yes is the honest answer" in doubt for doubt in doubts(made(yes_bias)))
    honest = unbalanced(behaviour_shift)["decomposition"]["dilemmas"]["1"]
    assert honest["balanced"] == pytest.approx(honest["effect"]["mean"]) == pytest.approx(2.0)


def test_dilemmas_of_which_none_can_be_counted_are_an_error() -> None:
    fillers = table(behaviour_shift).with_columns(pl.col("group").replace({"near": "filler", "far": "filler"}))
    with pytest.raises(UserError, match="none of the 120 dilemma rows can be counted"):
        summarise(fillers, "dW:lora", "sycophancy", "false")


def test_the_page_says_which_rows_are_not_counted() -> None:
    shown = effects.dilemma_table(restore(Summary, unbalanced(behaviour_shift)).numbers)
    assert shown.header[1] == "counted (n=75)" and shown.header[-2] == "all rows (n=120)"
    assert "Yes on 60 and No on 15 of the 75 counted rows" in shown.caption and "45 more rows (filler)" in shown.caption
    plain = effects.dilemma_table(summed(table(behaviour_shift)).numbers)
    assert plain.header[1] == "all (n=120)" and "more rows" not in plain.caption
    assert "Yes on 60 and No on 60 of the 120 counted rows" in plain.caption


@pytest.mark.parametrize(
    ("shift", "slope", "r2", "monotone"),
    [
        (lambda label, alpha: 2.0 * alpha * label, 2.0, 1.0, True),
        (lambda label, alpha: 2.0 * alpha**2 * label, 0.0, 0.0, False),
    ],
    ids=["a line", "a bend"],
)
def test_the_dose_response_says_slope_linearity_and_order(shift: Any, slope: float, r2: float, monotone: bool) -> None:
    found = made(shift)
    for probe in ("sycophancy", "dilemmas"):
        entry = found["dose_response"][probe]
        assert entry["slope"] == pytest.approx(slope, abs=1e-9) and entry["r2"] == pytest.approx(r2, abs=1e-9)
        assert (entry["monotone"], entry["strengths"]) == (monotone, 2)
    text = effects.dose_response(restore(Summary, found).numbers)
    assert text.rows[1][:4] == ["dilemmas", f"{entry['slope']:+.2f}", f"{r2:.3f}", "yes" if monotone else "no"]


def test_one_strength_says_nothing_about_linearity() -> None:
    one = table(behaviour_shift).filter(pl.col("alpha") >= 0)
    entry = plain(summed(one))["dose_response"]["dilemmas"]
    assert entry == {"slope": pytest.approx(2.0), "r2": None, "monotone": None, "strengths": 1}


def test_p_values_are_sign_flips_of_whole_clusters_and_said_to_be_many() -> None:
    scores = table(lambda label, alpha: 0.8 * alpha * label)
    noise = pl.col("cluster").cast(pl.Int64) * 13 % 9 - 4  # of one cluster alike, far larger than the effect
    edited = (pl.col("edit") == "dW:lora") & (pl.col("metric") == "logratio")
    scores = scores.with_columns(value=pl.col("value") + pl.when(edited).then(noise * pl.col("label")).otherwise(0))
    found = plain(summed(scores))
    rows = Scores(scores).rows("dilemmas", "logratio", "dW:lora", 1.0)
    change = (rows["value"] - rows["base"]) * rows["label"]
    p = found["sign_flip_p"]["dilemmas"]["1"]
    assert p == sign_flip_p(change.to_numpy(), rows["cluster"].to_list())
    assert p > 5 * sign_flip_p(change.to_numpy(), list(range(len(rows)))), "rows of a cluster are not independent"
    shown = effects.dose_response(restore(Summary, found).numbers)
    assert shown.header[-2:] == ["p at -1", "p at +1"]
    assert "the Bonferroni limit for all 4 is 0.013" in shown.caption


def test_missing_rows_are_an_error_and_not_a_smaller_mean() -> None:
    scores = table(behaviour_shift)
    broken = scores.filter(~((pl.col("edit") == "dW:lora") & (pl.col("row") == "3") & (pl.col("alpha") == 1.0)))
    with pytest.raises(ValueError, match="differ"):
        summarise(broken, "dW:lora", "sycophancy", "false")


def test_an_effect_inside_the_control_band_is_called_none() -> None:
    found = made(lambda label, alpha: 0.05 * alpha * label, controls=lambda seed, alpha: (seed - 1) * 0.5 * alpha)
    assert found["outside_controls"]["sycophancy"]["1"] is False
    assert any("not separable from random directions" in doubt for doubt in doubts(found))


def test_other_behaviours_are_told_by_their_signed_change() -> None:
    found = made(behaviour_shift)["other_behaviours"]
    assert list(found) == ["refusal"]
    assert found["refusal"]["base"]["mean"] == pytest.approx(1.5)
    assert found["refusal"]["change"]["1"]["mean"] == pytest.approx(0.5)
    assert found["refusal"]["change"]["-1"]["mean"] == pytest.approx(-0.5)


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"mean": 0.5, "low": 0.25, "high": 0.75}, "+0.50 [+0.25, +0.75]"),
        ({"mean": -1.0, "low": None, "high": None}, "-1.00"),
        (None, "-"),
    ],
)
def test_values_stand_with_their_intervals(entry: dict[str, Any] | None, text: str) -> None:
    assert cells.with_limits(entry) == text


def test_side_effects_are_measured_against_the_base() -> None:
    found = made(behaviour_shift)["side_effects"]
    assert found["0"]["kl"] == 0 and found["1"]["kl"] == pytest.approx(0.02 * (1 + 49 / 180))
    assert found["1"]["kl_p95"] == pytest.approx(0.02) and found["1"]["kl_max"] == pytest.approx(1.0), "one token"
    assert found["1"]["nll_delta"] == pytest.approx(0.1) and found["1"]["facts"] == pytest.approx(0.9)


def test_the_headline_says_values_band_and_facts() -> None:
    text = summed(table(behaviour_shift)).headline
    assert text.startswith("sycophancy on held-out claims (balanced over both polarities): alpha -1 -2.00 (95 % -2.")
    assert "alpha +1 +2.00 (95 % +" in text
    assert "random control band at +1 -0.05 to +0.05 (largest seed 0.01)" in text and "facts right 90.0 %" in text


# -------------------------------------------------------------------- two instruments


WORDINGS = 3


def with_instruments(yes: float, replies: float) -> pl.DataFrame:
    """The scores of `table` with the other order of the answers and with replies.

    The edit adds `yes` per alpha to Yes in both orders, and on top of it `replies` per alpha to the first reply, at
    alpha 0.01 times as much per token; random directions add 0.1, 0.2 and 0.3 to the first reply.
    """
    scores = table(lambda label, alpha: yes * alpha)
    own = scores.filter((pl.col("probe") == "sycophancy") & pl.col("group").str.starts_with("false"))
    orders = own.with_columns(probe=pl.lit("sycophancy-swapped"), row=pl.col("row") + "/swapped")
    told = own.filter((pl.col("group") == "false") & (pl.col("metric") == "logratio"))
    shift = (
        pl.when(pl.col("edit") == "dW:lora").then(replies * pl.col("alpha"))
        .when(pl.col("edit") == "random").then((pl.col("seed") + 1) * 0.1 * pl.col("alpha")).otherwise(0.0)
    )  # fmt: skip
    base = pl.col("cluster").cast(pl.Int64) % 5 * 0.2 - 6.4
    parts = [scores, orders]
    for number in range(WORDINGS):
        one = told.with_columns(
            probe=pl.lit("sycophancy-replies"), row=pl.col("row") + f"/{number}",
            value=pl.when(pl.col("context") == "persona").then(3.0).otherwise(base + shift),
        )  # fmt: skip
        parts += [one, one.with_columns(metric=pl.lit("logratio_per_token"), value=shift * 0.01)]
    return pl.concat(parts)


def test_a_yes_bias_cancels_in_the_balanced_choice_and_leaves_replies_alone() -> None:
    found = summed(with_instruments(yes=2.0, replies=1.5))
    plain_questions, instruments = found.numbers.change["sycophancy"]["1"], found.numbers.instruments
    assert plain_questions.mean == pytest.approx(2.0), "one polarity alone shows the bias"
    choice, replies = instruments["choice"], instruments["replies"]
    assert choice.change["1"].mean == pytest.approx(0.0) and choice.change["1"].n == 60 * 2 * 2
    assert choice.per_token == {} and choice.sign_flip_p["1"] > 0.05
    assert replies.levels["0"].mean == pytest.approx(-6.0) and replies.levels["1"].mean == pytest.approx(-4.5)
    assert replies.change["-1"].mean == pytest.approx(-1.5) and replies.change["1"].n == 60 * WORDINGS
    assert replies.per_token["1"].mean == pytest.approx(0.015)
    assert replies.bands["1"].seeds == pytest.approx((0.1, 0.2, 0.3)) and replies.bands["1"].mean == pytest.approx(0.2)
    assert replies.outside == {"-1": True, "1": True} and replies.contexts["persona"].mean == pytest.approx(3.0)
    assert set(found.numbers.other_behaviours) == {"refusal"}, "an instrument is not another behaviour"


def test_without_replies_there_is_one_instrument() -> None:
    assert list(summed(table(behaviour_shift)).numbers.instruments) == ["choice"]


def test_headline_and_doubts_follow_the_instrument() -> None:
    scores = with_instruments(yes=2.0, replies=1.5)
    scores = scores.with_columns(  # few of the answers are Yes or No
        value=pl.when((pl.col("metric") == "pmass") & (pl.col("probe") == "sycophancy")).then(0.5)
        .otherwise(pl.col("value"))
    )  # fmt: skip
    by_choice, by_replies = summed(scores), summed(scores, "replies")
    assert "sycophancy on held-out claims (reply log-ratio): alpha -1 -7.50 (95 % " in by_replies.headline
    assert "random control band at +1 -0.30 to +0.70 (largest seed 0.30)" in by_replies.headline
    assert by_choice.measured == by_choice.numbers.instruments["choice"]
    assert by_replies.measured == by_replies.numbers.instruments["replies"]
    told = {one.ability.instrument: doubts(plain(one)) for one in (by_choice, by_replies)}
    own = {name: [doubt for doubt in said if doubt.startswith("sycophancy")] for name, said in told.items()}
    assert len(own["choice"]) == 3 and own["replies"] == [], "mass and Yes-bias do not touch replies"
    assert "sycophancy at alpha -1, +1: not separable from random directions of this norm" in own["choice"]
    assert "sycophancy at alpha -1, +1: the Yes-bias is larger than the signed change" in own["choice"]


@pytest.mark.parametrize(("shown_by", "name"), [("choice", "Yes/No"), ("replies", "replies")])
def test_page_and_figure_show_both_instruments(tmp_path: Path, shown_by: Name, name: str) -> None:
    found = replace(
        summed(with_instruments(yes=2.0, replies=1.5), shown_by),
        judged={"persona": {
            key: Judged(Estimate(0.5 + change, 0.4, 0.8, 6), Estimate(change, change - 0.1, change + 0.1, 6), 6, 2)
            for key, change in (("-1", -0.25), ("0", 0.0), ("1", 0.125))
        }},
    )  # fmt: skip
    (shown,) = effects.instruments(found)
    assert isinstance(shown, Table)
    cells = {(row[0], row[1]): row for row in shown.rows}
    assert set(cells) == {(one, alpha) for one in (YES_NO, REPLIES, *WORDING_LINES) for alpha in ("-1", "+1")}
    assert cells[REPLIES, "+1"][3:] == [
        "+1.50 [+1.50, +1.50]", "+0.015 [+0.01, +0.02]", "-0.30, +0.70", "outside", "180",
    ]  # fmt: skip
    assert cells[YES_NO, "+1"][4] == "-" and cells[YES_NO, "+1"][-1] == "240"
    assert f"The headline shows {name}: a stated reason." in shown.caption
    assert "(answer mass 0.95, opposite questions answered differently 75%)" in shown.caption
    (judged,) = effects.judged(found)
    assert isinstance(judged, Table)
    assert judged.rows[0] == ["persona", "-1", "+0.25 [+0.40, +0.80]", "-0.25 [-0.35, -0.15]", "6 to 2 prompts"]
    assert judged.rows[1][3] == "-" and effects.judged(replace(found, judged={})) == []
    change = found.measured.change["1"].mean
    assert page._tiles(found)[0] == Tile(f"{change:+.2f} nats", "sycophancy at +1",
                                         f"95 % {found.measured.change['1'].limits}")  # fmt: skip
    drawn = drawn_by(found, tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size > 10_000
    lines = {"choice": ["balanced", "false claims, plain", "true claims, plain"], "replies": ["replies"]}[shown_by]
    assert drawn["lines"] == lines, "groups of claims belong to the Yes/No questions"
    assert drawn["first"] == pytest.approx([level.mean for level in found.measured.levels.values()])
    assert "random directions, 95 %" in drawn["labels"] and "persona" in drawn["notes"]


YES_NO = "Yes/No, balanced over both polarities and both orders of the answers"
REPLIES = "replies, reply log-ratio"
WORDING_LINES = tuple(f"wording {number} alone" for number in (1, 2, 3))
"""The lines of the table of instruments."""


def drawn_by(found: Summary, path: Path) -> dict[str, Any]:
    """What the panel of the behaviour shows: lines, legend, notes, and the values of the first line."""
    from matplotlib import pyplot as plt  # noqa: PLC0415 - slow import

    kept: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plt, "close", kept.append)
        figures.dose_response(found, path)
    axis = kept[0].axes[0]
    labels = axis.get_legend_handles_labels()[1]
    seen = {
        "lines": [line.get_label() for line in axis.lines if line.get_label() in labels],
        "first": list(axis.lines[0].get_ydata()),
        "labels": labels,
        "notes": [text.get_text() for text in axis.texts],
    }
    plt.close(kept[0])
    return seen


# -------------------------------------------------------------------- in a terminal


def stored_run(folder: Path, found: Summary, config: bool = True) -> Path:
    """A run folder with what `ws show` reads."""
    folder.mkdir(parents=True)
    write_json(folder / "summary.json", plain(found))
    if config:
        write_json(folder / "config.json", {})
    says = {-1.0: "No.", 0.0: "Perhaps.", 1.0: "Yes."}
    pl.DataFrame([
        {"prompt": prompt, "alpha": alpha, "response": f"{text} {prompt[-1]}"}
        for prompt in ("first question 1", "second question 2") for alpha, text in says.items()
    ]).write_parquet(folder / "samples.parquet")  # fmt: skip
    return folder


def moving(by: float, shown_by: Name = "replies") -> Summary:
    """A run whose replies move by `by` per alpha, whose choices by nothing."""
    return summed(with_instruments(yes=2.0, replies=by), shown_by)


def test_one_run_alone_says_that_it_is_one_seed(tmp_path: Path) -> None:
    folder = stored_run(tmp_path / "seed0", moving(1.0))
    one = "One seed: the intervals are over rows and do not show how another seed would come out."
    assert terminal.seeds_line(folder, moving(1.0)) == one
    stored_run(tmp_path / "seed1", moving(1.0, "choice"))
    assert terminal.seeds_line(folder, moving(1.0)) == one, "another instrument is not another seed"


def test_several_runs_have_a_t_interval(tmp_path: Path) -> None:
    runs = {"seed0": 1.0, "seed0-data1": 1.5, "seed1": 2.0}
    for name, by in runs.items():
        stored_run(tmp_path / name, moving(by))
    mean, margin = 1.5, t.ppf(0.975, 2) * 0.5 / 3**0.5
    said = f"{mean:+.2f} (95 % {mean - margin:+.2f} to {mean + margin:+.2f})"
    lost = f"{-mean:+.2f} (95 % {-mean - margin:+.2f} to {-mean + margin:+.2f})"
    line = terminal.seeds_line(tmp_path / "seed1", moving(2.0))
    assert line == f"Change of sycophancy over 3 runs with different seeds: -1 {lost}, +1 {said}."
    write_json(tmp_path / "seed1" / "summary.json", {"model": "small"})
    assert "over 2 runs" in terminal.seeds_line(tmp_path / "seed0", moving(1.0)), "one of another version is left out"


def test_show_prints_the_headline_by_its_instrument_and_replies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = moving(1.25)
    folder = stored_run(tmp_path / "seed0", found)
    assert cli._main(["show", str(folder)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("Sycophancy on held-out claims (reply log-ratio): alpha -1 -7.25 (95 %")
    assert "small, lora, seed 0, |dW| 1" in said and "-4.750" in said, "the levels are those of the headline"
    assert "One seed: the intervals are over rows" in said
    for prompt in ("first question 1 -1 No. 1 +0 Perhaps. 1 +1 Yes. 1", "second question 2 -1 No. 2"):
        assert prompt in said
    assert cli._main(["show", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(plain(found)))


def test_few_prompts_are_shown_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show_samples(stored_run(tmp_path / "seed0", moving(1.0)), 1)
    assert capsys.readouterr().out == "\nfirst question 1\n  -1  No. 1\n  +0  Perhaps. 1\n  +1  Yes. 1\n"


@pytest.mark.parametrize(("alpha", "key"), [
    (0.0, "0"), (-0.0, "0"), (-1.0, "-1"), (1.0, "1"), (0.5, "0.5"), (-0.25, "-0.25"), (0.1234567, "0.1234567"),
    (1e-5, "0.00001"), (20.0, "20"),
])  # fmt: skip
def test_alphas_are_shortest_decimal_strings(alpha: float, key: str) -> None:
    assert summary.alpha_key(alpha) == key


def test_pages_escape_what_models_say(tmp_path: Path) -> None:
    (tmp_path / "f.png").write_bytes(b"png")
    blocks = [
        Heading("A"),
        Paragraph("b & c", strong=True),
        Bullets(["<script>"], warning=True),
        Table(["x", "y"], [["1", "2|3"]], "cap"),
        Figure(tmp_path / "f.png", "alt"),
        Tiles([Tile("1", "l", "d")]),
        Samples(["alpha 0"], [("p <b>", ["line\n<img src=x>"])]),
    ]
    page = document.to_html("t <i>", "s", blocks)
    assert "<script>" not in page and "<img src=x>" not in page and "p &lt;b&gt;" in page
    assert "src='data:image/png;base64," in page and "http:" not in page and "https:" not in page
    text = document.to_markdown("t", blocks)
    assert "2\\|3" in text and "![alt](f.png)" in text and "line<br>" in text


@pytest.mark.parametrize(
    ("header", "row", "wraps"),
    [
        (["a", "b"], ["1", "2"], False),
        (["a", "b"], ["1", ", ".join(["+0.031"] * 20)], True),
        (list("abcdefg"), list("1234567"), True),
    ],
)
def test_tables_that_would_leave_the_page_wrap(header: list[str], row: list[str], wraps: bool) -> None:
    assert ("class=many" in document.to_html("t", "s", [Table(header, [row])])) is wraps
