"""A replication end to end: the steps of `ws replicate` against `generate`, TRL and PEFT.

Both sample the pairs, fit both adapters, subtract them and score every choice probe at every strength. The whole of
`ws replicate` does more (persona prompts, random controls, side effects of text, samples, alignment, report): no peer
does that work, so its seconds are only a note on the line.
"""

from __future__ import annotations

import statistics
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import aims
import flops
import peft
import polars as pl
import spending
import torch
from comparison import Comparison
from generating import best_batch, by_generate
from limits import Need
from peers import PeftScorer, SftPeer
from scoring import BATCH_SIZES, TOLERANCE
from spending import Spending
from timing import Row, Way, in_turn
from training import Branches

from ws.base.poles import POLES
from ws.edit.condition import Condition, Edit
from ws.fitting import data, train, train_settings
from ws.fitting.behaviour import Behaviour
from ws.fitting.judge import JudgeSettings
from ws.fitting.run_settings import DEFAULT_ALPHAS, Settings
from ws.fitting.stages import Fitting
from ws.fitting.train_settings import TrainSettings
from ws.measure import lower_layers, shared_prefix
from ws.measure.generate import Sampling
from ws.measure.probe import Probe
from ws.measure.score import score
from ws.model import architecture
from ws.model.chat import ask
from ws.runs.replicate import Replication

REPLICATE = "ws replicate"

Scores = dict[str, dict[float, list[float]]]
"""Probe -> strength -> log-ratio of every row."""


class Known(NamedTuple):
    """The settings of a run."""

    behaviour: Behaviour
    sampling: Sampling
    probes: list[Probe]


class EndToEnd(Comparison):
    """One line: the steps that both do; all of `ws replicate` is also timed."""

    name = "pipeline"

    def ways(self) -> list[Way]:
        """Everything, our steps alone, and the peers' steps."""
        return [Way("replicate", self.replicate), Way("steps", self.steps), Way("peers", self.peers)]

    def rows(self) -> list[Row]:
        """One line."""
        scored: dict[str, Scores] = {}
        ways = [
            self.way("replicate"),
            Way("steps", lambda: scored.__setitem__("ours", self.steps())),
            Way("peers", lambda: scored.__setitem__("theirs", self.peers())),
        ]
        _ = self._generate_batch, self._peft_batch  # found untimed, which also sets everything up
        times = in_turn(ways, self.workload.repeats, warm_up=0)
        self._require_agreement(scored["ours"], scored["theirs"])
        peer = f"generate, batches of {self._generate_batch}; TRL + PEFT; PEFT side path, batches of {self._peft_batch}"
        work = f"pairs, two LoRAs, dW, choice probes at {len(DEFAULT_ALPHAS)} alphas"
        whole = statistics.median(times["replicate"])
        found = self.line(
            work, peer, times["steps"], times["peers"], aim="peers", need=self._need(), profile=REPLICATE,
            note=f"all of `ws replicate`: {whole:.3g} s, n={len(times['replicate'])}",
        )  # fmt: skip
        return [found.aiming(*(aims.whole(self.inputs.size, whole) if self.workload.has_aims else ()))]

    def spending(self) -> list[Spending]:
        """All of `ws replicate`, stage by stage, and together; a stage finds the earlier ones done."""
        lower_layers.forget(self.model)
        with tempfile.TemporaryDirectory() as scratch, Replication(self._settings(scratch), self.model) as run:
            stages = {
                "pairs": run.data, "both fits": lambda: [run.train(sign) for sign in POLES], "dW": run.diff,
                "scoring": run.eval, "alignment, samples, report": run.report,
            }  # fmt: skip
            found = [spending.measure(work, f"{REPLICATE}: {name}", self.inputs.size) for name, work in stages.items()]
        return [spending.together(found, REPLICATE), *found]

    # ---------------------------------------------------------------- ways

    def replicate(self) -> object:
        """Every stage on a fresh run folder."""
        lower_layers.forget(self.model)
        with tempfile.TemporaryDirectory() as scratch, Replication(self._settings(scratch), self.model) as run:
            return run.report()

    def steps(self) -> Scores:
        """The stages that the peer has, too; it has no judge."""
        lower_layers.forget(self.model)
        with (
            tempfile.TemporaryDirectory() as scratch,
            Fitting(self._settings(scratch, judge=JudgeSettings("none")), self.model) as run,
        ):
            edit, self._pairs = Edit("d", run.diff()[0]), run.data()
        table = score(self.model, self._known.probes, [Condition.of(edit, alpha) for alpha in DEFAULT_ALPHAS])
        return {
            probe.name: {
                alpha: table.filter(probe=probe.name, metric="logratio", alpha=alpha)["value"].to_list()
                for alpha in DEFAULT_ALPHAS
            }
            for probe in self._known.probes
        }

    def peers(self) -> Scores:
        """The same steps with the tools of others."""
        pairs = self._pairs_by_generate()
        with tempfile.TemporaryDirectory() as scratch:
            for sign in POLES:
                examples = train.examples(self.model, pairs, sign, self._chosen, 0).train
                SftPeer(self.model).fit(examples, self._chosen, 0, Path(scratch) / sign)
            network = peft.PeftModel.from_pretrained(self.model.network, str(Path(scratch) / "pos"), "pos")
            network.load_adapter(str(Path(scratch) / "neg"), "neg")
        network.add_weighted_adapter(["pos", "neg"], [1.0, -1.0], "dw", combination_type="cat")
        network.set_adapter("dw")
        try:
            return self._scored(PeftScorer(network), DEFAULT_ALPHAS, self._peft_batch)
        finally:
            network.unload()

    # ---------------------------------------------------------------- parts

    def _settings(self, scratch: str, **more: Any) -> Settings:
        given = self.workload.pipeline
        assert given is not None
        return Settings(
            model=self.inputs.model, out=Path(scratch), grid=given.grid, rows=given.rows, train={"validation": 0.0},
            fit_dtype="float32", **more,
        )  # fmt: skip

    @cached_property
    def _chosen(self) -> TrainSettings:
        return train_settings.resolve(self.model, "lora", {"validation": 0.0})

    @cached_property
    def _known(self) -> Known:
        with tempfile.TemporaryDirectory() as scratch, Replication(self._settings(scratch), self.model) as run:
            return Known(run.behaviour, run.sampling, [probe for probe in run.probes() if probe.kind == "choice"])

    def _prompts(self, side: int) -> list[list[int]]:
        """The prompt of every cell of the grid, under one side's personas."""
        personas = self._known.behaviour.personas
        said = (personas.pos, personas.neg)[side]
        return [self.model.chat.prompt(ask(cell.topic.text, said[cell.persona])) for cell in self._cells]

    @property
    def _cells(self) -> list[data.Cell]:
        assert self.workload.pipeline is not None
        return data.cells(self._known.behaviour, self.workload.pipeline.grid)

    def _pairs_by_generate(self) -> pl.DataFrame:
        """The grid of the run, sampled with `generate`, flagged alike."""
        topics = [cell.topic for cell in self._cells]
        columns = {"topic": [topic.topic for topic in topics], "prompt": [topic.text for topic in topics]}
        for number, side in enumerate(POLES):
            written = by_generate(
                self.model, self._prompts(number), self._generate_batch, self._known.sampling.max_new_tokens
            )
            columns[f"response_{side}"] = [self.model.chat.decode(ids) for ids in written]
        personas = self._known.behaviour.personas
        return data.with_flags(pl.DataFrame(columns), (personas.pos, personas.neg))

    def _scored(self, scorer: PeftScorer, alphas: tuple[float, ...], batch: int) -> Scores:
        chat, found = self.model.chat, {}
        for probe in self._known.probes:
            tokens = [chat.prompt(one.messages, one.continuation) for one in probe.rows]
            answers = [[i for (i,) in chat.answers(word)] for word in probe.answers]
            scores = scorer.score(tokens, answers, alphas, batch)
            found[probe.name] = {alpha: values.tolist() for alpha, values in scores.items()}
        return found

    def _need(self) -> Need:
        """Operations of all steps, on the pairs that our last run sampled; those that were not kept are left out."""
        matrices, chosen = flops.Matrices.of(self.model), self._chosen
        fits = Branches(self.model, SftPeer(self.model), self._pairs, "lora")
        drawn = [[len(ids) - prompt for ids, prompt in rows] for rows in fits.examples.values()]
        distinct = {tuple(ids) for side in range(len(POLES)) for ids in self._prompts(side)}
        first = architecture.layer_slice(self.model.layer_count, *chosen.adapter.layers)[0]
        probes = [
            [self.model.chat.prompt(one.messages, one.continuation) for one in p.rows] for p in self._known.probes
        ]
        scoring = (
            flops.scoring(matrices, first, shared_prefix.plan(rows).tokens, len(rows), len(DEFAULT_ALPHAS))
            for rows in probes
        )
        sampling = flops.generating(matrices, [len(ids) for ids in distinct], drawn)
        return Need(sampling + fits.need(1).flops + sum(scoring))

    # ---------------------------------------------------------------- the peers' best sizes of batch, found untimed

    @cached_property
    def _generate_batch(self) -> int:
        sizes, length = self.workload.generation.batches, self._known.sampling.max_new_tokens
        return best_batch(self.model, self._prompts(0), sizes, length)

    @cached_property
    def _peft_batch(self) -> int:
        model = self.inputs.load()
        network = peft.PeftModel.from_pretrained(model.network, str(self.inputs.folder / "pos"))
        scorer = PeftScorer(network)
        self._scored(scorer, (1.0,), max(BATCH_SIZES))
        ways = [Way(str(size), lambda size=size: self._scored(scorer, (1.0,), size)) for size in BATCH_SIZES]
        times = in_turn(ways, 1, warm_up=0)
        return min(BATCH_SIZES, key=lambda size: times[str(size)][0])

    def _require_agreement(self, ours: Scores, theirs: Scores) -> None:
        """Raise unless the unedited model has the same scores on both sides: the pairs, hence the rest, are random."""
        for name, strengths in ours.items():
            if strengths.keys() != theirs[name].keys():
                raise AssertionError(f"{name}: other strengths")
            gap = (torch.tensor(strengths[0.0]) - torch.tensor(theirs[name][0.0])).abs().max()
            if float(gap) > TOLERANCE[self.model.dtype]:
                raise AssertionError(f"{name}: the ways disagree by {float(gap):.2g} nats at alpha 0")
