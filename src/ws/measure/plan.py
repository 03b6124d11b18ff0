"""Plan a scoring run before anything is edited: which Conditions to score, and how to read each probe.

Conditions are compared by content. A repeated Condition is scored once; two different ones with the same name are an
error. The Condition without edits is part of every Context and comes first. A probe is rendered once per Context and
batched by length under a token budget.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ws.algebra.direction import Direction
from ws.base.errors import UserError
from ws.base.files import content_key
from ws.edit.condition import Condition, Context
from ws.edit.steering import Mode, can_share_a_pass
from ws.measure import lower_layers, shared_prefix
from ws.measure.choice import Answers, Choices, answers_of
from ws.measure.lower_layers import Memory, Recordings
from ws.measure.probe import TEXTS, WRITTEN, Probe
from ws.measure.shared_prefix import Tree
from ws.model import architecture, forward
from ws.model.chat import Message
from ws.model.loading import ChatModel

SHARED_PASS = 4_096
"""Padded tokens per pass beyond which matrix products get hardly faster per token."""


@dataclass(frozen=True)
class PlannedCondition:
    """A Condition, the first layer that it changes, and whether it may share passes with others."""

    condition: Condition
    first_layer: int
    can_share: bool

    @classmethod
    def of(cls, model: ChatModel, condition: Condition) -> PlannedCondition:
        """The Condition with its first edited layer on this model and whether it can share passes."""
        first = lower_layers.first_edited(model.network, condition)
        return cls(condition, first, can_share_a_pass(model, condition))


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first pass.

    contexts: the distinct Conditions of each Context, base first. budget: padded tokens per batch. memory: bytes for
    recorded states. per_pass: how many Conditions share a pass, if they can. split: passes return final hidden states
    instead of logits, which works if no edit changes the head.
    """

    contexts: tuple[tuple[Context, tuple[PlannedCondition, ...]], ...]
    mode: Mode
    budget: int
    memory: Memory
    per_pass: int
    split: bool

    @classmethod
    def of(
        cls, model: ChatModel, conditions: Iterable[Condition], *, mode: Mode, token_budget: int | None,
        cache_memory: int | None, per_pass: int | None,
    ) -> Plan:  # fmt: skip
        """The plan for these Conditions; None chooses what suits the model."""
        distinct = _distinct_with_bases(conditions)
        budget = token_budget or default_token_budget(model)
        if per_pass is None:
            per_pass = 1 if model.dtype == torch.float32 or mode == "baked" else max(1, SHARED_PASS // budget)
        split = model.split.is_split and not any(_edits_head(model, condition) for condition in distinct)
        groups: dict[str, list[PlannedCondition]] = {}
        for condition in distinct:
            groups.setdefault(condition.context.name, []).append(PlannedCondition.of(model, condition))
        contexts = tuple((group[0].condition.context, tuple(group)) for group in groups.values())
        memory = Memory(model.cache_memory if cache_memory is None else cache_memory)
        return cls(contexts, mode, budget, memory, per_pass, split)

    @property
    def condition_count(self) -> int:
        """How many Conditions are scored, bases included."""
        return sum(len(group) for _, group in self.contexts)

    def prepared(
        self, model: ChatModel, probes: Sequence[Probe], context: Context, group: Sequence[PlannedCondition]
    ) -> list[PreparedProbe]:
        """The probes rendered under one Context, for the Conditions of that Context."""
        return [PreparedProbe.of(model, probe, context, group, self) for probe in probes]


def default_token_budget(model: ChatModel) -> int:
    """Padded tokens per batch: few if arithmetic limits the speed, many if kernel launches do."""
    if model.device.type != "cpu":
        return 16_384
    return 4_096 if model.parameter_count < 50_000_000 else 1_024


# -------------------------------------------------------------------- conditions


def _distinct_with_bases(conditions: Iterable[Condition]) -> list[Condition]:
    seen: dict[str, Condition] = {}
    for wanted in conditions:
        for condition in (Condition(wanted.context), wanted):
            known = seen.setdefault(content_key(condition.key()), condition)
            if known.context != condition.context:
                raise UserError(
                    f"two different contexts share the name {condition.context.name!r}", "Give each its own name."
                )
            if known is not condition and known.content_key != condition.content_key:
                raise UserError(
                    f"two different edits share the name {condition.key()}", "Give each its own name or seed."
                )
    return list(seen.values())


def _edits_head(model: ChatModel, condition: Condition) -> bool:
    head = {id(parameter) for parameter in model.split.head.parameters()}
    names = {name for name, parameter in model.network.named_parameters() if id(parameter) in head}
    return any(isinstance(edit.effect, Direction) and names & edit.effect.deltas.keys() for edit, _ in condition.active)


# -------------------------------------------------------------------- probes


@dataclass(frozen=True)
class PreparedProbe:
    """A probe rendered under one Context: token rows, and batches of their indices.

    A contrast has two token rows per row of the probe, one after the other.
    """

    probe: Probe
    tokens: list[list[int]]
    starts: list[int]  # first position whose next token is scored
    batches: list[list[int]]
    budget: int  # padded tokens per batch
    answers: Answers
    split: bool  # passes return final hidden states instead of logits, because no edit changes the head
    choices: Choices | None  # for choice probes: how the rows are read
    tree: Tree | None  # for texts: their shared prefixes, if these save enough
    recordings: Recordings  # states that enter the first edited layer
    base_states: dict[int, Tensor] = field(default_factory=dict)  # for divergence probes: the base's states, per batch

    @classmethod
    def of(
        cls, model: ChatModel, probe: Probe, context: Context, group: Sequence[PlannedCondition], plan: Plan
    ) -> PreparedProbe:
        """Render and batch a probe; recorded states take their memory from the plan."""
        tokens, starts = [], []
        for row in probe.rows:
            system = [Message(role="system", content=context.system)] if context.system.strip() else []
            messages = [*system, *row.messages]
            if probe.kind in WRITTEN:
                ids = (model.chat.thinking_prompt if probe.kind == "guided" else model.chat.prompt)(messages)
                tokens.append(ids)
                starts.append(len(ids) - 1)
            elif probe.kind == "choice":
                ids = model.chat.prompt(messages, row.continuation)
                tokens.append(ids)
                starts.append(len(ids) - 1)
            else:
                for text in row.replies or (row.continuation,):
                    ids, prompt_length = model.chat.supervised(messages, text, closed=probe.closed)
                    tokens.append(ids)
                    starts.append(prompt_length - 1)
        _require_fit(model, probe, max(map(len, tokens)) + probe.tokens)
        answers: Answers = ([], [])
        if probe.kind in ("choice", "guided"):
            answers = answers_of(model, probe.answers)
        batches = forward.plan_batches([len(ids) for ids in tokens], plan.budget)
        choices = Choices.of(model, tokens, answers, plan.budget) if probe.kind == "choice" else None
        tree = shared_prefix.worthwhile(model, tokens, starts) if probe.kind in TEXTS else None
        padded = sum(len(tokens[batch[0]]) * len(batch) for batch in batches)
        if tree is not None:
            padded = shared_prefix.padded_tokens(tree, plan.budget)
        # what a model writes differs between Conditions, so there is nothing to play back
        begins = () if probe.kind in WRITTEN else [planned.first_layer for planned in group]
        recordings = Recordings(model, begins, choices.padded_tokens if choices else padded, plan.memory)
        return cls(probe, tokens, starts, batches, plan.budget, answers, plan.split, choices, tree, recordings)

    @property
    def can_be_shared(self) -> bool:
        """Whether Conditions may share passes: choices with single-token answers and a tree."""
        return self.choices is not None and self.choices.tree is not None and not self.choices.beginnings


def _require_fit(model: ChatModel, probe: Probe, longest: int) -> None:
    limit = getattr(architecture.text_config(model.network), "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise UserError(
            f"probe {probe.name!r} has a row of {longest} tokens, but the model reads at most {limit}",
            "Shorten the row.",
        )
