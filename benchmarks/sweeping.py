"""Six adapter families x seeds, both signs each: ours against the same settings, one by one, with TRL and PEFT."""

from __future__ import annotations

from functools import cached_property, partial

from comparison import Comparison
from limits import Need
from peers import SftPeer
from spending import Spending
from timing import Row, Way, seconds
from training import Branches

from ws.measure import lower_layers


class Sweeping(Comparison):
    """One line per family and one for all of them.

    Ours fits one adapter after the other, too, but what the layers below the adapters give for a row is computed once
    per sweep: the first family pays for it. A repetition is a whole sweep.
    """

    name = "sweeping"

    def ways(self) -> list[Way]:
        """The whole sweep by either side."""
        return [Way("ours", self.ours), Way("trl", self.theirs)]

    def spending(self) -> list[Spending]:
        """Nothing: a fit is profiled as training."""
        return []

    def ours(self) -> None:
        """All families and seeds."""
        lower_layers.forget(self.model)
        for branches in self._families.values():
            branches.ours(*self.workload.seeds)

    def theirs(self) -> None:
        """All families and seeds."""
        for branches in self._families.values():
            branches.theirs(*self.workload.seeds)

    def rows(self) -> list[Row]:
        """Every family alone, then their sum."""
        mine: dict[str, list[float]] = {family: [] for family in self._families}
        peers: dict[str, list[float]] = {family: [] for family in self._families}
        seeds, first = self.workload.seeds, next(iter(self._families))
        for branches in self._families.values():
            branches.small.ours(seeds[0])
            branches.small.theirs(seeds[0])
        for _ in range(self.workload.sweeps):
            lower_layers.forget(self.model)
            for family, branches in self._families.items():
                mine[family].append(seconds(partial(branches.ours, *seeds)))
                peers[family].append(seconds(partial(branches.theirs, *seeds)))
        for branches in self._families.values():
            branches.require_agreement(seeds[0])
        needs = {
            family: branches.need(len(seeds), below=family == first) for family, branches in self._families.items()
        }
        of_seeds = f"{self._families[first].count} rows, {len(seeds)} seeds"
        lines = [
            self.line(f"pos + neg {family}, {of_seeds}", "TRL SFTTrainer + PEFT", mine[family], peers[family],
                      aim=None, need=needs[family], profile="training")
            for family in mine
        ]  # fmt: skip
        ours, theirs = ([sum(parts) for parts in zip(*side.values(), strict=True)] for side in (mine, peers))
        work, peer = f"pos + neg of all {len(mine)} families, {of_seeds}", "TRL SFTTrainer + PEFT, one after the other"
        whole = Need(sum(need.flops for need in needs.values()))
        return [*lines, self.line(work, peer, ours, theirs, aim="all", need=whole, profile="training")]

    @cached_property
    def _families(self) -> dict[str, Branches]:
        peer, pairs = SftPeer(self.model), self.inputs.pairs.gather_every(self.workload.sweep_every)
        return {family: Branches(self.model, peer, pairs, family) for family in self.workload.families}
