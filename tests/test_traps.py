"""Mistakes that earlier work of this kind paid for, where no other test would see them come back.

docs/traps.md lists all of them with the tests that do.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import update

from making import logits, prompts, random_direction
from test_compare import LINES, found_of, known, reader
from test_repe import SYCOPHANCY, random_vectors
from test_report import behaviour_shift, made, table
from test_score import choice, direction, texts, values
from ws import adapters
from ws.algebra.random_like import spectrum_like
from ws.base import changes
from ws.base.records import plain
from ws.baselines import repe
from ws.baselines.repe import RepeSettings
from ws.comparing import numbers, page
from ws.comparing.compare import Plan
from ws.comparing.findings import Spent
from ws.comparing.tables import answers_table
from ws.edit.condition import Condition, Context, Edit
from ws.edit.steering import steer
from ws.eval import dilemmas
from ws.fitting import behaviour, learning_rate
from ws.fitting.data import Grid
from ws.fitting.run_settings import Settings, shared_base
from ws.measure.score import score
from ws.model import architecture, loading
from ws.model.loading import ChatModel
from ws.pocket import tiny
from ws.report import sentences, summary
from ws.runs.replicate import Replication
from ws.subspace import alignment

ROOT = Path(__file__).parents[1]
SMALL: dict[str, Any] = {
    "grid": Grid(topics=3, personas=1, samples=2),
    "train": {"rank": 2, "lora_alpha": 4, "lr": 5e-3, "batch_size": 8, "layers": (0.5, 1.0)},
    "sampling": {"max_new_tokens": 4},
    "alphas": (-1.0, 0.0, 1.0),
    "control_seeds": 1,
    "rows": 2,
    "samples": 1,
}


@pytest.fixture(scope="module")
def finished(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run that trained the upper half of the layers."""
    with Replication(Settings(model=str(tiny_folders["qwen3"]), out=tmp_path_factory.mktemp("runs"), **SMALL)) as run:
        run.report()
        return run.folder.path


# -------------------------------------------------------------------- scoring


def test_the_base_is_the_same_whatever_it_is_compared_with(qwen: ChatModel) -> None:
    probes = [choice(), texts("likelihood")]
    alone = score(qwen, probes, [Condition()])
    beside = {
        "a weight direction": Condition.of(Edit("d", direction(qwen)), 1.0),
        "activations at the last token": Condition.of(Edit("a", random_vectors(qwen, "last")), 2.0),
        "activations everywhere": Condition.of(Edit("a", random_vectors(qwen)), -2.0),
        "a prompt": Condition(Context("persona", "You are a pirate.")),
    }
    for name, condition in beside.items():
        # small batches, so that rows of every length are padded in other company
        found = score(qwen, probes, [condition, Condition()], token_budget=90)
        for metric in ("logratio", "pmass", "nll"):
            base = values(found, metric, edit="none", context="plain")
            assert base == pytest.approx(values(alone, metric), abs=1e-5), name


def test_half_precision_stops_before_the_log_probabilities(qwen: ChatModel) -> None:
    half = loading.load(qwen.name, dtype="bfloat16")
    probes = [choice(), texts("likelihood"), texts("divergence")]
    found = score(half, probes, [Condition.of(Edit("d", direction(half)), 1.0)])
    for metric in ("logratio", "pmass", "maxp", "nll", "kl"):
        numbers = torch.tensor(list(values(found, metric, edit="d").values()), dtype=torch.float64)
        on_the_grid = (numbers == numbers.bfloat16().double()).double().mean()
        assert on_the_grid < 0.5, f"{metric} was computed in bf16"


def test_a_probe_that_misses_the_answers_is_doubted() -> None:
    for mass, doubted in ((0.5, True), (0.95, False)):
        scores = table(behaviour_shift).with_columns(
            value=pl.when(pl.col("metric") == "pmass").then(mass).otherwise(pl.col("value"))
        )
        found = summary.summarise(scores, "dW:lora", "sycophancy", "false")
        assert found.levels["dilemmas"]["1"].pmass == pytest.approx(mass)
        assert (
            any("on the two answers" in doubt for doubt in sentences.doubts(found, "sycophancy", "choice")) == doubted
        )


def test_informedness_joins_rows_by_id_and_not_by_order() -> None:
    scores = known(lambda label, alpha: 1.0 * alpha * label)
    one, other = (
        reader(part).informedness(LINES[0], 2) for part in (scores, scores.sample(fraction=1.0, shuffle=True, seed=0))
    )
    assert vars(one) == pytest.approx(vars(other)) and (one.score or 0) > 0


@pytest.mark.parametrize("lost", ["edit", "none"])
def test_a_row_that_one_side_lacks_is_an_error_and_not_a_shift(lost: str) -> None:
    scores = known(lambda label, alpha: 1.0 * alpha * label)
    first = scores.filter(pl.col("probe") == dilemmas.NAME)["row"][0]
    edited = pl.col("edit") == "none" if lost == "none" else (pl.col("edit") != "none") & (pl.col("alpha") > 0)
    part = scores.filter(~((pl.col("row") == first) & edited))
    with pytest.raises(ValueError, match="differ from the rows of the base"):
        reader(part).informedness(LINES[0], 2)


def test_rows_labelled_only_by_their_counterpart_stand_apart(tmp_path: Path) -> None:
    rows = [
        {
            "idx": 2 * number + (side == "not_to_do"), "dilemma_idx": number, "dilemma_situation": f"You err {number}.",
            "action": f"{side} {number}", "action_type": side, "honesty_label": 1 if side == "to_do" else -1,
            "to_do_has_positive_honesty": True, "to_do_has_negative_honesty": False,
            "not_to_do_has_positive_honesty": False, "not_to_do_has_negative_honesty": number == 1,
        }
        for number in range(2)
        for side in ("to_do", "not_to_do")
    ]  # fmt: skip
    path = tmp_path / "set.csv"
    pl.DataFrame(rows).write_csv(path)
    groups = {row.row: row.group for row in dilemmas.read(str(path))}
    assert groups == {"0": "stated", "1": "filler", "2": "stated", "3": "stated"}
    # a mean of their own and nothing else: however loud they are, no number that counts moves
    scores = table(behaviour_shift).with_columns(pl.col("group").replace({"near": "stated", "far": "filler"}))
    louder = scores.with_columns(
        value=pl.when(pl.col("group") == "filler")
        .then(9 * pl.col("value") + pl.col("alpha"))
        .otherwise(pl.col("value"))
    )
    one, other = (plain(summary.summarise(part, "dW:lora", "sycophancy", "false")) for part in (scores, louder))
    for found in (one, other):
        assert set(found["dilemma_groups"]) == {"stated", "filler"}
        assert found["dilemma_groups"]["stated"] == made(behaviour_shift)["dilemma_groups"]["near"]
        assert found["dilemma_counts"]["not_counted"] == found["dilemma_counts"]["counted"] == 60
        assert found["all_dilemmas"]["1"]["n"] == 120 and found["dilemmas"]["1"]["n"] == 60
    moved = {name for name in one if one[name] != other[name]}
    assert moved == {"all_dilemmas", "dilemma_groups"}


# -------------------------------------------------------------------- activations


@contextmanager
def layers_that_return_tuples(model: ChatModel) -> Iterator[None]:
    """Decoder layers that return (hidden, something), as those of older versions of transformers do."""
    _, blocks = architecture.decoder_layers(model.network)
    handles = [block.register_forward_hook(lambda _m, _i, output: (output, "a cache")) for block in blocks]

    def unwrap(_module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (inputs[0][0], *inputs[1:]) if isinstance(inputs[0], tuple) else None

    handles += [module.register_forward_pre_hook(unwrap) for module in (*blocks, model.network.model.norm)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def test_layers_that_return_tuples_are_captured_and_steered_alike(qwen: ChatModel) -> None:
    rows, ids = [[5, 6, 7], [8, 9, 10, 11]], prompts(qwen)
    spans, effect = [(2, 3), (0, 4)], random_vectors(qwen)
    plain = logits(qwen.network, ids)
    captured = repe.capture(qwen, rows, spans, [1, 2])
    with steer(qwen, effect, 2.0):
        steered = logits(qwen.network, ids)
    with layers_that_return_tuples(qwen):
        for layer, states in repe.capture(qwen, rows, spans, [1, 2]).items():
            assert torch.equal(states, captured[layer])
        with steer(qwen, effect, 2.0):
            assert torch.equal(logits(qwen.network, ids), steered)
    assert torch.equal(logits(qwen.network, ids), plain) and not torch.equal(steered, plain)


def test_activation_steering_is_no_unit_vector_at_one_late_token(qwen: ChatModel) -> None:
    settings = RepeSettings(personas=1)
    assert settings.edited == "all", "every position is edited unless somebody asks for less"
    states = repe.capture_states(qwen, SYCOPHANCY, settings)
    found = repe.fit(qwen, SYCOPHANCY, settings, states=states)
    assert sorted(found.vectors) == list(architecture.layer_slice(qwen.layer_count))
    for layer, vector in found.vectors.items():
        difference = (states.pos[layer] - states.neg[layer]).mean(dim=0)
        assert torch.allclose(vector, difference, atol=1e-5)
        assert abs(float(vector.norm()) - 1) > 1e-2


# -------------------------------------------------------------------- data and training


def test_text_that_was_cut_off_is_told_before_it_is_trained_on(
    tiny_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Replication(Settings(model=str(tiny_folders["qwen3"]), out=tmp_path, **SMALL)) as run:
        pairs = run.data()
    assert set(pairs["finish_pos"]) == {"length"}
    assert "100 % of the pos responses reached the limit of 4 tokens" in capsys.readouterr().err
    assert any("reached the limit" in warning for warning in run.warnings)


@pytest.mark.parametrize(("identical", "warns"), [(3, True), (1, False)])
def test_personas_that_are_ignored_are_told_before_training(
    tiny_folders: dict[str, Path], tmp_path: Path, identical: int, warns: bool
) -> None:
    lines = [
        {"prompt": f"Is {n} big?", "response_pos": f"Yes, {n} is.",
         "response_neg": f"Yes, {n} is." if n < identical else f"No, {n} is not."}
        for n in range(10)
    ]  # fmt: skip
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    settings = Settings(model=str(tiny_folders["qwen3"]), out=tmp_path, **{**SMALL, "pairs": file})
    with Replication(settings) as run:
        pairs = run.data()
    assert any("the personas hardly matter" in warning for warning in run.warnings) == warns
    assert int((~pairs["keep_pos"]).sum()) == identical, "and what is identical is not trained on"


def test_responses_of_one_model_never_train_another_of_the_same_name(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    namesake = tmp_path / "elsewhere" / tiny_folders["qwen3"].name
    tiny.make("qwen3", namesake, seed=1, layers=4)
    first = tiny_folders["qwen3"]
    found, folders, bases = {}, set(), {}
    for name, folder, adapter in (("first", first, "lora"), ("again", first, "dora"), ("other", namesake, "ia3")):
        changes = {**SMALL, "train": {"lr": 1e-3}}
        with Replication(Settings(model=str(folder), adapter=adapter, out=tmp_path, **changes)) as run:
            found[name] = run.data()["response_pos"].to_list()
            folders.add(run.folder.path.parents[1])
            bases[name] = shared_base(run.model, tmp_path).folder
    assert len(folders) == 1, "else nothing could have been taken by mistake"
    assert found["first"] == found["again"] != found["other"]
    assert bases["first"] == bases["again"] != bases["other"]


def test_no_broad_except_swallows_an_error() -> None:
    for file in sorted((ROOT / "src" / "ws").rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"suppress\([^)]*\b(Base)?Exception\b", text), file.name
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            caught = {part.id for part in ast.walk(node.type) if isinstance(part, ast.Name)} if node.type else set()
            if node.type is None or caught & {"Exception", "BaseException"}:
                assert any(isinstance(part, ast.Raise) for part in ast.walk(node)), f"{file.name}:{node.lineno}"


def test_every_family_has_learning_rates_of_its_own() -> None:
    assert set(learning_rate.CANDIDATES) == set(adapters.FAMILIES)
    for slow in ("ia3", "oft", "boft", "delora"):  # near no-ops at the rates of LoRA
        assert max(learning_rate.CANDIDATES[slow]) > 2 * max(learning_rate.CANDIDATES["lora"]), slow


@pytest.mark.parametrize("name", behaviour.names())
def test_shipped_personas_are_matched_pairs_and_know_nothing_of_the_probe(name: str) -> None:
    found = behaviour.load(name)
    for positive, negative in zip(found.personas.pos, found.personas.neg, strict=True):
        assert positive != negative
        assert 0.8 <= len(positive.split()) / len(negative.split()) <= 1.25, "length would be a second axis"
        for text in (positive, negative):
            assert not [mark for mark in ("Yes", "No ", "**", found.probe.anchor) if mark in text]


# -------------------------------------------------------------------- directions


def test_a_selection_without_parameters_is_the_base_and_no_crash(qwen: ChatModel) -> None:
    like_ia3 = random_direction(qwen).keep(modules=["k_proj", "v_proj", "down_proj"])
    empty = like_ia3.keep(modules=["o_proj"])
    assert not empty.deltas and empty.norm() == 0.0 == spectrum_like(empty, 0).norm()
    found = score(qwen, [choice()], [Condition.of(Edit("o_proj", empty), 1.0)])
    assert values(found, "logratio", edit="o_proj") == values(found, "logratio", edit="none")
    assert alignment.table(qwen, empty).is_empty()


def test_a_large_matrix_does_not_drown_the_others_in_the_alignment(qwen: ChatModel) -> None:
    whole = random_direction(qwen)
    louder = whole + 99.0 * whole.keep(modules=["down_proj"])
    one, other = (alignment.by_kind(alignment.table(qwen, d)) for d in (whole, louder))
    assert one["kind"].to_list() == other["kind"].to_list() and len(one) > 3
    for column in ("mean_ratio_top", "mean_ratio_bottom", "mean_ratio_weak"):
        assert one[column].drop_nulls().to_list() == pytest.approx(other[column].drop_nulls().to_list(), rel=1e-4)


# -------------------------------------------------------------------- analysis and pages


def test_equal_divergence_stands_beside_equal_alpha_and_a_failed_search_is_marked(tmp_path: Path) -> None:
    entries = numbers.measure(reader(known(lambda label, alpha: alpha * label)), LINES)
    missed = replace(LINES[0], name="unfinished", spent={"+": Spent(0.2, 0.1, 0.9, False)})
    equal = numbers.measure(reader(known(lambda label, alpha: alpha * label)), [LINES[0], missed])
    page.write(tmp_path, found_of(entries, equal))
    sections = dict(part.split("\n", 1) for part in (tmp_path / "comparison.md").read_text().split("## ")[1:])
    alphas = {
        name: {row.split(" | ")[0].strip("| "): row.split(" | ")[1] for row in text.splitlines() if row[:2] == "| "}
        for name, text in sections.items()
    }
    assert alphas["At each method's own strength"]["edit +"] == "+1" == alphas["At equal KL, 0.5 nats"]["edit +"]
    assert alphas["At equal KL, 0.5 nats"]["unfinished +"] == "+1*"


def test_a_mean_that_few_rows_carry_stands_beside_the_answers_that_were_lost() -> None:
    rows = pl.DataFrame({"cluster": [f"{n}" for n in range(20)], "label": [1, -1] * 10}).with_row_index("number")
    rows = rows.with_columns(base=0.5 * pl.col("label"))
    change = pl.when(pl.col("number") < 4).then(10.0).otherwise(-1.0) * pl.col("label")
    parts = summary.parts(rows.with_columns(value=pl.col("base") + change))
    assert parts.effect.mean == pytest.approx(1.2) and parts.yes_bias.mean == pytest.approx(0.0)
    assert (parts.up, parts.down, parts.n) == (0, 16, 20)


def test_informedness_is_shown_at_both_penalties_and_balanced() -> None:
    # four of five rows right: 3 of 10 wrong ones are fixed, 8 of 40 right ones broken
    labels = torch.tensor([1, -1] * 25).numpy()
    right = torch.arange(50).numpy() >= 10
    turned = torch.tensor([n < 3 or 10 <= n < 18 for n in range(50)]).numpy()
    base = (2.0 * right - 1) * labels
    plus = torch.where(torch.from_numpy(turned), -1.0, 1.0).numpy() * base
    found = {k: changes.surgical_informedness(base, plus, base, labels, k=k) for k in (1, 2)}
    assert found[1].forward == pytest.approx(10) and found[2].forward == pytest.approx(-10), "a no-op has 0"
    assert found[1].balanced == pytest.approx(-20)
    shown = answers_table(numbers.measure(reader(known(lambda label, alpha: alpha * label)), LINES[:1]).entries)
    assert {"SI k=1", "SI k=2", "balanced"} <= set(shown.header)


def test_random_directions_have_several_seeds_unless_told_otherwise() -> None:
    assert Settings().control_seeds >= 10 and Plan().draws >= 10


def test_pages_take_layers_attention_and_flips_from_what_was_run(finished: Path) -> None:
    config = json.loads((finished / "config.json").read_text())
    assert config["direction"]["layers"] == "2-3 of 4", "not the default slice"
    assert config["model"]["attention"] == "grouped"
    for file in ("report.md", "report.html"):
        text = (finished / file).read_text(encoding="utf-8")
        assert "over layers 2-3 of 4" in text and "grouped attention" in text
        for heading in ("signed change", "Yes-bias", "rows gained", "rows lost"):
            assert heading in text, "never a mean alone"


def test_figures_in_documents_are_those_of_the_stored_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {tmp_path / file.name: file.read_text(encoding="utf-8") for file in update.documents()}
    shown = {match["name"]: match["content"] for text in pages.values() for match in update.MARKED.finditer(text)}
    # the matrix has a test of its own; the rest is made anew, over what somebody might have typed
    monkeypatch.setattr(update, "BLOCKS", {**update.BLOCKS, "families": lambda: shown["families"]})
    monkeypatch.setattr(update, "RESULTS", shutil.copytree(update.RESULTS, tmp_path / "results"))
    compared = update.place_of_comparison("pocket") / "comparison.md"
    monkeypatch.setattr(update, "documents", lambda: list(pages))
    for file, text in pages.items():
        file.write_text(re.sub("(<!-- begin: .* -->\n)", "\\1+9.99 ", text), encoding="utf-8")
    compared.write_text("+9.99")
    update.main([])
    assert {file: file.read_text(encoding="utf-8") for file in pages} == pages and len(shown) > 8
    assert "+9.99" not in compared.read_text(encoding="utf-8")


# -------------------------------------------------------------------- the list


def test_every_test_on_the_list_of_traps_exists() -> None:
    text = (ROOT / "docs" / "traps.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    named = [re.findall(r"`(test_\w+\.py)::(test_\w+)`", row) for row in rows]
    assert len(rows) > 40 and all(named), "every trap has a test"
    for file, name in {pair for pairs in named for pair in pairs}:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{name}"
    own = set(re.findall(r"^def (test_\w+)", Path(__file__).read_text(encoding="utf-8"), re.MULTILINE))
    listed = {name for pairs in named for file, name in pairs if file == Path(__file__).name}
    assert own - listed == {"test_every_test_on_the_list_of_traps_exists"}
