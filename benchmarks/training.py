"""Both signs of a rank-r LoRA on the same tokens with the same loss: ours against TRL's SFTTrainer with PEFT."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path

import flops
import polars as pl
from comparison import Comparison
from limits import Need
from peers import SftPeer
from timing import Row, Way, in_turn

from ws.base.poles import POLES
from ws.fitting import train, train_settings
from ws.fitting.train_settings import TrainSettings
from ws.measure import lower_layers
from ws.model import architecture
from ws.model.chat import SupervisedTokens
from ws.model.loading import ChatModel

FEW_PAIRS = 4
LOW_RANK = frozenset({"lora", "dora", "pissa", "delora"})
"""Families whose side path is two thin products."""
TOLERANCE = 0.2
"""Relative difference of the mean training losses up to which two fits count as the same: their rows come in another
order, and a small workload has a dozen steps."""


class Branches:
    """Both branches of one family on one model: by ours and by the peer, from the same tokens."""

    def __init__(
        self, model: ChatModel, peer: SftPeer, pairs: pl.DataFrame, family: str, epochs: int | None = None
    ) -> None:
        self.model, self.peer, self.pairs = model, peer, pairs
        self.chosen: TrainSettings = train_settings.resolve(model, family, {"validation": 0.0, "epochs": epochs})
        self._losses: dict[tuple[str, int], float] = {}

    @cached_property
    def examples(self) -> dict[str, list[SupervisedTokens]]:
        """Tokens of each sign."""
        return {sign: train.examples(self.model, self.pairs, sign, self.chosen, 0).train for sign in POLES}

    @property
    def count(self) -> int:
        """Rows of both signs."""
        return sum(map(len, self.examples.values()))

    @property
    def small(self) -> Branches:
        """One step on a few rows of each sign: what sets a fit up."""
        return Branches(self.model, self.peer, self.pairs.head(FEW_PAIRS), self.chosen.adapter.family, 1)

    def ours(self, *seeds: int) -> None:
        """Fit both under every seed (none given: 0), with the states of lower layers that are known."""
        for seed in seeds or (0,):
            with tempfile.TemporaryDirectory() as scratch:
                folders = [Path(scratch) / sign for sign in POLES]
                for sign, folder in zip(POLES, folders, strict=True):
                    train.fit(self.model, self.pairs, sign, self.chosen, seed=seed, data_seed=0, folder=folder)
                losses = [pl.read_csv(folder / train.LOG_FILE)["loss"].mean() for folder in folders]
            self._losses["ours", seed] = sum(losses) / len(losses)

    def theirs(self, *seeds: int) -> None:
        """The same by the peer, one after the other."""
        for seed in seeds or (0,):
            with tempfile.TemporaryDirectory() as scratch:
                losses = [self.peer.fit(self.examples[s], self.chosen, seed, Path(scratch) / s) for s in POLES]
            self._losses["theirs", seed] = sum(losses) / len(losses)

    def require_agreement(self, seed: int = 0) -> None:
        """Raise if the last fits of the two learned differently: then they do not do the same work."""
        ours, theirs = self._losses["ours", seed], self._losses["theirs", seed]
        if abs(ours - theirs) > TOLERANCE * abs(ours):
            raise AssertionError(
                f"{self.chosen.adapter.family}: mean losses {ours:.3f} and {theirs:.3f}: not the same work"
            )

    def need(self, seeds: int, below: bool = True) -> Need:
        """What both fits under so many seeds need; without `below` the lower layers have been run before.

        A family that is not a sum of thin products has its own operations left out.
        """
        chosen, network = self.chosen, self.model.network
        rows = [one for rows in self.examples.values() for one in rows]
        layers = architecture.layer_slice(self.model.layer_count, *chosen.adapter.layers)
        thin = chosen.adapter.family in LOW_RANK
        factors = sum(chosen.adapter.rank * sum(site.shape) for site in architecture.sites(network, layers) if thin)
        matrices = flops.Matrices.of(self.model)
        tokens, answers = sum(len(ids) for ids, _ in rows), sum(len(ids) - prompt for ids, prompt in rows)
        once = 2 * sum(matrices.layers[: layers[0]]) * tokens
        whole = flops.training(matrices, layers[0], tokens, answers, factors, chosen.epochs)
        return Need(seeds * (whole - once) + (once if below else 0))


class Training(Comparison):
    """LoRA, both signs, one after the other: against the peer."""

    name = "training"

    def ways(self) -> list[Way]:
        """Ours and the peer."""
        return [
            Way("ours", self.ours, partial(self._set_up, Branches.ours)),
            Way("trl", self.theirs, partial(self._set_up, Branches.theirs)),
        ]

    def _set_up(self, fit: Callable[[Branches], None]) -> None:
        fit(self._branches.small)

    def ours(self) -> None:
        """Both fits, from what a first run has."""
        lower_layers.forget(self.model)
        self._branches.ours()

    def theirs(self) -> None:
        """Both fits by the peer."""
        self._branches.theirs()

    def rows(self) -> list[Row]:
        """One line."""
        branches = self._branches
        times = in_turn(map(self.way, ("ours", "trl")), self.workload.repeats)
        branches.require_agreement()
        peaks = self.peaks_of(["ours", "trl"])
        chosen = branches.chosen
        work = f"pos + neg LoRA, rank {chosen.adapter.rank}, {branches.count} rows, {chosen.epochs} epochs"
        return [
            self.line(work, "TRL SFTTrainer + PEFT", times["ours"], times["trl"], aim="trl", need=branches.need(1),
                      memory=(peaks["ours"], peaks["trl"]))
        ]  # fmt: skip

    @cached_property
    def _branches(self) -> Branches:
        # both put their adapter on and take it off again, so one copy serves them in turn
        return Branches(self.model, SftPeer(self.model), self.inputs.pairs, "lora")
