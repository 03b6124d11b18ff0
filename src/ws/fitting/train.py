"""Fit one adapter on the responses of one side, with the persona removed.

The conversation is the plain user prompt and the response; the loss covers only the response and its end of turn. It is
averaged over all tokens of an optimiser step, regardless of micro-batches. Whole topics are held out for validation,
because rows of one topic are near-copies. The data seed (which responses) and the training seed (initialisation and
order) are separate.

Numeric traps: a run that is all warm-up learns nothing, so the warm-up is shortened, with a warning. Adapter weights
are fp32 even on a half-precision base, with autocast around the forward pass. Gradients in fp16 underflow, so an fp16
base is trained with a scaled loss.
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import polars as pl
import torch
from torch import Tensor, nn

from ws import adapters
from ws.adapters import AdapterSettings
from ws.base import console, memory, settings
from ws.base.errors import UserError
from ws.base.files import atomic_file, atomic_folder, read_json, write_json
from ws.base.poles import Pole
from ws.fitting.train_settings import TrainSettings
from ws.measure import lower_layers
from ws.measure.lower_layers import Recording
from ws.model import forward
from ws.model.chat import SupervisedTokens, ask
from ws.model.loading import ChatModel
from ws.model.restore import restored

LOG_FILE = "train_log.csv"
"""One line per optimiser step, in the folder of the adapter."""
RESULT_FILE = "train_result.json"
"""The FitResult, in the folder of the adapter."""
NOTHING_LEARNED = 0.005
"""If the loss falls by less than this share, a warning says that nothing was learned."""


class DivergedError(UserError):
    """The loss or the gradient of a fit is not finite."""


class Examples(NamedTuple):
    """Tokenised conversations for fitting and for validation, and how many were truncated to `max_length`."""

    train: list[SupervisedTokens]
    validation: list[SupervisedTokens]
    truncated: int


def examples(model: ChatModel, pairs: pl.DataFrame, pole: Pole, chosen: TrainSettings, seed: int) -> Examples:
    """The kept responses of one side after the plain prompt, split by topic with `seed`."""
    kept = pairs.filter(pl.col(f"keep_{pole}"))
    if kept.is_empty():
        raise UserError(
            f"no response of the {pole} side is kept: the judge or the checks rejected all of them",
            "Look at the flags and scores in pairs.parquet; change --judge or --judge-threshold.",
        )
    topics = sorted(kept["topic"].unique().to_list())
    held_out: set[str] = set()
    if chosen.validation > 0 and len(topics) > 1:
        count = min(len(topics) - 1, max(1, round(chosen.validation * len(topics))))
        held_out = set(random.Random(f"validation/{seed}").sample(topics, count))
    parts: dict[bool, list[SupervisedTokens]] = {False: [], True: []}
    truncated = 0
    for topic, prompt, response in kept.select("topic", "prompt", f"response_{pole}").iter_rows():
        ids, prompt_length = model.chat.supervised(ask(prompt), response)
        if len(ids) > chosen.max_length:
            truncated += 1
            ids = ids[: chosen.max_length]
        if len(ids) <= prompt_length:
            raise UserError(
                f"the prompt {prompt[:40]!r} leaves no room for its response within {chosen.max_length} tokens",
                "Raise --max-length.",
            )
        parts[topic in held_out].append(SupervisedTokens(ids, prompt_length))
    return Examples(parts[False], parts[True], truncated)


# -------------------------------------------------------------------- results


@dataclass(frozen=True)
class Step:
    """One line of the log; step 0 has the validation loss of the base. `epoch` is fractional; None: not measured."""

    step: int
    epoch: float
    loss: float | None
    eval_loss: float | None
    lr: float
    grad_norm: float | None


Log = Sequence[Step]


@dataclass(frozen=True)
class FitResult:
    """The result of a fit, as stored in `train_result.json`.

    measure    "eval_loss": the loss on held-out topics before the first and after the last step. Without held-out
               topics "loss": the mean training loss over the first and over the last steps (see `_first_and_last`)
    skipped    optimiser steps that were skipped because a scaled fp16 gradient overflowed
    """

    steps: int
    train_rows: int
    validation_rows: int
    truncated: int
    measure: Literal["eval_loss", "loss"]
    first_loss: float
    last_loss: float
    skipped: int
    warnings: tuple[str, ...]
    trainable_parameters: int
    settings: TrainSettings

    @classmethod
    def read(cls, folder: Path) -> FitResult:
        """Read the result from the folder of an adapter."""
        path = folder / RESULT_FILE
        stored = read_json(path)
        training = stored["settings"]
        adapter = settings.make(AdapterSettings, training["adapter"], str(path))
        chosen = settings.make(TrainSettings, {**training, "adapter": adapter}, str(path))
        known = {one.name: stored[one.name] for one in fields(cls) if one.name in stored}
        return cls(**{"skipped": 0, **known, "warnings": tuple(stored["warnings"]), "settings": chosen})


def fit(
    model: ChatModel,
    pairs: pl.DataFrame,
    pole: Pole,
    chosen: TrainSettings,
    *,
    seed: int,
    data_seed: int,
    folder: Path,
) -> FitResult:
    """Fit one adapter, save it as a PEFT folder with its log and result, and leave the model as it was."""
    data = examples(model, pairs, pole, chosen, data_seed)
    with restored(model.network), ExitStack() as stack:
        model.network.eval()
        # the checks that run once per model must see it without adapters
        _ = model.split, model.fingerprint, lower_layers.is_exact(model)
        torch.manual_seed(seed)
        attached = adapters.attach(model.network, chosen.adapter, model.name)
        stack.callback(attached.detach)
        log, result = optimise(
            model, data, attached.trainable, chosen, seed=seed, first_layer=attached.first_layer,
            description=f"training {pole}",
        )  # fmt: skip
        with atomic_folder(folder) as temporary:
            attached.save(temporary)
            _write_log(temporary / LOG_FILE, log)
            write_json(temporary / RESULT_FILE, result)
    for warning in result.warnings:
        console.warn(f"{pole}: {warning}")
    return result


# -------------------------------------------------------------------- optimisation


def optimise(
    model: ChatModel, data: Examples, parameters: Sequence[nn.Parameter], chosen: TrainSettings, *,
    seed: int, first_layer: int = 0, description: str = "training",
) -> tuple[Log, FitResult]:  # fmt: skip
    """Minimise the response loss over parameters that are already attached; `seed` decides the order of the rows.

    first_layer: the first decoder layer that the parameters act on; the layers below run once for all epochs. Leaves
    the network in evaluation mode.
    """
    one = _Fit(model, data, parameters, chosen, seed, first_layer)
    try:
        one.run(description)
    finally:
        model.network.eval()
    return one.log, one.result()


class _Row(NamedTuple):
    """The tokens of a row, and the state with which it enters the first edited layer, if that is stored."""

    tokens: SupervisedTokens
    state: Tensor | None


class _Fit:
    """A fit under way."""

    def __init__(
        self, model: ChatModel, data: Examples, parameters: Sequence[nn.Parameter], chosen: TrainSettings, seed: int,
        first_layer: int,
    ) -> None:  # fmt: skip
        self.model, self.data, self.parameters, self.chosen = model, data, parameters, chosen
        self.first_layer, self.micro_tokens = first_layer, chosen.micro_tokens
        self.order = random.Random(f"order/{seed}")
        self.steps_per_epoch = math.ceil(len(data.train) / chosen.batch_size)
        self.steps = self.steps_per_epoch * chosen.epochs
        self.warmup = min(chosen.warmup_steps, max(0, (self.steps - 1) // 2))
        self.optimiser = torch.optim.AdamW(parameters, lr=chosen.lr, weight_decay=chosen.weight_decay)
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=model.dtype == torch.float16)
        self.log: list[Step] = []
        self.train, self.validation = self._rows(data.train), self._rows(data.validation)

    def run(self, description: str) -> None:
        """Run all steps and the scheduled validations."""
        self.log.append(Step(0, 0.0, None, self._validation_loss(0), 0.0, None))
        self.model.network.train()
        with console.progress(description, total=self.steps) as bar:
            for number, indices in enumerate(self._batches(), start=1):
                loss = self._backward([self.train[index] for index in indices])
                lr = self.chosen.lr * self._scale(number - 1)
                norm = self._step(number, loss, lr)
                is_due = number == self.steps or number % self.chosen.evaluate_every == 0
                validation = self._validation_loss(number) if is_due else None
                epoch = round(number * self.chosen.epochs / self.steps, 4)
                self.log.append(Step(number, epoch, loss, validation, lr, norm))
                bar.advance(note=f"{loss:.3f}")

    def result(self) -> FitResult:
        """First and last losses, and warnings about the run."""
        data, warnings = self.data, []
        first, last = self._first_and_last()
        skipped = sum(step.grad_norm is not None and not math.isfinite(step.grad_norm) for step in self.log)
        if self.warmup < self.chosen.warmup_steps:
            warnings.append(f"warm-up shortened from {self.chosen.warmup_steps} to {self.warmup} of {self.steps} steps")
        if not data.validation and self.steps == 1:
            warnings.append("training had one step and no held-out topics, so learning cannot be measured")
        elif last > first * (1 - NOTHING_LEARNED):
            where = "eval_loss" if data.validation else "loss"
            remedy = "raise --lr or --epochs" if last < first * (1 + NOTHING_LEARNED) else "lower --lr"
            warnings.append(f"nothing was learned: {where} went from {first:.4f} to {last:.4f}; {remedy}")
        if skipped:
            warnings.append(f"{skipped} of {self.steps} steps were skipped because fp16 gradients overflowed")
        if data.truncated:
            total = len(data.train) + len(data.validation)
            warnings.append(f"{data.truncated} of {total} responses were cut off at {self.chosen.max_length} tokens "
                            "(--max-length)")  # fmt: skip
        return FitResult(
            steps=self.steps,
            train_rows=len(data.train),
            validation_rows=len(data.validation),
            truncated=data.truncated,
            measure="eval_loss" if data.validation else "loss",
            first_loss=first,
            last_loss=last,
            skipped=skipped,
            warnings=tuple(warnings),
            trainable_parameters=sum(parameter.numel() for parameter in self.parameters),
            settings=self.chosen,
        )

    def _first_and_last(self) -> tuple[float, float]:
        """Validation losses before and after; without validation, mean training losses over the first and last steps.

        Batches differ more than training changes their loss, so single batches are not compared. With several epochs
        the means are over whole epochs, so over the same rows. With one epoch they are over its first and last quarter.
        """
        held_out = [step.eval_loss for step in self.log if step.eval_loss is not None]
        if held_out:
            return held_out[0], held_out[-1]
        window = self.steps_per_epoch if self.chosen.epochs > 1 else math.ceil(self.steps / 4)
        losses = [step.loss for step in self.log if step.loss is not None]
        return sum(losses[:window]) / window, sum(losses[-window:]) / window

    def _batches(self) -> Iterator[list[int]]:
        """Indices of training rows, step by step; every epoch has a new order."""
        order = list(range(len(self.train)))
        for _ in range(self.chosen.epochs):
            self.order.shuffle(order)
            for start in range(0, len(order), self.chosen.batch_size):
                yield order[start : start + self.chosen.batch_size]
            order.sort()

    def _scale(self, step: int) -> float:
        """Linear warm-up, then linear decay to zero at the end."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return (self.steps - step) / max(1, self.steps - self.warmup)

    def _step(self, number: int, loss: float, lr: float) -> float:
        """Take optimiser step `number` (from 1) on the accumulated gradient, and return the gradient's norm."""
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(self.optimiser)
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.chosen.clip_norm))
        # an overflow of the scaled gradient is not a divergence: the scaler skips the step and lowers the scale
        if not math.isfinite(loss) or not (math.isfinite(norm) or self.scaler.is_enabled()):
            what = "gradient norm" if math.isfinite(loss) else "training loss"
            value = norm if math.isfinite(loss) else loss
            raise DivergedError(f"the {what} is {value} at step {number}", "Lower --lr.")
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad()
        return norm

    def _backward(self, rows: Sequence[_Row]) -> float:
        """Accumulate the gradient of a step's mean loss per supervised token, and return that loss."""
        return memory.halving(self.micro_tokens, "training batches", partial(self._accumulate, rows))

    def _accumulate(self, rows: Sequence[_Row], micro_tokens: int) -> float:
        self.micro_tokens = micro_tokens  # later steps keep what fitted
        self.optimiser.zero_grad()  # an attempt that failed may have left a part
        count = sum(len(row.tokens.ids) - row.tokens.prompt_length for row in rows)
        parts = []
        for micro in self._micro(rows):
            loss = self._token_losses(micro).sum() / count
            self.scaler.scale(loss).backward()
            parts.append(loss.detach())
        return float(torch.stack(parts).sum())

    @torch.no_grad()
    def _validation_loss(self, number: int) -> float | None:
        """Mean loss per supervised token of the held-out rows after step `number`; None if nothing is held out."""
        if not self.validation:
            return None
        self.model.network.eval()
        losses = memory.halving(self.micro_tokens, "validation batches", self._validation_losses)
        self.model.network.train()
        loss = float(losses.double().mean())
        if math.isfinite(loss):
            return loss
        if number:
            raise DivergedError(f"the validation loss is {loss} after step {number}", "Lower --lr.")
        dtype = str(self.model.dtype).removeprefix("torch.")
        raise UserError(f"the loss of {self.model.name} in {dtype} is {loss} before training", "Try --dtype float32.")

    def _validation_losses(self, micro_tokens: int) -> Tensor:
        self.micro_tokens = micro_tokens
        return torch.cat([self._token_losses(micro).cpu() for micro in self._micro(self.validation)])

    def _rows(self, rows: Sequence[SupervisedTokens]) -> list[_Row]:
        with self._precision():
            states = lower_layers.entering(self.model, self.first_layer, [ids for ids, _ in rows]) if rows else None
        return [_Row(one, states[index] if states else None) for index, one in enumerate(rows)]

    def _micro(self, rows: Sequence[_Row]) -> list[list[_Row]]:
        plan = forward.plan_batches([len(row.tokens.ids) for row in rows], self.micro_tokens)
        return [[rows[index] for index in part] for part in plan]

    def _token_losses(self, rows: Sequence[_Row]) -> Tensor:
        """Negative log-likelihood of every supervised token, fp32."""
        device = self.model.device
        texts = [row.tokens for row in rows]
        ids = forward.pad_right([one.ids for one in texts], device)
        counts = torch.tensor([len(one.ids) - one.prompt_length for one in texts])
        numbers = torch.repeat_interleave(torch.arange(len(rows)), counts).to(device)
        columns = torch.cat([torch.arange(one.prompt_length - 1, len(one.ids) - 1) for one in texts]).to(device)
        with ExitStack() as stack:
            stack.enter_context(self._precision())
            states = [row.state for row in rows if row.state is not None]
            if len(states) == len(rows):
                entered = Recording(self.first_layer, [lower_layers.padded(states)])
                stack.enter_context(lower_layers.playing(self.model.network, entered))
            split, targets = self.model.split, ids[numbers, columns + 1]
            if split.is_split:
                return split.losses(split.hidden(ids)[numbers, columns], targets)
            logits = split.logits_at(ids, numbers, columns)
        return nn.functional.cross_entropy(logits, targets, reduction="none")

    def _precision(self) -> AbstractContextManager[Any]:
        dtype = self.model.dtype
        is_half = dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(self.model.device.type, dtype=dtype) if is_half else nullcontext()


def _write_log(path: Path, log: Log) -> None:
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, fieldnames=[one.name for one in fields(Step)])
        writer.writeheader()
        writer.writerows(map(asdict, log))
