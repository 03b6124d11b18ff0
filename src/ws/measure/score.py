"""The scoring engine: it scores Probes under Conditions and returns one long table.

    choice       logratio = log p(first answer) - log p(second) at an anchor, pmass = p(first) + p(second)
    likelihood   nll = mean negative log-probability of the tokens of a given text
    contrast     logratio = log p(first reply) - log p(second), of whole replies with their end of turn;
                 logratio_per_token = the same with each reply's mean log-probability per token
    divergence   kl = sum_v p_edited (log p_edited - log p_base) at every position of a given text
    guided       a choice after a thought that the edited model writes itself (greedy, at most `tokens`), and whether
                 the engine had to close the thought (`forced`)
    reply        a greedy reply: distinct3 = distinct / all of its 3-grams, its length, whether it ended (`finished`),
                 and in the group `json` whether it holds a JSON object that can be parsed

An answer is a set of token sequences; its probability is the sum of theirs. Log-probabilities are fp32. The logits of
answer tokens are computed in fp32 even on half-precision models; all other logits have the dtype of the head. The
Condition without edits is scored once per Context and shared. Rows are batched by length under a token budget and
padded on the right, so a row's value does not depend on its batch. On half-precision models edits are side paths, and
several Conditions share the passes of a choice (`steering.under_each`). Their separate batches would be too small for
fast matrix products.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from ws.base import console, memory
from ws.base.errors import UserError
from ws.base.files import content_key, write_table
from ws.base.store import Shards
from ws.edit.condition import Condition
from ws.edit.steering import Mode, under, under_each
from ws.measure import choice, divergence, shared_prefix
from ws.measure.choice import Choices
from ws.measure.generate import Request, Sample, Sampling, sample
from ws.measure.plan import Plan, PlannedCondition, PreparedProbe, default_token_budget
from ws.measure.probe import JSON, Probe
from ws.measure.shared_prefix import Texts
from ws.model import forward
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
"""Raise it when a change to the engine alters scores by more than rounding."""


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

    The result always includes the base of every Context.

    shards: keeps finished (probe, Condition) pieces on disk, so that a rerun reuses them. base_shards: keeps those
    without edits, for all runs of one model. cache_memory: limit in bytes (default: the model's) of the recorded states
    of layers below the edits; 0 runs every layer for every Condition. per_pass: how many Conditions share a pass, if
    they can (None: as many as fill `SHARED_PASS` tokens on a half-precision model, otherwise one).
    """
    wanted = tuple(conditions)

    def within(budget: int) -> pl.DataFrame:
        plan = Plan.of(model, wanted, mode=mode, token_budget=budget, cache_memory=cache_memory, per_pass=per_pass)
        return _score_all(model, probes, plan, shards, base_shards, description)

    return memory.halving(token_budget or default_token_budget(model), "batches", within)


def _score_all(
    model: ChatModel, probes: Sequence[Probe], plan: Plan, shards: Shards | None, base_shards: Shards | None,
    description: str,
) -> pl.DataFrame:  # fmt: skip
    pieces: list[pl.DataFrame] = []
    with console.progress(description, total=plan.condition_count * len(probes)) as bar:
        for context, group in plan.contexts:
            prepared = plan.prepared(model, probes, context, group)
            known: _Known = {}
            for number, planned in enumerate(group):
                is_base = planned.condition.is_base
                store = base_shards if base_shards is not None and is_base else shards
                if plan.per_pass > 1 and not is_base:
                    _read_together(model, prepared, group[number:], known, store, plan.per_pass)
                for part in _score_condition(model, prepared, planned, plan.mode, store, known):
                    pieces.append(part)
                    bar.advance()
            for piece in prepared:
                piece.recordings.release()
    return pl.concat(pieces)


def _score_condition(
    model: ChatModel, prepared: Sequence[PreparedProbe], planned: PlannedCondition, mode: Mode, shards: Shards | None,
    known: _Known,
) -> Iterator[pl.DataFrame]:  # fmt: skip
    """Tables of one Condition, one per probe; the model is edited only if a table is missing on disk."""
    condition = planned.condition
    names = [_shard_name(piece, condition) for piece in prepared] if shards is not None else [""] * len(prepared)
    stored = [shards is not None and shards.has(name) for name in names]
    base_states_needed = condition.is_base and any(piece.probe.kind == "divergence" for piece in prepared)
    if all(stored) and not base_states_needed:
        for name in names:
            assert shards is not None
            yield pl.read_parquet(shards.path(name))
        return
    with torch.no_grad(), under(model, condition, mode=mode):
        for piece, name, done in zip(prepared, names, stored, strict=True):
            if done and not (base_states_needed and piece.probe.kind == "divergence"):
                assert shards is not None
                yield pl.read_parquet(shards.path(name))
                continue
            values = known.pop((piece.probe.key, condition), None)
            if values is None:
                with piece.recordings.used(planned.first_layer):
                    values = _RUNNERS[piece.probe.kind](model, piece, condition)
            table = _as_table(piece.probe, condition, values)
            if shards is not None:
                write_table(shards.path(name), table)
            yield table


def _shard_name(piece: PreparedProbe, condition: Condition) -> str:
    """File name of a probe and Condition. It includes content digests, because labels do not identify the content."""
    what = [condition.context.system] if condition.is_base else [condition.context.system, condition.content_key]
    return f"{piece.probe.name}-{content_key(piece.probe.key, condition.key(), *what)}.parquet"


def _read_together(
    model: ChatModel, prepared: Sequence[PreparedProbe], coming: Sequence[PlannedCondition], known: _Known,
    shards: Shards | None, per_pass: int,
) -> None:  # fmt: skip
    """Read the choices of the next Condition, and of later ones in the same passes, into `known`."""
    for piece in prepared:
        if piece.choices is None or not piece.can_be_shared:
            continue
        wanted = [
            planned for planned in coming
            if planned.can_share and (piece.probe.key, planned.condition) not in known
            and not (shards is not None and shards.has(_shard_name(piece, planned.condition)))
        ]  # fmt: skip
        if not wanted or wanted[0] is not coming[0]:
            continue
        # passes of equal size, so that the last one is not left with a single Condition
        together = wanted[: math.ceil(len(wanted) / math.ceil(len(wanted) / per_pass))]
        if len(together) == 1:
            continue
        begins, conditions = min(one.first_layer for one in together), [one.condition for one in together]
        with torch.no_grad(), under_each(model, conditions), piece.recordings.used(begins, len(together)):
            found = choice.read_copies(model, piece.choices, len(together))
        for condition, readings in zip(conditions, found, strict=True):
            known[piece.probe.key, condition] = _by_row(piece.probe, readings)


Values = dict[str, dict[str, float]]
"""row id -> metric -> value."""
_Known = dict[tuple[str, Condition], Values]  # the key of a probe, because two probes may share a name
"""Key of a probe and Condition -> values that were read in advance."""


def _run_choice(model: ChatModel, piece: PreparedProbe, _condition: Condition) -> Values:
    assert piece.choices is not None
    return _by_row(piece.probe, choice.read(model, piece.choices))


def _by_row(probe: Probe, readings: Sequence[choice.Reading]) -> Values:
    return {row.row: reading for row, reading in zip(probe.rows, readings, strict=True)}


def _run_guided(model: ChatModel, piece: PreparedProbe, _condition: Condition) -> Values:
    """As in the replicated work: think under steering, close the thought, read the answer in one forward pass."""
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


def _run_reply(model: ChatModel, piece: PreparedProbe, _condition: Condition) -> Values:
    values: Values = {}
    for row, reply in zip(piece.probe.rows, _written(model, piece, model.chat.stop_ids), strict=True):
        values[row.row] = {
            "distinct3": divergence.distinct_ngrams(reply.ids),
            "tokens": float(len(reply.ids)),
            "finished": float(reply.finish == "eos"),
        }
        if row.group == JSON:
            values[row.row][JSON] = float(holds_json(model.chat.decode(reply.ids)))
    return values


def _written(model: ChatModel, piece: PreparedProbe, ends: frozenset[int]) -> list[Sample]:
    """What the model writes greedily after each row's prompt."""
    requests = [Request(ids, (row.row,)) for ids, row in zip(piece.tokens, piece.probe.rows, strict=True)]
    greedy = Sampling(max_new_tokens=piece.probe.tokens, temperature=0)
    return [one for (one,) in sample(model, requests, greedy, seed=0, stops=ends)]


def holds_json(text: str) -> bool:
    """Whether the text holds one JSON object, with or without other text around it."""
    start, end = text.find("{"), text.rfind("}")
    try:
        return start >= 0 and isinstance(json.loads(text[start : end + 1]), dict)
    except json.JSONDecodeError:
        return False


def _texts(model: ChatModel, piece: PreparedProbe) -> Iterator[Texts]:
    """All token rows of a probe, read from their start on, with shared prefixes if these save enough."""
    if piece.tree is not None:
        yield from shared_prefix.texts(model, piece.tree, piece.starts, piece.budget, split=piece.split)
        return
    for batch in piece.batches:
        ids = forward.pad_right([piece.tokens[index] for index in batch], model.device)
        firsts, lengths = [piece.starts[index] for index in batch], [len(piece.tokens[index]) for index in batch]
        yield shared_prefix.read_texts(model, batch, ids, firsts, lengths, split=piece.split, inputs={})


def _log_probabilities(model: ChatModel, piece: PreparedProbe, states: Tensor) -> Float[Tensor, "n vocabulary"]:
    return (model.split.logits(states) if piece.split else states).log_softmax(dim=-1)


def _in_blocks(model: ChatModel, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Positions in blocks whose logits stay within `forward.LOGIT_BYTES`."""
    return zip(*(tensor.split(model.split.positions_at_once) for tensor in tensors), strict=True)


def _losses(model: ChatModel, piece: PreparedProbe) -> dict[int, Float[Tensor, " tokens"]]:
    """Negative log-probability of every scored token, by token row."""
    found: dict[int, Tensor] = {}
    for rows, states, targets, counts in _texts(model, piece):
        losses = torch.cat([
            -_log_probabilities(model, piece, some).gather(-1, next_ids[:, None]).flatten()
            for some, next_ids in _in_blocks(model, states, targets)
        ])  # fmt: skip
        found |= dict(zip(rows, losses.split(counts), strict=True))
    return found


def _run_likelihood(model: ChatModel, piece: PreparedProbe, _condition: Condition) -> Values:
    losses = _losses(model, piece)
    return {
        row.row: {"nll": float(losses[index].mean()), "tokens": float(len(losses[index]))}
        for index, row in enumerate(piece.probe.rows)
    }


def _run_contrast(model: ChatModel, piece: PreparedProbe, _condition: Condition) -> Values:
    losses = _losses(model, piece)
    values: Values = {}
    for index, row in enumerate(piece.probe.rows):
        first, second = losses[2 * index], losses[2 * index + 1]
        values[row.row] = {
            "logratio": float(second.sum() - first.sum()),
            "logratio_per_token": float(second.mean() - first.mean()),
        }
    return values


def _run_divergence(model: ChatModel, piece: PreparedProbe, condition: Condition) -> Values:
    values: Values = {}
    for number, (rows, states, _, counts) in enumerate(_texts(model, piece)):
        if condition.is_base:
            piece.base_states[number] = states
        parts = []
        for some, base_states in _in_blocks(model, states, piece.base_states[number]):
            edited, base = _log_probabilities(model, piece, some), _log_probabilities(model, piece, base_states)
            parts.append(divergence.kl(edited, base))
        divergences = torch.cat(parts)
        for index, part in zip(rows, divergences.split(counts), strict=True):
            for position, value in enumerate(part.tolist()):
                values[f"{piece.probe.rows[index].row}@{position}"] = {"kl": value}
    return values


_RUNNERS = {
    "choice": _run_choice,
    "likelihood": _run_likelihood,
    "contrast": _run_contrast,
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
                    "The edit is too strong: use a smaller alpha.",
                )
            records.append({
                "probe": probe.name, "group": row.group, "row": name, "cluster": row.cluster or row.row,
                "label": row.label, **key, "metric": metric, "value": value,
            })  # fmt: skip
    order = {row.row: position for position, row in enumerate(probe.rows)}
    records.sort(key=lambda record: (order.get(record["row"].rsplit("@", 1)[0], 0), record["row"], record["metric"]))
    return pl.DataFrame(records, schema=SCHEMA)
