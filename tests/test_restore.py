"""A fit leaves no trace: modes, `requires_grad` flags, modules, hooks and global random states are as they were."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraModel
from torch import nn

from making import assert_one_line, hook_count, weights_digest
from test_train import SMALL, pairs
from ws import adapters
from ws.adapters import AdapterSettings
from ws.base.errors import UnsupportedFeatureError
from ws.base.poles import POLES
from ws.baselines import bias_only, gradient, jacobian, trained_vector
from ws.eval import sycophancy
from ws.fitting import behaviour, train
from ws.fitting.train_settings import TrainSettings
from ws.model import loading
from ws.model.loading import ChatModel
from ws.model.restore import restored

Fit = Callable[[ChatModel, Path], object]
SYCOPHANCY = behaviour.load("sycophancy")


def settings(family: str = "lora") -> TrainSettings:
    return TrainSettings(AdapterSettings(family, rank=2, lora_alpha=4.0), lr=1e-3, batch_size=12)


def adapter(family: str) -> Fit:
    def fit(model: ChatModel, folder: Path) -> object:
        return train.fit(model, pairs(), "pos", settings(family), seed=5, data_seed=0, folder=folder / "pos")

    return fit


def biases(model: ChatModel, _: Path) -> object:
    return bias_only.fit(model, pairs(), settings(), seed=5, data_seed=0)


def one_step(model: ChatModel, _: Path) -> object:
    positive, negative = (train.examples(model, pairs(), sign, SMALL, 0).train for sign in POLES)
    return gradient.steps(model, positive, negative, count=1, norm=1.0)


def vectors(model: ChatModel, _: Path) -> object:
    positive, negative = (train.examples(model, pairs(), sign, SMALL, 0).train for sign in POLES)
    return trained_vector.fit(model, SYCOPHANCY, positive, negative, layers=[1, 2], epochs=1)


def jacobian_vectors(model: ChatModel, _: Path) -> object:
    return jacobian.fit(model, sycophancy.headline_probe(SYCOPHANCY, limit=4), SYCOPHANCY, layers=[1, 2])


FITS = {"lora": adapter("lora"), "pissa": adapter("pissa"), "dora": adapter("dora"), "biases": biases,
        "one gradient step": one_step, "vectors": vectors, "jacobian": jacobian_vectors}  # fmt: skip


@pytest.fixture
def mixed(tiny_folders: dict[str, Path]) -> ChatModel:
    """GPT-2, which has dropout, in training mode but for one block, and with some parameters trainable."""
    model = loading.load(str(tiny_folders["gpt2"]))
    model.network.train()
    model.network.transformer.h[1].eval()
    for name, parameter in model.network.named_parameters():
        parameter.requires_grad_("mlp" in name)
    return model


@pytest.fixture(autouse=True)
def random_state() -> Iterator[None]:
    """States that no fit would choose."""
    torch.manual_seed(1234)
    np.random.seed(1234)  # noqa: NPY002 - the global state is what is looked at
    yield


def traces(network: nn.Module) -> dict[str, Any]:
    """All that a fit may change and has to put back; the checks of shapes themselves draw from `random`."""
    return {
        "modules": [(name, id(module), module.training) for name, module in network.named_modules()],
        "parameters": [(name, p.requires_grad, p.grad is None) for name, p in network.named_parameters()],
        "attributes": sorted(network.__dict__),
        "hooks": hook_count(network),
        "weights": weights_digest(network),
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
    }


def assert_no_trace(before: dict[str, Any], network: nn.Module) -> None:
    after = traces(network)
    assert [name for name in before if before[name] != after[name]] == []


@pytest.mark.parametrize("ends", [nullcontext(), pytest.raises(KeyboardInterrupt)])
def test_random_numbers_go_on_as_if_none_had_been_drawn(qwen: ChatModel, ends: AbstractContextManager[Any]) -> None:
    def drawn() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(1))]  # noqa: NPY002

    def seed() -> None:
        random.seed(7), np.random.seed(7), torch.manual_seed(7)  # noqa: NPY002

    seed()
    expected = drawn()
    seed()
    with ends, restored(qwen.network):
        random.seed(8), np.random.seed(8), torch.manual_seed(8)  # noqa: NPY002
        drawn()
        if not isinstance(ends, nullcontext):
            raise KeyboardInterrupt
    assert drawn() == expected


@pytest.mark.parametrize("name", FITS)
def test_a_fit_leaves_no_trace(mixed: ChatModel, tmp_path: Path, name: str) -> None:
    before = traces(mixed.network)
    FITS[name](mixed, tmp_path)
    assert_no_trace(before, mixed.network)


@pytest.mark.parametrize("name", FITS)
def test_a_fit_that_is_interrupted_leaves_no_trace(
    mixed: ChatModel, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        torch.rand(1), np.random.rand()  # noqa: NPY002
        raise KeyboardInterrupt

    before = traces(mixed.network)
    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    monkeypatch.setattr(torch.autograd, "grad", interrupted)
    with pytest.raises(KeyboardInterrupt):
        FITS[name](mixed, tmp_path)
    assert_no_trace(before, mixed.network)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "told"), [(TypeError("no such layer"), UnsupportedFeatureError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_a_network_on_which_peft_fails_half_way_is_left_alone(
    mixed: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, told: type[BaseException]
) -> None:
    place, wrapped = LoraModel._create_and_replace, []

    def failing(*given: Any, **named: Any) -> None:
        wrapped.append(1)
        if len(wrapped) == 4:
            raise error
        place(*given, **named)

    monkeypatch.setattr(LoraModel, "_create_and_replace", failing)
    before = traces(mixed.network)
    with pytest.raises(told) as caught:
        FITS["lora"](mixed, tmp_path)
    if isinstance(caught.value, UnsupportedFeatureError):
        assert_one_line(caught.value, "lora", "GPT2LMHeadModel", "no such layer")
    assert len(wrapped) == 4
    assert_no_trace(before, mixed.network)


def test_the_mode_that_a_model_comes_in_does_not_change_the_fit(
    mixed: ChatModel, tmp_path: Path, tiny_folders: dict[str, Path]
) -> None:
    ready = loading.load(str(tiny_folders["gpt2"]))
    for model, name in ((mixed, "mixed"), (ready, "ready")):
        FITS["lora"](model, tmp_path / name)
    one, other = (adapters.read(tmp_path / name / "pos").tensors for name in ("mixed", "ready"))
    assert all(torch.equal(one[name], other[name]) for name in one)
