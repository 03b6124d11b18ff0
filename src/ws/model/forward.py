"""A forward pass in two parts: the trunk gives final hidden states, the head gives logits where they are asked for.

Only positions that are scored meet the vocabulary matrix (a quarter of the arithmetic of a 0.6 B model otherwise), and
the head always gets a contiguous 2-D input: with `logits_to_keep=1` a CPU copies the whole head once per row. Whether
head(trunk(x)) is the model's own forward is checked once per model; a model where it is not (scaled or capped logits)
falls back to its own forward, and says so.

Batches are padded on the right. In a causal model nothing to the right of a position reaches it, so no mask is needed
and every row gives the same numbers alone and in company.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ws.base import console
from ws.base.errors import UnsupportedFeatureError, UserError

LOGIT_BYTES = 2**28
"""Most bytes of one set of fp32 logits in memory at once, where every token of a text meets the vocabulary."""

_scored: ContextVar[Tensor | None] = ContextVar("scored positions", default=None)
_exact_for: ContextVar[Tensor | None] = ContextVar("tokens with fp32 logits", default=None)
_scored_from: ContextVar[Tensor | None] = ContextVar("first scored positions", default=None)


@contextmanager
def _holding(variable: ContextVar[Tensor | None], value: Tensor) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def scoring_at(columns: Int[Tensor, " rows"]) -> AbstractContextManager[None]:
    """Within the block, `scored_positions` tells effects which position of each row is looked at."""
    return _holding(_scored, columns)


def scored_positions() -> Int[Tensor, " rows"] | None:
    """The position of each row of the batch that is scored; None outside of a scored batch."""
    return _scored.get()


def scoring_from(columns: Int[Tensor, " rows"]) -> AbstractContextManager[None]:
    """Within the block, every position from these on is looked at: the tokens of a text, read as they were written."""
    return _holding(_scored_from, columns)


def first_scored_positions() -> Int[Tensor, " rows"] | None:
    """The first of the scored positions of each row, where a whole text is scored; None otherwise."""
    return _scored_from.get()


def exact_for(tokens: Int[Tensor, " tokens"]) -> AbstractContextManager[None]:
    """Within the block, a half-precision head gives the logits of these tokens in fp32.

    In bf16 a logit between 16 and 32 comes in steps of 0.125, more than the effects that are looked for.
    """
    return _holding(_exact_for, tokens)


@contextmanager
def replaced(module: nn.Module, call: Callable[..., Any]) -> Iterator[None]:
    """Within the block, `call` stands for the module's forward (which an instance may have of its own)."""
    own = module.__dict__.get("forward")
    module.forward = call
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


class SplitForward:
    """Trunk and head of one causal LM. `hidden` is (rows, tokens, width); `logits` are fp32."""

    def __init__(self, network: Any) -> None:
        self.network = network
        self.decoder = network.get_decoder() if hasattr(network, "get_decoder") else network.base_model
        self.head = network.get_output_embeddings()
        self.is_split = self._matches_whole()
        if not self.is_split:
            console.warn(f"{type(network).__name__}: head and trunk do not compose; using whole forward passes")

    def hidden(self, ids: Int[Tensor, "rows tokens"], **inputs: Any) -> Float[Tensor, "rows tokens width"]:
        """Final hidden states (after the last norm)."""
        return self.decoder(input_ids=ids, **{"use_cache": False, **inputs}).last_hidden_state

    def logits(self, hidden: Float[Tensor, "n width"]) -> Float[Tensor, "n vocabulary"]:
        """Logits of single positions, fp32; within `exact_for` those of its tokens are products in fp32."""
        logits = self.head(hidden.contiguous()).to(torch.float32)
        tokens = _exact_for.get()
        # what hangs on the head is part of it
        if tokens is not None and self.head.weight.dtype != torch.float32 and not self.head._forward_hooks:
            bias = None if self.head.bias is None else self.head.bias[tokens].float()
            logits[:, tokens] = nn.functional.linear(hidden.float(), self.head.weight[tokens].float(), bias)
        return logits

    @property
    def positions_at_once(self) -> int:
        """Positions whose fp32 logits fill `LOGIT_BYTES`."""
        return max(1, LOGIT_BYTES // (4 * self.network.get_input_embeddings().weight.shape[0]))

    def logits_at(
        self,
        ids: Int[Tensor, "rows tokens"],
        rows: Int[Tensor, " n"],
        columns: Int[Tensor, " n"],
        **inputs: Any,
    ) -> Float[Tensor, "n vocabulary"]:
        """Logits at the given (row, column) positions of a batch, fp32."""
        if self.is_split:
            return self.logits(self.hidden(ids, **inputs)[rows, columns])
        whole = self.network(input_ids=ids, **{"use_cache": False, **inputs}).logits
        return whole[rows, columns].to(torch.float32)

    def losses(self, hidden: Float[Tensor, "n width"], targets: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Negative log-likelihood of every target after its final hidden state, fp32, for a frozen head.

        The logits are made a block at a time, at most `LOGIT_BYTES` of them, together with their gradient: neither all
        logits nor their gradients are ever in memory, and nothing is computed twice.
        """
        block = self.positions_at_once
        if not (torch.is_grad_enabled() and hidden.requires_grad):
            parts = zip(hidden.split(block), targets.split(block), strict=True)
            return torch.cat([self._losses_of_block(states, wanted) for states, wanted in parts])
        return _BlockwiseLosses.apply(hidden, targets, self._losses_of_block, block)

    def _losses_of_block(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.logits(hidden), targets, reduction="none")

    @torch.no_grad()
    def _matches_whole(self) -> bool:
        if self.head is None:
            return False
        device = self.network.get_input_embeddings().weight.device
        count = self.network.get_input_embeddings().weight.shape[0]
        ids = (torch.arange(8, device=device) * 7 % count)[None]
        whole = self.network(input_ids=ids, use_cache=False).logits.to(torch.float32)[0]
        parts = self.logits(self.hidden(ids)[0])
        tolerance = 1e-4 if self.head.weight.dtype == torch.float32 else 5e-2
        return bool((whole - parts).abs().max() <= tolerance * whole.abs().max().clamp(min=1e-6))


@torch.no_grad()
def check_causal(network: Any, name: str) -> None:
    """Run a network once: two rows that part in the middle have the same finite logits before, and keys to go on from.

    Raises `UserError` for a network that scoring and sampling cannot be exact with.
    """
    embedding = network.get_input_embeddings().weight
    ids = (torch.arange(16, device=embedding.device) * 7 + 3).repeat(2, 1)
    ids[1, 8:] += 1
    found = network(input_ids=ids % len(embedding), use_cache=True)
    kind = f"{name} ({type(network).__name__})"
    if getattr(found, "past_key_values", None) is None:
        raise UnsupportedFeatureError(
            f"{kind} keeps no keys and values of attention to sample from",
            "Use a decoder-only causal model with attention.",
        )
    logits = found.logits.float()
    if not logits.isfinite().all():
        raise UserError(
            f"{kind} computes numbers that are not finite in {network.dtype}",
            "Use --dtype float32; if it is that already, check its weights.",
        )
    # the mean, because rounding may send single tokens to another expert
    if (logits[0, :8] - logits[1, :8]).abs().mean() > 5e-2 * logits[0, :8].abs().mean():
        raise UnsupportedFeatureError(
            f"{kind} lets later tokens change what is before them", "Use a decoder-only causal language model."
        )


class OncePerNetwork:
    """A shortcut that is tried out once on every network, unedited, and is not taken where it is not exact.

    `holds` tries it; `otherwise` says what is done instead, in a warning that is given once.
    """

    def __init__(self, holds: Callable[[Any], bool], otherwise: str) -> None:
        self._holds, self._otherwise = holds, otherwise
        self._known: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()

    def __call__(self, model: Any) -> bool:
        """Whether the shortcut may be taken with this ChatModel."""
        known = self._known.get(model.network)
        if known is None:
            known = self._known[model.network] = self._holds(model)
            if not known:
                console.warn(f"{model.name}: {self._otherwise}")
        return known


class _BlockwiseLosses(torch.autograd.Function):
    """Losses with the gradient of each to its own state, taken while the logits of its block are there."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, losses_of: Callable[[Tensor, Tensor], Tensor], block: int
    ) -> Tensor:
        found, gradients = [], []
        for states, wanted in zip(hidden.split(block), targets.split(block), strict=True):
            with torch.enable_grad():
                leaf = states.detach().requires_grad_()
                losses = losses_of(leaf, wanted)
                # a loss depends on its own state alone, so the gradient of the sum holds all of them
                gradients.append(torch.autograd.grad(losses.sum(), leaf)[0])
            found.append(losses.detach())
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> tuple[Tensor, None, None, None]:
        (gradients,) = ctx.saved_tensors
        return gradients * weights[0][:, None].to(gradients.dtype), None, None, None


def pad_right(rows: Sequence[Sequence[int]], device: torch.device) -> Int[Tensor, "rows tokens"]:
    """Stack token rows; what is behind a row's end is id 0 and never looked at."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)


def plan_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first, at most `token_budget` padded tokens each.

    The first batch is the largest, so that running out of memory shows at once.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[list[int]] = []
    for index in order:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= token_budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
