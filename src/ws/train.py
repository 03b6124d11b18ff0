"""Fit one adapter per sign on its own responses, with the persona removed.

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
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import polars as pl
import torch
from torch import Tensor, nn

from ws import adapters, console, forward, settings
from ws.adapters import AdapterSettings
from ws.chat import SupervisedTokens, ask
from ws.errors import UserError
from ws.models import ChatModel
from ws.store import atomic_file, atomic_folder, write_json

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


def resolve_settings(model: ChatModel, family: str, given: Mapping[str, Any]) -> TrainSettings:
    """Defaults, then the model folder's recommendation for the family, then what the user gave (None: not given)."""
    adapters.require_family(family)
    recommended = dict(model.settings.get("train", {}).get(family, {}))
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
    data = examples(model, pairs, sign, chosen, data_seed)
    torch.manual_seed(seed)
    attached = adapters.attach(model.network, chosen.adapter, model.name)
    try:
        log, result = optimise(model, data, chosen, attached.trainable, seed=seed, description=f"training {sign}")
        with atomic_folder(folder) as temporary:
            attached.save(temporary)
            _write_log(temporary / LOG_FILE, log)
            write_json(temporary / RESULT_FILE, result | {"settings": asdict(chosen)})
    finally:
        attached.detach()
        model.network.eval().requires_grad_(False)
    for warning in result["warnings"]:
        console.warn(f"{sign}: {warning}")
    return result


Log = list[dict[str, float | None]]
"""One entry per step: step, epoch, loss, eval_loss, lr, grad_norm."""


def optimise(
    model: ChatModel, data: Examples, chosen: TrainSettings, parameters: list[nn.Parameter], *, seed: int,
    description: str,
) -> tuple[Log, dict[str, Any]]:  # fmt: skip
    """Minimise the response loss over `parameters`, which already act on the network; the curve and its result."""
    run = _Run(model, data, chosen, seed, description)
    log = run.loop(parameters)
    return log, {**run.result(log), "trainable_parameters": sum(p.numel() for p in parameters)}


class _Run:
    """One pass of optimisation over tokenised examples."""

    def __init__(self, model: ChatModel, data: Examples, chosen: TrainSettings, seed: int, description: str) -> None:
        self.model, self.data, self.chosen = model, data, chosen
        self.description = description
        self.rng = random.Random(f"order/{seed}")
        per_epoch = math.ceil(len(data.train) / chosen.batch_size)
        self.steps = per_epoch * chosen.epochs
        self.warmup = min(chosen.warmup_steps, max(0, (self.steps - 1) // 2))
        self.autocast = model.dtype in (torch.bfloat16, torch.float16)

    def loop(self, parameters: list[nn.Parameter]) -> Log:
        chosen = self.chosen
        optimiser = torch.optim.AdamW(parameters, lr=chosen.lr, weight_decay=chosen.weight_decay)
        log: Log = [self._entry(0, None, self._validation_loss(), 0.0, None)]
        self.model.network.train()
        with console.progress(self.description, total=self.steps) as bar:
            step = 0
            for _ in range(chosen.epochs):
                for batch in self._epoch():
                    for group in optimiser.param_groups:
                        group["lr"] = chosen.lr * self._scale(step)
                    loss = self._backward(batch)
                    norm = float(nn.utils.clip_grad_norm_(parameters, chosen.clip_norm))
                    optimiser.step()
                    optimiser.zero_grad()
                    step += 1
                    if not math.isfinite(loss):
                        raise UserError(f"the training loss is {loss} at step {step}", "Lower --lr.")
                    due = step % chosen.evaluate_every == 0 or step == self.steps
                    validation = self._validation_loss() if due else None
                    log.append(self._entry(step, loss, validation, optimiser.param_groups[0]["lr"], norm))
                    bar.advance(note=f"loss {loss:.3f}")
        self.model.network.eval()
        return log

    def result(self, log: Log) -> dict[str, Any]:
        """First and last losses and what is suspicious about them."""
        measure = "eval_loss" if self.data.validation else "loss"
        values = [entry[measure] for entry in log if entry[measure] is not None]
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
        }

    def _epoch(self) -> list[list[SupervisedTokens]]:
        order = list(range(len(self.data.train)))
        self.rng.shuffle(order)
        size = self.chosen.batch_size
        return [[self.data.train[i] for i in order[start : start + size]] for start in range(0, len(order), size)]

    def _scale(self, step: int) -> float:
        """Linear warm-up, then linear decay to zero at the end."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return (self.steps - step) / max(1, self.steps - self.warmup)

    def _backward(self, batch: Sequence[SupervisedTokens]) -> float:
        """Accumulate the gradient of the mean loss per supervised token of the whole batch."""
        count = sum(len(ids) - prompt for ids, prompt in batch)
        total = 0.0
        for micro in self._micro(batch):
            loss = self._token_losses(micro).sum() / count
            loss.backward()
            total += float(loss.detach())
        return total

    @torch.no_grad()
    def _validation_loss(self) -> float | None:
        if not self.data.validation:
            return None
        was_training = self.model.network.training
        self.model.network.eval()
        losses = [self._token_losses(micro) for micro in self._micro(self.data.validation)]
        self.model.network.train(was_training)
        return float(torch.cat(losses).mean())

    def _micro(self, batch: Sequence[SupervisedTokens]) -> list[list[SupervisedTokens]]:
        plan = forward.plan_batches([len(ids) for ids, _ in batch], self.chosen.micro_tokens)
        return [[batch[index] for index in part] for part in plan]

    def _token_losses(self, batch: Sequence[SupervisedTokens]) -> Tensor:
        """Negative log-likelihood of every supervised token, fp32."""
        device = self.model.device
        ids = forward.pad_right([ids for ids, _ in batch], device)
        rows = torch.cat([torch.full((len(ids) - prompt,), row) for row, (ids, prompt) in enumerate(batch)])
        columns = torch.cat([torch.arange(prompt - 1, len(ids) - 1) for ids, prompt in batch])
        rows, columns = rows.to(device), columns.to(device)
        precision = torch.autocast(device.type, dtype=self.model.dtype) if self.autocast else nullcontext()
        with precision:
            logits = self.model.split.logits_at(ids, rows, columns)
        return nn.functional.cross_entropy(logits.float(), ids[rows, columns + 1], reduction="none")

    def _entry(
        self, step: int, loss: float | None, validation: float | None, lr: float, norm: float | None
    ) -> dict[str, float | None]:
        epoch = step * self.chosen.epochs / self.steps
        return {"step": step, "epoch": round(epoch, 4), "loss": loss, "eval_loss": validation, "lr": lr,
                "grad_norm": norm}  # fmt: skip


def _write_log(path: Path, log: Log) -> None:
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(log[0]))
        writer.writeheader()
        writer.writerows(log)


if __name__ == "__main__":
    from ws.cli import main_as

    main_as("train")
