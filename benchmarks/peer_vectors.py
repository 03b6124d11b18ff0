"""Train repeng's and steering-vectors' vectors on the personas of a run, and write the files that `ws compare` reads.

    python benchmarks/peer_vectors.py out/pocket/sycophancy/lora/seed0 vectors
    ws compare --with repeng:vectors/repeng.gguf --with repeng:vectors/repeng-pca_center.gguf \\
        --with steering-vectors:vectors/steering-vectors.pt

Both are trained on every training prompt under every persona pair, in the model's chat format up to the reply: the rows
that our own mean difference reads. All else is their default:

    repeng              layers 1 to n-1, method "pca_diff" (first component of the centred differences), norm 1
    steering-vectors    all layers, mean difference at the last token

repeng's other method, "pca_center", is written as well. Centred differences have lost their mean, and the sign is that
of most pairs: with few persona pairs the default may point against the mean difference.

`peer_vectors.json` tells the versions, the seconds, and the cosine of every vector with our own mean difference.
Install them without their dependencies, which exclude this project's (repeng: NumPy 2, steering-vectors: transformers
5): pip install --no-deps -c constraints.txt repeng steering-vectors
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.metadata
import io
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from peers import library_forms
from torch import Tensor

from ws.base import console
from ws.base.errors import UserError
from ws.base.files import read_json, write_json
from ws.baselines import repe
from ws.baselines.repe import RepeSettings
from ws.fitting import behaviour
from ws.fitting.behaviour import Behaviour
from ws.fitting.run_settings import stored_in
from ws.model import loading
from ws.model.chat import Chat, ask
from ws.model.loading import ChatModel

PACKAGES = ("repeng", "steering-vectors")
REPENG_METHODS: dict[str, dict[str, str]] = {"repeng": {}, "repeng-pca_center": {"method": "pca_center"}}
"""Name of the file -> options of repeng's `train`."""
INSTALL = "pip install --no-deps -c constraints.txt repeng steering-vectors"


def import_repeng() -> ModuleType:
    """repeng 0.4.0 beside NumPy 2: an annotation of it names `np.float_`, which is there only during the import."""
    name, had = "float_", hasattr(np, "float_")
    if not had:
        setattr(np, name, np.float64)
    try:
        import repeng  # noqa: PLC0415 - only here
    except ImportError as error:
        raise UserError("repeng is not installed", f"Install it with: {INSTALL}") from error
    finally:
        if not had:
            delattr(np, name)
    return repeng


def import_steering_vectors() -> ModuleType:
    """steering-vectors 0.12.2 runs with transformers 5 as it is, though it asks for less."""
    try:
        import steering_vectors  # noqa: PLC0415 - only here
    except ImportError as error:
        raise UserError("steering-vectors is not installed", f"Install it with: {INSTALL}") from error
    return steering_vectors


class RenderedTokenizer:
    """The model's tokenizer for texts that its chat template has rendered: no second start token, right padding."""

    def __init__(self, chat: Chat) -> None:
        self._tokenizer = copy.deepcopy(chat.tokenizer)
        self._tokenizer.padding_side = "right"
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    @property
    def pad_token_id(self) -> int:
        """steering-vectors asks for it."""
        return int(self._tokenizer.pad_token_id)

    def __call__(self, texts: Sequence[str], **options: Any) -> Any:
        return self._tokenizer(list(texts), add_special_tokens=False, **options)


def rendered_pairs(model: ChatModel, subject: Behaviour) -> list[tuple[str, str]]:
    """Every training prompt under both personas of every pair, as text up to the reply, in the order of `repe.fit`."""
    encode = RenderedTokenizer(model.chat)
    found = []
    for personas in zip(subject.personas.pos, subject.personas.neg, strict=True):
        for topic in subject.train:
            asked = [ask(topic.text, persona) for persona in personas]
            texts = [model.chat.text(messages) for messages in asked]
            for text, messages in zip(texts, asked, strict=True):
                if encode([text])["input_ids"][0] != model.chat.prompt(messages):
                    raise UserError(
                        f"a persona of {subject.name} has the name of a control token", "Take it out of the persona."
                    )
            found.append((texts[0], texts[1]))
    return found


def train_repeng(model: ChatModel, pairs: Sequence[tuple[str, str]], **options: Any) -> Any:
    """repeng's `ControlVector`; options are those of its `train`. The hooks that it leaves stay on a copy."""
    repeng = import_repeng()
    entries = [repeng.DatasetEntry(positive=pos, negative=neg) for pos, neg in pairs]
    network = copy.deepcopy(model.network)
    with library_forms(network), contextlib.redirect_stderr(io.StringIO()):  # it shows three progress bars
        return repeng.ControlVector.train(network, RenderedTokenizer(model.chat), entries, **options)


def train_steering_vectors(model: ChatModel, pairs: Sequence[tuple[str, str]], **options: Any) -> Any:
    """steering-vectors' `SteeringVector`; options are those of `train_steering_vector`."""
    steering_vectors = import_steering_vectors()
    with library_forms(model.network):
        return steering_vectors.train_steering_vector(
            model.network, RenderedTokenizer(model.chat), list(pairs), **options
        )


def cosines(vectors: dict[int, Any], ours: dict[int, Tensor]) -> dict[int, float]:
    """Cosine of a library's vector with ours, by layer."""
    return {
        layer: round(float(torch.cosine_similarity(torch.as_tensor(vectors[layer]).cpu(), ours[layer], dim=0)), 4)
        for layer in sorted(vectors)
    }


def model_of(run: Path, name: str | None) -> tuple[ChatModel, Behaviour]:
    """The base model and the behaviour of a run; `name` replaces the stored name of the model."""
    stored = stored_in(run)
    loaded = ("dtype", "device", "thinking", "attention", "revision")
    model = loading.load(name or stored["model"], **{key: stored[key] for key in loaded})
    if (known := read_json(run / "identity.json")["fingerprint"]) != model.fingerprint:
        raise UserError(f"{run} was made on another model ({known})", "Name its base with --model.")
    return model, behaviour.load(stored["behaviour"])


def write(run: Path, target: Path, name: str | None = None) -> dict[str, Any]:
    """Train all and write their files and `peer_vectors.json`; the content of the latter."""
    model, subject = model_of(run, name)
    pairs = rendered_pairs(model, subject)
    target.mkdir(parents=True, exist_ok=True)
    own = dict(repe.fit(model, subject, RepeSettings(slice=(0.0, 1.0))).vectors)

    seconds, found = {}, {}
    for label, options in REPENG_METHODS.items():
        started = time.perf_counter()
        control = train_repeng(model, pairs, **options)
        seconds[label] = round(time.perf_counter() - started, 2)
        found[label] = cosines(control.directions, own)
        control.export_gguf(str(target / f"{label}.gguf"))
    started = time.perf_counter()
    steering = train_steering_vectors(model, pairs)
    seconds["steering-vectors"] = round(time.perf_counter() - started, 2)
    found["steering-vectors"] = cosines(steering.layer_activations, own)
    torch.save(steering.to("cpu"), target / "steering-vectors.pt")
    record = {
        "run": str(run), "model": model.slug, "fingerprint": model.fingerprint, "behaviour": subject.name,
        "pairs": len(pairs), "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "seconds": seconds, "cosine_with_our_mean_difference": found,
    }  # fmt: skip
    write_json(target / "peer_vectors.json", record)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder, such as out/pocket/sycophancy/lora/seed0")
    parser.add_argument("out", type=Path, help="folder for the two files")
    parser.add_argument("--model", help="where the run's base model is now, if it was moved")
    given = parser.parse_args()
    try:
        record = write(given.run, given.out, given.model)
    except UserError as error:
        parser.exit(2, f"{error}\n")
    for name, found in record["cosine_with_our_mean_difference"].items():
        least = min(found.values())
        console.say(f"{name}: {record['seconds'][name]} s on {record['pairs']} pairs; least cosine with ours {least}")


if __name__ == "__main__":
    main()
