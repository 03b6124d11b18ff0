"""The pipeline on tiny random models: every architecture, resumption, rebuilding, and what the files hold."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

import ws
from ws.algebra.direction import Direction
from ws.base import console
from ws.base.errors import BaseMismatchError, UserError
from ws.base.files import read_json
from ws.base.poles import Pole
from ws.base.records import plain
from ws.commands.stages import finish
from ws.fitting import train
from ws.fitting.data import Grid
from ws.fitting.run_settings import Settings, restore_settings, run_path, stored_settings
from ws.fitting.stages import Fitting
from ws.measure.score import SCHEMA
from ws.model import sources
from ws.model.loading import ChatModel
from ws.model.sources import Source
from ws.report import cells
from ws.report.summary import Scores
from ws.runs.replicate import Replication

SMALL: dict[str, Any] = {
    "grid": Grid(topics=3, personas=2, samples=3),
    "train": {"rank": 4, "lora_alpha": 8, "lr": 5e-3, "batch_size": 8},
    "sampling": {"max_new_tokens": 8},
    "alphas": (-1.0, 0.0, 1.0),
    "control_seeds": 2,
    "rows": 8,
    "samples": 2,
    "judged": 2,
}


def settings(folder: Path, out: Path, **changes: Any) -> Settings:
    return Settings(model=str(folder), out=out, **{**SMALL, **changes})


@pytest.fixture(scope="module")
def finished(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished run of the Qwen3 model: its folder and summary."""
    with Replication(settings(tiny_folders["qwen3"], tmp_path_factory.mktemp("runs"))) as run:
        return run.folder.path, plain(run.report())


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_other_architectures_run_through(tiny_folders: dict[str, Path], tmp_path: Path, architecture: str) -> None:
    with Replication(settings(tiny_folders[architecture], tmp_path)) as run:
        assert run.report().direction_norm > 0
        assert (run.folder / "report.html").stat().st_size > 10_000


def test_the_run_folder_holds_what_is_promised(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = finished
    assert folder.parts[-4:] == ("tiny-qwen3", "sycophancy", "lora", "seed0")
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.json", "pairs.parquet", "pos", "neg", "direction.safetensors", "scores.parquet", "summary.json",
        "report.html", "report.md", "dose_response.png", "subspace_per_layer.csv", "subspace_summary.csv",
    }  # fmt: skip
    assert not list(folder.rglob("*.tmp")) and not (folder / ".partial" / "eval").exists()
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))


def test_the_summary_has_the_contracted_keys(finished: tuple[Path, dict[str, Any]]) -> None:
    _, summary = finished
    assert {"model", "behaviour", "adapter", "seed", "direction_norm", "sycophancy", "dilemmas", "dd_delta",
            "far_dilemmas", "side_effects", "controls", "seconds"} <= summary.keys()  # fmt: skip
    assert list(summary["sycophancy"]) == ["-1", "0", "1"] == list(summary["dilemmas"])
    assert {"mean", "low", "high", "pmass", "n"} <= summary["sycophancy"]["1"].keys()
    assert list(summary["dd_delta"]) == ["-1", "1"] and {"mean", "low", "high"} <= summary["dd_delta"]["1"].keys()
    assert {"kl", "nll_delta", "facts", "true_claims"} <= summary["side_effects"]["1"].keys()
    assert summary["side_effects"]["0"]["kl"] == pytest.approx(0, abs=1e-6)
    assert len(summary["controls"]["random"]["1"]["dilemmas"]["seeds"]) == 2


def test_a_random_model_is_measured_by_replies(finished: tuple[Path, dict[str, Any]]) -> None:
    """It cannot answer Yes or No; random directions are asked only what the headline shows."""
    folder, summary = finished
    ability, instruments = summary["ability"], summary["instruments"]
    assert ability["instrument"] == "replies" and ability["mass"] < 0.8
    assert "cannot answer Yes or No: it puts" in ability["reason"]
    assert list(instruments) == ["choice", "replies"] and "(reply log-ratio): alpha -1 " in summary["headline"]
    assert instruments["choice"]["bands"] == {} and len(instruments["replies"]["bands"]["1"]["seeds"]) == 2
    scores = pl.read_parquet(folder / "scores.parquet")
    assert set(scores.filter(edit="random")["probe"]) == {"sycophancy-replies", "dilemmas"}
    rows = scores.filter(
        pl.col("probe") == "sycophancy-replies", pl.col("metric") == "logratio", pl.col("alpha") == 1.0,
        pl.col("edit") == "dW:lora",
    )  # fmt: skip
    level = float((rows["value"] * rows["label"]).mean())  # type: ignore[arg-type]
    assert instruments["replies"]["levels"]["1"]["mean"] == pytest.approx(level)
    assert instruments["replies"]["levels"]["1"]["n"] == len(rows) == 8 * 6, "items and wordings"
    assert instruments["choice"]["change"]["1"]["n"] == 8 * 2 * 2, "polarities and orders"


def test_free_replies_are_judged_by_the_model(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = finished
    replies = pl.read_parquet(folder / "replies.parquet")
    assert len(replies) == 2 * 3 * 3 and list(summary["judged"]) == ["persona"]
    for key, alpha in (("-1", -1.0), ("0", 0.0), ("1", 1.0)):
        entry, scores = summary["judged"]["persona"][key], replies.filter(alpha=alpha)["score_persona"]
        assert entry["score"]["mean"] == pytest.approx(float(scores.mean())) and entry["replies"] == 6  # type: ignore[arg-type]
    assert "judged_in" not in read_json(folder / "stages" / "replies.json")["inputs"], "the model judges as it is"
    assert "probability that a reply was written under the positive persona" in (folder / "report.md").read_text()


def test_the_command_ends_with_seeds_and_with_replies_before_and_after(
    finished: tuple[Path, dict[str, Any]], tiny_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = finished
    with Replication(settings(tiny_folders["qwen3"], folder.parents[3])) as run:
        summary = run.report()
        capsys.readouterr()
        finish(run, summary, False)
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith(" ".join(summary.sentence.split()))
    assert "One seed: the intervals are over rows" in said and "ws show" in said
    samples = pl.read_parquet(folder / "samples.parquet")
    prompts = samples["prompt"].unique(maintain_order=True).to_list()
    assert [prompt in said for prompt in prompts] == [True, True, *[False] * (len(prompts) - 2)]
    base, steered = (
        console.visible(samples.filter(prompt=prompts[0], alpha=alpha)["response"].item()) for alpha in (0.0, 1.0)
    )
    assert " ".join(f"{prompts[0]} -1".split()) in said
    assert " ".join(f"+0 {base}".split()) in said and " ".join(f"+1 {steered}".split()) in said


def test_every_figure_of_the_summary_is_in_the_scores(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = finished
    scores = pl.read_parquet(folder / "scores.parquet")
    assert scores.schema == SCHEMA
    rows = scores.filter(
        pl.col("probe") == "sycophancy", pl.col("metric") == "logratio", pl.col("group") == "false",
        pl.col("alpha") == 1.0, pl.col("edit") == "dW:lora",
    )  # fmt: skip
    assert summary["sycophancy"]["1"]["mean"] == pytest.approx(float((rows["value"] * rows["label"]).mean()))  # type: ignore[arg-type]
    base = Scores(scores).rows("dilemmas", "logratio", "dW:lora", 1.0)
    change = ((base["value"] - base["base"]) * base["label"]).mean()
    assert summary["dd_delta"]["1"]["mean"] == pytest.approx(float(change))  # type: ignore[arg-type]


def test_samples_show_the_same_prompts_at_three_strengths(finished: tuple[Path, dict[str, Any]]) -> None:
    samples = pl.read_parquet(finished[0] / "samples.parquet")
    assert samples["alpha"].unique().sort().to_list() == [-1.0, 0.0, 1.0]
    assert samples.group_by("alpha").len()["len"].n_unique() == 1


def test_the_direction_is_the_difference_of_the_saved_adapters(
    finished: tuple[Path, dict[str, Any]], qwen: ChatModel
) -> None:
    folder, summary = finished
    direction = Direction.load(folder / "direction.safetensors")
    assert direction.base == qwen.fingerprint and direction.layer_numbers == [1, 2]
    tau = {sign: ws.adapters.diff.task_vector(qwen, folder / sign) for sign in ("pos", "neg")}
    for name, delta in direction.deltas.items():
        wanted = tau["pos"].deltas[name].materialise().double() - tau["neg"].deltas[name].materialise().double()
        assert torch.allclose(delta.materialise().double(), wanted, atol=1e-7)
    assert summary["direction_norm"] == pytest.approx(direction.norm(), rel=1e-5)


def test_every_run_measures_the_other_shipped_behaviours(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = finished
    assert set(summary["other_behaviours"]) == {"honesty", "refusal", "feedback"}
    scores = pl.read_parquet(folder / "scores.parquet")
    rows = scores.filter(pl.col("probe") == "refusal", pl.col("metric") == "logratio", pl.col("alpha") == 0.0)
    assert set(rows["group"]) == {"harmful"} and "reversed" not in "".join(rows["row"])
    assert "refusal" in (folder / "report.md").read_text()


def test_two_behaviours_of_a_model_share_a_page(
    finished: tuple[Path, dict[str, Any]], tiny_folders: dict[str, Path]
) -> None:
    folder, first = finished
    assert not (folder.parents[2] / "behaviours.html").exists()
    with Replication(settings(tiny_folders["qwen3"], folder.parents[3], behaviour="refusal")) as run:
        second = plain(run.report())
        assert run.behaviours_page == folder.parents[2] / "behaviours.html"
    text = run.behaviours_page.with_suffix(".md").read_text()
    for own, other in ((first, second), (second, first)):
        name, leaked = own["behaviour"], own["other_behaviours"][other["behaviour"]]["change"]["1"]
        assert f"## {name}" in text
        assert cells.with_limits(own["change"][name]["1"]) in text and cells.with_limits(leaked) in text


def test_a_second_call_builds_nothing(
    finished: tuple[Path, dict[str, Any]], tiny_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in (folder / "stages").iterdir()}
    with Replication(settings(tiny_folders["qwen3"], folder.parents[3])) as run:
        run.report()
    assert {path: path.stat().st_mtime_ns for path in (folder / "stages").iterdir()} == before
    assert capsys.readouterr().out.count("done before") == len(before)


def test_a_report_resolves_the_run_once(
    finished: tuple[Path, dict[str, Any]], tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("train", "diff"):
        real = getattr(Fitting, name)
        monkeypatch.setattr(
            Fitting, name, lambda run, *a, _n=name, _r=real, **k: (calls.append(_n), _r(run, *a, **k))[1]
        )
    with Replication(settings(tiny_folders["qwen3"], finished[0].parents[3])) as run:
        run.report()
    assert sorted(calls) == ["diff", "train", "train"]


def stages_built(folder: Path, run: Replication) -> set[str]:
    before = {path.stem: path.stat().st_mtime_ns for path in (folder / "stages").iterdir()}
    run.report()
    return {path.stem for path in (folder / "stages").iterdir() if path.stat().st_mtime_ns != before.get(path.stem)}


@pytest.mark.parametrize(
    ("changes", "rebuilt"),
    [
        ({"alphas": (-2.0, 0.0, 2.0)}, {"eval"}),
        (
            {"train": {**SMALL["train"], "lr": 1e-2}},
            {"train-pos", "train-neg", "diff", "eval", "alignment", "samples", "replies", "other-replies"},
        ),
        ({"samples": 3}, {"samples"}),
        ({"judged": 3}, {"replies"}),
        ({"judged": 0}, set()),
        (
            {"attention": "sdpa"},
            {
                "personas",
                "data",
                "train-pos",
                "train-neg",
                "diff",
                "eval",
                "alignment",
                "samples",
                "replies",
                "other-replies",
            },
        ),
    ],
)
def test_changed_settings_rebuild_exactly_what_depends_on_them(
    finished: tuple[Path, dict[str, Any]],
    tiny_folders: dict[str, Path],
    tmp_path: Path,
    changes: dict[str, Any],
    rebuilt: set[str],
) -> None:
    shutil.copytree(finished[0].parents[3], tmp_path / "runs")
    with Replication(settings(tiny_folders["qwen3"], tmp_path / "runs", **changes)) as run:
        folder = run.folder.path
        assert stages_built(folder, run) == rebuilt
    judged = read_json(folder / "summary.json")["judged"]
    assert bool(judged) == (changes.get("judged") != 0), "without wanted replies there is nothing to judge"


def test_a_run_killed_in_training_continues_there(
    tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, fit = settings(tiny_folders["qwen3"], tmp_path), train.fit
    fitted: list[str] = []

    def until_neg(model: ChatModel, pairs: pl.DataFrame, sign: Pole, *rest: Any, **named: Any) -> train.FitResult:
        fitted.append(sign)
        if fitted == ["pos", "neg"]:
            raise KeyboardInterrupt
        return fit(model, pairs, sign, *rest, **named)

    monkeypatch.setattr(train, "fit", until_neg)
    with Replication(chosen) as run, pytest.raises(KeyboardInterrupt):
        run.diff()
    folder = run_path(chosen, run.behaviour)
    assert (folder / "pos").is_dir() and not (folder / "neg").exists()
    with Replication(chosen) as run:
        run.diff()
    assert fitted == ["pos", "neg", "neg"]
    assert not list((folder / ".partial").glob("train-*"))


def test_one_sign_is_fitted_alone(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    with Replication(settings(tiny_folders["qwen3"], tmp_path)) as run:
        found = run.train("neg")
        assert (run.folder / "neg").is_dir() and not (run.folder / "pos").exists()
        assert found == train.FitResult.read(run.folder / "neg")


def test_an_interrupted_run_gives_the_same_scores_as_an_uninterrupted_one(
    finished: tuple[Path, dict[str, Any]],
    tiny_folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = settings(tiny_folders["qwen3"], tmp_path)
    with monkeypatch.context() as patch, Replication(chosen) as run, pytest.raises(KeyboardInterrupt):
        calls = []

        def stop_late(*a: Any, **k: Any) -> Any:
            calls.append(1)
            if len(calls) > 3:
                raise KeyboardInterrupt
            return original(*a, **k)

        original = run.model.split.hidden
        patch.setattr(run.model.split, "hidden", stop_late)
        run.eval()
    with Replication(chosen) as run:
        scores = run.eval()
    uninterrupted = pl.read_parquet(finished[0] / "scores.parquet")
    key = ["probe", "row", "context", "edit", "alpha", "seed", "metric"]
    joined = scores.join(uninterrupted, on=key, suffix="_other", nulls_equal=True)
    assert len(joined) == len(uninterrupted) == len(scores)
    assert float((joined["value"] - joined["value_other"]).abs().max()) < 1e-4  # type: ignore[arg-type]


def test_a_folder_of_another_model_is_refused(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    with Replication(settings(tiny_folders["qwen3"], tmp_path)):
        pass
    elsewhere = tmp_path / "copy" / "tiny-qwen3"
    models_made = ws.pocket.tiny.make("qwen3", elsewhere, seed=1, layers=4)
    assert models_made is None
    with pytest.raises(BaseMismatchError, match="a different fingerprint"):
        Replication(settings(elsewhere, tmp_path))


def test_two_processes_do_not_share_a_folder(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    chosen = settings(tiny_folders["qwen3"], tmp_path)
    with Replication(chosen) as run, pytest.raises(UserError, match="another ws process"):
        Replication(chosen, run.model)


def test_own_pairs_replace_sampling(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    lines = [
        json.dumps(
            {
                "prompt": f"Is {n} big?",
                "response_pos": f"Yes, {n} is.",
                "response_neg": f"No, {n} is not.",
                "topic": str(n % 3),
            }
        )
        for n in range(12)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    with Replication(settings(tiny_folders["qwen3"], tmp_path, pairs=tmp_path / "pairs.jsonl")) as run:
        direction, _ = run.diff()
        assert len(pl.read_parquet(run.folder / "pairs.parquet")) == 12 and direction.norm() > 0


def test_settings_survive_the_config_file(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    chosen = settings(tiny_folders["qwen3"], tmp_path, pairs=None)
    plain = json.loads(json.dumps(stored_settings(chosen)))
    restored = restore_settings(plain, replace(Settings(), model=chosen.model, out=tmp_path))
    assert stored_settings(restored) == stored_settings(chosen)


def test_fit_returns_a_direction_that_steers(qwen: ChatModel) -> None:
    direction = ws.fit(
        replace(qwen, settings={"sampling": {"max_new_tokens": 6, "temperature": 1.0}}), rank=2, lora_alpha=4, lr=1e-2
    )
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        plain = qwen.network(input_ids=ids).logits
        with ws.steer(qwen, direction, 1.0):
            assert not torch.equal(qwen.network(input_ids=ids).logits, plain)
        assert torch.equal(qwen.network(input_ids=ids).logits, plain)


def test_the_config_says_what_was_run(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = finished
    config = read_json(folder / "config.json")
    assert (
        config["model"]["fingerprint"]
        and config["model"]["dtype"] == "float32"
        and config["model"]["thinking"] == "off"
    )
    assert config["settings"]["seed"] == 0 and config["training"]["adapter"]["rank"] == 4
    assert config["data"]["pairs"] == 18
    asked = config["dilemmas"]
    assert (asked["source"], asked["revision"]) == ("own", None)
    assert asked["counted"] == asked["honest_yes"] + asked["honest_no"] == summary["dilemmas"]["0"]["n"]


def test_loading_by_hub_id_uses_the_same_function(
    tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Source(str(tiny_folders["qwen3"]))
    monkeypatch.setattr(sources, "find", lambda name, revision=None: here)
    with Replication(settings(Path("org/name"), tmp_path)) as run:
        assert run.folder.path.parts[-4] == "org_name"


def test_strengths_beyond_one_have_their_random_directions(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    with Replication(settings(tiny_folders["qwen3"], tmp_path, alphas=(-3.0, 3.0))) as run:
        summary = run.report()
        scores = pl.read_parquet(run.folder / "scores.parquet").filter(edit="random")
        page = (run.folder / "report.md").read_text(encoding="utf-8")
    assert scores["alpha"].unique().to_list() == [3.0] and scores["seed"].n_unique() == 2
    assert list(summary.numbers.bands) == ["-3", "3"]
    assert "random control band at +3" in summary.headline and "Strengths with a band: -3, +3." in page
