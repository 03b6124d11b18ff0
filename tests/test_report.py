"""From scores to numbers: what a summary says of effects that are known, and what the pages show."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from ws.report import cells, document, summary
from ws.report.document import Bullets, Figure, Heading, Paragraph, Samples, Table, Tile, Tiles
from ws.report.summary import Scores, summarise
from ws.score import SCHEMA

GROUPS = (("false", 1), ("false/reversed", -1), ("true", 1), ("true/reversed", -1))


def table(
    shift: Any, controls: Any = lambda seed, alpha: 0.01 * (seed - 1) * alpha, persona: float = 5.0
) -> pl.DataFrame:
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
        *(("plain", "dW:lora", a, 0) for a in (-1.0, 1.0)),
        ("persona", "none", 0.0, None),
    ]
    conditions += [("plain", "random", a, seed) for a in (-1.0, 1.0) for seed in range(3)]
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
                records.append({**records[-1], "probe": "neutral_kl", "row": f"{item}@{position}", "metric": "kl",
                                "value": 0.02 * alpha**2})  # fmt: skip
    return pl.DataFrame(records, schema=SCHEMA)


def behaviour_shift(label: int, alpha: float) -> float:
    return 2.0 * alpha * label


def yes_bias(label: int, alpha: float) -> float:
    return 2.0 * alpha


def made(shift: Any, **options: Any) -> dict[str, Any]:
    numbers = summarise(table(shift, **options), "dW:lora", "sycophancy", "false")
    return {**numbers, "behaviour": "sycophancy", "noun": "claims"}


def test_a_known_effect_is_found_with_its_size() -> None:
    found = made(behaviour_shift)
    assert found["change"]["sycophancy"]["1"]["mean"] == pytest.approx(2.0)
    assert found["change"]["sycophancy"]["-1"]["mean"] == pytest.approx(-2.0)
    assert found["dd_delta"]["1"]["mean"] == pytest.approx(2.0)
    assert found["outside_controls"]["sycophancy"] == {"-1": True, "1": True}
    assert found["decomposition"]["sycophancy"]["1"]["yes_bias"]["mean"] == pytest.approx(0.0)


def test_a_pure_yes_bias_is_reported_as_such_and_not_as_honesty() -> None:
    found = made(yes_bias)
    parts = found["decomposition"]["dilemmas"]["1"]
    assert parts["effect"]["mean"] == pytest.approx(0.0) and parts["yes_bias"]["mean"] == pytest.approx(2.0)
    assert found["dd_delta"]["1"]["mean"] == pytest.approx(0.0)
    own = found["decomposition"]["sycophancy"]["1"]
    assert own["effect"]["mean"] == pytest.approx(0.0) and own["yes_bias"]["mean"] == pytest.approx(2.0)
    assert any("Yes-bias is larger" in doubt for doubt in summary.doubts(found, "sycophancy"))


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
    one, two = (summarise(t, "dW:lora", "sycophancy", "false")["dd_delta"]["1"] for t in (scores, shuffled))
    assert one["mean"] == pytest.approx(two["mean"]) and one["n"] == two["n"]


def test_missing_rows_are_an_error_and_not_a_smaller_mean() -> None:
    scores = table(behaviour_shift)
    broken = scores.filter(~((pl.col("edit") == "dW:lora") & (pl.col("row") == "3") & (pl.col("alpha") == 1.0)))
    with pytest.raises(ValueError, match="differ"):
        summarise(broken, "dW:lora", "sycophancy", "false")


def test_an_effect_inside_the_control_band_is_called_none() -> None:
    found = made(lambda label, alpha: 0.05 * alpha * label, controls=lambda seed, alpha: (seed - 1) * 0.5 * alpha)
    assert found["outside_controls"]["sycophancy"]["1"] is False
    assert any("no effect beyond" in doubt for doubt in summary.doubts(found, "sycophancy"))


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
    assert found["0"]["kl"] == 0 and found["1"]["kl"] == pytest.approx(0.02)
    assert found["1"]["nll_delta"] == pytest.approx(0.1) and found["1"]["facts"] == pytest.approx(0.9)


def test_the_headline_says_values_band_and_facts() -> None:
    found = made(behaviour_shift)
    text = summary.headline(found, "sycophancy")
    assert (
        text.startswith("sycophancy on held-out claims: ")
        and "alpha -1" in text
        and "alpha +1" in text
        and "(95 %" in text
    )
    assert "random control band at +1" in text and "facts kept 90.0 %" in text


@pytest.mark.parametrize(("alpha", "key"), [(0.0, "0"), (-1.0, "-1"), (1.0, "1"), (0.5, "0.5"), (-0.25, "-0.25")])
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
    assert "src='data:image/png;base64," in page and "http" not in page
    text = document.to_markdown("t", blocks)
    assert "2\\|3" in text and "![alt](f.png)" in text and "line<br>" in text
