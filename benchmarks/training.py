"""Both signs of a rank-r LoRA on the same tokens with the same loss: ours against TRL's SFTTrainer with PEFT."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import flops
import memory
import polars as pl
from comparison import Comparison
from peers import SftPeer
from timing import Row, Way, in_turn, row

from ws import architecture, lower_layers, train
from ws.chat import SupervisedTokens
from ws.models import ChatModel
from ws.train import TrainSettings

SIGNS: tuple[train.Sign, train.Sign] = ("pos", "neg")
TOLERANCE = 0.2
"""Relative difference of the mean training losses up to which two fits count as the same: their rows come in another
order, and a small workload has a dozen steps."""


class Branches:
    """Both branches of one family on one model: by ours and by the peer, from the same tokens."""

    def __init__(self, model: ChatModel, peer: SftPeer, pairs: pl.DataFrame, family: str) -> None:
        self.model, self.peer, self.pairs = model, peer, pairs
        self.chosen: TrainSettings = train.resolve_settings(model, family, {"validation": 0.0})

    @cached_property
    def examples(self) -> dict[str, list[SupervisedTokens]]:
        """Tokens of each sign."""
        return {sign: train.examples(self.model, self.pairs, sign, self.chosen, 0).train for sign in SIGNS}

    @property
    def count(self) -> int:
        """Rows of both signs."""
        return sum(map(len, self.examples.values()))

    def ours(self, *seeds: int) -> float:
        """Fit both under every seed (none given: 0) in one pass; the mean training loss of all steps."""
        lower_layers.forget(self.model)  # a repetition starts from what a first run has
        with tempfile.TemporaryDirectory() as scratch:
            sides = self._sides(seeds or (0,), Path(scratch))
            train.fit_together(self.model, sides, self.chosen)
            return _mean_loss(sides)

    def one_by_one(self) -> float:
        """Fit both, one after the other."""
        lower_layers.forget(self.model)
        with tempfile.TemporaryDirectory() as scratch:
            sides = self._sides((0,), Path(scratch))
            for side in sides:
                train.fit_together(self.model, [side], self.chosen)
            return _mean_loss(sides)

    def _sides(self, seeds: Sequence[int], scratch: Path) -> list[train.Side]:
        return [train.Side(self.pairs, sign, seed, 0, scratch / f"{sign}{seed}") for seed in seeds for sign in SIGNS]

    def theirs(self, seed: int = 0) -> float:
        """The same by the peer."""
        with tempfile.TemporaryDirectory() as scratch:
            losses = [self.peer.fit(self.examples[s], self.chosen, seed, Path(scratch) / s) for s in SIGNS]
        return sum(losses) / len(losses)

    def require_agreement(self, seed: int = 0) -> None:
        """Raise where the two learn differently: then they do not do the same work."""
        ours, theirs = self.ours(seed), self.theirs(seed)
        if abs(ours - theirs) > TOLERANCE * abs(ours):
            raise AssertionError(
                f"{self.chosen.adapter.family}: mean losses {ours:.3f} and {theirs:.3f}: not the same work"
            )


def _mean_loss(sides: Sequence[train.Side]) -> float:
    losses = [pl.read_csv(side.folder / train.LOG_FILE)["loss"].mean() for side in sides]
    return sum(losses) / len(losses)


class Training(Comparison):
    """LoRA, both signs: against the peer, and in one pass against one after the other."""

    name = "training"

    def ways(self) -> list[Way]:
        """Ours in one pass and one by one, and the peer."""
        return [
            Way(memory.LOADED, lambda: self.model),
            Way("ours", self.ours),
            Way("one by one", self.one_by_one),
            Way("trl", self.theirs),
        ]

    def one_by_one(self) -> float:
        """Both fits, one after the other."""
        return self._branches.one_by_one()

    def ours(self) -> float:
        """Both fits."""
        return self._branches.ours()

    def theirs(self) -> float:
        """Both fits by the peer."""
        return self._branches.theirs()

    def rows(self) -> list[Row]:
        """Two lines."""
        branches = self._branches
        branches.require_agreement()
        peers = {"trl": "TRL SFTTrainer + PEFT", "one by one": "ours, one sign after the other"}
        chosen_ways = ["ours", *peers]
        times = in_turn(map(self.way, chosen_ways), self.workload.repeats)
        peaks = self.peaks_of(chosen_ways)
        chosen = branches.chosen
        work = f"pos + neg LoRA, rank {chosen.adapter.rank}, {branches.count} rows, {chosen.epochs} epochs"
        return [
            row(work, peer, self.inputs.size, times["ours"], times[name], flops=self._needed(), peak=self.peak,
                memory=(peaks["ours"], peaks[name]))
            for name, peer in peers.items()
        ]  # fmt: skip

    @cached_property
    def _branches(self) -> Branches:
        # both put their adapter on and take it off again, so one copy serves them in turn
        return Branches(self.model, SftPeer(self.model), self.inputs.pairs, "lora")

    def _needed(self) -> int:
        """Operations of both fits, by `flops.training`."""
        chosen, network = self._branches.chosen, self.model.network
        examples = [one for rows in self._branches.examples.values() for one in rows]
        layers = architecture.layer_slice(self.model.layer_count, *chosen.adapter.layers)
        factors = sum(chosen.adapter.rank * sum(site.shape) for site in architecture.sites(network, layers))
        return flops.training(
            flops.Matrices.of(self.model), layers[0], sum(len(ids) for ids, _ in examples),
            sum(len(ids) - prompt for ids, prompt in examples), factors, chosen.epochs,
        )  # fmt: skip
