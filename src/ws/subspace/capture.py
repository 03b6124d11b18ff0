"""Activations of a model at the answer anchor, captured once under a Condition.

Rows are rendered, batched and padded as the scoring engine does it (`measure.plan`), so the captured position is the
one whose next token a choice probe scores. Nothing here depends on the batch: in a causal model with right padding a
row gives the same numbers alone and in a batch.

    h_before[l], h_after[l]    residual stream that enters and leaves decoder layer l, at the anchor
    block      d_l = h_after[l] - h_before[l]                      what layer l itself wrote
    block difference           d_l(+1) - d_l(-1)                   its part in the effect of a direction
    cumulative difference      h_after[l](+1) - h_after[l](-1)     with the parts of all layers up to l

Numeric trap: the residual of a late layer is much larger than what one layer writes, so the block difference is taken
in fp64 from fp32 states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ws.base.errors import UnsupportedFeatureError
from ws.edit.condition import Condition
from ws.edit.steering import under
from ws.measure.plan import Plan, PreparedProbe
from ws.measure.probe import Probe
from ws.model import architecture, forward
from ws.model.loading import ChatModel


@dataclass(frozen=True, eq=False)
class Captured:
    """Residuals that enter (`before`) and leave (`after`) every decoder layer at the anchor, fp32 on the CPU.

    before, after: (layers, prompts, width). mlp_inputs: what the up projection of each layer reads, (layers, prompts,
    width), after the norm; None for a layout without one. rows: ids of the prompts, in order. clusters: their clusters.
    """

    before: Float[Tensor, "layers prompts width"]
    after: Float[Tensor, "layers prompts width"]
    mlp_inputs: Float[Tensor, "layers prompts width"] | None
    rows: tuple[str, ...]
    clusters: tuple[str, ...]

    @property
    def layer_count(self) -> int:
        """Number of decoder layers."""
        return len(self.after)

    @property
    def block(self) -> Float[Tensor, "layers prompts width"]:
        """What each layer adds to the residual stream, fp64."""
        return self.after.double() - self.before.double()


def at_anchor(
    model: ChatModel, probe: Probe, condition: Condition | None = None, *, token_budget: int | None = None
) -> Captured:
    """The residuals of a choice probe's rows at its anchor under a Condition (default: the plain unedited model).

    token_budget: padded tokens per batch; it does not change the result beyond rounding.
    """
    found: dict[str, list[Tensor]] = {}
    for index, state in _states(model, probe, condition or Condition(), token_budget):
        for name, at_rows in state.anchor.items():
            kept = found.setdefault(name, [torch.empty(0)] * len(probe.rows))
            for place, row in enumerate(index):
                kept[row] = at_rows[place]
    return Captured(
        before=torch.stack(found["before"], dim=1),
        after=torch.stack(found["after"], dim=1),
        mlp_inputs=torch.stack(found["mlp"], dim=1) if "mlp" in found else None,
        rows=tuple(row.row for row in probe.rows),
        clusters=tuple(row.cluster or row.row for row in probe.rows),
    )


def block_difference(plus: Captured, minus: Captured) -> Float[Tensor, "layers prompts width"]:
    """`(after - before)(+1) - (after - before)(-1)`: what each layer itself contributes to the effect, fp64."""
    return plus.block - minus.block


def cumulative_difference(plus: Captured, minus: Captured) -> Float[Tensor, "layers prompts width"]:
    """`after(+1) - after(-1)`: the effect so far at each layer, fp64."""
    return plus.after.double() - minus.after.double()


# -------------------------------------------------------------------- tokens


@dataclass(frozen=True, eq=False)
class CapturedTokens:
    """Every token of every prompt: `states`, (layers, tokens, width) per prompt, leave the layers; fp32 on the CPU.

    attention: how much the anchor attends to each token, mean over heads, (layers, tokens) per prompt. ids: token ids.
    """

    states: tuple[Tensor, ...]
    attention: tuple[Tensor, ...]
    ids: tuple[tuple[int, ...], ...]


def all_tokens(
    model: ChatModel, probe: Probe, condition: Condition | None = None, *, token_budget: int | None = None
) -> CapturedTokens:
    """States and attention of all tokens; an error if the attention of this model keeps no weights."""
    states, attention = [torch.empty(0)] * len(probe.rows), [torch.empty(0)] * len(probe.rows)
    ids: list[tuple[int, ...]] = [()] * len(probe.rows)
    for index, state in _states(model, probe, condition or Condition(), token_budget, tokens=True):
        for place, row in enumerate(index):
            ids[row] = tuple(state.ids[place])
            length = len(ids[row])
            states[row] = torch.stack([one[place, :length].float().cpu() for one in state.after])
            attention[row] = torch.stack([one[place, :, length - 1, :length].float().mean(0).cpu()
                                          for one in state.attention])  # fmt: skip
    return CapturedTokens(tuple(states), tuple(attention), tuple(ids))


def shared_ending(first: Sequence[int], second: Sequence[int]) -> int:
    """How many last token ids two prompts have in common: the turns after different system prompts."""
    pairs = zip(reversed(first), reversed(second), strict=False)
    return next((number for number, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


# -------------------------------------------------------------------- one pass per batch


@dataclass(frozen=True, eq=False)
class _Batch:
    """States of one batch: at the anchor, name -> (rows, layers, width), and of all tokens, one tensor per layer."""

    anchor: dict[str, Tensor]
    after: list[Tensor]
    attention: list[Tensor]
    ids: list[list[int]]


@torch.no_grad()
def _states(
    model: ChatModel, probe: Probe, condition: Condition, token_budget: int | None, *, tokens: bool = False
) -> Iterator[tuple[list[int], _Batch]]:
    plan = Plan.of(model, [condition], mode="auto", token_budget=token_budget, cache_memory=0, per_pass=1)
    prepared = PreparedProbe.of(model, probe, condition.context, (), plan)
    layers = range(model.layer_count)
    with under(model, condition), _listening(model, tokens) as heard:
        for index in prepared.batches:
            rows = [prepared.tokens[row] for row in index]
            columns = torch.tensor([prepared.starts[row] for row in index], device=model.device)
            with forward.scoring_at(columns):
                model.split.hidden(forward.pad_right(rows, model.device))
            picked = torch.arange(len(index), device=model.device)
            anchor = {
                name: torch.stack([by_layer[layer][picked, columns].float().cpu() for layer in layers], dim=1)
                for name, by_layer in heard.items() if name != "attention" and len(by_layer) == len(layers)
            }  # fmt: skip
            attention = [heard["attention"][layer] for layer in layers] if tokens else []
            yield index, _Batch(anchor, [heard["after"][layer] for layer in layers], attention, rows)


@contextmanager
def _listening(model: ChatModel, tokens: bool) -> Iterator[dict[str, dict[int, Tensor]]]:
    """Hooks that keep, per layer, what enters and leaves it, the input of its up projection, and attention weights."""
    _, blocks = architecture.decoder_layers(model.network)
    modules = dict(model.network.named_modules())
    heard: dict[str, dict[int, Tensor]] = {"before": {}, "after": {}}
    with ExitStack() as stack:
        for layer, block in enumerate(blocks):
            hook = _keep_input(heard["before"], layer)
            stack.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(_keep_output(heard["after"], layer, 0)).remove)
        for site in architecture.sites(model.network):
            if "up" in site.roles:
                hook = _keep_input(heard.setdefault("mlp", {}), site.layer)
                stack.callback(modules[site.module].register_forward_pre_hook(hook, with_kwargs=True).remove)
            if "o" in site.roles and tokens:
                parent = modules[site.module.rsplit(".", 1)[0]]
                keep = _keep_output(heard.setdefault("attention", {}), site.layer, 1)
                stack.callback(parent.register_forward_hook(keep).remove)
        yield heard


def _keep_input(kept: dict[int, Tensor], layer: int) -> Callable[..., None]:
    def hook(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        kept[layer] = inputs[0] if inputs else named["hidden_states"]

    return hook


def _keep_output(kept: dict[int, Tensor], layer: int, place: int) -> Callable[..., None]:
    def hook(module: nn.Module, _inputs: Any, output: Any) -> None:
        parts = output if isinstance(output, tuple) else (output,)
        if len(parts) <= place or parts[place] is None:
            raise UnsupportedFeatureError(
                f"{type(module).__name__} gives no attention weights", "Use --attention eager."
            )
        kept[layer] = parts[place]

    return hook
