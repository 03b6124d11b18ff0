"""Train the embedded model: one seeded run of the corpus into a small chat model of a real architecture.

Every step writes its own rows of fixed length from (seed, step). So a run needs no data on disk and resumes exactly
where it was killed. Matrices inside the layers are trained with Muon, the rest with AdamW, in bf16 autocast
with eager attention (on a CPU the backward pass of fused attention is slower).

The loss covers replies, and other turns with a small weight. A second loss is a linear readout, from the middle of the
network, of the latents that decide a reply (the traits, and whether a claim is true). The readout is discarded after
training. Without it the trait is lost in the wording: after ten million tokens nothing carried over from one turn to
the next. With it, the model follows personas after two million. Early steps also contain more repetition than later
ones, because a network that learns to copy early learns to follow what was said before.

The result is an ordinary model folder: safetensors in bf16, a tokenizer with a ChatML template, the recommended
settings for steering, and the record of the run.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ws.base import console, precision
from ws.base.errors import UserError
from ws.base.files import atomic_file, atomic_folder, content_key, read_json, write_json
from ws.base.version import __version__
from ws.model.sources import SETTINGS_FILE
from ws.pocket import bpe, corpus
from ws.pocket.corpus import LATENTS, Corpus, Planted, TurnMix
from ws.pocket.muon import Muon

_LEARNING_RATES = {
    "rslora": 1.5e-3, "pissa": 1e-3, "delora": 1e-2, "oft": 3e-3, "boft": 3e-3, "ia3": 2e-2,
}  # fmt: skip
"""Learning rates of the families that use one rate on both architectures. lora and dora use `_Chosen.rate`."""
_OF_FAMILY: dict[str, dict[str, Any]] = {
    "delora": {"delora_lambda": 2.0},  # the default of 15 destroys a model of this size
    "oft": {"block_size": 8},
    "boft": {"block_size": 8},
}

Architecture = Literal["qwen3", "gemma3"]


class _Chosen(NamedTuple):
    """Which layers of an architecture carry adapters, their learning rate, and what differs for a behaviour."""

    layers: tuple[float, float]
    rate: float
    for_behaviour: Mapping[str, Mapping[str, Any]]


_CHOSEN: dict[Architecture, _Chosen] = {
    "qwen3": _Chosen((0.5, 0.9), 1.5e-3, {"honesty": {"lr": 5e-3, "epochs": 2}, "refusal": {"lr": 5e-3, "epochs": 2}}),
    "gemma3": _Chosen((0.3, 0.7), 4e-3, {"honesty": {"lr": 1.1e-2, "epochs": 2}, "refusal": {"lr": 1.2e-2}}),
}


def recommended(architecture: Architecture) -> dict[str, Any]:
    """Settings written beside the weights. At this size the defaults for real models do almost nothing.

    They were tuned for lora, seed 0, on the probe of each behaviour, the same probe that results report. The other
    families reuse the layers and epochs. Sycophancy has more pairs than honesty and refusal. At the rate where it moves
    as far as prompts do, those two fall short, so they have rates of their own. In Qwen3, layers 3 and 4 separate the
    traits best. On layers 1 to 3, candid responses taught half as much or less, and high rates lost facts. Sampled
    answers do not always follow their persona, so a judge filters the pairs. Without it honesty moved half as far.
    """
    chosen = _CHOSEN[architecture]
    families = {
        family: {
            "rank": 16, "lora_alpha": 32, "lr": rate, "lr_candidates": [rate / 2, rate, 2 * rate],
            "layers": list(chosen.layers), **_OF_FAMILY.get(family, {}),
        }
        for family, rate in (dict.fromkeys(("lora", "dora"), chosen.rate) | _LEARNING_RATES).items()
    }  # fmt: skip
    return {
        "train": families,
        "train_for": {name: dict.fromkeys(("lora", "dora"), other) for name, other in chosen.for_behaviour.items()},
        "sampling": {"max_new_tokens": 48, "temperature": 0.8},
        "judge": {"backend": "persona", "threshold": 0.7},
    }


CHECKPOINT_EVERY = 500
"""Steps between checkpoints of an unfinished build."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights; `Recipe.of` is what the shipped ones are made with."""

    seed: int = 0
    architecture: Architecture = "qwen3"
    width: int = 128
    layers: int = 6
    heads: int = 4
    key_value_heads: int = 2
    head_width: int = 32
    feed_forward: int = 384
    vocabulary: int = 2048
    row_tokens: int = 192
    rows: int = 12
    steps: int = 12_000
    warm_up: int = 100
    cool_down: float = 0.6
    matrix_lr: float = 0.015
    other_lr: float = 3e-3
    user_weight: float = 0.2
    user_share: float = 0.33
    decisive_weight: float = 1.0
    latent_weight: float = 2.0
    latent_layer: int = 4
    copying: float = 0.15
    copying_steps: int = 3_000
    planted: Planted = field(default_factory=Planted)
    mix: TurnMix = field(default_factory=TurnMix)

    @classmethod
    def of(cls, architecture: Architecture, seed: int = 0) -> Recipe:
        """The recipe of an embedded model.

        Gemma-3 uses the defaults. With them Qwen3 missed one of 21 thresholds at seed 0 and a different one at seed 1,
        and it knew fewer facts. It needs a third more steps, and more opinions and facts among its turns
        (docs/pocket.md).
        """
        recipe = cls(seed=seed, architecture=architecture)
        if architecture == "gemma3":
            return recipe
        mix = TurnMix(opinion=0.15, opinion_choice=0.13, fact_choice=0.12, dilemma_choice=0.14, dilemma_open=0.11,
                      request=0.16)  # fmt: skip
        return replace(recipe, steps=16_000, mix=mix)

    def scale(self, step: int) -> float:
        """Learning rate at a step relative to its peak: warm-up, plateau, linear cool-down to a hundredth."""
        rising = (step + 1) / self.warm_up
        falling = (self.steps - step) / (self.cool_down * self.steps)
        return max(0.01, min(1.0, rising, falling))


def build(recipe: Recipe, folder: Path, *, workspace: Path, compiled: bool | None = None) -> None:
    """Train by the recipe and write the model folder; checkpoints live in `workspace` and are resumed.

    `compiled` fuses the layers with torch.compile (None: when a C++ compiler is installed).
    """
    workspace.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(recipe, workspace)
    rows = RowWriter(recipe, tokenizer)
    network = _network(recipe, tokenizer)
    trainer = _Trainer(recipe, network, rows, workspace)
    trainer.run(shutil.which("g++") is not None if compiled is None else compiled)
    _save(recipe, network, tokenizer, folder, trainer)
    shutil.rmtree(workspace, ignore_errors=True)


# -------------------------------------------------------------------- tokens


def _tokenizer(recipe: Recipe, workspace: Path) -> Any:
    """Byte-level BPE trained on dialogues of the corpus. It stays in the workspace, so token ids survive a restart."""
    path = workspace / "tokenizer.json"
    if not path.exists():
        writer, rng = Corpus(recipe.planted, recipe.mix), random.Random(f"tokenizer/{recipe.seed}")
        texts = (line.content for _ in range(6_000) for line in islice(writer.dialogue(rng), 9))
        bpe.train(texts, recipe.vocabulary, path)
    return bpe.load(path)


class Rows(NamedTuple):
    """One batch of training rows.

    `ids` (rows, tokens); `weights` (rows, tokens), the weight of each token in the loss, 0 outside replies; `latents`
    (rows, tokens, len(LATENTS)), 1 or 0 for what is known of a reply, from its header to its Yes or No, NaN elsewhere.
    """

    ids: Tensor
    weights: Tensor
    latents: Tensor


class RowWriter:
    """Token rows of fixed length, each one dialogue, as a function of (seed, step)."""

    def __init__(self, recipe: Recipe, tokenizer: Any) -> None:
        self.recipe = recipe
        self.corpus = Corpus(recipe.planted, recipe.mix)
        self.copying = Corpus(recipe.planted, replace(recipe.mix, repeat=recipe.copying))
        self.encode = tokenizer.backend_tokenizer.encode_batch
        self.decisive = set(tokenizer.convert_tokens_to_ids(["Yes", "No", "Maybe"]))

    def batch(self, step: int) -> Rows:
        """The rows of a step."""
        rng = random.Random(f"rows/{self.recipe.seed}/{step}")
        corpus = self.copying if step < self.recipe.copying_steps else self.corpus
        ids, weights, latents = zip(*(self._row(corpus, rng) for _ in range(self.recipe.rows)), strict=True)
        return Rows(torch.tensor(ids), torch.tensor(weights), torch.tensor(latents))

    def _row(self, corpus: Corpus, rng: random.Random) -> tuple[list[int], list[float], list[list[float]]]:
        """A reply of n tokens weighs sqrt(n), its Yes or No 1 more. So long replies do not outweigh decisions."""
        length = self.recipe.row_tokens
        ids: list[int] = []
        weights: list[float] = []
        latents: list[list[float]] = []
        dialogue = corpus.dialogue(rng)
        while len(ids) < length:
            lines = list(islice(dialogue, 4))
            pieces = [bpe.as_turn(line.role, line.content) for line in lines]
            encodings = iter(self.encode([piece for turn in pieces for piece in turn]))
            for line in lines:
                header, content, end = (next(encodings).ids for _ in range(3))
                spoken = line.role == "assistant"
                share = len(content) ** -0.5 if spoken else 0.0
                known = [float(line.latents[name]) if name in line.latents else math.nan for name in LATENTS]
                hidden = next((at for at, token in enumerate(content) if token in self.decisive), 0)
                ids += header + content + end
                weights += [0.0] * len(header)
                weights += [
                    share + self.recipe.decisive_weight * (spoken and token in self.decisive) for token in content
                ]
                weights += [0.0] * len(end)
                before = len(header) + hidden
                latents += [known] * before + [[math.nan] * len(known)] * (len(content) - hidden + len(end))
        return ids[:length], weights[:length], latents[:length]


# -------------------------------------------------------------------- model


def _network(recipe: Recipe, tokenizer: Any) -> Any:
    """A new network of the recipe's architecture. The size settings mean the same for each architecture."""
    import transformers  # noqa: PLC0415 - heavy import, late

    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": recipe.width,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.key_value_heads,
        "head_dim": recipe.head_width,
        "intermediate_size": recipe.feed_forward,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(recipe.seed)
    if recipe.architecture == "gemma3":
        config = transformers.Gemma3TextConfig(**sizes, query_pre_attn_scalar=recipe.head_width)
        return transformers.Gemma3ForCausalLM._from_config(config, attn_implementation="eager")
    config = transformers.Qwen3Config(**sizes)
    return transformers.Qwen3ForCausalLM._from_config(config, attn_implementation="eager")


class _Trainer:
    """The loop with its optimisers, curve and checkpoints."""

    def __init__(self, recipe: Recipe, network: Any, rows: RowWriter, workspace: Path) -> None:
        self.recipe, self.network, self.rows, self.workspace = recipe, network, rows, workspace
        self.readout = nn.Linear(recipe.width, len(LATENTS))
        matrices = [p for p in network.get_decoder().layers.parameters() if p.ndim == 2]
        self.trained = dict(network.named_parameters()) | dict(self.readout.named_parameters(prefix="readout"))
        inside = {id(p) for p in matrices}
        rest = [p for p in self.trained.values() if id(p) not in inside]
        self.optimisers = {
            "muon": Muon(matrices, lr=recipe.matrix_lr),
            "adamw": torch.optim.AdamW(rest, lr=recipe.other_lr, betas=(0.9, 0.95), weight_decay=0.0),
        }
        self.curve: list[dict[str, float]] = []
        self.seconds = 0.0
        self.start = self._resume()

    def run(self, compiled: bool) -> None:
        decoder = self.network.get_decoder()
        trunk = torch.compile(decoder, dynamic=False) if compiled else decoder
        started, before = time.perf_counter(), self.seconds
        smooth: dict[str, float] = {}
        self.network.train()
        with console.progress("training pocket", total=self.recipe.steps) as bar:
            bar.advance(self.start)
            for step in range(self.start, self.recipe.steps):
                for name, loss in self._step(step, trunk).items():
                    smooth[name] = 0.98 * smooth.get(name, loss) + 0.02 * loss
                self.seconds = before + time.perf_counter() - started
                bar.advance(note=f"loss {smooth['loss']:.3f}")
                if (step + 1) % 100 == 0:
                    self.curve.append({"step": step + 1} | {name: round(loss, 4) for name, loss in smooth.items()})
                if (step + 1) % CHECKPOINT_EVERY == 0:
                    self._checkpoint(step + 1)
        self.network.eval()

    def _step(self, step: int, trunk: Any) -> dict[str, float]:
        ids, weights, latents = self.rows.batch(step)
        targets, weights = ids[:, 1:], weights[:, 1:]
        for name, optimiser in self.optimisers.items():
            peak = self.recipe.matrix_lr if name == "muon" else self.recipe.other_lr
            for group in optimiser.param_groups:
                group["lr"] = peak * self.recipe.scale(step)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision.bfloat16_is_fast()):
            states = trunk(input_ids=ids, use_cache=False, output_hidden_states=True)
            hidden = states.last_hidden_state[:, :-1]
            loss = self._loss(hidden, targets, weights)
            chance = torch.rand(weights.shape, generator=torch.Generator().manual_seed(step))
            other = self._loss(hidden, targets, ((weights == 0) & (chance < self.recipe.user_share)).float())
            latent = self._latent_loss(states.hidden_states[self.recipe.latent_layer], latents)
            total = loss + self.recipe.user_weight * other + self.recipe.latent_weight * latent
        total.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for optimiser in self.optimisers.values():
            optimiser.step()
            optimiser.zero_grad()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise UserError(f"the loss is {value} at step {step}", "Lower the learning rates of the recipe.")
        return {"loss": value, "latent_loss": float(latent.detach())}

    def _loss(self, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Weighted mean of the token losses where the weight is not 0. A short row may have no such token."""
        chosen = weights > 0
        logits = self.network.get_output_embeddings()(hidden[chosen])
        losses = nn.functional.cross_entropy(logits.float(), targets[chosen], reduction="none")
        return (losses * weights[chosen]).sum() / weights.sum().clamp(min=1e-6)

    def _latent_loss(self, states: Tensor, latents: Tensor) -> Tensor:
        """Cross-entropy of a linear readout of the known latents from one layer (nats per token, equal weights)."""
        known = ~latents.isnan()
        losses = nn.functional.binary_cross_entropy_with_logits(
            self.readout(states.float()), latents.nan_to_num(), weight=known.float(), reduction="none"
        )
        return (losses.sum((0, 1)) / known.sum((0, 1)).clamp(min=1)).mean()

    # ------------------------------------------------------------ checkpoints

    def _checkpoint(self, step: int) -> None:
        from safetensors.torch import save_file  # noqa: PLC0415

        tensors = {f"model/{name}": p.detach().clone() for name, p in self.trained.items()}
        for name, optimiser in self.optimisers.items():
            for index, state in optimiser.state_dict()["state"].items():
                tensors |= {f"{name}/{index}/{key}": torch.as_tensor(value).clone() for key, value in state.items()}
        record = {
            "step": step,
            "recipe": content_key(self.recipe),
            "seconds": self.seconds,
            "curve": self.curve,
        }
        with atomic_file(self.workspace / "checkpoint.safetensors") as temporary:
            save_file(tensors, temporary, metadata={"record": json.dumps(record)})

    def _resume(self) -> int:
        from safetensors import safe_open  # noqa: PLC0415

        path = self.workspace / "checkpoint.safetensors"
        if not path.exists():
            return 0
        with safe_open(path, framework="pt") as file:
            record = json.loads(file.metadata()["record"])
            if record["recipe"] != content_key(self.recipe):
                raise UserError(
                    f"{self.workspace} holds an unfinished build of another recipe",
                    "Finish that one or delete it.",
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        for name, parameter in self.trained.items():
            parameter.data.copy_(tensors[f"model/{name}"])
        for name, optimiser in self.optimisers.items():
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                owner, _, rest = key.partition("/")
                if owner == name:
                    index, _, entry = rest.partition("/")
                    state.setdefault(int(index), {})[entry] = value
            optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
        self.curve, self.seconds = record["curve"], record["seconds"]
        console.say(f"continuing at step {record['step']} of {self.recipe.steps}")
        return int(record["step"])


def _save(recipe: Recipe, network: Any, tokenizer: Any, folder: Path, trainer: _Trainer) -> None:
    with atomic_folder(folder) as temporary, console.library_noise_muted():
        network.to(torch.bfloat16).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / SETTINGS_FILE, recommended(recipe.architecture))
        write_json(temporary / "recipe.json", {
            "recipe": asdict(recipe),
            "corpus": corpus.describe(recipe.planted, recipe.mix),
            "tokens": recipe.steps * recipe.rows * recipe.row_tokens,
            "parameters": sum(p.numel() for p in network.parameters()),
            "minutes": round(trainer.seconds / 60, 1),
            "curve": trainer.curve,
            "versions": {"ws": __version__, "torch": torch.__version__},
        })  # fmt: skip


def recorded(folder: Path) -> dict[str, Any]:
    """The record of the run that made a model folder."""
    path = folder / "recipe.json"
    if not path.is_file():
        raise UserError(f"{folder} was not made by ws pocket build (no recipe.json)")
    return dict(read_json(path))
