"""Bad input of every kind: one clear line, exit code 2, nothing half-written, and the input left as it was."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from making import edit_json, random_direction, save_lora
from test_cli import one_line, run
from ws.algebra.direction import HEADER_KEY
from ws.base.files import digest
from ws.fitting import behaviour
from ws.model.loading import ChatModel
from ws.pocket import tiny

LONGEST = 700
"""Characters of the longest message, without the path of the test."""
QUICK = ("--topics", 2, "--personas", 1, "--samples", 2, "--rank", 2, "--max-new-tokens", 4)


@dataclass(frozen=True)
class Place:
    """What a case may use: an empty folder of its own, and shared things that it must not change."""

    here: Path
    model: Path
    adapter: Path
    direction: Path
    gguf: Path

    @property
    def out(self) -> Path:
        return self.here / "out"

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def model_with(self, change: Callable[[Path], object]) -> Path:
        """A copy of the model folder after a change."""
        return self._copy(self.model, "model", change)

    def adapter_with(self, change: Callable[[Path], object]) -> Path:
        return self._copy(self.adapter, "adapter", change)

    def direction_with(self, change: Callable[[Path], object]) -> Path:
        copy = self.here / "direction.safetensors"
        shutil.copy(self.direction, copy)
        change(copy)
        return copy

    def behaviour_with(self, old: str, new: str) -> Path:
        """The commented behaviour file with one text replaced."""
        text = behaviour.TEMPLATE.format(name="mine")
        assert old in text
        return self.file("mine.toml", text.replace(old, new, 1))

    def _copy(self, source: Path, name: str, change: Callable[[Path], object]) -> Path:
        shutil.copytree(source, self.here / name)
        change(self.here / name)
        return self.here / name


@pytest.fixture(scope="module")
def shared(tiny_folders: dict[str, Path], qwen: ChatModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bad")
    tiny.make("qwen3", root / "model", layers=4)  # a copy that cases cannot change for other tests
    save_lora(root / "model", root / "adapter")
    random_direction(qwen).save(root / "direction.safetensors")
    assert run("export", root / "model", "--format", "gguf", "--out", root / "model.gguf") == 0
    return {"model": root / "model", "adapter": root / "adapter", "direction": root / "direction.safetensors",
            "gguf": root / "model.gguf"}  # fmt: skip


@pytest.fixture
def place(shared: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, **shared)


Build = Callable[[Place], list[object]]
"""Makes the bad input and returns the command line."""


# ---------------------------------------------------------------- changes


def cut(name: str, keep: float = 0.5) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / name if folder.is_dir() else folder
        content = file.read_bytes()
        file.write_bytes(content[: int(keep * len(content))])

    return change


def filled(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name if folder.is_dir() else folder).write_bytes(content) and None


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def edited(name: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / name, lambda content: content.update(changes))


def tensors(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Change the tensors of a file, and keep its metadata."""

    def apply(folder: Path) -> None:
        file = folder / name if folder.is_dir() else folder
        with file.open("rb") as handle:
            header = json.loads(handle.read(struct.unpack("<Q", handle.read(8))[0]))
        found = load_file(file)
        change(found)
        save_file(found, file, metadata=header.get("__metadata__"))

    return apply


def spoil(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(found: dict[str, torch.Tensor]) -> None:
        name = sorted(found)[3]
        found[name].view(-1)[0] = value

    return change


def drop_one(found: dict[str, torch.Tensor]) -> None:
    del found[sorted(name for name in found if "q_proj" in name)[0]]


def reshape_one(found: dict[str, torch.Tensor]) -> None:
    name = sorted(name for name in found if "q_proj" in name)[0]
    found[name] = found[name][:-1].clone()


def as_integers(found: dict[str, torch.Tensor]) -> None:
    name = sorted(name for name in found if "q_proj" in name)[0]
    found[name] = found[name].to(torch.int8)


def rename_all(found: dict[str, torch.Tensor]) -> None:
    for name in list(found):
        found[name.replace("layers.1", "layers.9")] = found.pop(name)


def as_index(names: list[str]) -> Callable[[Path], None]:
    """Weights in the files that an index lists."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        index = {"metadata": {}, "weight_map": {f"t{number}": name for number, name in enumerate(names)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def smaller_vocabulary(folder: Path) -> None:
    """Fewer embeddings than the tokenizer has ids."""
    tensors("model.safetensors", lambda found: found.update(
        {name: value[:500].clone() for name, value in found.items() if value.shape[0] == tiny.VOCABULARY}
    ))(folder)  # fmt: skip
    edited("config.json", vocab_size=500)(folder)


def replicate(**more: object) -> Build:
    words = [part for name, value in more.items() for part in (f"--{name.replace('_', '-')}", value)]
    return lambda place: ["replicate", "--model", place.model, "--out", place.out, *QUICK, *words]


def on_model(change: Callable[[Path], object]) -> Build:
    return lambda place: ["replicate", "--model", place.model_with(change), "--out", place.out, *QUICK]


def on_adapter(change: Callable[[Path], object]) -> Build:
    return lambda place: ["diff", "--model", place.model, "--pos", place.adapter_with(change), "--neg", place.adapter,
                          "--out", place.out / "d.safetensors"]  # fmt: skip


def on_direction(change: Callable[[Path], object]) -> Build:
    return lambda place: ["export", place.direction_with(change), "--model", place.model, "--out", place.out]


def on_behaviour(old: str, new: str) -> Build:
    return lambda place: ["behaviour", "check", place.behaviour_with(old, new)]


def on_pairs(content: str | bytes) -> Build:
    return lambda place: ["replicate", "--model", place.model, "--out", place.out, "--pairs",
                          place.file("pairs.jsonl", content)]  # fmt: skip


def on_gguf(change: Callable[[Path], object], *words: object) -> Build:
    def build(place: Place) -> list[object]:
        copy = place.here / "copy.gguf"
        shutil.copy(place.gguf, copy)
        change(copy)
        return ["convert", copy, place.here / "folder", *words]

    return build


def pair(positive: str = "x", negative: str = "y", prompt: str = "a") -> str:
    return json.dumps({"prompt": prompt, "response_pos": positive, "response_neg": negative})


def words(*arguments: object) -> Build:
    return lambda _: list(arguments)


CASES: dict[str, tuple[Build, str]] = {
    # the command line
    "no such command": (words("replicat"), "replicat"),
    "no such option": (words("replicate", "--modle", "pocket"), "--model"),
    "a rate that is a typo": (words("replicate", "--lr", "autoo"), "--lr is 'autoo'; it takes FLOAT or auto"),
    "a seed that is a word": (words("replicate", "--seed", "one"), "--seed"),
    "a strength that is a word": (words("eval", "dilemmas", "--alphas", "one"), "--alphas"),
    "no such dtype": (words("replicate", "--dtype", "float31"), "--dtype"),
    "no such family": (words("replicate", "--adapter", "lorra"), "unknown adapter family 'lorra'"),
    "no such behaviour": (words("replicate", "--behaviour", "sycofancy"), "Did you mean sycophancy?"),
    "no such probe": (words("eval", "dilemas"), "there is no probe 'dilemas'"),
    "a thought without choices": (words("eval", "side-effects", "--think", 5), "no choice probes"),
    "data for a probe that takes none": (words("eval", "dilemmas", "--data", "x.csv"), "--data works with"),
    "a probe without its data": (words("eval", "truthfulqa"), "truthfulqa needs a data set"),
    "a judge without address": (words("replicate", "--judge", "http"), "--judge-url"),
    "an engine without address": (words("replicate", "--responses", "openai"), "--responses-url"),
    "an address without engine": (words("replicate", "--responses-url", "http://x/v1"), "--responses is local"),
    "an impossible threshold": (words("replicate", "--judge-threshold", 2), "the judge threshold is 2"),
    "a sweep without seeds": (words("sweep", "--seeds"), "the sweep has no cells"),
    "a comparison without seeds": (words("compare", "--seeds"), "no family or no seed"),
    "one side of a difference": (words("diff", "--pos", "a"), "--pos and --neg go together"),
    "a vector for two models": (words("compare", "--with", "repeng:x", "--models", "a", "b"), "one model"),
    "one behaviour to generalise from": (words("generalise", "--behaviours", "honesty"), "two"),
    "a name that is a path": (words("behaviour", "new", "../evil"), "not a valid behaviour name"),
    "nothing to report": (words("report"), "no run folder is given"),
    "no run to show": (words("show", "nowhere"), "nowhere is not a run folder"),
    "no run to reproduce": (words("reproduce", "nowhere"), "nowhere is not a run folder"),
    "nothing to verify": (words("verify", "nowhere"), "there is no nowhere"),
    "nothing to export": (words("export", "nowhere"), "there is no direction file nowhere"),
    # settings of a run
    "no strength": (replicate(alphas="nan"), "--alphas has nan"),
    "a temperature that is no number": (replicate(temperature="nan"), "--temperature has nan"),
    "a scale that is no number": (replicate(lora_alpha="nan"), "--lora-alpha has nan"),
    "a cache that is no number": (replicate(cache_memory="nan"), "--cache-memory has nan"),
    "layers that are no number": (
        lambda place: [*replicate()(place), "--layers", "nan", 0.5], "--layers has nan, 0.5",
    ),
    "no random direction": (replicate(control_seeds=-1), "--control-seeds is -1"),
    "no rows": (replicate(rows=0), "--rows is 0"),
    "a seed below zero": (replicate(seed=-1), "--seed is -1"),
    "no layers": (lambda place: [*replicate()(place), "--layers", 0.5, 0.5], "the slice 0.5-0.5 selects no layer"),
    "no such matrix": (replicate(roles="z"), "unknown role 'z'"),
    "rank zero": (replicate(rank=0), "rank"),
    "a rate below zero": (replicate(lr=-1), "lr is -1"),
    "no epochs": (replicate(epochs=0), "epochs is 0"),
    "rows that are too short": (replicate(max_length=3), "leaves no room for its response"),
    "too many topics": (replicate(topics=999), "training prompts, not 999"),
    "no samples": (replicate(samples=0), "the grid has no rows"),
    "no tokens": (replicate(max_new_tokens=0), "out of range"),
    "no such device": (replicate(device="tpu9"), "tpu9"),
    "no memory to reuse": (replicate(cache_memory=-1), "--cache-memory is -1"),
    "an out that is a file": (
        lambda place: [*replicate()(place)[:-len(QUICK)], "--out", place.file("taken", "x"), *QUICK],
        "cannot create the run folder",
    ),
    "dilemmas without columns": (
        lambda place: [*replicate()(place), "--dilemmas", place.file("d.csv", "a,b\n1,2\n")], "Give a table with",
    ),
    "dilemmas without rows": (
        lambda place: [*replicate()(place), "--dilemmas", place.file("d.csv", "situation,action,label\n")], "none of 0",
    ),
    "dilemmas that are not there": (replicate(dilemmas="nowhere.csv"), "nowhere.csv"),
    # pairs
    "no pairs": (on_pairs(""), "contains no pairs"),
    "pairs that are not JSON": (on_pairs("hello"), "line 1: not valid JSON"),
    "pairs in another alphabet": (on_pairs(pair().encode("utf-16")), "not UTF-8"),
    "pairs without a key": (on_pairs('{"prompt": "a"}'), "line 1: key 'response_pos'"),
    "identical sides": (on_pairs("\n".join(pair(str(n), str(n)) for n in range(4))), "D+ and D- are identical"),
    "one repeated response": (on_pairs("\n".join(pair("x", str(n)) for n in range(4))), "responses on the pos side"),
    "empty responses": (on_pairs("\n".join(pair("", str(n)) for n in range(4))), "are empty"),
    "half of a character": (on_pairs('{"prompt": "\\ud800", "response_pos": "x", "response_neg": "y"}'), "surrogate"),
    "pairs nested too deep": (on_pairs("[" * 100_000), "not valid JSON"),
    # behaviour files
    "no behaviour file": (words("behaviour", "check", "none.toml"), "unknown behaviour 'none.toml'"),
    "not TOML": (lambda place: ["behaviour", "check", place.file("b.toml", "= 3")], "not valid TOML"),
    "bytes": (lambda place: ["behaviour", "check", place.file("b.toml", b"\xff\x00\xfe")], "not UTF-8"),
    "an unknown key": (on_behaviour("[personas]", "[persona]"), "Did you mean 'personas'?"),
    "a missing key": (on_behaviour('summary = "', '# "'), "'summary': is missing"),
    "another schema": (on_behaviour("schema = 1", "schema = 7"), "'schema': is 7"),
    "a name that leaves the folder": (on_behaviour('name = "mine"', 'name = "../../evil"'), "cannot be a folder name"),
    "the name of a probe": (on_behaviour('name = "mine"', 'name = "dilemmas"'), "the name of a built-in probe"),
    "more personas on one side": (on_behaviour("negative = [", 'negative = [\n"One more.",'), "2 negative personas"),
    "a stray brace": (on_behaviour("{claim}. {nudge}", "{claim. {nudge}"), "stray brace"),
    "a field that no entry has": (on_behaviour("{nudge}", "{push}"), "has nudge, but its template uses push"),
    "a format that reaches into an object": (
        on_behaviour("{claim}.", "{claim.__class__}."), "{claim.__class__}, which is not one name",
    ),
    "an empty file": (lambda place: ["behaviour", "check", place.file("b.toml", "")], "'schema': is missing"),
    "one answer": (on_behaviour('answers = ["Yes", "No"]', 'answers = ["Yes", "yes "]'), "two different answers"),
    "no such group": (on_behaviour('headline = "opinions"', 'headline = "facts"'), "no row has the group 'facts'"),
    "a label of two": (on_behaviour('claim = "winter is nicer than summer",', 'claim = "w", label = 2,'), "is 2"),
    "the same row twice": (
        on_behaviour("cats are better pets than dogs", "cats are better pets than dogs\", row = \"000"), "occurs twice",
    ),
    "replies of unequal length": (on_behaviour("I agree with you about this.", "I agree."), "words"),
    # model folders
    "no model": (words("replicate", "--model", "./nowhere"), "no model folder ./nowhere"),
    "no hub": (words("replicate", "--model", "no/such-model"), "Without a network, use --model pocket"),
    "a folder without weights": (on_model(without("model.safetensors")), "no safetensors weights"),
    "weights as a pickle": (on_model(as_pickle), "no safetensors weights"),
    "weights that are cut short": (on_model(cut("model.safetensors")), "model.safetensors"),
    "weights that are no tensors": (on_model(filled("model.safetensors", b"x" * 100)), "model.safetensors"),
    "empty weights": (on_model(filled("model.safetensors", b"")), "model.safetensors"),
    "a header of a huge size": (on_model(filled("model.safetensors", struct.pack("<Q", 2**60))), "model.safetensors"),
    "NaN in the weights": (on_model(tensors("model.safetensors", spoil(float("nan")))), "NaN or infinite"),
    "infinity in the weights": (on_model(tensors("model.safetensors", spoil(float("inf")))), "NaN or infinite"),
    "a tensor too few": (on_model(tensors("model.safetensors", drop_one)), "lack"),
    "a tensor of another shape": (on_model(tensors("model.safetensors", reshape_one)), "shape"),
    "weights as integers": (on_model(tensors("model.safetensors", as_integers)), "integers"),
    "more layers than weights": (
        on_model(edited("config.json", num_hidden_layers=6, layer_types=["full_attention"] * 6)), "lack",
    ),
    "layers that contradict each other": (on_model(edited("config.json", num_hidden_layers=6)), "configuration"),
    "a configuration that is not JSON": (on_model(filled("config.json", b"{")), "config"),
    "an unknown architecture": (on_model(edited("config.json", model_type="nothing")), "nothing"),
    "no tokenizer": (on_model(without("tokenizer.json")), "tokenizer"),
    "a tokenizer that is not JSON": (on_model(filled("tokenizer.json", b"{")), "tokenizer"),
    "more tokens than embeddings": (on_model(smaller_vocabulary), "token"),
    "settings that are not JSON": (on_model(filled("weight_steering.json", b"[")), "weight_steering.json"),
    "settings that are unknown": (on_model(edited("weight_steering.json", sampling={"heat": 1})), "unknown setting"),
    "a file outside of the folder": (on_model(as_index(["../part.safetensors"])), "which is not in its folder"),
    "a file that the index lists": (on_model(as_index(["gone.safetensors"])), "lacks gone.safetensors"),
    "an index that is not JSON": (
        on_model(lambda folder: (as_index([])(folder), filled("model.safetensors.index.json", b"[")(folder))),
        "is damaged",
    ),
    "settings of a part that does not exist": (
        on_model(edited("weight_steering.json", trian={})), "unknown part 'trian'. Did you mean 'train'?",
    ),
    "strengths that are text": (
        on_model(edited("weight_steering.json", run={"alphas": "abc"})), "run: alphas is 'abc', but must be a list",
    ),
    "a model that is some file": (
        lambda place: ["replicate", "--model", place.file("model.bin", "x"), "--out", place.out],
        "is a file, but its name does not end in .gguf",
    ),
    "an adapter for a model": (
        lambda place: ["replicate", "--model", place.adapter_with(lambda _: None), "--out", place.out], "adapter",
    ),
    # GGUF files
    "no GGUF file": (words("convert", "none.gguf", "folder"), "there is no file none.gguf"),
    "not GGUF": (on_gguf(filled("", b"hello")), "is not a GGUF file"),
    "empty GGUF": (on_gguf(filled("", b"")), "is not a GGUF file"),
    "half of a GGUF": (on_gguf(cut("")), "cut short or damaged"),
    "only the mark of a GGUF": (on_gguf(cut("", 1e-5)), "copy.gguf"),
    "a GGUF that counts too many tensors": (
        on_gguf(lambda f: f.write_bytes(f.read_bytes()[:8] + b"\xff" * 8 + f.read_bytes()[16:])), "copy.gguf",
    ),
    "a folder that is not empty": (
        lambda place: ["convert", place.gguf, place.file("full/x", "x").parent], "exists and is not empty",
    ),
    "a folder that is a device": (lambda place: ["convert", place.gguf, os.devnull], "is not a folder"),
    "a folder that is a mount point": (lambda place: ["convert", place.gguf, "/"], "is a mount point"),
    "a folder in a file": (
        lambda place: ["convert", place.gguf, place.file("taken", "x") / "folder"], "cannot hold files",
    ),
    # directions
    "no strength of an export": (lambda place: ["export", place.direction, "--alpha", "nan"], "alpha is nan"),
    "half of a direction": (on_direction(cut("")), "cannot be read"),
    "a direction that is text": (on_direction(filled("", b"hello, world")), "cannot be read"),
    "other tensors": (lambda place: ["export", place.model / "model.safetensors"], "is not a direction"),
    "NaN in a direction": (on_direction(tensors("", spoil(float("nan")))), "NaN or infinite"),
    "infinity in a direction": (on_direction(tensors("", spoil(float("inf")))), "NaN or infinite"),
    "factors that do not fit": (on_direction(tensors("", lambda found: found.update(
        {name: value[:, :-1].clone() for name, value in found.items() if name.endswith("left")}))), "do not match"),
    "a header that is not JSON": (
        on_direction(lambda file: save_file(load_file(file), file, metadata={HEADER_KEY: "{"})), "header is not JSON",
    ),
    "a newer direction": (
        on_direction(lambda file: save_file(load_file(file), file, metadata={HEADER_KEY: json.dumps(
            {"format": "weight-steering direction 9", "base": "", "layers": {}, "provenance": {}})})), "direction 9",
    ),
    "a direction of another base": (
        lambda place: ["verify", place.direction, "--model", place.model_with(
            tensors("model.safetensors", spoil(0.5)))], "belongs to the base model",
    ),
    "an export to another base": (
        lambda place: ["export", place.direction, "--out", place.out, "--model", place.model_with(
            tensors("model.safetensors", spoil(0.5)))], "leave --model out",
    ),
    # adapters
    "no adapter": (lambda place: ["diff", "--pos", place.here, "--neg", place.adapter], "neither a PEFT adapter"),
    "an adapter that is cut short": (on_adapter(cut("adapter_model.safetensors")), "adapter_model.safetensors"),
    "an adapter without weights": (on_adapter(without("adapter_model.safetensors")), "has no adapter_model"),
    "NaN in an adapter": (
        on_adapter(tensors("adapter_model.safetensors", spoil(float("nan")))), "NaN or infinite",
    ),
    "an adapter whose settings are not JSON": (on_adapter(filled("adapter_config.json", b"{")), "adapter_config.json"),
    "an adapter whose settings are a list": (on_adapter(filled("adapter_config.json", b"[]")), "adapter_config.json"),
    "an adapter of another kind": (on_adapter(edited("adapter_config.json", peft_type="VERA")), "VERA"),
    "an adapter of a later PEFT": (on_adapter(edited("adapter_config.json", peft_type="LORA9")), "LORA9"),
    "a rank that is a word": (on_adapter(edited("adapter_config.json", r="four")), "r is 'four'"),
    "an option without exact form": (on_adapter(edited("adapter_config.json", use_qalora=True)), "use_qalora"),
    "layers that the model lacks": (on_adapter(tensors("adapter_model.safetensors", rename_all)), "layers.9"),
    "an adapter and a checkpoint": (
        lambda place: ["diff", "--pos", place.adapter, "--neg", place.model], "one of",
    ),
}  # fmt: skip


def test_the_table_is_long_enough() -> None:
    assert len(CASES) >= 80


def state(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): digest(file) for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_nothing_is_written(
    name: str, place: Place, shared: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    build, expected = CASES[name]
    arguments = build(place)
    before, root = state(place.here), shared["model"].parent
    given = state(root)
    capsys.readouterr()
    assert run(*arguments) == 2
    line = one_line(capsys)
    assert expected in line and len(line.replace(str(place.here), "")) < LONGEST
    after = state(place.here)
    assert {file: after[file] for file in before} == before and state(root) == given, "the input is as it was"
    new = {Path(file).name for file in after.keys() - before.keys()}
    # a run that could be opened has its identity and its settings; nothing else is there, and nothing half-made
    assert new <= {".lock", "identity.json", "config.json", "pairs.parquet", "data.json", "reproduce.json",
                   "personas.json"}  # fmt: skip
