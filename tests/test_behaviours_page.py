"""The page that all behaviours of a model share: what each direction and each persona does to each behaviour."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from test_report import behaviour_shift, made
from ws.base.files import write_json, write_text
from ws.base.records import restore
from ws.edit.condition import PLAIN
from ws.eval import dilemmas, feedback
from ws.report import behaviours, document
from ws.report.document import Paragraph
from ws.report.findings import Summary

NAMES = ("honesty", "refusal", "sycophancy")


def interval(mean: float) -> dict[str, Any]:
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "n": 3}


def scores(own: str, moved: dict[str, float]) -> pl.DataFrame:
    """Two rows of every probe, without a system prompt and under `prompt +`; `moved` is the change under it."""
    rows = []
    for context, factor in ((PLAIN.name, 0.0), ("prompt +", 1.0)):
        for probe in (*NAMES, feedback.NAME, dilemmas.NAME):
            for row, (group, label) in {"a": ("head", 1), "b": ("head", -1), "c": ("other", 1)}.items():
                if group == "head" or probe == own:
                    change = moved.get(probe, 0.0) if group == "head" else 100.0
                    rows.append({
                        "probe": probe, "group": group, "row": row, "cluster": row, "label": label, "context": context,
                        "edit": "none", "alpha": 0.0, "seed": None, "metric": "logratio",
                        "value": 0.5 + factor * change * label,
                    })  # fmt: skip
    return pl.DataFrame(rows, schema_overrides={"seed": pl.Int64})


def summary_of(name: str, leaks: dict[str, float]) -> dict[str, Any]:
    changes = {other: {key: interval(leaks.get(other, 0.0)) for key in behaviours.KEYS} for other in NAMES}
    others = {other: {"base": interval(0.0), "change": change} for other, change in changes.items()}
    return {
        **made(behaviour_shift), "behaviour": name, "headline_group": "head",
        "change": {name: {"-1": interval(-2.0), "1": interval(2.0)}},
        "other_behaviours": {other: entry for other, entry in others.items() if other != name},
    }  # fmt: skip


def run_folder(model_folder: Path, name: str, leaks: dict[str, float], moved: dict[str, float]) -> Path:
    folder = model_folder / name / "lora" / "seed0"
    folder.mkdir(parents=True)
    write_json(folder / "summary.json", summary_of(name, leaks))
    write_json(folder / "config.json", {"behaviour": {"positive_means": f"is full of {name}"}})
    scores(name, moved).write_parquet(folder / "scores.parquet")
    said = [{"prompt": "Why?", "alpha": alpha, "response": f"{name} {alpha:+g}"} for alpha in (-1.0, 0.0, 1.0)]
    pl.DataFrame(said).write_parquet(folder / "samples.parquet")
    blocks = [Paragraph("The evidence.")]
    write_text(folder / "report.html", document.to_html(name, "a subtitle", blocks))
    write_text(folder / "report.md", document.to_markdown(name, blocks))
    return folder


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, list[Path]]:
    first = run_folder(
        tmp_path / "small", "refusal", {"sycophancy": -0.4}, {"refusal": 3.0, "sycophancy": -0.25, "feedback": 1.25}
    )
    second = run_folder(tmp_path / "small", "sycophancy", {"refusal": 1.26}, {"refusal": 0.75, "sycophancy": 4.0})
    return tmp_path / "small", [first, second]


def test_personas_stand_against_probes_in_nats(two: tuple[Path, list[Path]]) -> None:
    model_folder, _ = two
    page = behaviours.write(model_folder, "lora", "seed0")
    assert page is not None
    text = page.with_suffix(".md").read_text(encoding="utf-8")
    assert "| persona | refusal | sycophancy | feedback |" in text
    assert re.search(r"\| refusal, prompt \+ \| \+3\.00 \[.*\] \| -0\.25 \[.*\] \| \+1\.25 \[", text)
    assert re.search(r"\| sycophancy, prompt \+ \| \+0\.75 \[.*\] \| \+4\.00 \[", text)
    assert "+100" not in text, "the headline group alone is the behaviour"


def test_feedback_stands_beside_the_behaviours_and_is_explained(two: tuple[Path, list[Path]]) -> None:
    model_folder, (folder, _) = two
    written = summary_of("refusal", {})
    written["other_behaviours"][feedback.NAME] = {"base": interval(0.0), "change": {"1": interval(0.5)}}
    write_json(folder / "summary.json", written)
    page = behaviours.write(model_folder, "lora", "seed0")
    assert page is not None
    text = page.with_suffix(".md").read_text(encoding="utf-8")
    assert re.search(r"\| refusal at \+1 \|.*\| \+0\.50 \[\+0\.40, \+0\.60\] \|", text)
    assert re.search(r"\| refusal at -1 \|.*\| - \|", text), "what a run did not measure is a dash"
    assert feedback.MEANING in text


def test_what_crosses_to_another_behaviour_is_said_in_words(two: tuple[Path, list[Path]]) -> None:
    model_folder, _ = two
    page = behaviours.write(model_folder, "lora", "seed0")
    assert page is not None
    text = page.with_suffix(".md").read_text(encoding="utf-8")
    assert "sycophancy at +1 moves refusal by +1.26 nats (63 % of its own +2.00)" in text
    assert "refusal at +1 moves sycophancy" not in text, "20 % is not told"
    assert behaviours.crossings(restore(Summary, summary_of("refusal", {})), ["sycophancy"]) == []


def test_every_report_links_to_the_page_once(two: tuple[Path, list[Path]]) -> None:
    model_folder, folders = two
    for _ in range(2):
        behaviours.write(model_folder, "lora", "seed0")
    for folder in folders:
        for name, pattern in (("report.html", r"href='([^']*)'"), ("report.md", r"\]\(([^)]*)\)")):
            (target,) = re.findall(pattern, (folder / name).read_text(encoding="utf-8"))
            assert (folder / target).resolve() == (model_folder / f"behaviours{Path(name).suffix}").resolve()
            assert (folder / target).is_file() and "The evidence." in (folder / name).read_text(encoding="utf-8")


def test_a_run_of_another_version_is_left_out_with_a_warning(
    two: tuple[Path, list[Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    model_folder, (first, _) = two
    write_json(first / "summary.json", {"behaviour": "refusal"})
    assert behaviours.write(model_folder, "lora", "seed0") is None
    assert "the page of all behaviours leaves out" in capsys.readouterr().err


def test_a_single_behaviour_has_no_page_and_no_link(two: tuple[Path, list[Path]]) -> None:
    model_folder, (first, second) = two
    (second / "samples.parquet").unlink()
    assert behaviours.write(model_folder, "lora", "seed0") is None
    assert "href" not in (first / "report.html").read_text(encoding="utf-8")
