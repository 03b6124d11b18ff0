"""Seven strengths of one direction on the dilemma probe: ours, the replicated work's way, and PEFT."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import flops
import memory
import peft
import torch
from aims import Aim
from comparison import Comparison
from limits import Need
from peers import PeftScorer, left_padded, library_forms, log_ratios
from timing import Row, Way, in_turn, seconds
from torch import Tensor

from ws.edit.condition import Condition, Edit
from ws.eval import dilemmas
from ws.export import write_peft
from ws.measure import rounding, shared_prefix
from ws.measure.probe import Probe
from ws.measure.score import score
from ws.model.chat import Chat
from ws.model.loading import ChatModel

ALPHAS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
FEW_ALPHAS = (0.0, 1.0)
"""Strengths that show how much memory a peer takes: it keeps nothing between strengths."""
BATCH_SIZES = (8, 16, 32, 64)
TOLERANCE = {torch.float32: 5e-2, torch.bfloat16: 0.5}
"""Nats by which two ways may differ in a row; bf16 rounds the changed weights themselves."""

Ratios = dict[float, Tensor]
"""Strength -> log-ratio of every row."""


class Scoring(Comparison):
    """Ways of computing the same log-ratios."""

    name = "scoring"

    def ways(self) -> list[Way]:
        """Ours with and without shared prefixes, weights in place, and PEFT in every size of batch."""
        return [
            Way(memory.LOADED, lambda: self.model),
            Way("ours", self.ours),
            Way("rows", self.without_tree),
            Way("in place", self.in_place, for_peak=partial(self.in_place, alphas=FEW_ALPHAS)),
            *(self._peft_way(size) for size in BATCH_SIZES),
        ]

    def rows(self) -> list[Row]:
        """Lines of the table."""
        few = self.workload.checked_rows
        ours = self.ours(few)  # what is checked is the warm-up of every way as well
        self.without_tree(few)
        self._agree(ours, self.in_place(few))
        self._agree(ours, self.with_peft(BATCH_SIZES[0], few))
        size = min(BATCH_SIZES, key=self._seconds_with)
        chosen = ["ours", "rows", "in place", f"peft, {size}"]
        times = in_turn(map(self.way, chosen), self.workload.repeats, warm_up=0)
        peaks: dict[str, float] = self.peaks_of(["ours", "in place", f"peft, {size}"])
        as_it_is = f"peft as it is, {size}"
        times[as_it_is] = [self._seconds_as_it_is(size)]
        tree = shared_prefix.plan(self.tokens)
        peers = {
            "in place": ("in place", "weights changed in place, left-padded batches of 8, all logits"),
            f"peft, {size}": ("peft", f"PEFT side path, sorted, batches of {size}, one logit row"),
            as_it_is: (None, "the same, the head fed as `logits_to_keep=1` slices it (one strength, times 7)"),
            "rows": (None, "ours without shared prefixes"),
        }
        lines = [
            self.line(f"{len(ALPHAS)} alphas x {len(self.tokens)} dilemma rows", peer, times["ours"], times[name],
                      aim=aim, memory=(peaks["ours"], peaks.get(name)), need=self._need(tree.tokens),
                      note=f"the tree saves {100 * tree.saving:.0f} % of the tokens" if name == "in place" else "")
            for name, (aim, peer) in peers.items()
        ]  # fmt: skip
        return [self._with_rounding(lines[0]), *lines[1:]]

    # ---------------------------------------------------------------- ways

    def ours(self, rows: int | None = None) -> Ratios:
        """One call of `score` on the first rows (None: all)."""
        probe = replace(self._probe, rows=self._probe.rows[:rows])
        table = score(self.model, [probe], [Condition.of(self._edit, alpha) for alpha in ALPHAS])
        ratios = table.filter(metric="logratio")
        return {alpha: torch.tensor(ratios.filter(alpha=alpha)["value"].to_list()) for alpha in ALPHAS}

    def without_tree(self, rows: int | None = None) -> Ratios:
        """The same with whole rows."""
        kept, shared_prefix.worthwhile = shared_prefix.worthwhile, lambda *_: None
        try:
            return self.ours(rows)
        finally:
            shared_prefix.worthwhile = kept

    @torch.no_grad()
    def in_place(self, rows: int | None = None, alphas: Sequence[float] = ALPHAS) -> Ratios:
        """The replicated work's way: add alpha dW to the weights, batches of 8 as they come, logits everywhere."""
        network, dense = self._plain.network, self._dense
        parameters = dict(network.named_parameters())
        with library_forms(network):
            return {alpha: self._at(alpha, self.tokens[:rows], network, parameters, dense) for alpha in alphas}

    def _at(
        self, alpha: float, tokens: Sequence[list[int]], network: Any, parameters: Mapping[str, Tensor],
        dense: Mapping[str, Tensor],
    ) -> Tensor:  # fmt: skip
        backup = {name: parameters[name].data.clone() for name in dense}
        for name, change in dense.items():
            parameters[name].data.add_((alpha * change).to(parameters[name].dtype))
        parts = [
            log_ratios(network(**left_padded(tokens[at : at + 8], network.device)).logits[:, -1], self._answers)
            for at in range(0, len(tokens), 8)
        ]
        for name, values in backup.items():
            parameters[name].data.copy_(values)
        return torch.cat(parts).cpu()

    def with_peft(
        self, batch: int, rows: int | None = None, alphas: Sequence[float] = ALPHAS, repaired: bool = True
    ) -> Ratios:
        """PEFT's side path in batches of one size."""
        return self._peft.score(self.tokens[:rows], self._answers, alphas, batch, repaired)

    def _peft_way(self, batch: int) -> Way:
        work = partial(self.with_peft, batch)
        return Way(f"peft, {batch}", work, for_peak=partial(work, alphas=FEW_ALPHAS))

    def _seconds_with(self, batch: int) -> float:
        """One strength on all rows."""
        return seconds(partial(self.with_peft, batch, alphas=(1.0,)))

    def _seconds_as_it_is(self, batch: int) -> float:
        """Of all strengths, from one: they cost alike, and all can take as long as the other ways many times over."""
        return len(ALPHAS) * seconds(partial(self.with_peft, batch, alphas=(1.0,), repaired=False))

    # ---------------------------------------------------------------- what is said beside the times

    def _need(self, tokens: int) -> Need:
        first = self._edit.effect.layer_numbers[0]
        matrices = flops.Matrices.of(self.model)
        return Need(flops.scoring(matrices, first, tokens, len(self.tokens), len(ALPHAS)))

    def _with_rounding(self, line: Row) -> Row:
        """The line with what the model's half precision does to the probe, and whether that is little enough."""
        found = rounding.measure(self.model, self._probe)
        if found is None:
            return line
        errors = f"mean shift {found.mean_shift:.2g}, p95 {found.p95:.2g} nats"
        note = f"{line.note}; {found.dtype} against float32 on {found.rows} rows: {errors}"
        return replace(line, note=note).aiming(
            Aim("mean shift, nats", rounding.LARGEST_SHIFT, found.mean_shift, at_least=False),
            Aim("p95 row error, nats", rounding.LARGEST_P95, found.p95, at_least=False),
        )

    # ---------------------------------------------------------------- what they need

    @cached_property
    def _probe(self) -> Probe:
        whole = dilemmas.probe()
        return Probe(whole.name, whole.kind, whole.rows[: self.workload.scoring_rows])

    @cached_property
    def _edit(self) -> Edit:
        return Edit("d", self.inputs.direction(self.model))

    @cached_property
    def _copies(self) -> list[ChatModel]:
        return []

    @cached_property
    def _plain(self) -> ChatModel:
        return self._copy()

    @cached_property
    def _dense(self) -> dict[str, Tensor]:
        direction = self.inputs.direction(self._plain)
        parameters = dict(self._plain.network.named_parameters())
        return {name: direction.materialise(name).reshape(parameters[name].shape) for name in direction.deltas}

    @cached_property
    def _peft(self) -> PeftScorer:
        model = self._copy()
        with tempfile.TemporaryDirectory() as scratch:
            write_peft(self.inputs.direction(model), model.network, Path(scratch), alpha=1.0)
            # on a bf16 model its factors may be bf16 too: several times faster than the fp32 that it takes by itself
            network = peft.PeftModel.from_pretrained(model.network, scratch, autocast_adapter_dtype=False)
            return PeftScorer(network)

    @cached_property
    def tokens(self) -> list[list[int]]:
        """Every row of the probe as token ids."""
        return [self._chat.prompt(one.messages, one.continuation) for one in self._probe.rows]

    @cached_property
    def _answers(self) -> list[list[int]]:
        return [[i for (i,) in self._chat.answers(word)] for word in ("Yes", "No")]

    @property
    def _chat(self) -> Chat:
        """That of any copy of the model that is there: another copy, only to render text, would count as memory."""
        return self._copies[0].chat if self._copies else self.model.chat

    def _copy(self) -> ChatModel:
        self._copies.append(self.inputs.load())
        return self._copies[-1]

    def _agree(self, ours: Ratios, theirs: Ratios) -> None:
        worst = max(float((ours[alpha] - theirs[alpha]).abs().max()) for alpha in ALPHAS)
        if worst > TOLERANCE[self.model.dtype]:
            raise AssertionError(f"the ways disagree by {worst:.2g} nats: they do not do the same work")
