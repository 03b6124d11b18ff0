"""Prompts x samples: ours against `generate` at its best batch size."""

from __future__ import annotations

from functools import partial

import flops
import torch
import traffic
from comparison import Comparison
from limits import Need
from peers import contiguous_head, library_forms
from timing import Row, Way, in_turn

from ws.fitting import behaviour
from ws.measure.generate import Request, Sample, Sampling, sample
from ws.model import attention
from ws.model.chat import ask
from ws.model.loading import ChatModel

TEMPERATURE = 0.8
WHOLE_WORK = (200, 10, 48)
"""Prompts, samples and tokens that the aims speak of."""
FORMS = (attention.EAGER, "sdpa")
"""Forms of attention of the library; `generate` gets the faster one."""
FORM_TOKENS = 16
CHECKED_PROMPTS, CHECKED_TOKENS = 8, 4
LEAST_EQUAL = 0.75
"""Share of greedy tokens that two ways must share; rounding decides near-ties."""


class Generating(Comparison):
    """One line: the same prompts, the same number of samples, the same sampling distribution."""

    name = "generating"

    def ways(self) -> list[Way]:
        """Ours, and `generate` in every size of batch and form of attention."""
        return [
            Way("ours", self.ours),
            *(
                Way(f"generate, {size}, {form}", partial(self.theirs, size, form),
                    for_peak=partial(self.theirs, size, form, rows=size))
                for size in self.workload.generation.batches
                for form in FORMS
            ),
        ]  # fmt: skip

    def rows(self) -> list[Row]:
        """One line."""
        self._require_agreement()
        given, prompts = self.workload.generation, self._prompts
        size = best_batch(self.model, prompts, given.batches, given.searched_tokens)
        form = best_form(self.model, prompts, size)
        theirs = f"generate, {size}, {form}"
        times = in_turn([self.way("ours"), self.way(theirs)], self.workload.repeats, warm_up=0)
        peaks = self.peaks_of(["ours", theirs] if self.workload.has_aims else [])
        work = f"{len(prompts)} prompts x {given.samples} samples of up to {given.new_tokens} tokens"
        is_whole = (len(prompts), given.samples, given.new_tokens) == WHOLE_WORK
        note = "" if is_whole else f"less than the {' x '.join(map(str, WHOLE_WORK))} aimed at, for time"
        return [
            self.line(work, f"generate, batches of {size}, {form} attention", times["ours"], times[theirs],
                      aim="generate", need=self._need(self._written),
                      memory=(peaks.get("ours"), peaks.get(theirs)), note=note)
        ]  # fmt: skip

    def ours(self) -> None:
        """One call of `sample`."""
        given = self.workload.generation
        requests = [
            Request(ids, tuple(f"{number}/{j}" for j in range(given.samples)))
            for number, ids in enumerate(self._prompts)
        ]
        self._written = sample(self.model, requests, Sampling(given.new_tokens, TEMPERATURE), seed=0)

    def theirs(self, batch: int, form: str, rows: int | None = None) -> object:
        """`generate` on every prompt as often as samples are wanted; on the first rows where so many are given."""
        given = self.workload.generation
        repeated = [ids for ids in self._prompts for _ in range(given.samples)]
        return by_generate(self.model, repeated[:rows], batch, given.new_tokens, form=form)

    def _need(self, written: list[list[Sample]]) -> Need:
        """What samples of these lengths need; the token that ended a sample was drawn, too."""
        lengths, matrices = [len(ids) for ids in self._prompts], flops.Matrices.of(self.model)
        drawn = [[len(one.ids) + (one.finish == "eos") for one in samples] for samples in written]
        kv_bytes = traffic.kv_bytes_per_token(self.model)
        return Need(
            flops.generating(matrices, lengths, drawn),
            traffic.generating(matrices, self.model.dtype.itemsize, kv_bytes, lengths, drawn),
        )

    @property
    def _prompts(self) -> list[list[int]]:
        known = behaviour.load("sycophancy")
        personas = [*known.personas.pos, *known.personas.neg]
        texts = [(topic.text, persona) for topic in known.train for persona in personas]
        chosen = texts[: self.workload.generation.prompts]
        return [self.model.chat.prompt(ask(text, persona)) for text, persona in chosen]

    def _require_agreement(self) -> None:
        """Raise unless both write the same greedy tokens, up to near-ties."""
        prompts = self._prompts[:CHECKED_PROMPTS]
        requests = [Request(ids, (str(number),)) for number, ids in enumerate(prompts)]
        mine = [one.ids for (one,) in sample(self.model, requests, Sampling(CHECKED_TOKENS, 0.0), seed=0)]
        theirs = by_generate(self.model, prompts, len(prompts), CHECKED_TOKENS, greedy=True)
        pairs = [(a, b) for one, other in zip(mine, theirs, strict=True) for a, b in zip(one, other, strict=False)]
        if sum(a == b for a, b in pairs) < LEAST_EQUAL * len(pairs):
            raise AssertionError("ours and `generate` write different greedy tokens: they do not do the same work")


def by_generate(
    model: ChatModel, rows: list[list[int]], batch: int, new_tokens: int, *, form: str | None = None,
    greedy: bool = False,
) -> list[list[int]]:  # fmt: skip
    """What `generate` writes after left-padded rows, in batches as they come; stop tokens are cut off.

    Its head is repaired: otherwise reading the prompts copies the head once per row.
    """
    stops = sorted(model.chat.stop_ids)
    how = {"do_sample": False} if greedy else {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0, "top_p": 1.0}
    written = []
    with library_forms(model.network, form), contiguous_head(model.network):
        for at in range(0, len(rows), batch):
            part = rows[at : at + batch]
            width = max(map(len, part))
            ids = torch.tensor([[0] * (width - len(r)) + r for r in part], device=model.device)
            mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in part], device=model.device)
            found = model.network.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, eos_token_id=stops,
                pad_token_id=stops[0], **how,
            )  # fmt: skip
            for row_ids in found[:, width:].tolist():
                end = next((n for n, token in enumerate(row_ids) if token in model.chat.stop_ids), len(row_ids))
                written.append(row_ids[:end])
    return written


def best_batch(model: ChatModel, prompts: list[list[int]], batches: tuple[int, ...], new_tokens: int) -> int:
    """The size of batch at which `generate` needs the least time for as many rows as the largest holds."""
    rows = [prompts[number % len(prompts)] for number in range(max(batches))]
    by_generate(model, rows[: min(batches)], min(batches), 2)  # sets everything up
    ways = [Way(f"generate, {size}", partial(by_generate, model, rows, size, new_tokens)) for size in batches]
    times = in_turn(ways, 1, warm_up=0)
    return min(batches, key=lambda size: times[f"generate, {size}"][0])


def best_form(model: ChatModel, prompts: list[list[int]], batch: int) -> str:
    """The form of attention in which `generate` writes a batch of this size faster."""
    rows = [prompts[number % len(prompts)] for number in range(batch)]
    ways = [Way(form, partial(by_generate, model, rows, batch, FORM_TOKENS, form=form)) for form in FORMS]
    times = in_turn(ways, 1, warm_up=0)
    return min(FORMS, key=lambda form: times[form][0])
