"""The bias-only baseline: shifts of module outputs, fitted like adapters, the network left as it was."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
import torch

from making import assert_one_line, gaussian, hook_count, logits, prompts, weights_digest
from ws.base.errors import UserError
from ws.baselines import bias_only
from ws.baselines.bias_only import OutputShift
from ws.edit.steering import steer
from ws.fitting import train_settings
from ws.model import architecture
from ws.model.loading import ChatModel

LAYERS = (0.3, 0.8)


def pairs() -> pl.DataFrame:
    """Ten topics, opposite answers."""
    return pl.DataFrame([
        {"topic": f"t{n}", "prompt": f"Do cats like milk, case {n}?", "response_pos": "Yes. Yes. Yes.",
         "response_neg": "No. No. No.", "keep_pos": True, "keep_neg": True}
        for n in range(10)
    ])  # fmt: skip


def shift(model: ChatModel, scale: float = 0.3) -> OutputShift:
    sites = architecture.sites(model.network, [1, 2])
    return OutputShift(
        {s.module: gaussian(s.shape[1 if s.transposed else 0], seed=n, scale=scale) for n, s in enumerate(sites)},
        model.fingerprint,
    )


def test_a_shift_is_what_a_bias_would_be(any_model: ChatModel) -> None:
    moved, ids = shift(any_model), prompts(any_model)
    modules, before = dict(any_model.network.named_modules()), weights_digest(any_model.network)
    with steer(any_model, moved, 0.5):
        shifted = logits(any_model.network, ids)
    kept = {name: modules[name].bias for name in moved.vectors}
    for name, vector in moved.vectors.items():
        own = 0 if kept[name] is None else kept[name].data
        modules[name].bias = torch.nn.Parameter(own + 0.5 * vector)
    biased = logits(any_model.network, ids)
    for name, bias in kept.items():
        modules[name].bias = bias
    assert torch.allclose(shifted, biased, atol=1e-4)
    assert (weights_digest(any_model.network), hook_count(any_model.network)) == (before, 0)


def test_a_shift_may_differ_by_row_and_rows_at_zero_are_the_base(qwen: ChatModel) -> None:
    ids = prompts(qwen, rows=3)
    base = logits(qwen.network, ids)
    with steer(qwen, shift(qwen), torch.tensor([0.0, 1.0, -1.0])):
        moved = logits(qwen.network, ids)
    assert torch.equal(moved[0], base[0])
    assert not torch.allclose(moved[1], base[1]) and not torch.allclose(moved[2], base[2])


def test_files_keep_vectors_and_base(qwen: ChatModel, tmp_path: Path) -> None:
    moved = shift(qwen)
    moved.save(tmp_path / "biases.safetensors")
    loaded = OutputShift.load(tmp_path / "biases.safetensors")
    assert loaded.base == qwen.fingerprint and loaded.vectors.keys() == moved.vectors.keys()
    assert all(torch.equal(loaded.vectors[name], vector) for name, vector in moved.vectors.items())
    assert (moved - loaded).norm() == 0 < moved.norm()


def test_a_module_that_is_not_there_is_an_error(qwen: ChatModel) -> None:
    with pytest.raises(UserError) as caught, steer(qwen, OutputShift({"no.where": torch.ones(3)}, qwen.fingerprint)):
        pass
    assert_one_line(caught.value, "no.where")


def test_the_fit_raises_what_the_positive_side_says(qwen: ChatModel) -> None:
    chosen = train_settings.resolve(qwen, "lora", {"batch_size": 4, "epochs": 3, "layers": LAYERS})
    before = weights_digest(qwen.network)
    fitted = bias_only.fit(qwen, pairs(), chosen, seed=0, data_seed=0)
    mlp = architecture.sites(qwen.network, architecture.layer_slice(qwen.layer_count, *LAYERS), ["gate", "up", "down"])
    assert set(fitted.vectors) == {site.module for site in mlp}
    assert weights_digest(qwen.network) == before and hook_count(qwen.network) == 0
    prompt = torch.tensor([qwen.chat.prompt([{"role": "user", "content": "Do cats like milk, case 3?"}])])
    yes, no = (qwen.chat.answers(word)[0][0] for word in ("Yes", "No"))
    ratios = []
    for alpha in (-1.0, 0.0, 1.0):
        with steer(qwen, fitted, alpha):
            last = logits(qwen.network, prompt)[0, -1]
        ratios.append(float(last[yes] - last[no]))
    assert ratios[0] < ratios[1] < ratios[2]
    again = bias_only.fit(qwen, pairs(), chosen, seed=0, data_seed=0)
    assert all(torch.equal(again.vectors[name], vector) for name, vector in fitted.vectors.items())
