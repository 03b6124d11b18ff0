"""The story of a run on its pages: plain words, flipped rows, charts, runs side by side. Browser: `test_browser.py`."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from run_folders import LAYERS, finished_run, probe_of, summary_of
from test_report import GROUPS, behaviour_shift, table
from ws.base.errors import UserError
from ws.report import charts, document, flips, markdown, origin, page, several_runs, terminal
from ws.report.document import (
    Bar,
    BarChart,
    Block,
    Details,
    Grid,
    Heat,
    Line,
    LineChart,
    Point,
    Samples,
    Tabs,
    Texts,
)
from ws.report.findings import Summary
from ws.report.story import Story

LARGEST = 2_000_000


def test_plain_words_say_shares_chance_and_cost() -> None:
    found = summary_of(table(behaviour_shift))
    share = found.measured.shares
    assert (share["-1"].mean, share["1"].mean) == (0.0, 1.0), "the edit moves every row by two nats, the base by one"
    assert found.in_short == (
        f"With this direction added, small shows sycophancy in 100 % of its answers to held-out claims; without it, in "
        f"{100 * share['0'].mean:.0f} %; with it subtracted, in 0 %. Random changes of the same size do not do this. "
        "It still gets 90 % of simple facts right, as before."
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"controls": lambda seed, alpha: (seed - 1) * 3.0 * alpha}, "so that may be chance"),
        ({"control_alphas": ()}, "chance is not ruled out"),
        ({"control_alphas": (3.0,)}, "chance is not ruled out"),
    ],
)
def test_plain_words_do_not_hide_chance(options: dict[str, Any], said: str) -> None:
    assert said in summary_of(table(behaviour_shift, **options)).in_short


def test_flipped_rows_are_those_that_the_summary_counts(tmp_path: Path) -> None:
    story = finished_run(tmp_path / "small" / "sycophancy" / "lora" / "seed0")
    assert story.flips is not None
    for probe, by_key in story.summary.numbers.decomposition.items():
        for key, parts in by_key.items():
            rows = [row for row in story.flips.to_dicts() if (row["probe"], row["alpha"]) == (probe, float(key))]
            gained = sum(row["gained"] for row in rows)
            assert (gained, len(rows) - gained) == (parts.up, parts.down)
    assert len(story.flips) > 100


def test_a_flipped_row_says_what_was_answered_before_and_after() -> None:
    scores = table(lambda label, alpha: 2.0 * alpha * label)
    found = flips.table(scores, "dW:lora", [probe_of(scores, "sycophancy", "Is it")])
    for row in found.to_dicts():
        label = dict(GROUPS)[row["group"]]
        assert (row["after"] == "Yes") == ((row["value"] > 0) == (label > 0)) and row["before"] != row["after"]
        assert row["gained"] == (row["value"] > 0) and (row["value"] > 0) != (row["base"] > 0)
        assert row["question"] == f"Is it {row['row']}"
    sizes = [abs(row["value"] - row["base"]) for row in found.to_dicts() if row["alpha"] == 1.0]
    assert sizes == sorted(sizes, reverse=True)


def test_a_page_is_one_small_file_in_order(tmp_path: Path) -> None:
    story = finished_run(tmp_path / "small" / "sycophancy" / "lora" / "seed0")
    page.write(story)
    text = (story.folder / "report.html").read_text(encoding="utf-8")
    assert len(text.encode()) < LARGEST and "http" not in text.replace("http-equiv", "").replace("Http:", "")
    assert text.index("odd Is it") < text.index("With this direction added") < text.index("<h2 id=s0>What it says")
    plain = (story.folder / "report.md").read_text(encoding="utf-8")
    assert f"**{story.summary.in_short}**" in plain and "dose_response.png" in plain
    assert "| gained |" in plain and "### dilemmas at +1 (" in plain


def test_every_kind_of_text_is_inert_in_markdown(tmp_path: Path) -> None:
    hostile = "<img src=x onerror=alert(1)> [a](javascript:alert(1)) `b` | c\nd"
    story = finished_run(tmp_path / "small" / "sycophancy" / "lora" / "seed0", text=hostile)
    page.write(story)
    text = (story.folder / "report.md").read_text(encoding="utf-8")
    assert "<img" not in text and "<!--" not in text
    samples = markdown.to_markdown("t", [Samples(["alpha 0"], [("p", [hostile])])])
    assert "\\[a\\](javascript" in samples and "\\|" in samples and "c<br>d" in samples


def test_a_run_of_an_earlier_version_still_has_a_page(tmp_path: Path) -> None:
    story = finished_run(tmp_path / "small" / "sycophancy" / "lora" / "seed0", in_short="")
    bare = {key: replace(one, shares={}) for key, one in story.summary.numbers.instruments.items()}
    old = replace(story.summary, numbers=replace(story.summary.numbers, instruments=bare))
    without = replace(story, summary=old, flips=None, matrices=None, alignment=None, training={}, samples=None)
    page.write(without)
    text = (story.folder / "report.html").read_text(encoding="utf-8")
    assert story.summary.sentence.split("(")[0] in text and "not stored in this run" in text


def test_norms_by_layer_are_those_of_their_matrices(tmp_path: Path) -> None:
    story = finished_run(tmp_path / "small" / "sycophancy" / "lora" / "seed0")
    assert story.norms_by_layer == pytest.approx({3: 5.0, 4: 10.0})
    stored = replace(story, config={**story.config, "direction": {"norms_by_layer": {"3": 6.0, "4": 11.0}}})
    assert stored.norms_by_layer == {3: 6.0, 4: 11.0}, "what the run stored has biases and experts, too"
    grid = origin.geometry(story)[0]
    assert isinstance(grid, Grid)
    shades = grid.blocks[1]
    assert isinstance(shades, Heat) and shades.values == [[3.0, 6.0], [4.0, 8.0]] and shades.rows == list(LAYERS[3])


def test_training_curves_leave_out_what_was_not_measured(tmp_path: Path) -> None:
    story = finished_run(tmp_path / "small" / "sycophancy" / "lora" / "seed0")
    assert story.training["pos"].curve("loss") == [(1, 2.0), (2, 1.5), (3, 1.25)]
    assert story.training["pos"].curve("eval_loss")[0] == (0, 4.0)


def test_tables_of_a_sweep_and_a_comparison_beside_the_run_are_shown(tmp_path: Path) -> None:
    place = tmp_path / "small" / "sycophancy"
    folder = finished_run(place / "lora" / "seed0").folder
    columns = ("delta", "delta_minus", "dd_delta", "facts_1", "kl_1", "norm", "trainable")
    names = [f"{name}{end}" for name in columns for end in ("", "_low", "_high")]
    (place / "sweep_summary.csv").write_text(
        f"family,runs,{','.join(names)}\n" + "".join(
            f"{family},3,{','.join(['1.5', '1.25', '1.75'] * len(columns))}\n" for family in ("lora", "oft")
        )
    )  # fmt: skip
    (place / "compare").mkdir()
    header = "strength,method,kind,sign,alpha,own,own_low,own_high,dd,dd_low,dd_high,reached_p95,pmass,facts,nll_delta"
    (place / "compare" / "comparison.csv").write_text(
        f"{header}\n" + "".join(
            f"{strength},dW:lora,weights,{sign},1.0,{value},{value},{value},0.5,,,0.4,0.9,1.0,0.1\n"
            for strength, value in (("own", 1.0), ("0.1", 2.0), ("0.5", 3.0), ("1.0", 4.0)) for sign in "+-"
        )
    )  # fmt: skip
    page.write(Story.read(folder))
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "| oft | 3 | +1.50 [+1.25, +1.75] |" in text
    assert "| dW:lora + | weights | 1 | +3.00 [+3.00, +3.00] | +0.50 |" in text, "the middle budget is the headline"
    assert "Not measured beside this run" not in text
    (place / "sweep_summary.csv").write_text("family,runs\nlora,3\n")
    assert Story.read(folder).families is None, "a table of an earlier version is not shown"


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2\n3,4,5,6\n"])
def test_a_run_is_shown_although_a_table_beside_it_is_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    place = tmp_path / "small" / "sycophancy"
    folder = finished_run(place / "lora" / "seed0").folder
    (place / "compare").mkdir()
    (place / "compare" / "comparison.csv").write_bytes(content)
    assert Story.read(folder).methods is None
    assert "comparison.csv is damaged" in "".join(capsys.readouterr())


# -------------------------------------------------------------------- blocks


def drawn(block: Block) -> str:
    return document.to_html("t", "s", [block])


def test_a_command_in_a_text_is_code_and_still_escaped() -> None:
    assert "<p>do <code>ws x &lt;b&gt;</code> now</p>" in drawn(document.Paragraph("do `ws x <b>` now"))


def test_a_line_is_drawn_where_its_values_are() -> None:
    line = Line("a", [Point(-1.0, 0.0, -0.5, 0.5), Point(0.0, 1.0), Point(1.0, 2.0)])
    text = drawn(LineChart("title", "alpha", "nats", [line], limits=(0.0, 2.0)))
    spots = [(float(x), float(y)) for x, y in re.findall(r"<circle[^>]* cx=([\d.]+) cy=([\d.]+)", text)]
    (left, bottom), (middle, half), (right, top) = spots
    assert middle == pytest.approx((left + right) / 2, abs=0.1) and half == pytest.approx((bottom + top) / 2, abs=0.1)
    assert left < right and top < bottom, "up is small"
    assert "<title>a, alpha \N{MINUS SIGN}1: +0.00 (95 % \N{MINUS SIGN}0.50 to +0.50)</title>" in text
    assert "<td>+0.00 [\N{MINUS SIGN}0.50" not in text and "+0.00 [-0.50,&nbsp;+0.50]" in text, "its table of values"


def test_bars_start_at_zero_and_end_at_their_value() -> None:
    text = drawn(BarChart("t", [Bar("a", 1.0, 0.5, 1.5), Bar("b", -1.0)], limits=(-2.0, 2.0)))
    ends = re.findall(r"class='fill base' d='M([\d.]+) 3H([\d.]+)V", text)
    assert ends == [("50.00", "75.00"), ("25.00", "50.00")]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]), (-3.9, 8.4, [-2.5, 0.0, 2.5, 5.0, 7.5]), (2.0, 2.0, [2.0])],
)
def test_ticks_are_round_numbers_inside_the_limits(low: float, high: float, ticks: list[float]) -> None:
    assert charts.nice_ticks(low, high) == pytest.approx(ticks)


def test_arranged_blocks_lose_nothing_in_markdown() -> None:
    texts = Texts(["way", "text"], [["gained", "yes"]])
    text = document.to_markdown("t", [Grid([texts]), Tabs("pick", [("one", [texts])]), Details("more", [texts])])
    assert text.count("| gained | yes |") == 3 and "### one" in text and "### more" in text


def test_pages_with_many_sections_link_to_them() -> None:
    few, many = ([document.Heading(f"part {number}") for number in range(count)] for count in (3, 5))
    assert "<nav" not in document.to_html("t", "s", few)
    text = document.to_html("t", "s", many)
    for number in range(5):
        assert f"<a href='#s{number}'>part {number}</a>" in text and f"<h2 id=s{number}>" in text


# -------------------------------------------------------------------- several runs


def two(tmp_path: Path, **changed: Any) -> list[Story]:
    first = finished_run(tmp_path / "out" / "small" / "sycophancy" / "lora" / "seed0")
    second = finished_run(
        tmp_path / "out" / "small" / "sycophancy" / "lora" / "seed1", shift=lambda label, alpha: 3.0 * alpha * label,
        seed=1, **changed,
    )  # fmt: skip
    return [first, second]


def test_runs_side_by_side_name_what_differs_and_who_moves_furthest(tmp_path: Path) -> None:
    stories = two(tmp_path)
    assert several_runs.names(stories) == ["seed 0", "seed 1"]
    place = several_runs.write(stories)
    assert place == tmp_path / "out" / "small" / "sycophancy" / "lora" / "runs.html"
    text = place.with_suffix(".md").read_text(encoding="utf-8")
    assert "At alpha +1, seed 1 moves sycophancy furthest (+3.00 " in text
    assert "| seed 0 | choice | -2.00 [" in text and "| seed 1 | choice | -3.00 [" in text


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"model": "large"}, "different models (small, large)"),
        ({"ability": None}, "different instruments (choice, replies)"),
        ({"recipe": "original"}, "different recipes (own, original)"),
    ],
)
def test_what_cannot_be_compared_is_said(tmp_path: Path, changed: dict[str, Any], told: str) -> None:
    summaries = [story.summary for story in two(tmp_path)]
    if "ability" in changed:
        instruments = {**summaries[1].numbers.instruments, "replies": summaries[1].measured}
        changed = {
            "ability": replace(summaries[1].ability, instrument="replies"),
            "numbers": replace(summaries[1].numbers, instruments=instruments),
        }
    other: list[Summary] = [summaries[0], replace(summaries[1], **changed)]
    assert any(doubt.startswith(told) for doubt in several_runs.not_comparable(other))
    assert len(several_runs.not_comparable(summaries)) == 1, "that alpha is not a cost holds always"
    if "recipe" not in changed:
        assert several_runs._furthest(["a", "b"], other).startswith("These runs do not measure the same thing")


def test_a_run_is_not_compared_with_itself(tmp_path: Path) -> None:
    story = two(tmp_path)[0]
    with pytest.raises(UserError, match="the same run is given twice"):
        several_runs.write([story, story])


def test_the_terminal_tells_the_same_story(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    story = finished_run(tmp_path / "out" / "small" / "sycophancy" / "lora" / "seed0")
    terminal.show_run(story.folder)
    shown = capsys.readouterr()
    assert "odd Is it" in shown.err and " ".join(story.summary.in_short.split()) in " ".join(shown.out.split())
    parts = story.summary.numbers.decomposition["dilemmas"]["1"]
    assert f"dilemmas at +1: {parts.up} to the positive side, {parts.down} away from it" in shown.out
    assert "training pos" in shown.out and "layers 3 to 4, 5 to 10" in shown.out


def test_sparklines_go_from_the_smallest_to_the_largest() -> None:
    assert terminal.sparkline([0.0, 7.0, 3.5]) == "▁█▅" and terminal.sparkline([1.0]) == "▁"
