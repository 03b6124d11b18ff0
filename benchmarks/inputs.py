"""The inputs of the comparisons of one model, on disk, so that a fresh process starts from the same inputs.

inputs.json              model and workload
pairs.parquet            what the adapters are trained on
direction.safetensors    what is scored
pos/, neg/               the two adapters whose difference it is

They are made here, or taken from a run of `ws replicate`.
"""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import peft
import polars as pl
import shapes
import torch
from workload import WORKLOADS, Workload

from ws import world
from ws.adapters import AdapterSettings, diff
from ws.algebra.direction import Direction
from ws.base.errors import UserError
from ws.base.files import read_json, write_json
from ws.base.poles import POLES
from ws.fitting import behaviour
from ws.fitting.run_settings import Settings, stored_in
from ws.model import architecture, convert, loading, sources
from ws.model.loading import ChatModel
from ws.runs.replicate import Replication

_FILE = "inputs.json"
_SPREAD = 0.02
"""Standard deviation of a random adapter's B: large enough to move logits."""


@dataclass(frozen=True)
class Inputs:
    """One model with its workload; `model` is what `loading.load` takes, `size` what the table calls it."""

    size: str
    model: str
    workload: Workload
    folder: Path
    behaviour: str = "sycophancy"

    def load(self) -> ChatModel:
        """A fresh copy of the model."""
        return loading.load(self.model)

    @property
    def pairs(self) -> pl.DataFrame:
        """Both sides' responses, as in a run's `pairs.parquet`."""
        return pl.read_parquet(self.folder / "pairs.parquet")

    def direction(self, model: ChatModel) -> Direction:
        """The direction, bound to its base."""
        return Direction.load(self.folder / "direction.safetensors").bind(model)

    @classmethod
    def make(cls, name: str, workload: Workload, folder: Path) -> Inputs:
        """Write them: those of a run folder, trained ones for a model that can talk, or random ones for a shape."""
        if is_run(name):
            return cls._of_run(Path(name), workload, folder)
        model = name
        if name in shapes.SHAPES:
            model = str(folder / name)
            shapes.make(shapes.SHAPES[name], Path(model), shapes.fast_dtype())
        elif name == sources.SMOLLM2:  # mergekit and PEFT read folders, not GGUF files
            model = str(folder / name)
            convert.convert(name, Path(model))
        made = cls(sources.model_slug(name), model, workload, folder)
        made._write_description()
        if workload.grid is None:
            made._write_random()
        else:
            made._write_trained()
        return made

    @classmethod
    def read(cls, folder: Path) -> Inputs:
        """Read the inputs that another process made."""
        stored = read_json(folder / _FILE)
        return cls(stored["size"], stored["model"], WORKLOADS[stored["workload"]], folder, stored["behaviour"])

    @classmethod
    def _of_run(cls, run: Path, workload: Workload, folder: Path) -> Inputs:
        """Copy the pairs, adapters and direction of a run. Its base must be a folder of safetensors, for mergekit."""
        stored = stored_in(run)
        if stored["adapter"] != "lora":
            raise UserError(f"{run} has adapters of the family {stored['adapter']}", "Give a run with lora.")
        size = f"{loading.model_slug(stored['model'])}, run on {stored['behaviour']}"
        made = cls(size, stored["model"], workload, folder, stored["behaviour"])
        for name in ("pairs.parquet", "direction.safetensors"):
            shutil.copy(run / name, folder / name)
        for pole in POLES:
            shutil.copytree(run / pole, folder / pole)
        made._write_description()
        return made

    def _write_description(self) -> None:
        write_json(self.folder / _FILE, {
            "size": self.size, "model": self.model, "workload": self.workload.name, "behaviour": self.behaviour,
        })  # fmt: skip

    def _write_trained(self) -> None:
        assert self.workload.grid is not None
        settings = Settings(model=self.model, out=self.folder / "out", grid=self.workload.grid)
        with Replication(settings) as run:
            run.diff()[0].save(self.folder / "direction.safetensors")
            run.data().write_parquet(self.folder / "pairs.parquet")
            for sign in ("pos", "neg"):
                shutil.copytree(run.folder / sign, self.folder / sign)

    def _write_random(self) -> None:
        written_pairs(self.workload.written).write_parquet(self.folder / "pairs.parquet")
        model = self.load()
        folders = [random_adapter(model, self.folder / sign, seed) for seed, sign in enumerate(("pos", "neg"))]
        diff.direction(model, *folders)[0].save(self.folder / "direction.safetensors")


def is_run(name: str) -> bool:
    """Whether a name is the folder of a run, not of a model."""
    return (Path(name) / "direction.safetensors").is_file()


def written_pairs(count: int) -> pl.DataFrame:
    """Pairs of ready sentences under the training prompts of sycophancy: only their length is real."""
    topics, sentences = behaviour.load("sycophancy").train, world.sentences()
    texts = [" ".join(random.Random(number).sample(sentences, 3)) for number in range(2 * count)]
    chosen = [topics[number % len(topics)] for number in range(count)]
    frame = pl.DataFrame({
        "topic": [topic.topic for topic in chosen], "prompt": [topic.text for topic in chosen],
        "response_pos": texts[:count], "response_neg": texts[count:],
    })  # fmt: skip
    return frame.with_columns(*(pl.lit(True).alias(f"keep_{side}") for side in POLES))


def random_adapter(model: ChatModel, folder: Path, seed: int) -> Path:
    """A rank-32 LoRA with random factors on every matrix of the default slice, saved by PEFT; the model is unchanged.

    The direction of two of them has rank 64.
    """
    torch.manual_seed(seed)
    settings = AdapterSettings()
    layers = architecture.layer_slice(model.layer_count, *settings.layers)
    wrapped = peft.get_peft_model(model.network, peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.lora_alpha, task_type="CAUSAL_LM",
        target_modules=sorted({site.kind for site in architecture.sites(model.network, layers)}),
        layers_to_transform=list(layers), layers_pattern="layers",
    ))  # fmt: skip
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=_SPREAD)
    wrapped.save_pretrained(str(folder))
    wrapped.unload()
    return folder
