"""Directions of activation steering from the personas: ours against steering-vectors and repeng, same rows and layers.

The mean difference is the default of steering-vectors. repeng's "pca_center", the first component of both sides around
the middle of their pair, is the method of its that has an equal here. Both peers must give our vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import flops
import peer_vectors
import torch
from comparison import Comparison
from limits import Need
from spending import Spending, measure
from timing import Row, Way, in_turn

from ws.baselines import repe
from ws.baselines.repe import RepeSettings
from ws.fitting import behaviour
from ws.fitting.behaviour import Behaviour
from ws.model import architecture

LEAST_COSINE = {torch.float32: 0.9999, torch.bfloat16: 0.99}
"""Below this a peer's vector is another direction than ours."""


class Activations(Comparison):
    """Two lines, each from the loaded model to a vector per layer of the default slice."""

    name = "activations"

    def ways(self) -> list[Way]:
        """Our mean difference and component, and the peer of each."""
        return [
            Way("mean", lambda: self.ours("mean")), Way("component", lambda: self.ours("pca_center")),
            Way("steering-vectors", self.steering_vectors), Way("repeng", self.repeng),
        ]  # fmt: skip

    def rows(self) -> list[Row]:
        """Two lines."""
        peers = {"mean": self.steering_vectors(), "component": self.repeng()}
        ours = {"mean": self.ours("mean"), "component": self.ours("pca_center")}
        least = {name: self._least_cosine(peers[name], ours[name]) for name in ours}
        times = in_turn(self.ways(), self.workload.repeats, warm_up=0)  # all of them have run above
        peaks = self.peaks_of([way.name for way in self.ways()] if self.workload.has_aims else [])
        rows = f"{2 * len(self._pairs)} prompts, {len(self._layers)} layers"
        return [
            self.line(
                f"{work}, {rows}", peer, times[mine], times[theirs], aim=theirs, need=self._need(),
                memory=(peaks.get(mine), peaks.get(theirs)), note=f"least cosine of the two {least[mine]:.5f}",
            )
            for work, peer, mine, theirs in (
                ("mean difference of the personas", "steering-vectors", "mean", "steering-vectors"),
                ("first component of the personas", "repeng, pca_center", "component", "repeng"),
            )
        ]  # fmt: skip

    def spending(self) -> list[Spending]:
        """Our mean difference."""
        return [measure(lambda: self.ours("mean"), self.name, self.inputs.size)]

    def ours(self, estimator: repe.Estimator) -> Mapping[int, Any]:
        """One forward pass over rows of similar length, all layers at once."""
        return repe.fit(self.model, self._behaviour, RepeSettings(estimator=estimator)).vectors

    def steering_vectors(self) -> Mapping[int, Any]:
        """Its own loop, one pair at a time as it is by default."""
        found = peer_vectors.train_steering_vectors(self.model, self._pairs, layers=self._layers)
        return dict(found.layer_activations)

    def repeng(self) -> Mapping[int, Any]:
        """Its own batches of 32; it runs the head and keeps all hidden states."""
        found = peer_vectors.train_repeng(self.model, self._pairs, hidden_layers=self._layers, method="pca_center")
        return dict(found.directions)

    @cached_property
    def _behaviour(self) -> Behaviour:
        return behaviour.load(self.inputs.behaviour)

    @cached_property
    def _pairs(self) -> list[tuple[str, str]]:
        return peer_vectors.rendered_pairs(self.model, self._behaviour)

    @property
    def _layers(self) -> list[int]:
        return list(architecture.layer_slice(self.model.layer_count))

    def _least_cosine(self, theirs: Mapping[int, Any], ours: Mapping[int, Any]) -> float:
        """The least over layers; raise where the two are not the same work."""
        if sorted(theirs) != sorted(ours):
            raise AssertionError("the ways read different layers")
        least = min(peer_vectors.cosines(theirs, ours).values())
        if least < LEAST_COSINE[self.model.dtype]:
            raise AssertionError(f"the vectors of a layer have the cosine {least:.4f}")
        return least

    def _need(self) -> Need:
        """Every token through the layers up to the last one that is read."""
        tokens = sum(len(self.model.chat.tokenizer(text, add_special_tokens=False)["input_ids"])
                     for pair in self._pairs for text in pair)  # fmt: skip
        return Need(2 * sum(flops.Matrices.of(self.model).layers[: self._layers[-1] + 1]) * tokens)
