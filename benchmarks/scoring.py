"""Seven strengths of one direction on the dilemma probe: ours, the replicated work's way, and PEFT."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import flops
import memory
import peft
import torch
from comparison import Comparison
from peers import PeftScorer, left_padded, library_forms, log_ratios
from timing import Row, Way, in_turn, row
from torch import Tensor

from ws import shared_prefix
from ws.chat import Chat
from ws.condition import Condition, Edit
from ws.eval import dilemmas
from ws.export import write_peft
from ws.models import ChatModel
from ws.probe import Probe
from ws.score import score

ALPHAS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
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
            Way("in place", self.in_place),
            *(Way(f"peft, {size}", partial(self.with_peft, size)) for size in BATCH_SIZES),
            *(Way(f"peft as it is, {size}", partial(self.with_peft, size, repaired=False)) for size in BATCH_SIZES),
        ]

    def rows(self) -> list[Row]:
        """Lines of the table."""
        ours = self.ours()
        self._agree(ours, self.in_place())
        size = min(BATCH_SIZES, key=self._seconds_with)
        self._agree(ours, self.with_peft(size))
        chosen = ["ours", "rows", "in place", f"peft, {size}"]
        times = in_turn(map(self.way, chosen), self.workload.repeats, warm_up=0)
        peaks: dict[str, float | None] = dict(self.peaks_of(chosen))
        as_it_is = f"peft as it is, {size}"  # once: it can take many times as long as all others together
        times[as_it_is] = in_turn([self.way(as_it_is)], 1, warm_up=0)[as_it_is]
        peaks[as_it_is] = None
        tree = shared_prefix.plan(self.tokens)
        first = self._edit.effect.layer_numbers[0]
        needed = flops.scoring(flops.Matrices.of(self.model), first, tree.tokens, len(self.tokens), len(ALPHAS))
        peers = {
            "in place": "weights changed in place, left-padded batches of 8, all logits",
            f"peft, {size}": f"PEFT side path, sorted, batches of {size}, one logit row",
            as_it_is: "the same, the head fed as `logits_to_keep=1` slices it (timed once)",
            "rows": "ours without shared prefixes",
        }
        return [
            row(f"{len(ALPHAS)} alphas x {len(self.tokens)} dilemma rows", peer, self.inputs.size, times["ours"],
                times[name], memory=(peaks["ours"], peaks[name]), flops=needed, peak=self.peak,
                note=f"the tree saves {100 * tree.saving:.0f} % of the tokens" if name == "in place" else "")
            for name, peer in peers.items()
        ]  # fmt: skip

    # ---------------------------------------------------------------- ways

    def ours(self) -> Ratios:
        """One call of `score`."""
        table = score(self.model, [self._probe], [Condition.of(self._edit, alpha) for alpha in ALPHAS])
        ratios = table.filter(metric="logratio")
        return {alpha: torch.tensor(ratios.filter(alpha=alpha)["value"].to_list()) for alpha in ALPHAS}

    def without_tree(self) -> Ratios:
        """The same with whole rows."""
        kept, shared_prefix.worthwhile = shared_prefix.worthwhile, lambda *_: None
        try:
            return self.ours()
        finally:
            shared_prefix.worthwhile = kept

    @torch.no_grad()
    def in_place(self) -> Ratios:
        """The replicated work's way: add alpha dW to the weights, batches of 8 as they come, logits everywhere."""
        network, dense = self._plain.network, self._dense
        parameters = dict(network.named_parameters())
        with library_forms(network):
            return {alpha: self._at(alpha, network, parameters, dense) for alpha in ALPHAS}

    def _at(
        self, alpha: float, network: Any, parameters: Mapping[str, Tensor], dense: Mapping[str, Tensor]
    ) -> Tensor:  # fmt: skip
        backup = {name: parameters[name].data.clone() for name in dense}
        for name, change in dense.items():
            parameters[name].data.add_((alpha * change).to(parameters[name].dtype))
        parts = [
            log_ratios(network(**left_padded(self.tokens[at : at + 8])).logits[:, -1], self._answers)
            for at in range(0, len(self.tokens), 8)
        ]
        for name, values in backup.items():
            parameters[name].data.copy_(values)
        return torch.cat(parts)

    def with_peft(self, batch: int, alphas: tuple[float, ...] = ALPHAS, repaired: bool = True) -> Ratios:
        """PEFT's side path in batches of one size."""
        return self._peft.score(self.tokens, self._answers, alphas, batch, repaired)

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
        """That of any copy of the model that is there: one more, only to render text, would count as memory."""
        return self._copies[0].chat if self._copies else self.model.chat

    def _copy(self) -> ChatModel:
        self._copies.append(self.inputs.load())
        return self._copies[-1]

    def _seconds_with(self, batch: int) -> float:
        return in_turn([Way("peft", lambda: self.with_peft(batch, (1.0,)))], 1)["peft"][0]

    def _agree(self, ours: Ratios, theirs: Ratios) -> None:
        worst = max(float((ours[alpha] - theirs[alpha]).abs().max()) for alpha in ALPHAS)
        if worst > TOLERANCE[self.model.dtype]:
            raise AssertionError(f"the ways disagree by {worst:.2g} nats: they do not do the same work")
