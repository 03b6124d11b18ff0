"""Prompts from which activations are captured: the behaviour's own questions, on rows that no result is made of.

They are the `[dev]` rows of the behaviour file, or, without any, the dev clusters of its probe (`probe.is_dev`). Both
are disjoint from the training prompts and from the reported test rows. Every row is asked as its question and, if the
file has one, as the reversed question, up to the answer anchor. FIT is for estimating bases, EVAL for scoring them; a
cluster is wholly in one of the two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from ws.base.errors import UserError
from ws.fitting.behaviour import Behaviour, ProbeItem
from ws.measure.probe import Probe, ProbeRow, is_dev
from ws.model.chat import ask

FEW_CLUSTERS = 4
"""Fewer clusters cannot be halved in a way that means anything."""


@dataclass(frozen=True)
class Prompts:
    """FIT and EVAL: choice probes with rows of different clusters. `source` says where the rows are from."""

    fit: Probe
    evaluation: Probe
    source: str

    @property
    def counts(self) -> str:
        """How many prompts and clusters there are, for people."""
        halves = [f"{len(one.rows)} prompts in {len(clusters(one))} clusters" for one in (self.fit, self.evaluation)]
        return f"FIT {halves[0]}, EVAL {halves[1]}, from {self.source}"


def clusters(probe: Probe) -> list[str]:
    """The clusters of a probe's rows, in order of appearance."""
    return list(dict.fromkeys(row.cluster or row.row for row in probe.rows))


def of(behaviour: Behaviour) -> Prompts:
    """The prompts of a behaviour; an error if its file has too few dev rows, or trains on one of them."""
    items, source = behaviour.probe.dev, "the [dev] rows"
    if not items:
        items = tuple(item for item in behaviour.probe.items if is_dev(item.cluster))
        source = "the dev clusters of the probe"
    trained = {prompt.text for prompt in behaviour.train}
    if shared := [item.row for item in items if trained & {item.question, item.reversed, item.open_question}]:
        raise UserError(f"{behaviour.name}: dev row {shared[0]!r} is also a training prompt", "Remove it from [dev].")
    order = sorted({item.cluster for item in items}, key=_place)
    if len(order) < FEW_CLUSTERS:
        raise UserError(
            f"{behaviour.name} has {len(order)} dev clusters, but activations are fitted on one half and scored on the "
            "other",
            f"Add at least {FEW_CLUSTERS} rows under [dev] in the behaviour file.",
        )
    first = set(order[: (len(order) + 1) // 2])
    fit = _probe(behaviour, [item for item in items if item.cluster in first])
    evaluation = _probe(behaviour, [item for item in items if item.cluster not in first])
    return Prompts(fit, evaluation, source)


def _probe(behaviour: Behaviour, items: Sequence[ProbeItem]) -> Probe:
    rows = []
    for item in items:
        for number, question in enumerate(filter(None, (item.question, item.reversed))):
            rows.append(ProbeRow(
                f"{item.row}/{number}", tuple(ask(question)), behaviour.probe.anchor, item.cluster, item.group,
                -item.label if number else item.label,
            ))  # fmt: skip
    return Probe(behaviour.name, "choice", tuple(rows), behaviour.probe.answers)


def _place(cluster: str) -> str:
    """A random order of clusters that depends on their names alone."""
    return hashlib.blake2b(f"fit or eval|{cluster}".encode(), digest_size=8).hexdigest()
