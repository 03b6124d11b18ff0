"""Read choices: log p(first answer) - log p(second) after every token row of a probe, p(first) + p(second), the top p.

An answer is a set of token sequences; its probability is the sum of theirs. Each proper prefix of a sequence needs one
more forward pass. A prefix that rows share is computed once (`shared_prefix`). Several copies of the rows can be read
at once, one per Condition.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ws.base.errors import UserError
from ws.measure import shared_prefix
from ws.measure.shared_prefix import Tree
from ws.model import forward
from ws.model.loading import ChatModel

Answers = tuple[list[list[int]], list[list[int]]]
"""The token sequences of both answers."""
Reading = dict[str, float]
"""metric -> value of one row."""


def answers_of(model: ChatModel, words: tuple[str, str]) -> Answers:
    """The token sequences of two answers; an error if one is a prefix of the other, because both would then apply."""
    found = model.chat.answers(words[0]), model.chat.answers(words[1])
    for first, second in product(*found):
        shorter = min(len(first), len(second))
        if first[:shorter] == second[:shorter]:
            raise UserError(
                f"the answer {words[1]!r} begins with the same tokens as {words[0]!r}, so one contains the other",
                "Give two answers with different first words.",
            )
    return found


@dataclass(frozen=True)
class Choices:
    """Token rows that end where an answer begins, in batches of their indices; `tree` holds their shared prefixes."""

    rows: Sequence[Sequence[int]]
    batches: Sequence[Sequence[int]]
    answers: Answers
    budget: int
    tree: Tree | None = None

    @classmethod
    def of(cls, model: ChatModel, rows: Sequence[Sequence[int]], answers: Answers, budget: int) -> Choices:
        """Choices with planned batches and, if it pays, a tree of shared prefixes."""
        planned = forward.plan_batches([len(row) for row in rows], budget)
        return cls(rows, planned, answers, budget, shared_prefix.worthwhile(model, rows))

    @property
    def beginnings(self) -> list[tuple[int, ...]]:
        """Proper prefixes of answers of several tokens."""
        return sorted({
            tuple(sequence[:end]) for group in self.answers for sequence in group for end in range(1, len(sequence))
        })  # fmt: skip

    def answer_tokens(self, model: ChatModel) -> Int[Tensor, " tokens"]:
        """Every token of the answers, on the model's device."""
        tokens = {token for group in self.answers for sequence in group for token in sequence}
        return torch.tensor(sorted(tokens), device=model.device)

    @property
    def padded_tokens(self) -> int:
        """Positions that one reading computes, padding included."""
        whole = sum(len(self.rows[batch[0]]) * len(batch) for batch in self.batches)
        opening = shared_prefix.padded_tokens(self.tree, self.budget) if self.tree else whole
        return whole * len(self.beginnings) + opening


def read(model: ChatModel, choices: Choices) -> list[Reading]:
    """The reading of every row, in order."""
    found: list[Reading] = [{} for _ in choices.rows]
    with forward.exact_for(choices.answer_tokens(model)):
        for batch, opening in _openings(model, choices):
            by_prefix = {(): opening} | {
                begun: _next_log_probabilities(model, [[*choices.rows[index], *begun] for index in batch])
                for begun in choices.beginnings
            }
            for index, reading in zip(batch, _readings(choices.answers, by_prefix), strict=True):
                found[index] = reading
    return found


def read_copies(model: ChatModel, choices: Choices, copies: int) -> list[list[Reading]]:
    """The readings of every copy; each block of a batch is under a different edit (`steering.under_each`).

    This needs a tree and answers of one token each.
    """
    if choices.tree is None or choices.beginnings:
        raise ValueError("reading copies needs a tree and single-token answers")
    found: list[list[Reading]] = [[{} for _ in choices.rows] for _ in range(copies)]
    with forward.exact_for(choices.answer_tokens(model)):
        for batch, logits in shared_prefix.last_logits(model, choices.tree, choices.budget, copies):
            for of_copy, block in zip(found, logits.log_softmax(dim=-1).chunk(copies), strict=True):
                for index, reading in zip(batch, _readings(choices.answers, {(): block}), strict=True):
                    of_copy[index] = reading
    return found


def _readings(
    answers: Answers, by_prefix: Mapping[tuple[int, ...], Float[Tensor, "rows vocabulary"]]
) -> Iterator[Reading]:
    log_first, log_second = (_log_probability(by_prefix, group) for group in answers)
    ratio = log_first - log_second
    mass = log_first.exp() + log_second.exp()
    top = by_prefix[()].max(dim=-1).values.exp()
    for one, covered, likeliest in zip(ratio.tolist(), mass.tolist(), top.tolist(), strict=True):
        yield {"logratio": one, "pmass": covered, "maxp": likeliest}


def _openings(model: ChatModel, choices: Choices) -> Iterator[tuple[Sequence[int], Float[Tensor, "rows vocabulary"]]]:
    """Log-probabilities of the next token after every row, in blocks with the indices of their rows."""
    if choices.tree is not None:
        for block, logits in shared_prefix.last_logits(model, choices.tree, choices.budget):
            yield block, logits.log_softmax(dim=-1)
    else:
        for batch in choices.batches:
            yield batch, _next_log_probabilities(model, [choices.rows[index] for index in batch])


def _next_log_probabilities(model: ChatModel, rows: Sequence[Sequence[int]]) -> Float[Tensor, "rows vocabulary"]:
    ids = forward.pad_right(rows, model.device)
    last = torch.tensor([len(row) - 1 for row in rows], device=model.device)
    with forward.scoring_at(last):
        logits = model.split.logits_at(ids, torch.arange(len(rows), device=model.device), last)
    return logits.log_softmax(dim=-1)


def _log_probability(
    by_prefix: Mapping[tuple[int, ...], Float[Tensor, "rows vocabulary"]], sequences: list[list[int]]
) -> Float[Tensor, " rows"]:
    """Log of the summed probability of the sequences."""
    terms = [
        sum(
            (by_prefix[tuple(sequence[:end])][:, token] for end, token in enumerate(sequence)),
            start=torch.zeros(()),
        )
        for sequence in sequences
    ]
    return torch.stack([torch.as_tensor(term) for term in terms]).logsumexp(dim=0)
