"""Fit one adapter per sign on its own responses, with the persona removed; both in one pass over the frozen base.

The conversation is the plain user prompt and the response; the loss covers the response and its end of turn only.
Tokens of one optimiser step are averaged together, whatever the micro-batches. Topics, not rows, are held out for
validation: rows of one topic are near-copies. Data seed (which responses) and training seed (initialisation and
order) are separate.

Numeric traps: a warm-up as long as the run learns nothing, so it is shortened and said; adapter weights are fp32 also
on a bf16 base, with bf16 autocast around the forward pass.
"""

from __future__ import annotations

import csv
import math
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import polars as pl
import torch
from torch import Tensor, nn

from ws import adapters
from ws.adapters import AdapterSettings, Together
from ws.base import console, settings
from ws.base.errors import UserError
from ws.base.store import atomic_file, atomic_folder, write_json
from ws.measure import lower_layers
from ws.measure.lower_layers import Recording
from ws.model import forward
from ws.model.chat import SupervisedTokens, ask
from ws.model.loading import ChatModel

Sign = Literal["pos", "neg"]
LOG_FILE = "train_log.csv"
RESULT_FILE = "train_result.json"
NOTHING_LEARNED = 0.005
"""Relative fall of the loss below which a run is reported as having learned nothing."""


@dataclass(frozen=True)
class TrainSettings:
    """How to fit an adapter; the defaults are the original's for real models (spec of the replicated work).

    `lr_candidates` are what `--lr auto` tries (none: `LEARNING_RATES` of the family). `validation` is the share of
    topics held out; `micro_tokens` bounds memory and has no effect on results beyond
    rounding.
    """

    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    lr: float = 2e-4
    lr_candidates: tuple[float, ...] = ()
    weight_decay: float = 0.01
    warmup_steps: int = 5
    epochs: int = 1
    batch_size: int = 16
    max_length: int = 512
    validation: float = 0.1
    evaluate_every: int = 10
    clip_norm: float = 1.0
    micro_tokens: int = 4_096

    def __post_init__(self) -> None:
        for name in ("lr", "epochs", "batch_size", "max_length", "evaluate_every", "micro_tokens"):
            if getattr(self, name) <= 0:
                raise UserError(f"training setting {name} is {getattr(self, name)}", "It must be positive.")
        if not 0 <= self.validation < 1:
            raise UserError(f"validation share {self.validation} is not in [0, 1)")


def resolve_settings(model: ChatModel, family: str, given: Mapping[str, Any], behaviour: str = "") -> TrainSettings:
    """Defaults, the model folder's recommendation for the family, that for the behaviour, then what the user gave.

    A folder recommends under `train`, family by family, and under `train_for`, behaviour by behaviour, what is other
    there. None in `given`: not given.
    """
    adapters.require_family(family)
    of_behaviour = model.settings.get("train_for", {}).get(behaviour, {})
    recommended = model.settings.get("train", {}).get(family, {}) | of_behaviour.get(family, {})
    chosen = recommended | {name: value for name, value in given.items() if value is not None}
    adapter_names = {f.name for f in fields(AdapterSettings)}
    of_adapter = {"family": family} | {name: value for name, value in chosen.items() if name in adapter_names}
    of_training = {name: value for name, value in chosen.items() if name not in adapter_names}
    where = f"training settings for {family}"
    adapter = settings.make(AdapterSettings, of_adapter, where)
    return settings.make(TrainSettings, {**of_training, "adapter": adapter}, where)


LEARNING_RATES: dict[str, tuple[float, ...]] = {
    "lora": (1e-4, 2e-4, 5e-4),
    "rslora": (5e-5, 1e-4, 2e-4),
    "dora": (1e-4, 2e-4, 5e-4),
    "pissa": (5e-5, 1e-4, 2e-4),
    "delora": (2e-4, 1e-3, 5e-3),
    "oft": (2e-4, 1e-3, 4e-3),
    "boft": (2e-4, 1e-3, 4e-3),
    "ia3": (1e-3, 3e-3, 1e-2),
}
"""What `--lr auto` tries for real models: one rate for all families makes IA3 and OFT no-ops."""


class Examples(NamedTuple):
    """Tokenised conversations for fitting and for validation, and how many lost their end of turn to truncation."""

    train: list[SupervisedTokens]
    validation: list[SupervisedTokens]
    truncated: int


def examples(model: ChatModel, pairs: pl.DataFrame, sign: Sign, chosen: TrainSettings, seed: int) -> Examples:
    """Kept responses of one side under the plain prompt, split by topic with `seed`."""
    kept = pairs.filter(pl.col(f"keep_{sign}"))
    if kept.is_empty():
        raise UserError(f"no response of the {sign} side is kept", "Lower the judge threshold or check the pairs.")
    topics = sorted(kept["topic"].unique().to_list())
    held_out: set[str] = set()
    if chosen.validation > 0 and len(topics) > 1:
        count = min(len(topics) - 1, max(1, round(chosen.validation * len(topics))))
        held_out = set(random.Random(f"validation/{seed}").sample(topics, count))
    parts: dict[bool, list[SupervisedTokens]] = {False: [], True: []}
    truncated = 0
    for topic, prompt, response in kept.select("topic", "prompt", f"response_{sign}").iter_rows():
        ids, prompt_length = model.chat.supervised(ask(prompt), response)
        if len(ids) > chosen.max_length:
            truncated += 1
            ids = ids[: chosen.max_length]
        if len(ids) <= prompt_length:
            raise UserError(
                f"the prompt {prompt[:40]!r} leaves no room for its response in {chosen.max_length} tokens",
                "Raise --max-length.",
            )
        parts[topic in held_out].append(SupervisedTokens(ids, prompt_length))
    return Examples(parts[False], parts[True], truncated)


class Side(NamedTuple):
    """One adapter to be fitted: on which responses, with which seeds, and the folder it goes to."""

    pairs: pl.DataFrame
    sign: Sign
    seed: int
    data_seed: int
    folder: Path


def fit(
    model: ChatModel,
    pairs: pl.DataFrame,
    sign: Sign,
    chosen: TrainSettings,
    *,
    seed: int,
    data_seed: int,
    folder: Path,
) -> dict[str, Any]:
    """Fit one adapter, save it as a PEFT folder with its curve, and leave the model as it was.

    Returns the result record: losses before and after, steps, trainable parameters, warnings.
    """
    return fit_together(model, [Side(pairs, sign, seed, data_seed, folder)], chosen)[0]


TOGETHER_UP_TO = 50_000_000
"""Parameters up to which a CPU fits several sides in one pass; larger models fill it with one, and need less memory."""


def fit_together(model: ChatModel, sides: Sequence[Side], chosen: TrainSettings) -> list[dict[str, Any]]:
    """Fit several adapters of one family, in one pass over the frozen base where that pays; each as `fit` would alone.

    Every step is a step of every side on its own rows in its own order, with its own loss, clipping and optimiser;
    results differ from separate fits by rounding only. Large models on a CPU (`TOGETHER_UP_TO`), and those in which
    rows cannot be told apart (mixtures of experts), fit the sides one after the other.
    """
    if model.device.type == "cpu" and model.parameter_count > TOGETHER_UP_TO:
        return [result for side in sides for result in _fit_together(model, [side], chosen)]
    try:
        return _fit_together(model, sides, chosen)
    except adapters.NotByRowsError:
        return [result for side in sides for result in _fit_together(model, [side], chosen)]


def _fit_together(model: ChatModel, sides: Sequence[Side], chosen: TrainSettings) -> list[dict[str, Any]]:
    started = time.perf_counter()
    data = [examples(model, side.pairs, side.sign, chosen, side.data_seed) for side in sides]
    # what is found out once per model belongs to the model without adapters
    _ = model.split, model.fingerprint, lower_layers.is_exact(model)
    try:
        with adapters.attach_together(
            model.network, chosen.adapter, model.name, [side.seed for side in sides]
        ) as together:
            branches = [
                Branch(side.sign, rows, parameters, side.seed)
                for side, rows, parameters in zip(sides, data, together.parameters, strict=True)
            ]
            outcomes = optimise(model, branches, chosen, together, first_layer=together.first_layer(model.network))
        # what one pass took is shared out evenly, so that sums over sides stay true
        share = {"seconds": round((time.perf_counter() - started) / len(sides), 3), "fitted_together": len(sides)}
        outcomes = [(log, result | share) for log, result in outcomes]
        for number, (side, (log, result)) in enumerate(zip(sides, outcomes, strict=True)):
            with atomic_folder(side.folder) as temporary:
                together.save(number, temporary)
                _write_log(temporary / LOG_FILE, log)
                write_json(temporary / RESULT_FILE, result | {"settings": asdict(chosen)})
    finally:
        model.network.eval().requires_grad_(False)
    for side, (_, result) in zip(sides, outcomes, strict=True):
        for warning in result["warnings"]:
            console.warn(f"{side.sign}: {warning}")
    return [result for _, result in outcomes]


# -------------------------------------------------------------------- optimisation


Log = list[dict[str, float | None]]
"""One entry per step: step, epoch, loss, eval_loss, lr, grad_norm."""


class Branch(NamedTuple):
    """Rows and the parameters to be fitted on them, which already act on the network; `seed` decides the order."""

    name: str
    data: Examples
    parameters: list[nn.Parameter]
    seed: int


def optimise(
    model: ChatModel, branches: Sequence[Branch], chosen: TrainSettings, together: Together | None = None, *,
    first_layer: int = 0, description: str = "",
) -> list[tuple[Log, dict[str, Any]]]:  # fmt: skip
    """Minimise the response loss of every branch; its curve and its result.

    together: what sends the rows of a branch through its own parameters; a single branch needs none. first_layer: the
    first decoder layer that parameters act on; what lies below runs once for all epochs.
    """
    fits = [_Fit(branch, chosen) for branch in branches]
    _Loop(model, fits, chosen, together, first_layer).run(
        description or "training " + " + ".join(branch.name for branch in branches)
    )
    return [(one.log, one.result()) for one in fits]


class _Fit:
    """One branch under way: its order, its optimiser and schedule, its log."""

    def __init__(self, branch: Branch, chosen: TrainSettings) -> None:
        self.data, self.parameters, self.chosen = branch.data, branch.parameters, chosen
        self.rng = random.Random(f"order/{branch.seed}")
        self.steps = math.ceil(len(self.data.train) / chosen.batch_size) * chosen.epochs
        self.warmup = min(chosen.warmup_steps, max(0, (self.steps - 1) // 2))
        self.optimiser = torch.optim.AdamW(branch.parameters, lr=chosen.lr, weight_decay=chosen.weight_decay)
        self.log: Log = []

    def batches(self) -> Iterator[list[int]]:
        """Indices of training rows, step by step; every epoch in an order of its own."""
        order = list(range(len(self.data.train)))
        for _ in range(self.chosen.epochs):
            self.rng.shuffle(order)
            for start in range(0, len(order), self.chosen.batch_size):
                yield order[start : start + self.chosen.batch_size]
            order.sort()

    def step(self, number: int, loss: float) -> None:
        """Take optimiser step `number` (from 1) on the gradient of `loss` that is there, and log it."""
        if not math.isfinite(loss):
            raise UserError(f"the training loss is {loss} at step {number}", "Lower --lr.")
        lr = self.chosen.lr * self._scale(number - 1)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.chosen.clip_norm))
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.note(number, loss, None, lr, norm)

    def is_due(self, number: int) -> bool:
        """Whether the validation loss is wanted after this step."""
        return number == self.steps or (number < self.steps and number % self.chosen.evaluate_every == 0)

    def note(self, step: int, loss: float | None, validation: float | None, lr: float, norm: float | None) -> None:
        """Append to the log."""
        epoch = round(step * self.chosen.epochs / self.steps, 4)
        self.log.append({"step": step, "epoch": epoch, "loss": loss, "eval_loss": validation, "lr": lr,
                         "grad_norm": norm})  # fmt: skip

    def result(self) -> dict[str, Any]:
        """First and last losses and what is suspicious about them."""
        measure = "eval_loss" if self.data.validation else "loss"
        values = [entry[measure] for entry in self.log if entry[measure] is not None]
        first, last = float(values[0] or 0), float(values[-1] or 0)
        warnings = []
        if self.warmup < self.chosen.warmup_steps:
            warnings.append(f"warm-up shortened from {self.chosen.warmup_steps} to {self.warmup} of {self.steps} steps")
        if last > first * (1 - NOTHING_LEARNED):
            warnings.append(
                f"nothing was learned: {measure} went from {first:.4f} to {last:.4f}; raise --lr or --epochs"
            )
        if self.data.truncated:
            total = len(self.data.train) + len(self.data.validation)
            warnings.append(f"{self.data.truncated} of {total} responses lost their end to max_length")
        return {
            "steps": self.steps,
            "train_rows": len(self.data.train),
            "validation_rows": len(self.data.validation),
            "truncated": self.data.truncated,
            "measure": measure,
            "first_loss": first,
            "last_loss": last,
            "warnings": warnings,
            "trainable_parameters": sum(parameter.numel() for parameter in self.parameters),
        }

    def _scale(self, step: int) -> float:
        """Linear warm-up, then linear decay to zero at the end."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return (self.steps - step) / max(1, self.steps - self.warmup)


class _Row(NamedTuple):
    """A row in a batch: its branch by number, its tokens, and the state with which it enters the first edited layer."""

    branch: int
    tokens: SupervisedTokens
    state: Tensor | None


class _Loop:
    """Steps of all branches side by side over one network."""

    def __init__(
        self, model: ChatModel, fits: Sequence[_Fit], chosen: TrainSettings, together: Together | None,
        first_layer: int,
    ) -> None:  # fmt: skip
        self.model, self.fits, self.chosen, self.together = model, fits, chosen, together
        self.first_layer = first_layer
        self.autocast = model.dtype in (torch.bfloat16, torch.float16)
        self.train = [self._rows(number, one.data.train) for number, one in enumerate(fits)]
        self.validation = [self._rows(number, one.data.validation) for number, one in enumerate(fits)]

    def run(self, description: str) -> None:
        """All steps of all branches; one that has fewer ends earlier."""
        for one, loss in zip(self.fits, self._validation_losses(), strict=True):
            one.note(0, None, loss, 0.0, None)
        orders = [one.batches() for one in self.fits]
        total = max(one.steps for one in self.fits)
        self.model.network.train()
        with console.progress(description, total=total) as bar:
            for number in range(1, total + 1):
                live = [index for index, one in enumerate(self.fits) if number <= one.steps]
                losses = self._backward([self.train[index][row] for index in live for row in next(orders[index])])
                for index in live:
                    self.fits[index].step(number, losses[index])
                if any(one.is_due(number) for one in self.fits):
                    self._validate(number)
                bar.advance(note=" ".join(f"{losses[index]:.3f}" for index in live))
        self.model.network.eval()

    def _rows(self, branch: int, rows: Sequence[SupervisedTokens]) -> list[_Row]:
        with self._precision():
            states = lower_layers.entering(self.model, self.first_layer, [ids for ids, _ in rows]) if rows else None
        return [_Row(branch, one, states[index] if states else None) for index, one in enumerate(rows)]

    def _backward(self, rows: Sequence[_Row]) -> list[float]:
        """Accumulate every branch's gradient of its mean loss per supervised token; the losses by branch."""
        counts = [0] * len(self.fits)
        for row in rows:
            counts[row.branch] += len(row.tokens.ids) - row.tokens.prompt_length
        weights = torch.tensor([1 / count if count else 0.0 for count in counts], device=self.model.device)
        totals = torch.zeros(len(self.fits), device=self.model.device)
        for micro in self._micro(rows):
            losses, owners = self._token_losses(micro)
            weighted = losses * weights[owners]
            weighted.sum().backward()
            totals = totals.index_add(0, owners, weighted.detach())
        return totals.tolist()

    def _validate(self, number: int) -> None:
        """Log the validation losses of the branches for which they are due."""
        for one, loss in zip(self.fits, self._validation_losses(), strict=True):
            if one.is_due(number):
                one.log[-1]["eval_loss"] = loss

    @torch.no_grad()
    def _validation_losses(self) -> list[float | None]:
        was_training = self.model.network.training
        self.model.network.eval()
        sums, counts = torch.zeros(2, len(self.fits), dtype=torch.float64, device=self.model.device)
        for micro in self._micro([row for rows in self.validation for row in rows]):
            losses, owners = self._token_losses(micro)
            sums.index_add_(0, owners, losses.double())
            counts.index_add_(0, owners, torch.ones_like(losses, dtype=torch.float64))
        self.model.network.train(was_training)
        return [float(total / count) if count else None for total, count in zip(sums, counts, strict=True)]

    def _micro(self, rows: Sequence[_Row]) -> list[list[_Row]]:
        plan = forward.plan_batches([len(row.tokens.ids) for row in rows], self.chosen.micro_tokens)
        return [sorted((rows[index] for index in part), key=lambda row: row.branch) for part in plan]

    def _token_losses(self, rows: Sequence[_Row]) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood of every supervised token, fp32, and the branch that it belongs to."""
        device = self.model.device
        texts = [row.tokens for row in rows]
        ids = forward.pad_right([one.ids for one in texts], device)
        counts = torch.tensor([len(one.ids) - one.prompt_length for one in texts])
        numbers = torch.repeat_interleave(torch.arange(len(rows)), counts).to(device)
        columns = torch.cat([torch.arange(one.prompt_length - 1, len(one.ids) - 1) for one in texts]).to(device)
        owners = torch.tensor([row.branch for row in rows], device=device)[numbers]
        of_branch = Counter(row.branch for row in rows)
        with ExitStack() as stack:
            stack.enter_context(self._precision())
            if self.together is not None:
                stack.enter_context(self.together.rows([of_branch[index] for index in range(len(self.fits))]))
            states = [row.state for row in rows if row.state is not None]
            if len(states) == len(rows):
                entered = Recording(self.first_layer, [lower_layers.padded(states)])
                stack.enter_context(lower_layers.playing(self.model.network, entered))
            split, targets = self.model.split, ids[numbers, columns + 1]
            if split.is_split:
                return split.losses(split.hidden(ids)[numbers, columns], targets), owners
            logits = split.logits_at(ids, numbers, columns)
        return nn.functional.cross_entropy(logits, targets, reduction="none"), owners

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.model.device.type, dtype=self.model.dtype) if self.autocast else nullcontext()


def _write_log(path: Path, log: Log) -> None:
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(log[0]))
        writer.writeheader()
        writer.writerows(log)
