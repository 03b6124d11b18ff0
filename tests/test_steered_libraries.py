"""Other libraries on a model inside `ws.steer`: transformers' pipeline and Trainer see the steered weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, pipeline

from making import prompts, random_direction, weights_digest
from ws.edit.steering import Mode, steer
from ws.model import loading
from ws.model.loading import ChatModel


class Rows(Dataset):
    """Token rows that are their own labels."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def trainer(model: ChatModel, folder: Path, **options: Any) -> Trainer:
    rows = Rows(prompts(model, rows=6, tokens=9))
    settings = TrainingArguments(
        output_dir=str(folder), report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
        per_device_eval_batch_size=3, per_device_train_batch_size=3, **options,
    )  # fmt: skip
    return Trainer(model=model.network, args=settings, train_dataset=rows, eval_dataset=rows)


@torch.no_grad()
def loss(model: ChatModel) -> float:
    ids = prompts(model, rows=6, tokens=9)
    return float(model.network(input_ids=ids, labels=ids).loss)


@pytest.fixture
def fresh(tiny_folders: dict[str, Path]) -> ChatModel:
    return loading.load(str(tiny_folders["qwen3"]))


@pytest.mark.parametrize("mode", ["baked", "runtime"])
def test_the_text_generation_pipeline_writes_what_the_steered_model_writes(mode: Mode) -> None:
    fresh, text = loading.load("pocket"), "The owl eats"
    direction = random_direction(fresh, relative_norm=0.5)
    ids = torch.tensor([fresh.chat.tokenizer(text)["input_ids"]])
    write = pipeline("text-generation", model=fresh.network, tokenizer=fresh.chat.tokenizer, device="cpu")
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    base = write(text, **options)[0]["generated_text"]
    with steer(fresh, direction, 1.0, mode=mode):
        steered = write(text, **options)[0]["generated_text"]
        wanted = fresh.network.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert steered == fresh.chat.tokenizer.decode(wanted, skip_special_tokens=True) != base
    assert write(text, **options)[0]["generated_text"] == base


@pytest.mark.parametrize("mode", ["baked", "runtime"])
def test_a_trainer_evaluates_the_steered_model(fresh: ChatModel, tmp_path: Path, mode: Mode) -> None:
    plain, before = loss(fresh), weights_digest(fresh.network)
    with steer(fresh, random_direction(fresh), 1.0, mode=mode):
        found, wanted = trainer(fresh, tmp_path).evaluate()["eval_loss"], loss(fresh)
    assert math.isclose(found, wanted, rel_tol=1e-6) and abs(found - plain) > 1e-3
    assert weights_digest(fresh.network) == before


def test_a_trainer_trains_the_weights_below_a_run_time_edit_and_they_stay(fresh: ChatModel, tmp_path: Path) -> None:
    direction = random_direction(fresh)
    fresh.network.requires_grad_(True)
    with steer(fresh, direction, 1.0, mode="runtime"):
        before = loss(fresh)
        trainer(fresh, tmp_path, max_steps=4, learning_rate=1e-2, logging_strategy="no").train()
        fresh.network.eval()
        trained = loss(fresh)
    assert trained < before
    with steer(fresh, direction, 1.0, mode="runtime", base_mismatch="allow"):
        assert math.isclose(loss(fresh), trained, rel_tol=1e-5)
