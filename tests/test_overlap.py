"""Energies against their definitions, calibrated nulls, and planted truths that the instruments must find."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor

from making import dense, gaussian, generator, random_direction
from materials import background_of, material_of, run_of
from ws.algebra.delta import Delta
from ws.algebra.direction import Direction
from ws.base.errors import UserError
from ws.commands.cli import _main
from ws.fitting.data import Grid
from ws.fitting.run_settings import Settings
from ws.model import architecture, loading
from ws.model.loading import ChatModel
from ws.report import subspaces as page
from ws.runs.replicate import Replication
from ws.subspace import moments, overlap, ranking, spans
from ws.subspace.bases import BASES, Background, Material, build
from ws.subspace.moments import Moment
from ws.subspace.weights import ResidualWeights

RANK = 4
ANSWERS = ([11, 12], [13])


@pytest.fixture(scope="module")
def material(qwen: ChatModel) -> Material:
    return material_of(qwen)


def scores_of(name: str, material: Material) -> dict[str, overlap.Score]:
    built = build(BASES[name], material)
    assert not built.reason
    return {one.metric: one for one in overlap.scores(built, material, ANSWERS)}


def psd(d: int, seed: int, rank: int) -> Moment:
    factor = gaussian(d, rank, seed=seed).double()
    gram = factor @ factor.T
    return gram / gram.trace()


# -------------------------------------------------------------------- against the definitions


KINDS = {
    "thin": lambda model: random_direction(model, seed=3),
    "dense": lambda model: whole(model, lambda shape, n: dense(*shape, seed=n)),
    "function of the weight": lambda model: whole(model, scaled).bind(model),
}


def scaled(shape: tuple[int, int], number: int) -> Delta:
    return Delta.scaling(shape, row=gaussian(shape[0], seed=number)) + Delta.low_rank(
        gaussian(shape[0], 2, seed=number + 50), gaussian(2, shape[1], seed=number + 90)
    )


def whole(model: ChatModel, make: Any) -> Direction:
    sites = architecture.sites(model.network, [1, 2])
    deltas = {site.parameter: make(site.shape, number) for number, site in enumerate(sites)}
    return Direction(deltas, model.fingerprint, {site.parameter: site.layer for site in sites})


@pytest.mark.parametrize("kind", KINDS)
def test_weight_energies_are_those_of_the_dense_update(any_model: ChatModel, kind: str) -> None:
    """The slow twin: |B' N dW|^2 / |N dW|^2 and |dW N B|^2 / |dW N|^2 with dW written out."""
    direction, view = KINDS[kind](any_model), ResidualWeights(any_model)
    span = spans.random(64, RANK, generator(0))
    front, behind = view.norms(2)
    written, reading = {}, []
    for site in architecture.sites(any_model.network, [2]):
        stored = direction.materialise(site.parameter).double()
        delta = stored.T if site.transposed else stored
        part = "attention" if {"q", "k", "v", "o"} & set(site.roles) else "mlp"
        if site.writes_residual:
            written[site.roles[0]] = behind[part].behind(delta)
        else:
            reading.append(front[part].before(delta))
    for role, update in written.items():
        energy = moments.energy(span, moments.written(view, direction, 2, role))
        assert energy == pytest.approx(float((span.T @ update).norm() ** 2 / update.norm() ** 2), rel=1e-5)
    blocks = torch.cat([update / update.norm() for update in written.values()], dim=1)
    both = moments.energy(span, moments.written(view, direction, 2, "o", "down"))
    assert both == pytest.approx(float((span.T @ blocks).norm() ** 2 / blocks.norm() ** 2), rel=1e-5)
    rows = torch.cat(reading)
    energy = moments.energy(span, moments.read(view, direction, 2))
    assert energy == pytest.approx(float((rows @ span).norm() ** 2 / rows.norm() ** 2), rel=1e-5)


def test_activation_energy_is_the_mean_share_of_every_prompt(material: Material) -> None:
    rows = material.steered("evaluation", "block")
    span = spans.random(64, RANK, generator(1))
    shares = (rows @ span).square().sum(1) / rows.square().sum(1)
    assert moments.energy(span, moments.of_rows(rows)) == pytest.approx(float(shares.mean()))
    with_zero = torch.cat([rows, torch.zeros(1, 64, dtype=torch.float64)])
    assert moments.energy(span, moments.of_rows(with_zero)) == pytest.approx(float(shares.mean()))


def test_the_oracle_is_the_best_of_all_subspaces_of_its_rank(material: Material) -> None:
    for axis in overlap.AXES:
        moment = material.moment(axis)
        best = float(moments.spectrum_of(moment)[:RANK].sum())
        assert moments.energy(spans.top_eigenvectors(moment, RANK), moment) == pytest.approx(best)
        drawn = [moments.energy(spans.random(64, RANK, generator(seed)), moment) for seed in range(50)]
        assert max(drawn) < best


@pytest.mark.parametrize(("name", "axis"), [
    ("w_oracle", "written"), ("read_oracle", "read"), ("act_oracle_block", "block"), ("act_oracle", "cumulative"),
])  # fmt: skip
def test_oracles_score_one_on_their_own_axis(material: Material, name: str, axis: str) -> None:
    score = scores_of(name, material)[axis]
    assert score.as_record()["percent"] == pytest.approx(100.0, abs=1e-4)
    assert score.z > 3


def test_readout_metrics_are_their_formulas(material: Material) -> None:
    (span,) = build(BASES["taskdiff"], material).spans
    found, own = scores_of("taskdiff", material), span.double()
    rows, head = material.steered("evaluation", "block"), material.view.head_rows(list(range(material.view.vocabulary)))
    toward = head[ANSWERS[0]].mean(0) - head[ANSWERS[1]].mean(0)
    inside = rows @ own @ own.T
    assert found["cap_yn"].value == pytest.approx(float((own.T @ toward).square().sum() / toward.square().sum()))
    assert found["lens"].value == pytest.approx(float((inside @ toward).abs().mean()))
    units, lengths = torch.nn.functional.normalize(head, dim=1), rows.norm(dim=1, keepdim=True)
    kept, all_of_it = ((part / lengths @ units.T).square().sum() for part in (inside, rows))
    assert found["preserved_E"].value == pytest.approx(float(kept / all_of_it), rel=1e-5)
    assert found["cap_yn"].null == pytest.approx(3 / 64, rel=0.25)


def test_a_random_state_has_token_energy_one(material: Material) -> None:
    gram = material.view.unit_head_gram
    isotropic = torch.eye(64, dtype=torch.float64) / 64
    # exact for an unembedding that is isotropic; of a random one the Gram matrix nearly is
    assert overlap.token_energy(isotropic, material) == pytest.approx(1.0, rel=0.1)
    top = spans.top_eigenvectors(gram, 1)
    assert overlap.token_energy(top @ top.T, material) > 1.1


def test_specific_is_blind_to_the_clean_components(material: Material) -> None:
    assert "specific" not in scores_of("layer_clean_pca", material)
    found = scores_of("act_oracle_block", material)["specific"]
    assert found.null == pytest.approx(found.rank / (64 - overlap.CLEAN_REMOVED))


@pytest.mark.parametrize(("first", "second", "expected"), [
    ([0, 1], [0, 1], 1.0), ([0, 1], [2, 3], 0.0), ([0, 1], [1, 2], 0.5), ([0], [0, 1, 2], 1.0),
])  # fmt: skip
def test_subspace_overlap_is_the_mean_squared_cosine(
    first: Sequence[int], second: Sequence[int], expected: float
) -> None:
    axes = torch.eye(6)
    assert overlap.subspace_overlap(axes[:, first], axes[:, second]) == pytest.approx(expected)


def test_runs_overlap_wholly_with_themselves(material: Material, qwen: ChatModel) -> None:
    other = replace(material, run=run_of(qwen, "dora", 0, material.siblings["dora"]))
    rows = pl.DataFrame(overlap.between_runs([material, other], "written"))
    assert rows.filter(pl.col("first") == pl.col("second"))["overlap"].to_list() == pytest.approx([1.0, 1.0])
    crossed = rows.filter(pl.col("first") != pl.col("second"))["overlap"].to_list()
    assert crossed[0] == pytest.approx(crossed[1]) and crossed[0] < 0.3


# -------------------------------------------------------------------- nulls


@pytest.mark.parametrize(("rank", "spread"), [(1, 2), (4, 8), (8, 64), (16, 3)])
def test_random_subspaces_have_rank_over_d_and_the_exact_variance(rank: int, spread: int) -> None:
    """For uniformly random B: var tr(B'SB) = 2 r (d - r) (tr S^2 - 1/d) / (d (d - 1) (d + 2))."""
    d, moment = 64, psd(64, 1, spread)
    drawn = overlap._haar(d, rank, "test")
    energies = (drawn * (moment @ drawn)).sum(dim=(1, 2))
    purity = float(moment.square().sum())
    sd = math.sqrt(2 * rank * (d - rank) * (purity - 1 / d) / (d * (d - 1) * (d + 2)))
    assert abs(float(energies.mean()) - rank / d) < 3 * sd / math.sqrt(overlap.RANDOM)
    assert overlap._spread(moment, drawn) == pytest.approx(sd, rel=0.25)


@pytest.mark.parametrize("axis", ["block", "cumulative", "written", "o", "down", "read", "specific"])
def test_the_random_null_is_at_its_null(material: Material, axis: str) -> None:
    score = scores_of("random_null", material)[axis]
    assert abs(score.value - score.null) < 3 * score.sd / math.sqrt(BASES["random_null"].draws)


def test_the_null_inside_dw_has_its_share_of_the_rank_of_dw(material: Material) -> None:
    """A random 3 of the 8 dimensions of dW: 3/8 of the energy, far above rank / d, without knowing what matters."""
    score = scores_of("null_in_dw", material)["written"]
    assert score.value == pytest.approx(3 / 8, abs=0.05) and score.null == 3 / 64


# -------------------------------------------------------------------- planted truth


@pytest.fixture(scope="module")
def pocket() -> tuple[ChatModel, Background]:
    model = loading.load("pocket")
    return model, background_of(model)


def planted(
    model: ChatModel, layer: int, span: Tensor, noise: float, seed: int, roles: Sequence[str] = ("o", "down")
) -> Direction:
    """Updates of writers that write into the span, plus a Gaussian part with the share `noise` of the energy."""
    deltas, layers = {}, {}
    for site in architecture.sites(model.network, [layer], roles):
        signal = span.double() @ gaussian(span.shape[1], site.shape[1], seed=seed).double()
        rest = gaussian(*site.shape, seed=seed + 1).double()
        update = math.sqrt(1 - noise) * signal / signal.norm() + math.sqrt(noise) * rest / rest.norm()
        weight = model.network.get_parameter(site.parameter).detach()
        deltas[site.parameter] = Delta.full((0.05 * float(weight.norm()) * update).float())
        layers[site.parameter] = layer
    return Direction(deltas, model.fingerprint, layers)


def with_planted(pocket: tuple[ChatModel, Background], rank: int, place: str, noise: float, *roles: str) -> Material:
    model, background = pocket
    bare = Material(background, 3, rank)
    (span,) = build(BASES[place], bare).spans
    direction = planted(model, 3, span, noise, rank, roles)
    return replace(bare, run=run_of(model, "planted", 0, direction), siblings={"planted": direction}, _known={})


PLACES = ("taskdiff", "attn_ov_write", "layer_clean_pca")
APART = ("personas", "attended tokens", "clusters", "compound", "gradient")
"""Families of bases that share directions with `taskdiff`."""


@pytest.mark.parametrize("noise", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("rank", [1, 4, 8])
@pytest.mark.parametrize("place", PLACES)
def test_what_is_planted_in_a_basis_is_found_there_and_nowhere_else(
    pocket: tuple[ChatModel, Background], place: str, rank: int, noise: float
) -> None:
    material = with_planted(pocket, rank, place, noise, "o", "down")
    found, expected = scores_of(place, material), 1 - noise + noise * rank / 128
    for axis in ("o", "down", "written"):
        assert found[axis].value == pytest.approx(expected, abs=0.05)
        assert found[axis].as_record()["percent"] > (99.9 if noise == 0 else 75)
    null = scores_of("random_null", material)["written"]
    assert abs(null.value - rank / 128) < 3 * null.sd / math.sqrt(BASES["random_null"].draws)
    others = [
        name for name, one in BASES.items()
        if ranking.is_candidate(name) and ranking.is_ranked(one, "written") and one.family not in APART
        and name != place and not build(one, material).reason
    ]  # fmt: skip
    assert max(scores_of(name, material)["written"].value for name in others) < found["written"].value


@pytest.mark.parametrize("place", PLACES)
def test_what_down_writes_is_the_block_difference(pocket: tuple[ChatModel, Background], place: str) -> None:
    """Nothing in the layer reads what down writes, so the activations lie where the weights write."""
    found = scores_of(place, with_planted(pocket, 8, place, 0.0, "down"))
    for axis in ("block", "cumulative"):
        assert found[axis].value == pytest.approx(1.0, abs=1e-4)


def test_what_o_writes_is_read_by_the_layers_own_mlp(pocket: tuple[ChatModel, Background]) -> None:
    """So the activations of a layer need not lie where its dW writes: an oracle of the one is none of the other."""
    found = scores_of("attn_ov_write", with_planted(pocket, 1, "attn_ov_write", 0.0, "o"))
    assert found["o"].value == pytest.approx(1.0, abs=1e-5) and found["block"].value < 0.5


# -------------------------------------------------------------------- means, intervals, verdicts


VERDICTS: dict[str, tuple[dict[str, Any], str]] = {
    "interval above half": ({"percent": 80, "percent_low": 60, "percent_high": 95, "z": 20}, "mostly inside"),
    "interval below half": ({"percent": 20, "percent_low": 12, "percent_high": 28, "z": 5}, "mostly outside"),
    "interval around half": ({"percent": 50, "percent_low": 30, "percent_high": 70, "z": 9}, "about half"),
    "interval around random": ({"percent": 9, "percent_low": 4, "percent_high": 14, "z": 3}, "at random level"),
    "below random": ({"percent": 2, "percent_low": 1, "percent_high": 3, "z": -4}, "below random"),
    "like other random subspaces": ({"percent": 7, "percent_low": 6.9, "percent_high": 7.1, "z": 1.1},
                                    "at random level"),
    "one run, far above": ({"percent": 20, "percent_low": None, "percent_high": None, "z": 5}, "mostly outside"),
    "one run, near": ({"percent": 20, "percent_low": None, "percent_high": None, "z": 1}, "at random level"),
    "no percentage": ({"percent": None, "percent_low": None, "percent_high": None, "z": 1}, ""),
}  # fmt: skip


@pytest.mark.parametrize("case", VERDICTS)
def test_verdicts_follow_their_rule(case: str) -> None:
    row, expected = VERDICTS[case]
    assert ranking.verdict({"null_percent": 6.0, **row}) == expected


def table(percents: dict[str, list[list[float]]]) -> pl.DataFrame:
    """Scores per layer: metric -> runs -> layers, of the basis `taskdiff`; random has 5 %, sd 1 %."""
    rows = [
        {"family": "lora", "seed": seed, "layer": layer, "basis": "taskdiff", "metric": metric, "rank": 8,
         "value": percent / 100, "null": 0.05, "null_sd": 0.01, "z": (percent - 5) / 1, "concentration": percent / 5,
         "oracle": 1.0, "percent": percent, "null_percent": 5.0}
        for metric, runs in percents.items() for seed, layers in enumerate(runs)
        for layer, percent in enumerate(layers)
    ]  # fmt: skip
    return pl.DataFrame(rows)


def test_a_run_is_the_mean_over_its_layers_and_the_interval_is_over_runs() -> None:
    found = ranking.summary(table({"block": [[10.0, 30.0], [20.0, 40.0], [30.0, 50.0]]}))
    (row,) = found.filter(metric="block").to_dicts()
    assert (row["percent"], row["runs"], row["layers"]) == (pytest.approx(30.0), 3, 2)
    margin = 4.302653 * 10 / math.sqrt(3)  # runs have 20, 30, 40
    assert (row["percent_low"], row["percent_high"]) == (pytest.approx(30 - margin), pytest.approx(30 + margin))
    # z of a mean over two layers: 25 / (1 / sqrt 2)
    assert row["z"] == pytest.approx(25 * math.sqrt(2))


def test_the_joint_score_takes_means_over_layers_first() -> None:
    found = ranking.summary(table({"block": [[10.0, 30.0]], "written": [[80.0, 80.0]]}))
    (joint,) = found.filter(metric="joint").to_dicts()
    (gap,) = found.filter(metric="gap_log2").to_dicts()
    assert joint["percent"] == pytest.approx(math.sqrt(20 * 80)) and joint["percent_low"] is None
    assert gap["value"] == pytest.approx(-2.0)


def test_readers_are_not_ranked_on_what_is_written_nor_writers_on_what_is_read() -> None:
    assert not ranking.is_ranked(BASES["attn_qkv_read"], "written") and ranking.is_ranked(BASES["taskdiff"], "written")
    assert not ranking.is_ranked(BASES["write"], "read") and ranking.is_ranked(BASES["attn_qkv_read"], "read")
    assert not [name for name in BASES if ranking.is_candidate(name) and ("oracle" in name or "null_" in name)]


# -------------------------------------------------------------------- the command


SMALL: dict[str, Any] = {
    "grid": Grid(topics=2, personas=1, samples=2), "sampling": {"max_new_tokens": 5},
    "train": {"rank": 2, "lora_alpha": 4, "lr": 5e-3, "batch_size": 4, "layers": (0.25, 0.75)},
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(qwen: ChatModel, tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        with Replication(Settings(model=str(tiny_folders["qwen3"]), out=out, seed=seed, **SMALL), qwen) as run:
            run.diff()
    return out


def asked(runs: Path, tiny_folders: dict[str, Path], *words: object) -> list[str]:
    return ["subspace", "--model", str(tiny_folders["qwen3"]), "--out", str(runs), *map(str, words)]


def test_the_command_writes_tables_page_and_json(
    runs: Path, tiny_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--bases", "all", "--seeds", 0, 1, "--rank", 4, "--json")
    assert _main(asked(runs, tiny_folders, *words)) == 0
    said = json.loads(capsys.readouterr().out)
    (place,) = [path.parent for path in runs.rglob(page.PAGE)]
    per_layer = pl.read_parquet(place / "bases_per_layer.parquet")
    assert set(per_layer["seed"]) == {0, 1} and set(per_layer["layer"]) == {1, 2}
    summary = pl.read_csv(place / "bases_summary.csv")
    made, missing = set(summary["basis"]), {one["basis"] for one in said["unavailable"]}
    assert made | missing == set(BASES) and "shared_dw" in missing
    assert said["rank"] == 4 and "FIT 40 prompts" in said["prompts"]
    for name, metric in (("w_oracle", "written"), ("act_oracle_block", "block")):
        (row,) = summary.filter(basis=name, metric=metric).to_dicts()
        assert row["percent"] == pytest.approx(100.0) and row["runs"] == 2
    html = (place / page.PAGE).read_text()
    assert "Not available here" in html and all(sentence[:40] in html for sentence in said["sentences"])
    assert not {"bases_between_runs.csv", "bases_scope.csv", "subspace_ranking.png", "subspace_overlap.png"} - {
        path.name for path in place.iterdir()
    }
    before = (place / "bases_per_layer.parquet").read_bytes()
    assert _main(asked(runs, tiny_folders, *words)) == 0
    assert (place / "bases_per_layer.parquet").read_bytes() == before


@pytest.mark.parametrize("names", [("write",), ("random_null", "w_oracle"), ("gradient_read",)])
def test_any_choice_of_bases_has_a_page(
    runs: Path, tiny_folders: dict[str, Path], capsys: pytest.CaptureFixture[str], names: tuple[str, ...]
) -> None:
    assert _main(asked(runs, tiny_folders, "--bases", *names, "--seeds", 0)) == 0
    told = capsys.readouterr().out
    assert "page " in told and "ws subspace --bases" in told and "--seeds 0 1 2" in told
    assert ("no basis was scored" in told.replace("\n", " ")) == (names == ("random_null", "w_oracle"))


def test_a_missing_run_says_how_to_make_it(
    runs: Path, tiny_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(asked(runs, tiny_folders, "--bases", "write", "--families", "lora", "dora", "--seeds", 0, 1)) == 2
    told = capsys.readouterr().err
    assert "dora" in told and "ws sweep --families dora --seeds 0 1" in told.replace("\n", " ")
    assert not (runs / "dora").exists()


@pytest.mark.parametrize(("words", "problem"), [
    (("--bases", "wrote"), "no basis"), (("--bases", "write", "--rank", 40), "--rank is 40"),
    (("--bases", "write", "--rank", 0), "--rank is 0"), (("--k", 1.5), "--k is 1.5"),
])  # fmt: skip
def test_wrong_requests_are_one_line(
    runs: Path, tiny_folders: dict[str, Path], capsys: pytest.CaptureFixture[str], words: Sequence[object], problem: str
) -> None:
    assert _main(asked(runs, tiny_folders, *words)) == 2
    assert problem in capsys.readouterr().err


def test_alignment_ends_with_a_row_of_random_directions_near_one(
    runs: Path, tiny_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(asked(runs, tiny_folders, "--k", 0.25, "--json")) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[-1]["kind"] == "random" and rows[-1]["n"] == 3 * sum(row["n"] for row in rows[:-1])
    assert rows[-1]["mean_ratio_top"] == pytest.approx(1.0, abs=0.2)
    (folder,) = [path.parent for path in runs.rglob("subspace_summary.parquet")]
    assert pl.read_parquet(folder / "subspace_summary.parquet")["kind"].to_list() == [row["kind"] for row in rows]
    assert pl.read_csv(folder / "subspace_per_layer.csv")["k"].max() == 16


def test_a_run_of_another_model_is_refused(runs: Path, tmp_path: Path) -> None:
    from ws.pocket import tiny  # noqa: PLC0415
    from ws.runs import subspaces  # noqa: PLC0415

    tiny.make("qwen3", tmp_path / "tiny-qwen3", layers=4, seed=5)
    with pytest.raises(UserError, match="fingerprint"):
        subspaces.run(Settings(model=str(tmp_path / "tiny-qwen3"), out=runs, **SMALL), subspaces.Asked(("write",)))
