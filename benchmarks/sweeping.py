"""Six adapter families x seeds, both signs each: ours against the same settings, one by one, with TRL and PEFT."""

from __future__ import annotations

from functools import cached_property

from comparison import Comparison
from peers import SftPeer
from timing import Row, Way, in_turn, row
from training import Branches


class Sweeping(Comparison):
    """One line per family and one for all of them; ours fits all seeds of a family in one pass."""

    name = "sweeping"

    def ways(self) -> list[Way]:
        """The whole sweep by either side."""
        return [Way("ours", self.ours), Way("trl", self.theirs)]

    def ours(self) -> None:
        """All families and seeds."""
        for branches in self._families.values():
            branches.ours(*self.workload.seeds)

    def theirs(self) -> None:
        """All families and seeds."""
        for branches in self._families.values():
            for seed in self.workload.seeds:
                branches.theirs(seed)

    def rows(self) -> list[Row]:
        """Every family alone, then their sum."""
        mine: dict[str, list[float]] = {}
        peers: dict[str, list[float]] = {}
        seeds = self.workload.seeds
        for family, branches in self._families.items():
            branches.require_agreement(seeds[0])  # the first, untimed use of either side as well
            ways = [
                Way("ours", lambda fits=branches: fits.ours(*seeds)),
                Way("trl", lambda fits=branches: [fits.theirs(seed) for seed in seeds]),
            ]
            times = in_turn(ways, 1, warm_up=0)
            mine[family], peers[family] = times["ours"], times["trl"]
        of_seeds = f"{next(iter(self._families.values())).count} rows, {len(seeds)} seeds"
        lines = [
            row(f"pos + neg {family}, {of_seeds}", "TRL SFTTrainer + PEFT", self.inputs.size, mine[family],
                peers[family])
            for family in mine
        ]  # fmt: skip
        totals = [[sum(parts) for parts in zip(*side.values(), strict=True)] for side in (mine, peers)]
        work = f"pos + neg of all {len(mine)} families, {of_seeds}"
        return [*lines, row(work, "TRL SFTTrainer + PEFT, one after the other", self.inputs.size, *totals)]

    @cached_property
    def _families(self) -> dict[str, Branches]:
        peer, pairs = SftPeer(self.model), self.inputs.pairs
        return {family: Branches(self.model, peer, pairs, family) for family in self.workload.families}
