"""The comparison: splits, choices on dev rows, controls, and tables that say what the scores say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from making import in_fp64, random_direction
from ws import compare, models, stats
from ws.baselines import controls, gradient, prompts, repe, synthetic
from ws.baselines.repe import ActivationDirection, RepeSettings
from ws.behaviour import load
from ws.chat import SupervisedTokens
from ws.compare import Plan
from ws.condition import Condition, Edit
from ws.data import Grid
from ws.dev_split import is_dev, split
from ws.errors import UserError
from ws.eval import dilemmas, sycophancy
from ws.models import ChatModel
from ws.report import comparison as tables
from ws.report.comparison import Line
from ws.run_settings import Settings
from ws.score import SCHEMA, score

SMALL: dict[str, Any] = {
    "grid": Grid(topics=3, personas=2, samples=2),
    "train": {"rank": 2, "lora_alpha": 4, "lr": 5e-3, "batch_size": 8, "layers": (0.25, 0.75)},
    "sampling": {"max_new_tokens": 6},
    "samples": 1,
    "rows": 40,
}
PLAN = Plan(families=("lora", "ia3"), seeds=(0, 1), random_seeds=3, permutations=1, shuffles=2, target=0.005,
            calibration_prompts=3, calibration_tokens=6)  # fmt: skip


@pytest.fixture(scope="module")
def result(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> compare.Result:
    settings = Settings(model=str(tiny_folders["qwen3"]), out=tmp_path_factory.mktemp("runs"), **SMALL)
    return compare.run(settings, PLAN)


@pytest.mark.slow
def test_every_method_is_a_line_on_identical_rows(result: compare.Result) -> None:
    names = [entry["name"] for entry in result.summary["own_strength"]]
    assert {"dW:lora", "dW:ia3", "tau_pos (lora)", "tau_neg (lora)", "bisector (lora)", "RepE mean, all layers",
            "RepE mean, best single layer", "prompt: simple", "prompt: embody", "random", "layers permuted",
            "personas shuffled", "one gradient step", "synthetic, first input",
            "biases alone"} <= set(names)  # fmt: skip
    scores = pl.read_parquet(result.folder / "scores.parquet")
    rows = scores.filter(pl.col("metric") == "logratio", pl.col("probe") == "dilemmas")
    per_condition = rows.group_by("context", "edit", "alpha", "seed").agg(pl.col("row").sort().str.join("|"))
    assert per_condition["row"].n_unique() == 1
    assert not [name for name in rows["cluster"].unique().to_list() if is_dev(name)], "test rows only"


@pytest.mark.slow
def test_comparisons_stand_together_in_one_table(result: compare.Result, tmp_path: Path) -> None:
    other = replace(result, model="another", behaviour="honesty")
    path = compare.together([result, other], tmp_path)
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if "dW:lora" in line]
    assert [row[0].strip("| ") for row in rows] == [result.model, "another"] and rows[1][1] == "honesty"
    lora = next(entry for entry in result.summary["own_strength"] if entry["name"] == "dW:lora")
    assert all(f"{lora['+']['own']['mean']:+.2f} [" in row[4] and "; seeds " in row[4] for row in rows)
    entries = result.summary["own_strength"]
    best = [tables.best_of_kind(entries, kind) for kind in ("activations", "prompts")]
    listed = [e["name"] for e in entries if e["kind"] == "weights"] + [entry["name"] for entry in best if entry]
    methods = [line.split(" | ")[2] for line in text.splitlines() if line.startswith(f"| {result.model} |")]
    assert path.is_file() and methods == listed


@pytest.mark.slow
def test_the_tables_say_what_the_scores_say(result: compare.Result) -> None:
    scores = pl.read_parquet(result.folder / "scores.parquet")
    entry = next(e for e in result.summary["own_strength"] if e["name"] == "dW:lora")
    mine = scores.filter(
        pl.col("edit") == "dW:lora",
        pl.col("alpha") == 1.0,
        pl.col("probe") == "dilemmas",
        pl.col("metric") == "logratio",
    )
    base = scores.filter(pl.col("edit") == "none", pl.col("context") == "plain", pl.col("probe") == "dilemmas",
                         pl.col("metric") == "logratio").select("row", pl.col("value").alias("base"))  # fmt: skip
    joined = mine.join(base, on="row")
    change = ((joined["value"] - joined["base"]) * joined["label"]).mean()
    assert entry["+"]["dilemmas"]["mean"] == pytest.approx(float(change))  # type: ignore[arg-type]
    assert len(entry["+"]["dilemmas"]["seeds"]) == 2 and entry["+"]["dilemmas"]["over_seeds"]["n"] == 2
    text = (result.folder / "comparison.md").read_text()
    assert result.headline[1:60] in text and (result.folder / "pareto.png").stat().st_size > 10_000


@pytest.mark.slow
def test_equal_divergence_is_equal_or_marked(result: compare.Result) -> None:
    found = result.summary["calibration"]
    assert found["target"] == PLAN.target and "dW:lora" in found["edits"]
    for solved in found["edits"].values():
        for sign, side in solved.items():
            assert side["alpha"] * int(sign) > 0
            assert side["converged"] == (abs(side["p95"] - found["target"]) <= 0.05)
    assert {e["name"] for e in result.summary["equal_kl"]} == set(found["edits"])


@pytest.mark.slow
def test_a_second_comparison_measures_nothing_anew(
    result: compare.Result, tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("scored again")

    stamps = {p: p.stat().st_mtime_ns for p in result.folder.glob("*.parquet")}
    settings = Settings(model=str(tiny_folders["qwen3"]), out=result.folder.parents[2], **SMALL)
    assert compare.run(settings, PLAN).headline == result.headline
    assert {p: p.stat().st_mtime_ns for p in result.folder.glob("*.parquet")} == stamps


# -------------------------------------------------------------------- splits and methods


def test_the_split_keeps_clusters_whole_and_never_drifts() -> None:
    probe = dilemmas.probe()
    dev, test = split(probe, dev=True), split(probe, dev=False)
    clusters = [{row.cluster for row in part.rows} for part in (dev, test)]
    assert not clusters[0] & clusters[1] and len(dev.rows) + len(test.rows) == len(probe.rows)
    assert 0.15 < len(dev.rows) / len(probe.rows) < 0.35
    assert is_dev("broken_things/6") is is_dev("broken_things/6")


def test_engineered_prompts_never_mention_how_a_probe_asks() -> None:
    for name in ("sycophancy", "honesty", "refusal"):
        found = prompts.engineered(name)
        assert {p.side for p in found if p.kind == "embody"} == {1, -1}
        personas = load(name).personas
        for prompt in found:
            assert prompt.text not in (*personas.positive, *personas.negative)
            assert not [
                word for word in ("Yes", "No", "answer:", "choice", "dilemma", "**") if word in prompt.text.split()
            ]


def test_permuted_layers_keep_every_norm_and_no_place(qwen: ChatModel) -> None:
    direction = random_direction(qwen, layers=[0, 1, 2, 3])
    moved = controls.permuted_layers(direction, 0)
    assert moved.norm() == pytest.approx(direction.norm()) and moved.deltas.keys() == direction.deltas.keys()
    for name, delta in moved.deltas.items():
        assert not torch.equal(in_fp64(delta), in_fp64(direction.deltas[name]))
    with pytest.raises(UserError, match="one layer"):
        controls.permuted_layers(direction.keep(layers=[1]), 0)


def test_shuffled_pairs_exchange_whole_sides_of_half_of_the_rows() -> None:
    pairs = pl.DataFrame({
        "prompt": [f"p{n}" for n in range(200)], "response_pos": ["+"] * 200, "response_neg": ["-"] * 200,
        "keep_pos": [True] * 200, "keep_neg": [False] * 200,
    })  # fmt: skip
    shuffled = controls.shuffled_pairs(pairs, 0)
    swapped = shuffled["response_pos"] == "-"
    assert 70 < swapped.sum() < 130
    assert (shuffled["keep_pos"] == ~swapped).all() and (shuffled["response_neg"] != shuffled["response_pos"]).all()
    assert shuffled["prompt"].to_list() == pairs["prompt"].to_list()
    assert controls.shuffled_pairs(pairs, 1)["response_pos"].to_list() != shuffled["response_pos"].to_list()


def test_synthetic_writes_are_rank_one_and_of_the_asked_size(any_model: ChatModel) -> None:
    activation = repe.fit(any_model, load("sycophancy"), RepeSettings(personas=1))
    for source in synthetic.INPUTS:
        direction = synthetic.residual_writes(any_model, activation, source)
        assert direction.provenance["constructed_before_trained_diff_load"] is True
        for name, delta in direction.deltas.items():
            weight = any_model.network.get_parameter(name).data.double()
            assert delta.rank == 1 and name.split(".")[-2] in ("o_proj", "down_proj", "c_proj")
            assert float(in_fp64(delta).norm()) == pytest.approx(1e-3 * float(weight.norm()), rel=1e-5)


def test_one_gradient_step_lowers_the_contrast_loss(qwen: ChatModel) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [SupervisedTokens(torch.randint(5, 900, (12,), generator=generator).tolist(), 4) for _ in range(6)]
    positive, negative = rows[:3], rows[3:]

    def loss(part: list[SupervisedTokens]) -> float:
        total = count = 0.0
        for ids, prompt in part:
            with torch.no_grad():
                logits = qwen.network(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            total -= float(sum(logits[at - 1, ids[at]] for at in range(prompt, len(ids))))
            count += len(ids) - prompt
        return total / count

    step = gradient.one_step(qwen, positive, negative, norm=0.05)
    assert step.norm() == pytest.approx(0.05, rel=1e-4)
    before = loss(positive) - loss(negative)
    from ws.steering import steer  # noqa: PLC0415

    with steer(qwen, step, 1.0):
        after = loss(positive) - loss(negative)
    with steer(qwen, step, -1.0):
        other = loss(positive) - loss(negative)
    assert after < before < other
    assert not any(parameter.requires_grad for parameter in qwen.network.parameters())


# -------------------------------------------------------------------- tables on known scores


def known(shift: Any, control: Any = lambda seed: 0.02 * (seed - 2)) -> pl.DataFrame:
    """Scores of one edit, five random controls and a prompt on sixty claims and sixty dilemmas of two rows."""
    records: list[dict[str, Any]] = []
    conditions = [
        ("plain", "none", 0.0, None),
        *(("plain", "edit", a, 0) for a in (1.0, -1.0)),
        ("p +", "none", 0.0, None),
    ]
    conditions += [("plain", "random", a, seed) for a in (1.0, -1.0) for seed in range(5)]
    for context, edit, alpha, seed in conditions:
        key = {"context": context, "edit": edit, "alpha": alpha, "seed": seed, "data_seed": None}
        for item in range(60):
            for label in (1, -1):
                base = 0.4 * label + ((item * 7) % 11 - 5) / 10
                move = shift(label, alpha) if edit == "edit" else control(seed) * label if edit == "random" else 0.0
                move += 1.5 * label if context == "p +" else 0.0
                for probe in ("sycophancy", "dilemmas"):
                    names = {
                        "probe": probe,
                        "group": "false",
                        "row": f"{item}/{label}",
                        "cluster": f"{item}",
                        "label": label,
                    }
                    records.append({**names, **key, "metric": "logratio", "value": base + move})
                    records.append({**names, **key, "metric": "pmass", "value": 0.95})
            side = {"group": "true", "row": f"{item}", "cluster": f"{item}", "label": 1, **key}
            records.append({"probe": "facts", **side, "metric": "logratio", "value": 1.0 if item < 54 else -1.0})
            records.append({"probe": "neutral_kl", **side, "metric": "kl", "value": 0.02 * alpha**2})
    return pl.DataFrame(records, schema=SCHEMA)


LINES = [
    Line("edit", "weights", {"+": ("plain", "edit", 1.0), "-": ("plain", "edit", -1.0)}),
    Line("prompt", "prompts", {"+": ("p +", "none", 0.0)}),
    Line("random", "controls", {"+": ("plain", "random", 1.0), "-": ("plain", "random", -1.0)}),
]


def measured(shift: Any, **options: Any) -> dict[str, dict[str, Any]]:
    entries = tables.measure(tables.Comparison(known(shift, **options), "sycophancy", "false"), LINES)
    return {entry["name"]: entry for entry in entries}


def test_known_effects_stand_in_the_table() -> None:
    found = measured(lambda label, alpha: 2.0 * alpha * label)
    assert found["edit"]["+"]["own"]["mean"] == pytest.approx(2.0)
    assert found["edit"]["-"]["own"]["mean"] == pytest.approx(-2.0) and found["edit"]["+"]["own"]["outside"] is True
    assert found["prompt"]["+"]["own"]["mean"] == pytest.approx(1.5) and "-" not in found["prompt"]
    assert found["random"]["+"]["own"]["seeds"] == pytest.approx([-0.04, -0.02, 0.0, 0.02, 0.04])
    assert found["edit"]["+"]["facts"] == pytest.approx(0.9) and found["edit"]["+"]["kl"] == pytest.approx(0.02)
    controls_found = tables.control_means(list(found.values()))
    mean = next(c for c in controls_found if c["sign"] == "+" and c["probe"] == "own")["mean"]
    assert mean["low"] < 0 < mean["high"]


def test_a_yes_biased_direction_is_reported_as_yes_bias_and_not_as_honesty() -> None:
    entry = measured(lambda label, alpha: 2.0 * alpha)["edit"]
    parts = entry["+"]["decomposition"]
    assert parts["truth"] == pytest.approx(0.0) and parts["bias"] == pytest.approx(2.0)
    assert entry["+"]["dilemmas"]["mean"] == pytest.approx(0.0)
    assert entry["informedness"]["k1"]["balanced"] <= 0


def test_a_confident_direction_is_reported_as_confidence() -> None:
    table = known(lambda label, alpha: 0.0)
    louder = table.with_columns(
        pl.when((pl.col("edit") == "edit") & (pl.col("metric") == "logratio"))
        .then(pl.col("value") * 1.5).otherwise(pl.col("value")).alias("value")
    )  # fmt: skip
    entry = tables.measure(tables.Comparison(louder, "sycophancy", "false"), LINES)[0]
    parts = entry["+"]["decomposition"]
    assert parts["scale"] == pytest.approx(1.5) and parts["truth"] > 0.1
    assert parts["beyond_scale"] == pytest.approx(0.0, abs=1e-6)


def test_an_effect_within_the_control_band_is_called_none() -> None:
    entries = list(measured(lambda label, alpha: 0.05 * alpha * label, control=lambda seed: 0.3 * (seed - 2)).values())
    assert entries[0]["+"]["own"]["outside"] is False
    assert "no effect at +" in tables.headline(entries, "sycophancy")


def test_rows_that_are_not_those_of_the_base_are_an_error() -> None:
    table = known(lambda label, alpha: 0.0)
    broken = table.filter(~((pl.col("edit") == "none") & (pl.col("row") == "3/1")))
    with pytest.raises(ValueError, match="not those of the base"):
        tables.measure(tables.Comparison(broken, "sycophancy", "false"), LINES[:1])


def test_persona_rows_never_enter_the_base() -> None:
    one, two = measured(lambda label, alpha: alpha * label), measured(lambda label, alpha: alpha * label)
    assert one["edit"]["+"]["own"]["mean"] == two["edit"]["+"]["own"]["mean"] == pytest.approx(1.0)


def test_a_built_yes_bias_of_a_real_model_shows_as_such(qwen: ChatModel) -> None:
    """An activation direction along (Yes - No) of the unembedding, in the last layer."""
    head = models.load(qwen.name).network.get_output_embeddings().weight.data
    yes, no = (torch.tensor([ids[0] for ids in qwen.chat.answers(word)]) for word in ("Yes", "No"))
    vector = head[yes].mean(dim=0) - head[no].mean(dim=0)
    effect = ActivationDirection({qwen.layer_count - 1: 3 * vector / vector.norm()}, qwen.fingerprint)
    probes = [dilemmas.probe(limit=20), sycophancy.headline_probe(load("sycophancy"), 20)]
    table = score(qwen, probes, [Condition.of(Edit("bias", effect), 1.0)])
    rows = table.filter(pl.col("probe") == "dilemmas", pl.col("metric") == "logratio")
    base = rows.filter(pl.col("edit") == "none").sort("row")
    after = rows.filter(pl.col("edit") == "bias").sort("row")
    parts = stats.decompose(*(column.to_numpy() for column in (base["value"], after["value"], base["label"])))
    assert parts.bias > 20 * abs(parts.truth) and parts.bias > 0.05


def test_results_can_be_written_as_json(tmp_path: Path) -> None:
    entries = list(measured(lambda label, alpha: alpha * label).values())
    tables.write(tmp_path, "t", entries, [], {"target": 0.5, "anchor": None}, "sycophancy", 0.9)
    assert json.loads((tmp_path / "comparison.json").read_text())["base_facts"] == 0.9
