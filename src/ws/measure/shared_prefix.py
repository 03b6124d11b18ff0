"""Compute shared prefixes of a probe's rows only once, with a tree of three levels over their tokens.

    trunk     the longest prefix of all rows (chat header, instruction)           once per Condition
    branch    the next longest prefix of neighbouring rows (a situation)          once per group
    leaf      the rest of a row (an action and the answer anchor)                 once per row

Each level is a batch that continues the attention cache of the level above, expanded to its rows. Positions are given
explicitly and a mask hides the padding of shorter branches, so every row sees exactly its own tokens. The result is
exact up to the order of floating-point sums. It is checked against whole rows once per model; if the check fails,
whole rows are scored, with a warning.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ws.measure import lower_layers
from ws.model import forward
from ws.model.forward import OncePerNetwork
from ws.model.loading import ChatModel

SHORTEST_BRANCH = 8
"""Rows form a branch if they share at least this many tokens after the trunk."""
LEAST_SAVING = 0.2
"""Share of all tokens that a tree must save; below it, whole rows are as fast."""


class Branch(NamedTuple):
    """Rows with the prefix `shared` after the trunk; `leaves` holds the rest of each row, in the order of `rows`."""

    shared: tuple[int, ...]
    rows: tuple[int, ...]
    leaves: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Tree:
    """Token rows as trunk and branches; every leaf has at least one token."""

    trunk: tuple[int, ...]
    branches: tuple[Branch, ...]
    whole: int

    @property
    def tokens(self) -> int:
        """Tokens that are computed."""
        return len(self.trunk) + sum(len(b.shared) + sum(map(len, b.leaves)) for b in self.branches)

    @property
    def saving(self) -> float:
        """Share of the rows' tokens that need not be computed."""
        return 1 - self.tokens / self.whole

    @property
    def longest(self) -> int:
        """Longest sequence in the cache, padding of branches included."""
        middle = max(len(b.shared) for b in self.branches)
        return len(self.trunk) + middle + max(len(leaf) for b in self.branches for leaf in b.leaves)


def plan(rows: Sequence[Sequence[int]], shareable: Sequence[int] | None = None) -> Tree:
    """The tree of token rows; neighbours in lexicographic order share a branch if their common prefix is long.

    shareable: how many of a row's first tokens a prefix may hold. None: all but the last, whose logits are wanted.
    """
    most = [len(row) - 1 for row in rows] if shareable is None else shareable
    order = sorted(range(len(rows)), key=lambda index: (list(rows[index]), index))
    first, last = rows[order[0]], rows[order[-1]]
    trunk = min(_common(first, last), *most)
    groups: list[list[int]] = []
    length = 0
    for index in order:
        if groups:
            shared = min(_common(rows[groups[-1][0]], rows[index]), *(most[i] for i in (*groups[-1], index)))
            if shared - trunk >= SHORTEST_BRANCH and (len(groups[-1]) == 1 or 2 * (shared - trunk) > length - trunk):
                groups[-1].append(index)
                length = shared
                continue
        groups.append([index])
        length = len(rows[index])
    branches = []
    for group in groups:
        shared = min(_common(rows[group[0]], rows[group[-1]]), *(most[i] for i in group)) if len(group) > 1 else trunk
        branches.append(Branch(
            tuple(rows[group[0]][trunk:shared]), tuple(group), tuple(tuple(rows[i][shared:]) for i in group)
        ))  # fmt: skip
    return Tree(tuple(first[:trunk]), tuple(branches), sum(map(len, rows)))


def worthwhile(model: ChatModel, rows: Sequence[Sequence[int]], shareable: Sequence[int] | None = None) -> Tree | None:
    """The tree of the rows if it saves enough and is exact on this model; None means: score whole rows."""
    if len(rows) < 2:
        return None
    tree = plan(rows, shareable)
    window = getattr(_text_config(model), "sliding_window", None)
    if tree.saving < LEAST_SAVING or not tree.trunk or (window is not None and tree.longest > window):
        return None
    return tree if is_exact(model) else None


def last_logits(
    model: ChatModel, tree: Tree, token_budget: int, copies: int = 1
) -> Iterator[tuple[list[int], Float[Tensor, "rows vocabulary"]]]:
    """Logits after the last token of every row, fp32, in blocks with the indices of their rows.

    With `copies`, every batch holds its rows that many times, one block after the other, and so do the logits.
    """
    for leaves in _leaf_batches(model, tree, token_budget, copies):
        last = torch.tensor([length - 1 for length in leaves.lengths], device=model.device)
        with forward.scoring_at(last):
            logits = model.split.logits_at(
                leaves.ids, torch.arange(len(leaves.ids), device=model.device), last, **leaves.inputs
            )
        yield leaves.rows, logits


class Texts(NamedTuple):
    """A batch of rows whose scored positions were read.

    states: final hidden states (or logits, if the forward is not split) at all scored positions, row after row.
    targets: the token that follows each of them. counts: number of scored positions per row.
    """

    rows: list[int]
    states: Float[Tensor, "positions width"]
    targets: Int[Tensor, " positions"]
    counts: list[int]


def texts(model: ChatModel, tree: Tree, starts: Sequence[int], token_budget: int, *, split: bool) -> Iterator[Texts]:
    """Read every row from its position in `starts` on; no prefix of the tree may reach beyond it."""
    for leaves in _leaf_batches(model, tree, token_budget, 1):
        firsts = [starts[row] - offset for row, offset in zip(leaves.rows, leaves.offsets, strict=True)]
        yield read_texts(model, leaves.rows, leaves.ids, firsts, leaves.lengths, split=split, inputs=leaves.inputs)


def read_texts(
    model: ChatModel, rows: list[int], ids: Int[Tensor, "rows tokens"], firsts: Sequence[int],
    lengths: Sequence[int], *, split: bool, inputs: Mapping[str, Any],
) -> Texts:  # fmt: skip
    """One pass over a batch: read row i, of `lengths[i]` tokens, from column `firsts[i]` on."""
    counts = [length - 1 - first for first, length in zip(firsts, lengths, strict=True)]
    numbers = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(counts)).to(model.device)
    columns = torch.cat([torch.arange(first, length - 1) for first, length in zip(firsts, lengths, strict=True)])
    columns = columns.to(model.device)
    with forward.scoring_from(torch.tensor(firsts, device=model.device)):
        if split:
            states = model.split.hidden(ids, **inputs)[numbers, columns]
        else:
            states = model.split.logits_at(ids, numbers, columns, **inputs)
    return Texts(rows, states, ids[numbers, columns + 1], counts)


class _Leaves(NamedTuple):
    """A batch of leaves, padded on the right, that continues a cache.

    offsets: tokens of each row before its leaf. inputs: the keyword arguments of the forward pass. With copies, `rows`
    and `offsets` name the rows of one copy.
    """

    rows: list[int]
    ids: Int[Tensor, "rows tokens"]
    lengths: list[int]
    offsets: list[int]
    inputs: dict[str, Any]


def _leaf_batches(model: ChatModel, tree: Tree, token_budget: int, copies: int) -> Iterator[_Leaves]:
    device = model.device
    trunk = _extend(model, None, torch.tensor([tree.trunk] * copies, device=device), None, 0)
    for batch in _batches(tree, token_budget):
        branches = batch * copies
        width = max(len(branch.shared) for branch in branches)
        cache = _expanded(trunk, torch.arange(copies, device=device).repeat_interleave(len(batch)))
        if width:
            _extend(model, cache, forward.pad_right([b.shared for b in branches], device), None, len(tree.trunk))
        owners = [number for number, branch in enumerate(branches) for _ in branch.rows]
        cache.reorder_cache(torch.tensor(owners, device=device))
        leaves = [leaf for branch in branches for leaf in branch.leaves]
        lengths = torch.tensor([len(branches[owner].shared) for owner in owners], device=device)
        ids = forward.pad_right(leaves, device)
        hidden = _hide_padding(len(tree.trunk), width, lengths, ids.shape[1])
        positions = len(tree.trunk) + lengths[:, None] + torch.arange(ids.shape[1], device=device)
        inputs = {"past_key_values": cache, "use_cache": True, "attention_mask": hidden, "position_ids": positions}
        offsets = [len(tree.trunk) + len(branch.shared) for branch in batch for _ in branch.rows]
        rows = [row for branch in batch for row in branch.rows]
        yield _Leaves(rows, ids, [len(leaf) for leaf in leaves], offsets, inputs)


def _batches(tree: Tree, token_budget: int) -> Iterator[list[Branch]]:
    """Branches in batches; a branch whose leaves alone exceed the budget is divided."""
    parts = [part for branch in tree.branches for part in _divided(branch, token_budget)]
    for batch in forward.plan_batches([_width(branch) * len(branch.rows) for branch in parts], token_budget):
        yield [parts[index] for index in batch]


def _divided(branch: Branch, token_budget: int) -> Iterator[Branch]:
    at_once = max(1, token_budget // max(map(len, branch.leaves)))
    for start in range(0, len(branch.rows), at_once):
        end = start + at_once
        yield Branch(branch.shared, branch.rows[start:end], branch.leaves[start:end])


def padded_tokens(tree: Tree, token_budget: int) -> int:
    """Positions that `last_logits` computes, padding included."""
    total = len(tree.trunk)
    for branches in _batches(tree, token_budget):
        total += len(branches) * max(len(branch.shared) for branch in branches)
        leaves = [len(leaf) for branch in branches for leaf in branch.leaves]
        total += len(leaves) * max(leaves)
    return total


def _width(branch: Branch) -> int:
    return len(branch.shared) + max(map(len, branch.leaves))


def _extend(model: ChatModel, cache: Any, ids: Int[Tensor, "rows tokens"], mask: Tensor | None, start: int) -> Any:
    """The cache extended by these tokens. No position is scored here, so effects at the scored position do nothing."""
    cache = lower_layers.new_cache(model) if cache is None else cache
    nowhere = torch.full((len(ids),), -1, device=ids.device)
    positions = (start + torch.arange(ids.shape[1], device=ids.device)).expand(len(ids), -1)
    with forward.scoring_at(nowhere):
        model.split.hidden(ids, past_key_values=cache, use_cache=True, attention_mask=mask, position_ids=positions)
    return cache


def _expanded(cache: Any, rows: Int[Tensor, " rows"]) -> Any:
    fresh = copy.deepcopy(cache)
    fresh.reorder_cache(rows)
    return fresh


def _hide_padding(trunk: int, width: int, lengths: Int[Tensor, " rows"], leaf: int) -> Int[Tensor, "rows positions"]:
    """1 if a cached position is a token of the row, 0 if it is padding of its branch."""
    inside = torch.arange(width, device=lengths.device) < lengths[:, None]
    ones = inside.new_ones(len(lengths), 1)
    return torch.cat([ones.expand(-1, trunk), inside, ones.expand(-1, leaf)], dim=1).long()


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


# -------------------------------------------------------------------- is it exact?


@torch.no_grad()
def _matches_whole_rows(model: ChatModel) -> bool:
    count = model.network.get_input_embeddings().weight.shape[0]
    sequence = [(7 * n + 3) % count for n in range(64)]
    trunk, one, other = sequence[:9], sequence[9:21], sequence[21:40]
    rows = [[*trunk, *one, *sequence[40:44]], [*trunk, *one, *sequence[44:46]], [*trunk, *other, *sequence[46:53]],
            [*trunk, *other, *sequence[53:56]]]  # fmt: skip
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    try:
        for block, logits in last_logits(model, plan(rows), 4_096):
            for index, found in zip(block, logits, strict=True):
                ids = torch.tensor([rows[index]], device=model.device)
                at = torch.tensor([0], device=model.device)
                whole = model.split.logits_at(ids, at, torch.tensor([len(rows[index]) - 1], device=model.device))[0]
                if (found - whole).abs().max() > tolerance * whole.abs().max().clamp(min=1e-6):
                    return False
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):  # a model without such a cache
        return False
    return True


is_exact = OncePerNetwork(_matches_whole_rows, "shared prefixes do not compose; scoring whole rows")
"""Whether the tree gives the same logits as whole rows."""


def _text_config(model: ChatModel) -> Any:
    from ws.model.architecture import text_config  # noqa: PLC0415

    return text_config(model.network)
