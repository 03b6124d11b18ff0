"""A forward pass in two parts: the trunk computes final hidden states, the head computes logits at chosen positions.

Only scored positions are multiplied by the vocabulary matrix (else a quarter of the arithmetic of a 0.6 B model).
The head always gets a contiguous 2-D input: with `logits_to_keep=1` a CPU copies the whole head once per row. Once per
model it is checked that head(trunk(x)) equals the model's own forward pass. If not (scaled or capped logits), the own
forward pass is used, with a warning.

Batches are padded on the right. In a causal model a position does not depend on later ones, so no mask is needed and a
row gives the same numbers alone and in a batch.
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
"""Most bytes of fp32 logits in memory at once, if every token of a text needs logits."""

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
    """Within the block, `scored_positions` gives effects the scored position of each row."""
    return _holding(_scored, columns)


def scored_positions() -> Int[Tensor, " rows"] | None:
    """The position of each row of the batch that is scored; None outside of a scored batch."""
    return _scored.get()


def scoring_from(columns: Int[Tensor, " rows"]) -> AbstractContextManager[None]:
    """Within the block, every position from these on is scored: all tokens of a written text."""
    return _holding(_scored_from, columns)


def first_scored_positions() -> Int[Tensor, " rows"] | None:
    """The first scored position of each row if a whole text is scored; None otherwise."""
    return _scored_from.get()


def exact_for(tokens: Int[Tensor, " tokens"]) -> AbstractContextManager[None]:
    """Within the block, a half-precision head gives the logits of these tokens in fp32.

    In bf16, logits between 16 and 32 have steps of 0.125, larger than the effects that are measured.
    """
    return _holding(_exact_for, tokens)


@contextmanager
def replaced(module: nn.Module, call: Callable[..., Any]) -> Iterator[None]:
    """Within the block, `call` replaces the module's forward (which may be an attribute of the instance)."""
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
            console.warn(f"{type(network).__name__}: head(trunk(x)) is not its forward pass; using slower whole passes")

    def hidden(self, ids: Int[Tensor, "rows tokens"], **inputs: Any) -> Float[Tensor, "rows tokens width"]:
        """Final hidden states (after the last norm)."""
        return self.decoder(input_ids=ids, **{"use_cache": False, **inputs}).last_hidden_state

    def logits(self, hidden: Float[Tensor, "n width"]) -> Float[Tensor, "n vocabulary"]:
        """Logits of single positions, fp32. Within `exact_for`, the logits of its tokens are computed in fp32."""
        logits = self.head(hidden.contiguous()).to(torch.float32)
        tokens = _exact_for.get()
        # hooks on the head are part of it, so they must run
        if tokens is not None and self.head.weight.dtype != torch.float32 and not self.head._forward_hooks:
            bias = None if self.head.bias is None else self.head.bias[tokens].float()
            logits[:, tokens] = nn.functional.linear(hidden.float(), self.head.weight[tokens].float(), bias)
        return logits

    @property
    def positions_at_once(self) -> int:
        """Number of positions whose fp32 logits fill `LOGIT_BYTES`."""
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

        Logits and their gradients are computed in blocks of at most `LOGIT_BYTES`, so neither is ever in memory as a
        whole, and nothing is computed twice.
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
    """Check that a network is causal: two rows that differ in the second half have equal logits in the first half.

    Raises `UserError` if they differ or are not finite, or if the network has no key-value cache.
    """
    embedding = network.get_input_embeddings().weight
    ids = (torch.arange(16, device=embedding.device) * 7 + 3).repeat(2, 1)
    ids[1, 8:] += 1
    found = network(input_ids=ids % len(embedding), use_cache=True)
    kind = f"{name} ({type(network).__name__})"
    if getattr(found, "past_key_values", None) is None:
        raise UnsupportedFeatureError(
            f"{kind} has no key-value cache, which sampling needs",
            "Use a decoder-only causal model with attention.",
        )
    logits = found.logits.float()
    if not logits.isfinite().all():
        raise UserError(
            f"{kind} computes NaN or infinite logits in {network.dtype}",
            "Use --dtype float32. If you already do, check its weights.",
        )
    # the mean, because rounding may route single tokens to other experts
    if (logits[0, :8] - logits[1, :8]).abs().mean() > 5e-2 * logits[0, :8].abs().mean():
        raise UnsupportedFeatureError(
            f"{kind} is not causal: later tokens change the logits of earlier ones",
            "Use a decoder-only causal language model.",
        )


class OncePerNetwork:
    """A shortcut that is tested once on every unedited network, and used only if it is exact.

    `holds` tests it; `otherwise` is the text of the warning, given once, if it is not exact.
    """

    def __init__(self, holds: Callable[[Any], bool], otherwise: str) -> None:
        self._holds, self._otherwise = holds, otherwise
        self._known: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()

    def __call__(self, model: Any) -> bool:
        """Whether the shortcut may be used with this ChatModel."""
        known = self._known.get(model.network)
        if known is None:
            known = self._known[model.network] = self._holds(model)
            if not known:
                console.warn(f"{model.name}: {self._otherwise}")
        return known


class _BlockwiseLosses(torch.autograd.Function):
    """Losses, and the gradient of each to its own hidden state, block by block."""

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
    """Stack token rows, padded on the right with id 0; padding is never scored."""
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
