"""The engine: Probes under Conditions to one long table of scores.

    choice       logratio = log p(first answer) - log p(second) at an anchor, pmass = p(first) + p(second)
    likelihood   nll = mean negative log-probability of the tokens of a given text
    divergence   kl = sum_v p_edited (log p_edited - log p_base) at every position of a given text
    guided       a choice after a thought that the edited model writes itself (greedy, at most `tokens`), and whether
                 the thought had to be closed for it (`forced`)
    reply        a greedy reply: distinct3 = distinct / all of its 3-grams, its length, whether it ended (`finished`),
                 and in the group `json` whether it holds a JSON object that can be parsed

An answer is a set of token sequences; its probability is their sum. Log-probabilities are fp32; the logits of answer
tokens are products in fp32 also on half-precision models, those of all others in the dtype of the head. The Condition
without edits is scored once per Context and serves all others. Rows are batched by length under a token budget and
padded on the right, so a row's value does not depend on its company. On half-precision models, where edits are side
paths, several Conditions share the passes of a choice (`steering.under_each`): their batches are too small for fast
products otherwise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from ws.algebra.direction import Direction
from ws.base import console
from ws.base.errors import UserError
from ws.base.store import Shards, content_key, write_table
from ws.edit.condition import Condition, Context
from ws.edit.steering import Mode, can_share_a_pass, under, under_each
from ws.measure import choice, last_layer, lower_layers
from ws.measure.choice import Choices
from ws.measure.generate import Request, Sample, Sampling, sample
from ws.measure.lower_layers import Memory, Recordings
from ws.measure.probe import JSON, WRITTEN, Probe
from ws.model import forward
from ws.model.chat import Message
from ws.model.loading import ChatModel

SCHEMA: dict[str, Any] = {
    "probe": pl.String,
    "group": pl.String,
    "row": pl.String,
    "cluster": pl.String,
    "label": pl.Int8,
    "context": pl.String,
    "edit": pl.String,
    "alpha": pl.Float64,
    "seed": pl.Int64,
    "data_seed": pl.Int64,
    "metric": pl.String,
    "value": pl.Float64,
}
"""Columns of a scores table: one value of one metric of one row under one Condition."""


SCORES_VERSION = 2
"""Raised when what the engine makes of the same model and rows changes by more than rounding."""
SHARED_PASS = 4_096
"""Padded tokens at which the matrix products of a pass are about as fast as they get."""


def default_token_budget(model: ChatModel) -> int:
    """Padded tokens per batch: small where arithmetic binds at once, large where launching does."""
    if model.device.type != "cpu":
        return 16_384
    return 4_096 if model.parameter_count < 50_000_000 else 1_024


def score(
    model: ChatModel,
    probes: Sequence[Probe],
    conditions: Iterable[Condition],
    *,
    token_budget: int | None = None,
    cache_memory: int | None = None,
    mode: Mode = "auto",
    per_pass: int | None = None,
    shards: Shards | None = None,
    base_shards: Shards | None = None,
    description: str = "scoring",
) -> pl.DataFrame:
    """Score every probe under every Condition; columns as in `SCHEMA`.

    The base of every Context is always part of the result. With `shards`, finished (probe, Condition) pieces are kept
    on disk and reused by a rerun; with `base_shards`, those without edits are kept there, for all runs of one model.
    `cache_memory` (default: the model's) bounds, in bytes, the states kept of layers below the edits; 0 runs every
    layer for every Condition. `per_pass` is how many Conditions share a pass where they can (None: as many as fill
    `SHARED_PASS` tokens on a half-precision model, else one).
    """
    plan = _distinct_with_bases(conditions)
    last_layer.is_exact(model)  # tried out while nothing is edited
    budget = token_budget or default_token_budget(model)
    memory = Memory(model.cache_memory if cache_memory is None else cache_memory)
    if per_pass is None:
        per_pass = 1 if model.dtype == torch.float32 or mode == "baked" else max(1, SHARED_PASS // budget)
    pieces: list[pl.DataFrame] = []
    split = model.split.is_split and not any(_edits_head(model, condition) for condition in plan)
    with console.progress(description, total=len(plan) * len(probes)) as bar:
        for context, group in plan.by_context():
            begins = [lower_layers.first_edited(model.network, condition) for condition in group]
            prepared = [_Prepared.of(model, probe, context, budget, split, begins, memory) for probe in probes]
            known: _Known = {}
            for number, condition in enumerate(group):
                store = base_shards if base_shards is not None and condition.is_base else shards
                if per_pass > 1 and not condition.is_base:
                    _read_together(model, prepared, group[number:], known, store, per_pass)
                for part in _score_condition(model, prepared, condition, mode, store, known):
                    pieces.append(part)
                    bar.advance()
            for piece in prepared:
                piece.recordings.release()
    return pl.concat(pieces)


# -------------------------------------------------------------------- planning


class _Plan(list[Condition]):
    """Distinct Conditions, grouped by Context, the base of each first."""

    def by_context(self) -> Iterator[tuple[Context, list[Condition]]]:
        contexts = {condition.context.name: condition.context for condition in self}
        for name, context in contexts.items():
            yield context, [condition for condition in self if condition.context.name == name]


def _distinct_with_bases(conditions: Iterable[Condition]) -> _Plan:
    plan = _Plan()
    seen: dict[str, Condition] = {}
    for wanted in conditions:
        for condition in (Condition(wanted.context), wanted):
            key = content_key(condition.key())
            if key not in seen:
                seen[key] = condition
                plan.append(condition)
            elif not _same_edits(seen[key], condition):
                raise UserError(f"two different edits share the name {condition.key()}", "Name or seed them apart.")
            elif seen[key].context.system != condition.context.system:
                raise UserError(f"two contexts share the name {condition.context.name!r}", "Name them apart.")
    return plan


def _edits_head(model: ChatModel, condition: Condition) -> bool:
    head = {id(parameter) for parameter in model.split.head.parameters()}
    names = {name for name, parameter in model.network.named_parameters() if id(parameter) in head}
    return any(isinstance(edit.effect, Direction) and names & edit.effect.deltas.keys() for edit, _ in condition.active)


def _same_edits(one: Condition, other: Condition) -> bool:
    return [edit.effect for edit, _ in one.active] == [edit.effect for edit, _ in other.active]


@dataclass(frozen=True)
class _Prepared:
    """A probe rendered under one Context: token rows, and batches of their indices."""

    probe: Probe
    tokens: list[list[int]]
    starts: list[int]  # first position whose next token is scored
    batches: list[list[int]]
    budget: int  # padded tokens per batch
    answers: choice.Answers
    split: bool  # final hidden states stand for logits, because no edit reaches the head
    base_states: dict[int, Tensor]  # divergence: those of the base, per batch
    choices: Choices | None  # choice: how its rows are read
    recordings: Recordings  # states that enter the first edited layer

    @classmethod
    def of(
        cls, model: ChatModel, probe: Probe, context: Context, budget: int, split: bool, begins: Sequence[int],
        memory: Memory,
    ) -> _Prepared:  # fmt: skip
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
                ids, prompt_length = model.chat.supervised(messages, row.continuation)
                tokens.append(ids)
                starts.append(prompt_length - 1)
        _require_fit(model, probe, max(map(len, tokens)) + probe.tokens)
        answers: choice.Answers = ([], [])
        if probe.kind in ("choice", "guided"):
            answers = choice.answers_of(model, probe.answers)
        batches = forward.plan_batches([len(ids) for ids in tokens], budget)
        choices = Choices.of(model, tokens, answers, budget) if probe.kind == "choice" else None
        padded = sum(len(tokens[batch[0]]) * len(batch) for batch in batches)
        # what a model writes differs between Conditions, so there is nothing to play back
        recordings = Recordings(
            model, () if probe.kind in WRITTEN else begins, choices.padded_tokens if choices else padded, memory
        )
        return cls(probe, tokens, starts, batches, budget, answers, split, {}, choices, recordings)


def _require_fit(model: ChatModel, probe: Probe, longest: int) -> None:
    from ws.model.architecture import text_config  # noqa: PLC0415 - only for the message

    limit = getattr(text_config(model.network), "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise UserError(
            f"probe {probe.name!r} has a row of {longest} tokens, the model reads {limit}", "Shorten the row."
        )


# -------------------------------------------------------------------- running


def _score_condition(
    model: ChatModel, prepared: Sequence[_Prepared], condition: Condition, mode: Mode, shards: Shards | None,
    known: _Known,
) -> Iterator[pl.DataFrame]:  # fmt: skip
    """Tables of one Condition, one per probe; the model is edited only if something is missing on disk."""
    names = [_shard_name(piece, condition) for piece in prepared]
    stored = [shards is not None and shards.has(name) for name in names]
    base_states_needed = condition.is_base and any(piece.probe.kind == "divergence" for piece in prepared)
    if all(stored) and not base_states_needed:
        for name in names:
            assert shards is not None
            yield pl.read_parquet(shards.path(name))
        return
    begins = lower_layers.first_edited(model.network, condition)
    with torch.no_grad(), under(model, condition, mode=mode):
        for piece, name, done in zip(prepared, names, stored, strict=True):
            if done and not (base_states_needed and piece.probe.kind == "divergence"):
                assert shards is not None
                yield pl.read_parquet(shards.path(name))
                continue
            values = known.pop((piece.probe.key, id(condition)), None)
            if values is None:
                with piece.recordings.used(begins):
                    values = _RUNNERS[piece.probe.kind](model, piece, condition)
            table = _as_table(piece.probe, condition, values)
            if shards is not None:
                write_table(shards.path(name), table)
            yield table


def _shard_name(piece: _Prepared, condition: Condition) -> str:
    said = condition.context.system  # the name of a context does not tell it
    return f"{piece.probe.name}-{content_key(piece.probe.key, condition.key(), said)}.parquet"


def _read_together(
    model: ChatModel, prepared: Sequence[_Prepared], coming: Sequence[Condition], known: _Known,
    shards: Shards | None, per_pass: int,
) -> None:  # fmt: skip
    """Read the choices of the next Condition, and in the same passes those of Conditions behind it, into `known`."""
    for piece in prepared:
        if piece.choices is None or piece.choices.tree is None or piece.choices.beginnings:
            continue
        wanted = [
            condition for condition in coming
            if can_share_a_pass(model, condition) and (piece.probe.key, id(condition)) not in known
            and not (shards is not None and shards.has(_shard_name(piece, condition)))
        ]  # fmt: skip
        if not wanted or wanted[0] is not coming[0]:
            continue
        # passes of equal size, the last one not left with a single Condition
        together = wanted[: math.ceil(len(wanted) / math.ceil(len(wanted) / per_pass))]
        if len(together) == 1:
            continue
        begins = min(lower_layers.first_edited(model.network, condition) for condition in together)
        with torch.no_grad(), under_each(model, together), piece.recordings.used(begins, len(together)):
            found = choice.read_copies(model, piece.choices, len(together))
        for condition, readings in zip(together, found, strict=True):
            known[piece.probe.key, id(condition)] = _by_row(piece.probe, readings)


Values = dict[str, dict[str, float]]
"""row id -> metric -> value."""
_Known = dict[tuple[str, int], Values]  # by the key of a probe: two may share a name
"""Probe and Condition (by identity) -> what has been read of it ahead."""


def _run_choice(model: ChatModel, piece: _Prepared, _condition: Condition) -> Values:
    assert piece.choices is not None
    return _by_row(piece.probe, choice.read(model, piece.choices))


def _by_row(probe: Probe, readings: Sequence[choice.Reading]) -> Values:
    return {row.row: reading for row, reading in zip(probe.rows, readings, strict=True)}


def _run_guided(model: ChatModel, piece: _Prepared, _condition: Condition) -> Values:
    """Spec of the replicated work: think under steering, close the thought, read the answer in one forward pass."""
    chat, tokens = model.chat, piece.tokens
    ends = chat.stop_ids if chat.thought_end is None else chat.stop_ids | {chat.thought_end}
    thoughts = _written(model, piece, ends)
    closed = [one.finish == "eos" if chat.thought_end is None else one.stop == chat.thought_end for one in thoughts]
    whole = [
        [*prompt, *chat.close_thought(thought.ids, done, row.continuation)]
        for prompt, thought, done, row in zip(tokens, thoughts, closed, piece.probe.rows, strict=True)
    ]
    batches = forward.plan_batches([len(ids) for ids in whole], piece.budget)
    values = _by_row(piece.probe, choice.read(model, Choices(whole, batches, piece.answers, piece.budget)))
    for row, thought, done in zip(piece.probe.rows, thoughts, closed, strict=True):
        values[row.row] |= {"forced": float(not done), "tokens": float(len(thought.ids))}
    return values


def _run_reply(model: ChatModel, piece: _Prepared, _condition: Condition) -> Values:
    values: Values = {}
    for row, reply in zip(piece.probe.rows, _written(model, piece, model.chat.stop_ids), strict=True):
        values[row.row] = {
            "distinct3": distinct_ngrams(reply.ids),
            "tokens": float(len(reply.ids)),
            "finished": float(reply.finish == "eos"),
        }
        if row.group == JSON:
            values[row.row][JSON] = float(holds_json(model.chat.decode(reply.ids)))
    return values


def _written(model: ChatModel, piece: _Prepared, ends: frozenset[int]) -> list[Sample]:
    """What the model writes greedily after each row's prompt."""
    requests = [Request(ids, (row.row,)) for ids, row in zip(piece.tokens, piece.probe.rows, strict=True)]
    greedy = Sampling(max_new_tokens=piece.probe.tokens, temperature=0)
    return [one for (one,) in sample(model, requests, greedy, seed=0, stops=ends)]


def distinct_ngrams(ids: Sequence[int], n: int = 3) -> float:
    """Share of distinct n-grams among all of a text; 1 where it is too short to have two."""
    grams = [tuple(ids[at : at + n]) for at in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def holds_json(text: str) -> bool:
    """Whether the text holds one JSON object, with or without a fence or words around it."""
    start, end = text.find("{"), text.rfind("}")
    try:
        return start >= 0 and isinstance(json.loads(text[start : end + 1]), dict)
    except json.JSONDecodeError:
        return False


def _scored_states(model: ChatModel, piece: _Prepared, batch: list[int]) -> tuple[Tensor, Tensor, list[int]]:
    """Final hidden states (or logits, where the forward is not split) of all scored positions of a batch.

    Returns them with the ids that come next and the count per row.
    """
    rows = [piece.tokens[index] for index in batch]
    ids = forward.pad_right(rows, model.device)
    counts = [len(row) - 1 - piece.starts[index] for row, index in zip(rows, batch, strict=True)]
    row_numbers = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(counts)).to(model.device)
    columns = torch.cat([torch.arange(piece.starts[i], len(row) - 1) for row, i in zip(rows, batch, strict=True)])
    columns = columns.to(model.device)
    targets = ids[row_numbers, columns + 1]
    with forward.scoring_from(torch.tensor([piece.starts[index] for index in batch], device=model.device)):
        if piece.split:
            return model.split.hidden(ids)[row_numbers, columns], targets, counts
        return model.split.logits_at(ids, row_numbers, columns), targets, counts


def _log_probabilities(model: ChatModel, piece: _Prepared, states: Tensor) -> Float[Tensor, "n vocabulary"]:
    return (model.split.logits(states) if piece.split else states).log_softmax(dim=-1)


def _in_blocks(model: ChatModel, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Positions in blocks whose logits stay within `forward.LOGIT_BYTES`."""
    return zip(*(tensor.split(model.split.positions_at_once) for tensor in tensors), strict=True)


def _run_likelihood(model: ChatModel, piece: _Prepared, _condition: Condition) -> Values:
    values: Values = {}
    for batch in piece.batches:
        states, targets, counts = _scored_states(model, piece, batch)
        losses = torch.cat([
            -_log_probabilities(model, piece, some).gather(-1, next_ids[:, None]).flatten()
            for some, next_ids in _in_blocks(model, states, targets)
        ])  # fmt: skip
        for index, part in zip(batch, losses.split(counts), strict=True):
            values[piece.probe.rows[index].row] = {"nll": float(part.mean()), "tokens": float(len(part))}
    return values


def _run_divergence(model: ChatModel, piece: _Prepared, condition: Condition) -> Values:
    values: Values = {}
    for number, batch in enumerate(piece.batches):
        states, _, counts = _scored_states(model, piece, batch)
        if condition.is_base:
            piece.base_states[number] = states
        parts = []
        for some, base_states in _in_blocks(model, states, piece.base_states[number]):
            edited, base = _log_probabilities(model, piece, some), _log_probabilities(model, piece, base_states)
            parts.append((edited.exp() * (edited - base)).sum(dim=-1))
        divergences = torch.cat(parts)
        for index, part in zip(batch, divergences.split(counts), strict=True):
            for position, value in enumerate(part.tolist()):
                values[f"{piece.probe.rows[index].row}@{position}"] = {"kl": value}
    return values


_RUNNERS = {
    "choice": _run_choice,
    "likelihood": _run_likelihood,
    "divergence": _run_divergence,
    "guided": _run_guided,
    "reply": _run_reply,
}


def _as_table(probe: Probe, condition: Condition, values: Values) -> pl.DataFrame:
    key = condition.key()
    by_row = {row.row: row for row in probe.rows}
    records = []
    for name, metrics in values.items():
        row = by_row[name.rsplit("@", 1)[0] if probe.kind == "divergence" else name]
        for metric, value in metrics.items():
            if not math.isfinite(value):
                raise UserError(
                    f"probe {probe.name!r}, row {row.row!r}: {metric} is {value} under {key}",
                    "The edited model breaks down: use a smaller alpha.",
                )
            records.append({
                "probe": probe.name, "group": row.group, "row": name, "cluster": row.cluster or row.row,
                "label": row.label, **key, "metric": metric, "value": value,
            })  # fmt: skip
    order = {row.row: position for position, row in enumerate(probe.rows)}
    records.sort(key=lambda record: (order.get(record["row"].rsplit("@", 1)[0], 0), record["row"], record["metric"]))
    return pl.DataFrame(records, schema=SCHEMA)
