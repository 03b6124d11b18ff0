"""Every fast path against the same work without it. Delete a path that pays nowhere.

    python benchmarks/fast_paths.py pocket qwen3-0.6b-shape --out docs/results/fast-paths.json

It counts CPU seconds of one thread, which other work on the machine hardly changes.

In `run.py` it is one more comparison, in seconds on all threads. `aims.unpaid` says which paths pay nowhere.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import shapes
import timing
import torch
import workload
from comparison import Comparison
from inputs import Inputs
from peers import SftPeer
from spending import Spending
from timing import Row, Way
from torch import Tensor, nn
from training import Branches

from ws.base import console
from ws.edit.condition import Condition, Edit
from ws.eval import dilemmas, side_effects
from ws.fitting import behaviour
from ws.measure import lower_layers, sample_cache, shared_prefix
from ws.measure.generate import Request, Sampling, sample
from ws.measure.probe import Probe
from ws.measure.score import score
from ws.model import attention, forward, loading
from ws.model.chat import ask
from ws.model.loading import ChatModel


class FastPaths(Comparison):
    """One line per path and work that it is part of: with it, and without it."""

    name = "paths"
    clock: Callable[[], float] = time.perf_counter
    per_pass: int | None = None
    """Conditions in a pass; None: the default of `score`."""
    reads_prompts_once = True

    def ways(self) -> list[Way]:
        """Every work with every path."""
        return [Way(name, work) for name, work in self._works.items()]

    def spending(self) -> list[Spending]:
        """Nothing: the same work is profiled by the other comparisons."""
        return []

    def rows(self) -> list[Row]:
        """Every path on each of its works, with and without in turn; in half precision and in fp32."""
        return list(self.lines())

    def lines(self) -> Iterator[Row]:
        """The lines, one by one as they are measured."""
        for dtype in dict.fromkeys([self.model.dtype, torch.float32]):
            if dtype != self.model.dtype:
                self.model = loading.load(self.inputs.model, dtype="float32")
            known = set[str]()
            for path in PATHS:
                if dtype == torch.float32 and path.only_half:
                    continue
                for work in path.works:
                    yield self._line(path, work, is_first=work not in known)
                    known.add(work)

    def _line(self, path: FastPath, work: str, *, is_first: bool) -> Row:
        ways = [Way(path.name, self._works[work]), Way(f"without {path.name}", partial(self._without, path, work))]
        repeats, warm_up = self.workload.paths.repeats, int(is_first)  # a work is set up once for all of its paths
        with_it, without_it = timing.in_turn(ways, repeats, warm_up, self.clock).values()
        return timing.row(
            f"{path.name}: {work}", "ours without it", self.inputs.size, with_it, without_it,
            note=str(self.model.dtype).removeprefix("torch."),
        )  # fmt: skip

    def _without(self, path: FastPath, work: str) -> None:
        with path.off(self):
            self._works[work]()

    # ---------------------------------------------------------------- works

    @property
    def _works(self) -> dict[str, Callable[[], object]]:
        return {
            "choices": partial(self._score, "dilemmas"),
            "texts": partial(self._score, "texts"),
            "replies": partial(self._score, "replies"),
            "samples": self._sample,
            "fit": self._fit,
        }

    def _score(self, name: str) -> object:
        given = self.workload.paths
        edit = Edit("d", self.inputs.direction(self.model))
        conditions = [Condition.of(edit, (number + 1) / given.alphas) for number in range(given.alphas)]
        return score(self.model, [self._probes[name]], conditions, per_pass=self.per_pass)

    def _sample(self) -> object:
        given, known = self.workload.paths, behaviour.load("sycophancy")
        persona = known.personas.pos[0]
        prompts = [self.model.chat.prompt(ask(topic.text, persona)) for topic in known.train[: given.prompts]]
        keys = [tuple(f"{number}/{j}" for j in range(given.samples)) for number in range(len(prompts))]
        requests = [Request(ids, names) for ids, names in zip(prompts, keys, strict=True)]
        if not self.reads_prompts_once:
            requests = [Request(request.prompt, (key,)) for request in requests for key in request.keys]
        return sample(self.model, requests, Sampling(given.new_tokens), seed=0)

    def _fit(self) -> None:
        lower_layers.forget(self.model)
        pairs = self.inputs.pairs.head(self.workload.paths.pairs)
        Branches(self.model, SftPeer(self.model), pairs, "lora").ours()

    @cached_property
    def _probes(self) -> dict[str, Probe]:
        rows = self.workload.paths.rows
        whole = {"dilemmas": dilemmas.probe(), "texts": side_effects.neutral()[0], "replies": side_effects.text()}
        return {name: replace(probe, rows=probe.rows[:rows]) for name, probe in whole.items()}


# -------------------------------------------------------------------- the paths


@dataclass(frozen=True)
class FastPath:
    """One fast path, and the works that it is part of. Within `off(comparison)` they are done without it.

    `only_half`: in fp32 there is no such path.
    """

    name: str
    works: tuple[str, ...]
    off: Callable[[FastPaths], AbstractContextManager[Any]]
    only_half: bool = False


@contextmanager
def _library_attention(network: Any) -> Iterator[None]:
    own = network.config._attn_implementation
    network.set_attn_implementation(attention.EAGER if own == attention.GROUPED else own)
    try:
        yield
    finally:
        network.set_attn_implementation(own)


def _all_logits_exact(model: ChatModel) -> Callable[[Tensor], Tensor]:
    return lambda hidden: nn.functional.linear(hidden.float(), model.split.head.weight.float())


def _library_cache(prompts: Any, owners: Tensor, _room: int) -> Any:
    prompts.reorder_cache(owners)
    return prompts


def as_they_come(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """`forward.plan_batches` without the order: rows as they come, at most `token_budget` padded tokens a batch."""
    batches: list[list[int]] = []
    longest = 0
    for index, length in enumerate(lengths):
        if batches and (len(batches[-1]) + 1) * max(longest, length) <= token_budget:
            batches[-1].append(index)
            longest = max(longest, length)
        else:
            batches.append([index])
            longest = length
    return batches


PATHS = (
    FastPath("grouped attention", ("choices", "texts", "samples", "fit"),
             lambda c: _library_attention(c.model.network)),
    FastPath("layers below the edits run once", ("choices", "texts", "fit"),
             lambda c: patch.object(c.model, "cache_memory", 0)),
    FastPath("shared prefixes", ("choices",), lambda _: patch.object(shared_prefix, "worthwhile", lambda *_: None)),
    FastPath("head where it is read", ("choices", "texts", "samples"),
             lambda c: patch.object(c.model.split, "is_split", False)),
    FastPath("fp32 logits of the answers alone", ("choices",),
             lambda c: patch.object(c.model.split, "logits", _all_logits_exact(c.model)), only_half=True),
    FastPath("several Conditions in a pass", ("choices",), lambda c: patch.object(c, "per_pass", 1), only_half=True),
    FastPath("sample cache with room", ("samples", "replies"),
             lambda _: patch.object(sample_cache, "for_samples", _library_cache)),
    FastPath("ended rows leave the batch", ("samples", "replies"),
             lambda _: patch.object(sample_cache, "LEAST_ENDED", 2.0)),
    FastPath("prompts read once for all samples", ("samples",), lambda c: patch.object(c, "reads_prompts_once", False)),
    FastPath("rows batched by length", ("choices", "texts"),
             lambda _: patch.object(forward, "plan_batches", as_they_come)),
)  # fmt: skip
"""Every fast path of the package."""


# -------------------------------------------------------------------- rough figures


STORED = "docs/results/fast-paths.json"
ROUGH = workload.Paths(rows=96, alphas=3, prompts=8, samples=8, new_tokens=32, pairs=32, repeats=3)
SMALL = workload.Paths(rows=8, alphas=3, prompts=2, samples=8, new_tokens=8, pairs=4, repeats=1)
"""Less work on small models and on shapes. The directions are random: a path saves as much on them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--out", type=Path, help="JSON file that the ratios are added to, such as " + STORED)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with console.quiet(), tempfile.TemporaryDirectory() as scratch:
        for name in given.models:
            folder = Path(scratch) / f"inputs-{name}"
            folder.mkdir()
            chosen = replace(workload.choose(name, False), grid=None, written=ROUGH.pairs)
            chosen = replace(chosen, paths=SMALL if name in shapes.SHAPES else ROUGH)
            comparison = FastPaths(Inputs.make(name, chosen, folder))
            comparison.clock = time.process_time
            for line in comparison.lines():
                sys.stdout.write(f"{line.ratio:5.2f}  {line.size}, {line.note}  {line.work}\n")
                sys.stdout.flush()
                if given.out:
                    _keep(given.out, line)


def _keep(file: Path, line: Row) -> None:
    """Put a ratio into the file, in the place of an earlier one of the same path, work and size."""
    path, _, work = line.work.partition(": ")
    known = json.loads(file.read_text()) if file.is_file() else []
    record = {"path": path, "work": work, "size": f"{line.size}, {line.note}", "ratio": round(line.ratio, 3)}
    same = ("path", "work", "size")
    others = [one for one in known if any(one[key] != record[key] for key in same)]
    file.write_text(json.dumps([*others, record], indent=1) + "\n")


if __name__ == "__main__":
    main()
