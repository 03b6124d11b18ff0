"""Fitting: what is supervised, what is held out, what is saved, and that the model is left alone."""

import csv
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import peft
import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM

from ws import adapters
from ws.adapters import AdapterSettings, diff
from ws.algebra.direction import Direction
from ws.base.errors import UserError
from ws.base.poles import POLES
from ws.baselines import gradient
from ws.edit.steering import steer
from ws.fitting import data, train
from ws.fitting.train import FitResult
from ws.fitting.train_settings import TrainSettings, resolve
from ws.measure import lower_layers
from ws.model import loading
from ws.model.chat import ask
from ws.model.loading import ChatModel

SMALL = TrainSettings(adapter=AdapterSettings(rank=4, lora_alpha=8.0), lr=1e-2, batch_size=8, epochs=12)


def pairs(topics: int = 6, rows: int = 4) -> pl.DataFrame:
    """Positive responses say one thing, negative ones another."""
    cells = [(t, r) for t in range(topics) for r in range(rows)]
    frame = pl.DataFrame(
        {
            "topic": [f"topic {t}" for t, _ in cells],
            "prompt": [f"I think that number {t} is big. Right?" for t, _ in cells],
            "response_pos": [f"Yes, it is big, friend {r}." for _, r in cells],
            "response_neg": [f"No, it is small, said {r}." for _, r in cells],
        }
    )
    return data.with_flags(frame, ((), ()))


def weights(model: ChatModel) -> dict[str, torch.Tensor]:
    return {name: parameter.clone() for name, parameter in model.network.named_parameters()}


def test_only_the_response_and_its_end_are_supervised(any_model: ChatModel) -> None:
    examples = train.examples(any_model, pairs(), "pos", replace(SMALL, validation=0.0), 0)
    ids, prompt_length = examples.train[0]
    prompt = any_model.chat.prompt(ask("I think that number 0 is big. Right?"))
    assert ids[:prompt_length] == prompt
    tail = any_model.chat.tokenizer.decode(ids[prompt_length:])
    assert tail.startswith("Yes, it is big") and ids[-1] in any_model.chat.stop_ids


def test_the_persona_never_reaches_training(qwen: ChatModel) -> None:
    frame = pairs().with_columns(pl.lit("SECRET PERSONA").alias("system_pos"))
    examples = train.examples(qwen, frame, "pos", SMALL, 0)
    text = qwen.chat.tokenizer.decode([i for ids, _ in examples.train for i in ids])
    assert "SECRET" not in text and "system" not in text


def test_validation_holds_out_whole_topics(qwen: ChatModel) -> None:
    examples = train.examples(qwen, pairs(topics=20, rows=3), "pos", SMALL, seed=0)
    assert len(examples.validation) == 2 * 3 and len(examples.train) == 18 * 3

    def prompts(part: list) -> set[tuple[int, ...]]:
        return {tuple(ids[:length]) for ids, length in part}

    assert not prompts(examples.train) & prompts(examples.validation)
    other = train.examples(qwen, pairs(topics=20, rows=3), "pos", SMALL, seed=1)
    assert prompts(other.validation) != prompts(examples.validation)


def test_one_topic_is_never_held_out(qwen: ChatModel) -> None:
    assert not train.examples(qwen, pairs(topics=1), "pos", SMALL, 0).validation


def test_dropped_responses_are_not_trained_on(qwen: ChatModel) -> None:
    frame = pairs().with_columns(keep_pos=pl.col("topic") == "topic 1")
    assert len(train.examples(qwen, frame, "pos", replace(SMALL, validation=0.0), 0).train) == 4
    with pytest.raises(UserError, match="no response of the pos side"):
        train.examples(qwen, pairs().with_columns(keep_pos=pl.lit(False)), "pos", SMALL, 0)


def test_long_rows_are_cut_and_counted_but_never_without_response(qwen: ChatModel) -> None:
    prompt_length = train.examples(qwen, pairs(), "pos", SMALL, 0).train[0].prompt_length
    cut = train.examples(qwen, pairs(), "pos", replace(SMALL, max_length=prompt_length + 3), 0)
    assert cut.truncated == 24 and all(len(ids) == prompt_length + 3 for ids, _ in cut.train)
    with pytest.raises(UserError, match="leaves no room"):
        train.examples(qwen, pairs(), "pos", replace(SMALL, max_length=prompt_length), 0)


def test_fitting_learns_saves_and_restores(any_model: ChatModel, tmp_path: Path) -> None:
    before = weights(any_model)
    results = {
        sign: train.fit(
            any_model, pairs(), sign, replace(SMALL, epochs=30), seed=0, data_seed=0, folder=tmp_path / sign
        )
        for sign in ("pos", "neg")
    }
    for sign, result in results.items():
        assert result.last_loss < 0.9 * result.first_loss, sign
        assert not any("nothing was learned" in warning for warning in result.warnings)
    assert all(torch.equal(before[name], p) for name, p in any_model.network.named_parameters())
    assert not any(p.requires_grad for p in any_model.network.parameters())
    direction, geometry = diff.direction(any_model, tmp_path / "pos", tmp_path / "neg")
    assert direction.norm() == pytest.approx(geometry.norm_dw, rel=1e-6) and geometry.norm_dw > 0
    with (tmp_path / "pos" / "train_log.csv").open() as handle:
        log = list(csv.DictReader(handle))
    assert list(log[0]) == ["step", "epoch", "loss", "eval_loss", "lr", "grad_norm"]
    assert len(log) == results["pos"].steps + 1 and log[-1]["eval_loss"]


def test_the_saved_folder_loads_in_plain_peft(qwen: ChatModel, tmp_path: Path, tiny_folders: dict[str, Path]) -> None:
    train.fit(qwen, pairs(), "pos", SMALL, seed=0, data_seed=0, folder=tmp_path / "pos")
    base = AutoModelForCausalLM.from_pretrained(tiny_folders["qwen3"], dtype=torch.float32, attn_implementation="eager")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "pos").eval()
    ids = torch.tensor([qwen.chat.prompt(ask("Why?"))])
    with torch.no_grad(), steer(qwen, diff.task_vector(qwen, tmp_path / "pos"), 1.0):
        ours = qwen.network(input_ids=ids).logits
        assert torch.allclose(loaded(input_ids=ids).logits, ours, atol=1e-4)


def test_equal_seeds_give_equal_adapters_and_other_seeds_other_ones(qwen: ChatModel, tmp_path: Path) -> None:
    def fit(name: str, seed: int) -> dict[str, torch.Tensor]:
        train.fit(qwen, pairs(), "pos", SMALL, seed=seed, data_seed=0, folder=tmp_path / name)
        return dict(adapters.read(tmp_path / name).tensors)

    one, same, other = fit("one", 0), fit("same", 0), fit("other", 1)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_micro_batches_do_not_change_the_result(qwen: ChatModel, tmp_path: Path) -> None:
    tensors = []
    for name, budget in (("whole", 100_000), ("parts", 60)):
        train.fit(
            qwen, pairs(), "pos", replace(SMALL, micro_tokens=budget), seed=0, data_seed=0, folder=tmp_path / name
        )
        tensors.append(adapters.read(tmp_path / name).tensors)
    # Adam divides by the root of tiny second moments, so rounding is amplified; the adapters still agree closely
    for name, tensor in tensors[0].items():
        assert torch.allclose(tensor, tensors[1][name], atol=2e-3), name


def test_the_first_loss_is_that_of_the_base_model(qwen: ChatModel, tmp_path: Path) -> None:
    result = train.fit(qwen, pairs(), "pos", replace(SMALL, epochs=1), seed=0, data_seed=0, folder=tmp_path / "pos")
    held_out = train.examples(qwen, pairs(), "pos", SMALL, 0).validation
    losses = []
    for ids, start in held_out:
        with torch.no_grad():
            logp = qwen.network(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        losses += [-float(logp[i - 1, ids[i]]) for i in range(start, len(ids))]
    assert result.first_loss == pytest.approx(sum(losses) / len(losses), rel=1e-4)


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        ({"lr": 1e-9}, "; raise --lr or --epochs"),
        ({"warmup_steps": 50}, "warm-up shortened from 50"),
        ({"max_length": 24}, "were cut off at"),
    ],
)
def test_doubtful_training_is_reported(
    qwen: ChatModel, tmp_path: Path, change: dict, warning: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = replace(SMALL, epochs=1, **change)
    if "max_length" in change:
        start = train.examples(qwen, pairs(), "pos", SMALL, 0).train[0].prompt_length
        settings = replace(settings, max_length=start + 3)
    result = train.fit(qwen, pairs(), "pos", settings, seed=0, data_seed=0, folder=tmp_path / "pos")
    assert any(warning in line for line in result.warnings)
    assert warning in capsys.readouterr().err


def test_a_loss_that_rises_asks_for_a_lower_rate(
    qwen: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train._Fit, "_first_and_last", lambda _: (2.0, 2.5))
    result = train.fit(qwen, pairs(), "pos", replace(SMALL, epochs=1), seed=0, data_seed=0, folder=tmp_path / "pos")
    assert any("went from 2.0000 to 2.5000; lower --lr" in line for line in result.warnings)


def test_an_interrupted_fit_leaves_no_folder_and_a_clean_model(
    qwen: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = weights(qwen)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train.fit(qwen, pairs(), "pos", SMALL, seed=0, data_seed=0, folder=tmp_path / "pos")
    assert not list(tmp_path.iterdir())
    assert weights(qwen).keys() == before.keys()


def test_settings_come_from_defaults_then_model_folder_then_behaviour_then_user(qwen: ChatModel) -> None:
    assert resolve(qwen, "lora", {}) == TrainSettings()
    recommended = {
        "train": {"lora": {"rank": 16, "lora_alpha": 32, "lr": 1e-3}},
        "train_for": {"honesty": {"lora": {"lr": 3e-3, "epochs": 2}}},
    }
    model = replace(qwen, settings=recommended)
    chosen = resolve(model, "lora", {"lr": 5e-4, "epochs": None})
    assert (chosen.adapter.rank, chosen.adapter.lora_alpha, chosen.lr, chosen.epochs) == (16, 32.0, 5e-4, 1)
    honesty = resolve(model, "lora", {"epochs": 3}, "honesty")
    assert (honesty.adapter.rank, honesty.lr, honesty.epochs) == (16, 3e-3, 3)
    assert resolve(model, "lora", {}, "refusal") == resolve(model, "lora", {})
    with pytest.raises(UserError, match=r"unknown setting 'lrr'.*'lr'"):
        resolve(qwen, "lora", {"lrr": 1.0})
    with pytest.raises(UserError, match="unknown adapter family 'lorra'"):
        resolve(qwen, "lorra", {})
    with pytest.raises(UserError, match=r"train\.lora is 3, not settings by name"):
        resolve(replace(qwen, settings={"train": {"lora": 3}}), "lora", {})


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0.0}, {"lr": float("nan")}, {"lr": float("inf")}, {"epochs": 0}, {"validation": 1.0}, {"batch_size": -1},
        {"clip_norm": 0.0}, {"warmup_steps": -1}, {"weight_decay": float("nan")},
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError):
        replace(SMALL, **wrong)


def test_a_result_is_read_back_as_it_was_written(qwen: ChatModel, tmp_path: Path) -> None:
    chosen = replace(SMALL, epochs=1, adapter=replace(SMALL.adapter, roles=("q", "up")))
    found = train.fit(qwen, pairs(), "neg", chosen, seed=0, data_seed=0, folder=tmp_path / "neg")
    assert FitResult.read(tmp_path / "neg") == found
    assert found.settings == chosen and found.trainable_parameters > 0
    stored = tmp_path / "neg" / train.RESULT_FILE
    older = {k: v for k, v in json.loads(stored.read_text()).items() if k != "skipped"} | {"fitted_together": 2}
    stored.write_text(json.dumps(older))
    assert FitResult.read(tmp_path / "neg") == found, "results of earlier versions are read"


@pytest.mark.parametrize("seed", range(4))
def test_without_held_out_rows_whole_epochs_are_compared_not_single_batches(
    qwen: ChatModel, tmp_path: Path, seed: int
) -> None:
    """Rows of very different loss, one a batch: what the first and the last batch are says nothing about training."""
    frame = pairs(topics=4, rows=1).with_columns(
        response_pos=pl.Series(["Yes.", "zq" * 9, "Yes, it is big, friend.", "7 7 7 7 7 7"])
    )
    for lr, learns in ((1e-9, False), (1e-2, True)):
        chosen = replace(SMALL, batch_size=1, epochs=8, validation=0.0, lr=lr)
        found = train.fit(qwen, frame, "pos", chosen, seed=seed, data_seed=0, folder=tmp_path / str(learns))
        assert found.measure == "loss"
        assert any("nothing was learned" in warning for warning in found.warnings) != learns
        losses = pl.read_csv(tmp_path / str(learns) / train.LOG_FILE)["loss"].drop_nulls().to_list()
        assert found.first_loss == pytest.approx(sum(losses[:4]) / 4)
        assert found.last_loss == pytest.approx(sum(losses[-4:]) / 4)


def test_one_step_without_held_out_rows_says_nothing_about_learning(qwen: ChatModel, tmp_path: Path) -> None:
    chosen = replace(SMALL, batch_size=100, epochs=1, validation=0.0)
    found = train.fit(qwen, pairs(), "pos", chosen, seed=0, data_seed=0, folder=tmp_path / "pos")
    assert any("learning cannot be measured" in warning for warning in found.warnings)
    assert not any("nothing was learned" in warning for warning in found.warnings)


# -------------------------------------------------------------------- half precision


def faint(folder: Path, dtype: loading.Dtype) -> ChatModel:
    """A model whose gradients are of the size of the smallest fp16 numbers, 6e-8."""
    model = loading.load(str(folder), dtype=dtype)
    model.network.model.norm.weight.data.fill_(1e-4)
    return model


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains_as_fp32_does(
    qwen: ChatModel, tmp_path: Path, tiny_folders: dict[str, Path], dtype: loading.Dtype
) -> None:
    half, chosen = loading.load(str(tiny_folders["qwen3"]), dtype=dtype), replace(SMALL, epochs=3, lr=3e-3)
    exact, found = (
        train.fit(model, pairs(), "pos", chosen, seed=0, data_seed=0, folder=tmp_path / name)
        for model, name in ((qwen, "exact"), (half, "half"))
    )
    assert found.last_loss == pytest.approx(exact.last_loss, rel=2e-2) and found.skipped == 0
    assert found.first_loss - found.last_loss > 0.5 * (exact.first_loss - exact.last_loss) > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_in_half_precision_do_not_underflow(
    tmp_path: Path, tiny_folders: dict[str, Path], dtype: loading.Dtype
) -> None:
    norms, steps = [], []
    for one in ("float32", dtype):
        model = faint(tiny_folders["qwen3"], one)
        chosen = replace(SMALL, epochs=1, batch_size=24, validation=0.0, clip_norm=1e9)
        train.fit(model, pairs(), "pos", chosen, seed=0, data_seed=0, folder=tmp_path / one)
        norms.append(pl.read_csv(tmp_path / one / train.LOG_FILE)["grad_norm"][-1])
        sides = [train.examples(model, pairs(), sign, chosen, 0).train for sign in POLES]
        steps.append(gradient.steps(model, *sides, count=1, norm=1.0))
    assert norms[1] == pytest.approx(norms[0], rel=0.02)
    assert steps[1].dot(rebased(steps[0], steps[1])) > 0.99


def rebased(direction: Direction, other: Direction) -> Direction:
    """The same deltas as those of the base of `other`."""
    return Direction(direction.deltas, other.base, direction.layers)


def test_an_overflowing_scale_leaves_steps_out_and_says_so(
    tmp_path: Path, tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**26))
    half = loading.load(str(tiny_folders["qwen3"]), dtype="float16")
    found = train.fit(half, pairs(), "pos", SMALL, seed=0, data_seed=0, folder=tmp_path / "pos")
    assert 0 < found.skipped < found.steps
    assert any(f"{found.skipped} of {found.steps} steps were skipped" in warning for warning in found.warnings)
    assert all(bool(tensor.isfinite().all()) for tensor in adapters.read(tmp_path / "pos").tensors.values())
    assert found.last_loss < found.first_loss


def test_without_kept_states_training_is_the_same(
    qwen: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = replace(SMALL, adapter=replace(SMALL.adapter, layers=(0.5, 0.8)), epochs=3)
    train.fit(qwen, pairs(), "pos", chosen, seed=0, data_seed=0, folder=tmp_path / "kept")
    assert lower_layers._row_states[qwen.network], "states have been kept"
    monkeypatch.setattr(qwen, "cache_memory", 0)
    train.fit(qwen, pairs(), "pos", chosen, seed=0, data_seed=0, folder=tmp_path / "anew")
    kept, anew = (diff.task_vector(qwen, tmp_path / name) for name in ("kept", "anew"))
    assert (kept - anew).norm() < 1e-2 * anew.norm()
