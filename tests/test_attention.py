"""Grouped attention is the library's eager attention without the copies; a network where it is not keeps its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from making import relative_error
from ws.model import attention, loading
from ws.model.loading import ChatModel


def padded(model: ChatModel) -> dict[str, Tensor]:
    """Three rows, two of them padded on the left."""
    count = model.network.get_input_embeddings().weight.shape[0]
    ids = torch.arange(36).view(3, 12) * 13 % count
    mask = torch.ones_like(ids)
    mask[1, :5], mask[2, :2] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def outputs(network: Any, inputs: dict[str, Tensor]) -> Tensor:
    return network(**inputs, use_cache=False).logits[inputs["attention_mask"] > 0]


def test_grouped_attention_is_eager_attention(any_model: ChatModel) -> None:
    eager = loading.load(any_model.name, attention="eager")
    assert any_model.network.config._attn_implementation == attention.GROUPED
    assert eager.network.config._attn_implementation == attention.EAGER
    inputs = padded(any_model)
    with torch.no_grad():
        assert relative_error(outputs(any_model.network, inputs), outputs(eager.network, inputs)) < 1e-5


def test_grouped_attention_is_eager_attention_token_by_token(any_model: ChatModel) -> None:
    """One query against a cache of keys, as in generation."""
    eager = loading.load(any_model.name, attention="eager")
    inputs = padded(any_model)
    found = []
    for network in (any_model.network, eager.network):
        cache = DynamicCache(config=network.config)
        mask = inputs["attention_mask"]
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        ids, steps = inputs["input_ids"], []
        with torch.no_grad():
            for start, stop in ((0, 9), (9, 10), (10, 11), (11, 12)):
                steps.append(network(
                    input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions[:, start:stop],
                    past_key_values=cache, use_cache=True,
                ).logits[:, -1])  # fmt: skip
        found.append(torch.stack(steps))
    assert relative_error(*found) < 1e-5


def test_gradients_are_those_of_eager_attention(any_model: ChatModel) -> None:
    found = {}
    for name in ("auto", "eager"):
        network = loading.load(any_model.name, attention=name).network.requires_grad_(True)
        outputs(network, padded(any_model)).square().mean().backward()
        found[name] = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
    scale = max(float(gradient.norm()) for gradient in found["eager"].values())
    assert found["auto"].keys() == found["eager"].keys()
    for name, gradient in found["eager"].items():
        assert float((found["auto"][name] - gradient).norm()) < 1e-5 * scale, name


def test_weights_of_the_heads_are_in_the_order_of_the_heads(qwen: ChatModel) -> None:
    # copies of our own: asked for its attentions, a network keeps the library's hooks for good
    networks = [loading.load(qwen.name, attention=name).network for name in ("auto", "eager")]
    ids = torch.arange(8)[None]
    with torch.no_grad():
        mine, theirs = (network(input_ids=ids, output_attentions=True).attentions for network in networks)
    for one, other in zip(mine, theirs, strict=True):
        assert one.shape == other.shape and torch.allclose(one, other, atol=1e-6)


def test_softcap_and_default_scaling() -> None:
    query, key, value = (torch.randn(2, heads, 5, 8) for heads in (4, 2, 2))
    module = torch.nn.Module().eval()
    keys, values = (one.repeat_interleave(2, dim=1) for one in (key, value))
    scores = torch.tanh(query @ keys.mT / 8**0.5 / 2.0) * 2.0
    found, _ = attention.grouped(module, query, key, value, None, softcap=2.0)
    assert torch.allclose(found, (scores.softmax(-1) @ values).transpose(1, 2), atol=1e-6)


def test_a_network_that_computes_something_else_keeps_its_own(
    qwen: ChatModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AttentionInterface  # noqa: PLC0415

    def ignoring_keys(_module: Any, query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return query.transpose(1, 2).contiguous(), None

    monkeypatch.setitem(AttentionInterface._global_mapping, attention.GROUPED, ignoring_keys)
    model = loading.load(qwen.name)
    assert model.network.config._attn_implementation == attention.EAGER
    assert "grouped attention does not match this model" in capsys.readouterr().err
    monkeypatch.undo()
    inputs = padded(qwen)
    with torch.no_grad():
        assert relative_error(outputs(model.network, inputs), outputs(qwen.network, inputs)) < 1e-5
