"""What decides a run: values of the user, recommendations of a model folder, the recipe of the replicated work."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from ws.base import precision
from ws.base.errors import UserError
from ws.base.files import read_json, write_json
from ws.commands.results import Report
from ws.fitting import behaviour, data, judge, train, train_settings
from ws.fitting.data import Grid
from ws.fitting.judge import JudgeSettings
from ws.fitting.run_settings import (
    Settings,
    command,
    limit_of,
    recommended,
    restore_settings,
    run_path,
    stored_settings,
)
from ws.fitting.stages import Fitting
from ws.fitting.train_settings import TrainSettings
from ws.model.loading import ChatModel
from ws.runs import replicate
from ws.runs.replicate import Replication

FOLDER: Mapping[str, Any] = {
    "train": {"lora": {"lr": 1e-3, "layers": [0.2, 0.9]}},
    "sampling": {"max_new_tokens": 64, "temperature": 0.7},
    "judge": {"backend": "persona", "threshold": 0.6},
    "fit_dtype": "float32",
    "run": {"grid": {"topics": 3, "personas": None, "samples": 6}, "alphas": [-4.0, 4.0], "control_seeds": 5,
            "samples": 2, "judged": 16},
    "rows": {"choice": 40, "others": 20},
}  # fmt: skip
"""Recommendations of a model folder."""


@pytest.fixture
def model(qwen: ChatModel) -> ChatModel:
    """A model whose folder recommends settings."""
    return replace(qwen, settings=FOLDER)


def opened(model: ChatModel, out: Path, **given: Any) -> Fitting:
    with Fitting(Settings(model=model.name, out=out, **given), model) as run:
        return run


# -------------------------------------------------------------------- recommendations


def test_recommendations_fill_what_the_user_left_out(model: ChatModel, tmp_path: Path) -> None:
    run = opened(model, tmp_path)
    found = run.settings
    assert (found.grid, found.control_seeds, found.samples, found.judged) == (Grid(3, None, 6), 5, 2, 16)
    assert found.alphas == (-4.0, 0.0, 4.0), "0 is asked even if it is not recommended"
    assert (run.training.lr, run.training.adapter.layers) == (1e-3, (0.2, 0.9))
    assert (run.sampling.max_new_tokens, run.sampling.temperature) == (64, 0.7)
    assert (run.judge.backend, run.judge.threshold) == ("persona", 0.6)


def test_values_of_the_user_win(model: ChatModel, tmp_path: Path) -> None:
    run = opened(
        model, tmp_path, grid=Grid(topics=5), alphas=(-1.0, 1.0), control_seeds=3, samples=4, judged=0,
        train={"lr": 5e-4}, sampling={"max_new_tokens": 32}, judge=JudgeSettings("none"),
    )  # fmt: skip
    found = run.settings
    assert found.grid == Grid(5, None, 6), "part by part"
    assert (found.alphas, found.control_seeds, found.samples, found.judged) == ((-1.0, 0.0, 1.0), 3, 4, 0)
    assert (run.training.lr, run.training.adapter.layers) == (5e-4, (0.2, 0.9))
    assert (run.sampling.max_new_tokens, run.sampling.temperature, run.judge.backend) == (32, 0.7, "none")


def test_what_is_restored_is_what_was_run(model: ChatModel) -> None:
    """A later command without options has the settings of the run, also where the folder recommends others."""
    first, _ = recommended(Settings(judged=7, grid=Grid(topics=2)), model)
    again, _ = recommended(restore_settings(stored_settings(first), Settings()), model)
    assert again == first and (again.judged, again.grid) == (7, Grid(2, None, 6))


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"topics": 3}, r"weight_steering\.json of .*, run: unknown setting 'topics'"),
        ({"judge": "none"}, r"run: unknown setting 'judge'"),
        ({"grid": {"rows": 3}}, r"weight_steering\.json of .*, run: grid: unknown setting 'rows'"),
        ({"grid": {"topics": "three"}}, r"run: grid: topics is 'three', but must be a whole number or null"),
        ({"grid": {"samples": -3}}, r"run: grid: --samples is -3"),
        ({"grid": 3}, r"run: grid is 3, not settings by name"),
        ({"grid": None}, r"run: grid is None, not settings by name"),
        ({"alphas": "abc"}, r"run: alphas is 'abc', but must be a list of values, each a finite number"),
        ({"alphas": [1, "x"]}, r"run: alphas is \[1, 'x'\]"),
        ({"alphas": [math.nan]}, r"run: alphas is \[nan\]"),
        ({"alphas": []}, r"run: --alphas is empty"),
        ({"alphas": 3}, r"run: alphas is 3"),
        ({"alphas": None}, r"run: alphas is None"),
        ({"control_seeds": "5"}, r"run: control_seeds is '5', but must be a whole number"),
        ({"control_seeds": -1}, r"run: --control-seeds is -1"),
        ({"judged": 1.5}, r"run: judged is 1\.5"),
    ],
)
def test_unknown_recommendations_are_refused(model: ChatModel, part: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        recommended(Settings(), replace(model, settings={"run": part}))
    text = str(caught.value)
    assert "\n" not in text and ("Correct it there" in text or "Known:" in text)


@pytest.mark.parametrize(
    ("parts", "use", "said"),
    [
        ({"sampling": {"temperature": math.nan}}, "sampling", "temperature is nan, but must be a finite number"),
        ({"sampling": {"max_new_tokens": "48"}}, "sampling", "sampling: max_new_tokens is '48'"),
        ({"sampling": {"top_p": 2}}, "sampling", "sampling: Sampling"),
        ({"judge": {"backend": "oracle"}}, "judge", "judge: backend is 'oracle', but must be one of auto"),
        ({"judge": {"threshold": 7}}, "judge", "judge: the judge threshold is 7"),
        ({"train": {"lora": {"lr": "fast"}}}, "train", r"train\.lora: lr is 'fast'"),
        ({"train": {"lora": {"lr_candidates": 0.1}}}, "train", r"train\.lora: lr_candidates is 0\.1"),
        ({"train": {"lora": {"lr_candidates": [-1]}}}, "train", "lr_candidates is -1"),
        ({"train": {"lora": {"layers": [math.nan, 0.5]}}}, "train", r"layers is \[nan, 0\.5\]"),
        ({"train": {"lora": {"layers": [0.1, 0.2, 0.3]}}}, "train", "layers is .*2 values, each a finite number"),
        ({"train": {"lora": {"layers": ["a", "b"]}}}, "train", r"layers is \['a', 'b'\]"),
        ({"train": {"lora": 3}}, "train", r"train\.lora is 3, not settings by name"),
        ({"train": {"loraa": {}}}, "train", "train: unknown adapter family 'loraa'"),
        ({"rows": {"choice": "many"}}, "rows", "rows: choice is 'many', but must be 1 or more"),
    ],
)  # fmt: skip
def test_a_recommendation_that_cannot_be_used_names_its_file_and_place(
    model: ChatModel, tmp_path: Path, parts: dict[str, Any], use: str, said: str
) -> None:
    told, settings = replace(model, settings=parts), Settings(out=tmp_path)
    uses: dict[str, Callable[[], Any]] = {
        "sampling": lambda: Fitting(settings, told),
        "judge": lambda: judge.resolve(JudgeSettings(), told),
        "train": lambda: train_settings.resolve(told, "lora", {}),
        "rows": lambda: limit_of(settings, told, "choice"),
    }
    with pytest.raises(UserError, match=f"weight_steering.json of .*, .*{said}") as caught:
        uses[use]()
    assert str(caught.value).endswith("Correct it there, or delete it.")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"alphas": (1.0, math.inf)}, "--alphas has 1, inf"),
        ({"cache_memory": math.nan}, "--cache-memory has nan"),
        ({"sampling": {"temperature": math.nan}}, "--temperature has nan"),
        ({"train": {"lora_alpha": math.nan}}, "--lora-alpha has nan"),
        ({"train": {"layers": (math.nan, 0.5)}}, "--layers has nan, 0.5"),
    ],
)
def test_numbers_that_are_not_finite_are_refused_before_anything_is_made(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"{re.escape(said)}. Give finite numbers"):
        Settings(**given)


@pytest.mark.parametrize(
    ("grid", "said"), [(3, "grid is 3, not settings by name"), ({"samples": "x"}, "samples is 'x'")]
)
def test_a_damaged_stored_setting_names_the_file_and_the_remedy(tmp_path: Path, grid: Any, said: str) -> None:
    stored = {**stored_settings(Settings()), "grid": grid}
    with pytest.raises(UserError, match=f"{tmp_path / 'config.json'}: .*{said}.*Restore the file"):
        restore_settings(stored, Settings(), tmp_path / "config.json")


def test_a_behaviour_may_have_recommendations_of_its_own(model: ChatModel) -> None:
    """The part of the behaviour wins over that of all behaviours, and the user's value over both."""
    parts = {"run": {"grid": {"samples": 6}, "judged": 4}, "run_for": {"refusal": {"grid": {"samples": 3}}}}
    model = replace(model, settings=parts)

    def samples(**given: Any) -> int:
        return recommended(Settings(**given), model)[0].grid.samples

    assert (samples(), samples(behaviour="refusal")) == (6, 3)
    assert samples(behaviour="refusal", grid=Grid(samples=5)) == 5
    assert recommended(Settings(behaviour="refusal"), model)[0].judged == 4


def test_what_a_behaviour_recommends_goes_over_what_holds_for_all(model: ChatModel) -> None:
    """In every part, and inside parts: what the behaviour does not name stays."""
    parts: dict[str, Any] = {
        "judge": {"backend": "persona", "threshold": 0.7}, "judge_for": {"refusal": {"backend": "none"}},
        "rows": {"choice": 40, "others": 20}, "rows_for": {"refusal": {"choice": 8}},
        "train": {"lora": {"lr": 1e-3, "rank": 8}, "ia3": {"lr": 1e-2}},
        "train_for": {"refusal": {"lora": {"lr": 2e-3}}},
        "sampling": {"temperature": 0.8, "max_new_tokens": 64},
    }  # fmt: skip
    model = replace(model, settings=parts)
    assert model.recommended("judge", "refusal") == {"backend": "none", "threshold": 0.7}
    assert model.recommended("judge", "honesty") == model.recommended("judge") == parts["judge"]
    assert model.recommended("train", "refusal") == {"lora": {"lr": 2e-3, "rank": 8}, "ia3": {"lr": 1e-2}}
    assert model.recommended("sampling", "refusal") == parts["sampling"]
    assert (limit_of(Settings(behaviour="refusal"), model, "choice"), limit_of(Settings(), model, "choice")) == (8, 40)
    assert judge.resolve(JudgeSettings(), model, "refusal").backend == "none"
    assert parts["train"]["lora"] == {"lr": 1e-3, "rank": 8}, "the model's own settings stay"


@pytest.mark.parametrize(
    ("rows", "probe", "limit"),
    [(None, "choice", 40), (None, "others", 20), (None, "replies", None), (8, "choice", 8), (8, "replies", 8)],
)
def test_rows_of_the_user_win_over_those_of_the_folder(
    model: ChatModel, rows: int | None, probe: str, limit: int | None
) -> None:
    assert limit_of(Settings(rows=rows), model, probe) == limit
    original = recommended(Settings(rows=rows, recipe="original"), model)[1]
    assert limit_of(Settings(rows=rows), original, probe) == limit, "a recipe says nothing about what is asked"


# -------------------------------------------------------------------- the recipe of the replicated work


def test_the_original_recipe_is_that_of_the_replicated_work(model: ChatModel, tmp_path: Path) -> None:
    run = opened(model, tmp_path, recipe="original")
    topics, personas = len(run.behaviour.train), len(run.behaviour.personas.pos)
    assert (topics * personas * run.settings.grid.samples, run.settings.grid) == (1000, Grid(None, None, 10))
    assert (run.sampling.max_new_tokens, run.sampling.temperature) == (96, 0.8)
    assert run.judge == JudgeSettings("none") and run.training == TrainSettings()
    adapter = run.training.adapter
    assert (adapter.rank, adapter.lora_alpha, adapter.layers) == (32, 64, (0.3, 0.8))
    assert (run.training.lr, run.training.epochs) == (2e-4, 1)
    assert (run.settings.alphas, run.settings.judged) == (Settings.alphas, Settings.judged)
    own, other = (opened(model, tmp_path, recipe="original", train={"lr": 3e-4}, sampling={"max_new_tokens": 8}),
                  opened(model, tmp_path))  # fmt: skip
    assert (own.training.lr, own.sampling.max_new_tokens) == (3e-4, 8), "the user's values win here too"
    assert (
        other.folder.path.name == "seed0"
        and own.folder.path.parents[2].name == f"{other.folder.path.parents[2].name}-original"
    )


def test_each_recipe_has_its_own_folder_and_command() -> None:
    subject = behaviour.load("sycophancy")
    settings = Settings(recipe="original", seed=2, data_seed=1)
    assert run_path(settings, subject) == Path("out/pocket-original/sycophancy/lora/seed2-data1")
    assert run_path(replace(settings, recipe="own"), subject).name == "seed2-data1"
    assert "--recipe original" in command(settings, "show") and "--recipe" not in command(Settings(), "show")


def test_report_finds_a_run_of_the_original_recipe(tmp_path: Path) -> None:
    folder = tmp_path / "pocket-original" / "sycophancy" / "lora" / "seed0"
    settings = Settings(recipe="original", out=tmp_path)
    write_json(folder / "config.json", {"settings": stored_settings(settings)})
    found = Report((folder,))._settings(folder)
    assert found.recipe == "original" and run_path(found, behaviour.load("sycophancy")) == folder
    earlier = {name: value for name, value in stored_settings(Settings()).items() if name != "recipe"}
    older = tmp_path / "pocket" / "sycophancy" / "lora" / "seed0"
    write_json(older / "config.json", {"settings": earlier})
    assert Report(())._settings(older).recipe == "own"


# -------------------------------------------------------------------- the dtype of fits

TINY: dict[str, Any] = {
    "grid": Grid(topics=2, personas=1, samples=2), "sampling": {"max_new_tokens": 4}, "samples": 1, "rows": 2,
    "train": {"rank": 2, "lora_alpha": 4, "lr": 1e-2, "batch_size": 2},
}  # fmt: skip


def test_fits_have_their_own_dtype_and_scores_that_of_the_model(
    qwen: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, set[torch.dtype]] = {}

    def watch(module: Any, name: str) -> None:
        real = getattr(module, name)

        def watched(model: ChatModel, *rest: Any, **named: Any) -> Any:
            seen.setdefault(name, set()).add(model.dtype)
            return real(model, *rest, **named)

        monkeypatch.setattr(module, name, watched)

    for module, name in ((data, "make_pairs"), (train, "fit"), (replicate, "score")):
        watch(module, name)
    settings = Settings(model=qwen.name, out=tmp_path, fit_dtype="bfloat16", **TINY)
    with Replication(settings, qwen) as run:
        direction, _ = run.diff()
        run.samples()
        assert run.ability.instrument in ("choice", "replies")
        folder, fitting = run.folder.path, run.fitting_model
    assert seen == {"make_pairs": {torch.bfloat16}, "fit": {torch.bfloat16}, "score": {torch.float32}}
    assert (run.model.dtype, fitting.dtype) == (torch.float32, torch.bfloat16)
    assert direction.base == qwen.fingerprint == fitting.fingerprint and direction.norm() > 0
    assert {delta.materialise().dtype for delta in direction.deltas.values()} == {torch.float32}
    with safe_open(folder / "pos" / "adapter_model.safetensors", "pt") as stored:
        assert {stored.get_slice(name).get_dtype() for name in stored.keys()} == {"F32"}  # noqa: SIM118
    dtypes = {name: read_json(folder / "stages" / f"{name}.json")["inputs"]["dtype"]
              for name in ("data", "train-pos", "train-neg", "samples")}  # fmt: skip
    assert dtypes == {"data": "torch.bfloat16", "train-pos": "torch.bfloat16", "train-neg": "torch.bfloat16",
                      "samples": "torch.float32"}, "samples are written by the model itself"  # fmt: skip
    capsys.readouterr()
    with Fitting(settings, qwen) as again:
        again.diff()
    assert "rebuilding" not in capsys.readouterr().out
    with Fitting(replace(settings, fit_dtype="auto"), qwen) as other:
        assert other.fitting_model is qwen
        other.diff()
    said = capsys.readouterr().out
    assert "data: rebuilding, because dtype changed" in said and "train-pos: rebuilding, because dtype" in said


@pytest.mark.parametrize(
    ("asked", "is_fast", "dtype"),
    [
        ("auto", True, torch.bfloat16),
        ("auto", False, torch.float32),
        ("float32", True, torch.float32),
        ("bfloat16", False, torch.bfloat16),
    ],
)
def test_a_recommended_dtype_is_used_where_it_is_fast(
    qwen: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: Any, is_fast: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(precision, "bfloat16_is_fast", lambda device: is_fast)
    half = replace(qwen, settings={"fit_dtype": "bfloat16"})
    assert opened(half, tmp_path, fit_dtype=asked).fitting_model.dtype == dtype


def test_a_recommended_dtype_that_does_not_exist_is_refused(
    qwen: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "bfloat16_is_fast", lambda device: True)
    run = opened(replace(qwen, settings={"fit_dtype": "bf16"}), tmp_path)
    with pytest.raises(UserError, match=r"hold fit_dtype 'bf16'\. Use one of auto, float32, bfloat16, float16"):
        _ = run.fitting_model
