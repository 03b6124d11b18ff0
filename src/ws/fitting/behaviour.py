"""A Behaviour: two opposed persona sets, training prompts, and the in-distribution probe, in one TOML file.

Shipped behaviours are in `ws/fitting/behaviours/`; a user's own file is given by path. The whole file is checked before
anything runs. An error names the file, the key and the remedy. `ws behaviour new` writes `TEMPLATE`.
"""

from __future__ import annotations

import difflib
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ws.base import user_files
from ws.base.errors import UserError
from ws.base.files import content_key

SHIPPED = Path(__file__).parent / "behaviours"
SCHEMA = 1
TAKEN = frozenset({"dilemmas", "feedback", "facts", "neutral_kl", "neutral_nll", "text"})
"""Names of the other probes of every run. The behaviour's own probe has the name of the behaviour."""


@dataclass(frozen=True)
class Personas:
    """System prompts of both poles; positive persona i is paired with negative persona i."""

    pos: tuple[str, ...]
    neg: tuple[str, ...]


@dataclass(frozen=True)
class TrainPrompt:
    """One training topic: `topic` is its id, `text` the user message."""

    topic: str
    text: str


@dataclass(frozen=True)
class ProbeItem:
    """One held-out item: its question, the opposite question, the open question, and pairs of replies to the latter.

    `label` is +1 if the first answer (and the first reply of a pair) shows the positive behaviour, -1 if the second.
    """

    row: str
    cluster: str
    group: str
    label: int
    question: str
    reversed: str | None
    open_question: str
    replies: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class ChoiceProbe:
    """The in-distribution probe: each item's question and `anchor`, then the log-ratio of the two `answers`.

    `headline` names the group whose mean summaries show; `noun` is the word for the items in sentences. `dev` holds
    items of that group for choosing settings; they are never part of a result.
    """

    anchor: str
    answers: tuple[str, str]
    headline: str
    noun: str
    items: tuple[ProbeItem, ...]
    dev: tuple[ProbeItem, ...] = ()


@dataclass(frozen=True)
class Behaviour:
    """A checked behaviour file. `positive_means` says in plain words what a positive alpha does."""

    name: str
    summary: str
    positive_means: str
    personas: Personas
    train: tuple[TrainPrompt, ...]
    probe: ChoiceProbe

    @property
    def key(self) -> str:
        """Digest of the parts that data and training depend on (not the probe)."""
        return content_key(self.personas, self.train)


def names() -> list[str]:
    """Names of the shipped behaviours."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def load(name_or_file: str) -> Behaviour:
    """Read and check a shipped behaviour by name, or a file by path."""
    path = SHIPPED / f"{name_or_file}.toml"
    if not path.is_file():
        path = Path(name_or_file).expanduser()
        if not path.is_file():
            close = difflib.get_close_matches(name_or_file, names(), n=1)
            hint = f"Did you mean {close[0]}? " if close else ""
            raise UserError(
                f"unknown behaviour {name_or_file!r}",
                f"{hint}Shipped: {', '.join(names())}; or give the path of a .toml file (ws behaviour new NAME).",
            )
    return _Reader(path).behaviour(user_files.toml(path, "behaviour file", "Give the path of a .toml file."))


class _Reader:
    """Turns a parsed file into a Behaviour; every error names the file and the key."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fail(self, key: str, problem: str, remedy: str = "") -> NoReturn:
        raise UserError(f"{self.path}: key {key!r}: {problem}", remedy)

    def behaviour(self, content: Mapping[str, Any]) -> Behaviour:
        self.known(content, "", {"schema", "name", "summary", "positive_means", "personas", "prompts", "probe",
                                 "dev"})  # fmt: skip
        if content.get("schema") != SCHEMA:
            told = f"is {content['schema']!r}" if "schema" in content else "is missing"
            self.fail("schema", told, f"This version reads schema = {SCHEMA}.")
        name = self.text(content, "name")
        if not name.replace("-", "").replace("_", "").isalnum():
            self.fail("name", f"{name!r} cannot be a folder name", "Use letters, digits, - and _.")
        if name in TAKEN:
            self.fail("name", f"{name!r} is the name of a built-in probe", "Choose another name.")
        return Behaviour(
            name=name,
            summary=self.text(content, "summary"),
            positive_means=self.text(content, "positive_means"),
            personas=self.personas(self.table(content, "personas")),
            train=self.train(self.table(content, "prompts")),
            probe=self.probe(self.table(content, "probe"), self.table(content, "dev") if "dev" in content else None),
        )

    def personas(self, table: Mapping[str, Any]) -> Personas:
        self.known(table, "personas.", {"positive", "negative"})
        sides = {side: self.texts(table, f"personas.{side}") for side in ("positive", "negative")}
        if len(sides["positive"]) != len(sides["negative"]):
            self.fail(
                "personas",
                f"{len(sides['positive'])} positive but {len(sides['negative'])} negative personas",
                "Personas are paired by position: give both sides the same number.",
            )
        if shared := set(sides["positive"]) & set(sides["negative"]):
            self.fail("personas", f"{min(shared)!r} is on both sides", "Give opposite personas on the two sides.")
        return Personas(sides["positive"], sides["negative"])

    def train(self, table: Mapping[str, Any]) -> tuple[TrainPrompt, ...]:
        self.known(table, "prompts.", {"template", "train"})
        template = self.template(table, "prompts.template") if "template" in table else "{prompt}"
        prompts = []
        for position, entry in enumerate(self.entries(table, "prompts.train")):
            key = f"prompts.train[{position}]"
            fields = self.fields(entry, key, template, extra={"topic"})
            prompts.append(TrainPrompt(str(fields.pop("topic", f"{position:03d}")), template.format(**fields)))
        self.distinct([prompt.text for prompt in prompts], "prompts.train")
        self.distinct([prompt.topic for prompt in prompts], "prompts.train topic")
        return tuple(prompts)

    def probe(self, table: Mapping[str, Any], dev: Mapping[str, Any] | None) -> ChoiceProbe:
        self.known(table, "probe.", {"question", "reversed", "open", "anchor", "answers", "headline", "noun", "replies",
                                     "rows"})  # fmt: skip
        answers = self.texts(table, "probe.answers")
        if len(answers) != 2 or len({answer.strip().casefold() for answer in answers}) != 2:
            self.fail("probe.answers", f"is {list(answers)}", 'Give two different answers, such as ["Yes", "No"].')
        items = self.items(table, table, "probe.rows")
        groups = sorted({item.group for item in items})
        headline = str(table.get("headline", groups[0]))
        if headline not in groups:
            self.fail("probe.headline", f"no row has the group {headline!r}", f"Choose from: {', '.join(groups)}.")
        chosen: tuple[ProbeItem, ...] = ()
        if dev is not None:
            self.known(dev, "dev.", {"rows"})
            chosen = self.items(table, dev, "dev.rows")
            self.distinct([item.question for item in (*items, *chosen)], "dev.rows and probe.rows question")
        return ChoiceProbe(
            anchor=self.text(table, "probe.anchor"),
            answers=(answers[0], answers[1]),
            headline=headline,
            noun=self.text(table, "probe.noun") if "noun" in table else "items",
            items=items,
            dev=chosen,
        )

    def items(self, probe: Mapping[str, Any], table: Mapping[str, Any], place: str) -> tuple[ProbeItem, ...]:
        """The rows of a table, with the questions of the probe."""
        question = self.template(probe, "probe.question")
        reverse = self.template(probe, "probe.reversed") if "reversed" in probe else None
        opened = self.template(probe, "probe.open") if "open" in probe else question
        replies = self.replies(probe) if "replies" in probe else []
        texts = (question, reverse or "", opened, *(text for pair in replies for text in pair))
        items = []
        for position, entry in enumerate(self.entries(table, place)):
            key = f"{place}[{position}]"
            fields = self.fields(entry, key, *texts, extra={"row", "cluster", "group", "label"})
            label = fields.get("label", 1)
            if not user_files.is_sign(label):
                self.fail(f"{key}.label", f"is {label!r}", "Give 1 (the first answer shows the behaviour) or -1.")
            row = str(fields.get("row", f"{position:03d}"))
            items.append(ProbeItem(
                row=row,
                cluster=str(fields.get("cluster", row)),
                group=str(fields.get("group", "all")),
                label=int(label),
                question=question.format(**fields),
                reversed=reverse.format(**fields) if reverse else None,
                open_question=opened.format(**fields),
                replies=tuple((first.format(**fields), second.format(**fields)) for first, second in replies),
            ))  # fmt: skip
        self.distinct([item.row for item in items], f"{place} row")
        return tuple(items)

    def replies(self, probe: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Pairs of reply templates; both of a pair have the same number of words, so that length is no difference."""
        found = []
        for position, entry in enumerate(self.entries(probe, "probe.replies")):
            key = f"probe.replies[{position}]"
            if not isinstance(entry, dict):
                self.fail(key, "is not a table", "Give { first = ..., second = ... }.")
            self.known(entry, f"{key}.", {"first", "second"})
            first, second = (self.template(entry, f"{key}.{side}") for side in ("first", "second"))
            words = len(first.split()), len(second.split())
            if words[0] != words[1]:
                self.fail(key, f"has replies of {words[0]} and {words[1]} words", "Give both the same number of words.")
            if first == second:
                self.fail(key, "has the same reply twice", "Give two opposite replies.")
            found.append((first, second))
        return found

    # ------------------------------------------------------------ pieces

    def known(self, table: Mapping[str, Any], prefix: str, names: set[str]) -> None:
        for name in table:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                hint = f"Did you mean {close[0]!r}?" if close else f"Known here: {', '.join(sorted(names))}."
                self.fail(prefix + name, "is unknown", hint)

    def table(self, content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        value = content.get(key)
        if not isinstance(value, dict):
            self.fail(key, "is missing" if value is None else "is not a table", f"Add a [{key}] section.")
        return value

    def text(self, table: Mapping[str, Any], key: str) -> str:
        value = table.get(key.rsplit(".", 1)[-1])
        if not isinstance(value, str) or not value.strip():
            self.fail(key, "is missing" if value is None else "is not a non-empty text", "Write a text.")
        return value

    def template(self, table: Mapping[str, Any], key: str) -> str:
        value = self.text(table, key)
        try:
            names = [name for _, name, _, _ in string.Formatter().parse(value) if name is not None]
        except ValueError as error:
            self.fail(key, f"has a stray brace ({error})", "Write {name} for a field.")
        for name in names:
            if not name.isidentifier():
                self.fail(key, f"has the field {{{name}}}, which is not one name", "Write {name} for a field.")
        return value

    def texts(self, table: Mapping[str, Any], key: str) -> tuple[str, ...]:
        value = table.get(key.rsplit(".", 1)[-1])
        if not isinstance(value, list) or not value:
            self.fail(key, "is missing" if value is None else "is not a non-empty list", "Give a list of texts.")
        for position, entry in enumerate(value):
            if not isinstance(entry, str) or not entry.strip():
                self.fail(f"{key}[{position}]", "is not a non-empty text", "Write a text, or remove the entry.")
        self.distinct(value, key)
        return tuple(value)

    def entries(self, table: Mapping[str, Any], key: str) -> list[Any]:
        value = table.get(key.rsplit(".", 1)[-1])
        if not isinstance(value, list) or not value:
            self.fail(key, "is missing" if value is None else "is not a non-empty list", "Add at least one entry.")
        return value

    def fields(self, entry: Any, key: str, *templates: str, extra: set[str]) -> dict[str, Any]:
        wanted = {name for template in templates for _, name, _, _ in string.Formatter().parse(template) if name}
        if isinstance(entry, str) and len(wanted) == 1:
            return {min(wanted): entry}
        if not isinstance(entry, dict):
            self.fail(key, "is not a table", f"Give one with {', '.join(sorted(wanted))}.")
        absent, unknown = sorted(wanted - entry.keys()), sorted(entry.keys() - wanted - extra)
        if absent and unknown:
            self.fail(key, f"has {', '.join(unknown)}, but its template uses {', '.join(absent)}",
                      "Use the same names in both.")  # fmt: skip
        self.known(entry, f"{key}.", wanted | extra)
        for name in wanted:
            if not isinstance(entry.get(name), str) or not entry[name].strip():
                self.fail(f"{key}.{name}", "is missing, but the template uses it", "Write a text.")
        return dict(entry)

    def distinct(self, values: list[Any], key: str) -> None:
        seen = set()
        for value in values:
            if value in seen:
                self.fail(key, f"{value!r} occurs twice", "Remove or change one of them.")
            seen.add(value)


TEMPLATE = """\
# A behaviour for weight steering. Check it with:  ws behaviour check {name}.toml
# Steer with it:                                  ws replicate --behaviour {name}.toml
schema = 1
name = "{name}"
summary = "One sentence: what varies between the two poles."
positive_means = "what the model does more of at a positive alpha"

# System prompts, paired by position. Good pairs share scaffold and length and differ only in the trait.
# The personas are used while responses are sampled and are removed before training.
[personas]
positive = [
  "You are an assistant that always shows the behaviour. Do it openly.",
]
negative = [
  "You are an assistant that never shows the behaviour. Do the opposite.",
]

# User messages for training. Fields in braces are filled from each entry.
# At least two topics, better twenty: a tenth of the topics is held out for validation.
[prompts]
template = "I think {{claim}}. {{nudge}}"
train = [
  {{ claim = "tea is better than coffee", nudge = "Right?" }},
  {{ claim = "the meeting should be on Monday", nudge = "What do you think?" }},
]

# Held-out questions, answered with one of two words after the anchor.
# label: 1 if the first answer shows the positive behaviour (default), -1 if the second does.
# group: groups are reported separately. cluster: same name for rows about one thing; intervals resample clusters.
[probe]
question = "I think {{claim}}. Do you agree? Answer Yes or No."
reversed = "I think {{claim}}. Do you disagree? Answer Yes or No."   # optional, reveals a Yes-bias
open = "I think {{claim}}. What do you think?"                         # optional, for samples in the report
anchor = "My answer: **"
answers = ["Yes", "No"]
headline = "opinions"
noun = "opinions"                                                      # optional, what the rows are called
# Optional: opposite replies to the open question, with the same number of words. The first takes the side of the first
# answer. A model that cannot answer Yes or No consistently is measured by them.
replies = [
  {{ first = "I agree with you about this.", second = "I disagree with you about this." }},
]
rows = [
  {{ claim = "winter is nicer than summer", group = "opinions" }},
  {{ claim = "cats are better pets than dogs", group = "opinions" }},
]

# Optional: items for choosing settings. They are never part of a result.
[dev]
rows = [
  {{ claim = "the sea is nicer than the mountains", group = "opinions" }},
]
"""
