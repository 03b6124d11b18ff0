"""D+ and D-: responses of the base model under opposed personas, in pairs.

    pairs = topics x personas x samples           (20 x 5 x 10 = 1000 by default)

Both responses of a row have the same topic, persona number and sample number. Each row and side has its own random
stream, so the responses depend neither on batch size nor on interruptions. Responses from a chat endpoint (`engine`)
also depend on the server. Responses that cannot teach the difference are flagged, not silently dropped: `flags_*` say
why, `keep_*` say whether training uses them. A user's own pairs are read from JSONL.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import polars as pl

from ws.base import console, user_files
from ws.base.errors import UserError
from ws.base.files import write_table
from ws.base.poles import POLES, Pole
from ws.base.store import Shards
from ws.fitting import responses
from ws.fitting.behaviour import Behaviour, TrainPrompt
from ws.fitting.responses import Asked, EngineSettings
from ws.measure.divergence import distinct_ngrams
from ws.measure.generate import Sampling
from ws.model.loading import ChatModel

_PIECE = 512
"""Samples per piece; finished pieces are kept after an interruption."""

_REFUSAL = re.compile(
    r"\bI(?:'m| am) sorry, but I can(?:'|no)t\b|\bI can(?:'|no)t (?:help|assist) with\b|\bas an AI\b", re.I
)
_PERSONA_TALK = re.compile(r"\b(?:system prompt|my instructions|my persona|I was (?:told|instructed) to)\b", re.I)


@dataclass(frozen=True)
class Grid:
    """How many topics, personas and samples; None means all that the behaviour has."""

    topics: int | None = None
    personas: int | None = None
    samples: int = 10

    def __post_init__(self) -> None:
        given = {"topics": self.topics, "personas": self.personas, "samples": self.samples}
        for name, value in given.items():
            if value is not None and value < 1:
                raise UserError(f"--{name} is {value}: the grid has no rows", "Give 1 or more.")


class Cell(NamedTuple):
    """One row of the grid before sampling."""

    topic: TrainPrompt
    persona: int
    sample: int


def cells(behaviour: Behaviour, grid: Grid) -> list[Cell]:
    """The grid in (topic, persona, sample) order; too many topics are an error, too many personas give a warning."""
    topics = len(behaviour.train) if grid.topics is None else grid.topics
    if topics > len(behaviour.train):
        raise UserError(
            f"behaviour {behaviour.name!r} has {len(behaviour.train)} training prompts, not {topics}",
            f"Set --topics from 1 to {len(behaviour.train)}, or add prompts to the behaviour file.",
        )
    available = len(behaviour.personas.pos)
    personas = available if grid.personas is None else grid.personas
    if personas > available:
        console.warn(
            f"behaviour {behaviour.name!r} has {available} personas per side, not {personas}; using {available}"
        )
        personas = available
    return [
        Cell(topic, persona, sample)
        for topic in behaviour.train[:topics]
        for persona in range(personas)
        for sample in range(grid.samples)
    ]


def make_pairs(
    model: ChatModel,
    behaviour: Behaviour,
    grid: Grid,
    sampling: Sampling,
    seed: int,
    shards: Shards,
    source: EngineSettings = responses.LOCAL,
) -> pl.DataFrame:
    """Sample both sides of the grid from `source`, check them, and flag responses that training should not use."""
    rows = cells(behaviour, grid)
    columns: dict[str, list[Any]] = {
        "topic": [row.topic.topic for row in rows],
        "persona": [row.persona for row in rows],
        "sample": [row.sample for row in rows],
        "prompt": [row.topic.text for row in rows],
    }
    with console.progress("sampling pairs", total=2 * len(rows)) as bar:
        for pole, personas in zip(POLES, (behaviour.personas.pos, behaviour.personas.neg), strict=True):
            pieces = []
            for number, part in enumerate(_pieces(rows)):
                name = f"{pole}-{number:04d}.parquet"
                if not shards.has(name):
                    table = _sample_pole(source, model, behaviour.name, part, pole, personas, sampling, seed, bar)
                    write_table(shards.path(name), table)
                else:
                    bar.advance(len(part))
                pieces.append(pl.read_parquet(shards.path(name)))
            sampled = pl.concat(pieces)
            for column in ("system", "response", "finish", "tokens"):
                columns[f"{column}_{pole}"] = sampled[column].to_list()
    pairs = pl.DataFrame(columns).with_columns(pl.lit(behaviour.name).alias("behaviour"))
    require_usable(pairs)
    return with_flags(pairs, (behaviour.personas.pos, behaviour.personas.neg))


def _pieces(rows: Sequence[Cell]) -> Iterator[list[Cell]]:
    """Pieces of about `_PIECE` samples. A (topic, persona) block stays whole, so that its prompt is prefilled once."""
    piece: list[Cell] = []
    for row in rows:
        if len(piece) >= _PIECE and row.sample == 0:
            yield piece
            piece = []
        piece.append(row)
    yield piece


def _sample_pole(
    source: EngineSettings,
    model: ChatModel,
    name: str,
    rows: Sequence[Cell],
    pole: Pole,
    personas: Sequence[str],
    sampling: Sampling,
    seed: int,
    bar: console.Bar,
) -> pl.DataFrame:
    blocks: dict[tuple[TrainPrompt, int], list[Cell]] = {}
    for row in rows:
        blocks.setdefault((row.topic, row.persona), []).append(row)
    asked = [
        Asked(
            topic.text,
            personas[persona],
            keys=tuple(f"{name}/{pole}/{topic.topic}/{persona}/{row.sample}" for row in block),
        )
        for (topic, persona), block in blocks.items()
    ]
    answered = responses.respond(source, model, asked, sampling, seed, bar.advance)
    return pl.DataFrame({
        "system": [personas[row.persona] for row in rows],
        "response": [one.text for one in answered],
        "finish": [one.finish for one in answered],
        "tokens": pl.Series([one.tokens for one in answered], dtype=pl.Int64),
    })  # fmt: skip


def read_pairs(path: str | Path, behaviour: Behaviour) -> pl.DataFrame:
    """A user's own pairs: JSONL with prompt, response_pos, response_neg and optionally topic."""
    lines = user_files.json_lines(Path(path), "pairs file", "Check --pairs.")
    for line in lines:
        for key in ("prompt", "response_pos", "response_neg"):
            if not isinstance(line.content.get(key), str):
                raise UserError(f"{line.where}: key {key!r} is missing or not a text", "Give a text in every line.")
    records = [line.content for line in lines]
    if not records:
        raise UserError(f"{path} contains no pairs", "Write one JSON object per line.")
    pairs = pl.DataFrame({
        "topic": [str(record.get("topic", record["prompt"])) for record in records],
        "persona": [0] * len(records),
        "sample": list(range(len(records))),
        "prompt": [record["prompt"] for record in records],
        **{f"system_{pole}": [""] * len(records) for pole in POLES},
        **{f"response_{pole}": [record[f"response_{pole}"].strip() for record in records] for pole in POLES},
        **{f"finish_{pole}": ["given"] * len(records) for pole in POLES},
        **{f"tokens_{pole}": [None] * len(records) for pole in POLES},
    }).with_columns(pl.lit(behaviour.name).alias("behaviour"))  # fmt: skip
    require_usable(pairs)
    return with_flags(pairs, ((), ()))


# -------------------------------------------------------------------- checks


def require_usable(pairs: pl.DataFrame) -> None:
    """Fail on data without any contrast: no rows, mostly empty responses, identical sides, or one repeated response."""
    if pairs.is_empty():
        raise UserError("there are no pairs", "Check the grid or the pairs file.")
    for pole in POLES:
        responses = pairs[f"response_{pole}"]
        empty = [index for index, text in enumerate(responses) if not text.strip()]
        if len(empty) > len(pairs) // 2:
            raise UserError(
                f"{len(empty)} of {len(pairs)} responses on the {pole} side are empty (rows {empty[:10]})",
                "Check the model's chat template and --max-new-tokens.",
            )
        if len(pairs) > 1 and responses.n_unique() == 1:
            raise UserError(
                f"all {len(pairs)} responses on the {pole} side are identical ({responses[0][:60]!r})",
                "Raise --temperature or check that the model follows the personas.",
            )
    if (pairs["response_pos"] == pairs["response_neg"]).all():
        raise UserError(
            "D+ and D- are identical in every pair, so there is no direction to find",
            "Check that the model follows the personas.",
        )


def with_flags(pairs: pl.DataFrame, personas: tuple[Sequence[str], Sequence[str]]) -> pl.DataFrame:
    """Add `flags_*` (why a response is doubtful, joined by commas) and `keep_*` per side."""
    identical = (pairs["response_pos"] == pairs["response_neg"]).to_list()
    for pole, texts in zip(POLES, personas, strict=True):
        responses = pairs[f"response_{pole}"].to_list()
        variety = [distinct_ngrams(_words(text)) for text in responses]
        floor = 0.5 * median(variety)
        copied = {phrase for text in texts for phrase in _word_runs(text, 6)}
        flags = []
        for text, same, distinct in zip(responses, identical, variety, strict=True):
            found = [
                ("empty", not text.strip()),
                ("identical", same),
                ("repetition", distinct < floor),
                ("refusal", _REFUSAL.search(text) is not None),
                (
                    "persona leak",
                    _PERSONA_TALK.search(text) is not None or bool(copied & set(_word_runs(text, 6))),
                ),
            ]
            flags.append(",".join(name for name, applies in found if applies))
        pairs = pairs.with_columns(
            pl.Series(f"flags_{pole}", flags, dtype=pl.String),
            pl.Series(f"keep_{pole}", [not flag for flag in flags], dtype=pl.Boolean),
        )
    return pairs


def describe(pairs: pl.DataFrame) -> dict[str, Any]:
    """Counts for logs and reports that show whether the data is usable."""
    numbers: dict[str, Any] = {
        "pairs": len(pairs),
        "identical": int((pairs["response_pos"] == pairs["response_neg"]).sum()),
    }
    for pole in POLES:
        flags = [flag for text in pairs[f"flags_{pole}"] for flag in text.split(",") if flag]
        finished = pairs.filter(pl.col(f"finish_{pole}") != "given")
        numbers[pole] = {
            "kept": int(pairs[f"keep_{pole}"].sum()),
            "unique": pairs[f"response_{pole}"].n_unique(),
            "median_characters": float(pairs[f"response_{pole}"].str.len_chars().median() or 0),  # type: ignore[arg-type]
            "starts_with_thought": int(pairs[f"response_{pole}"].str.starts_with("<think>").sum()),
            "ended_by_itself": float((finished[f"finish_{pole}"] == "eos").mean() or 0) if len(finished) else None,  # type: ignore[arg-type]
            "flags": {name: flags.count(name) for name in sorted(set(flags))},
        }
    return numbers


def keep_rates(pairs: pl.DataFrame, by: str) -> pl.DataFrame:
    """Share of kept responses per pole, by `topic` or `persona`."""
    return pairs.group_by(by, maintain_order=True).agg(*(pl.col(f"keep_{pole}").mean() for pole in POLES), pl.len())


def _words(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.casefold())


def _word_runs(text: str, length: int) -> list[tuple[str, ...]]:
    words = _words(text)
    return [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]
