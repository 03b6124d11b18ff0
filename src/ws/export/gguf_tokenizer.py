"""The tokenizer of a model folder in the form that GGUF holds: byte-level BPE with a known rule for splitting text.

llama.cpp has the rules built in, and a file only names one. So a tokenizer is written if its rule is one of the four
below, which the tests compare with llama.cpp. Every other tokenizer is an error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ws.base.errors import UnsupportedFeatureError, UserError
from ws.model.library import refusals_told

_REMEDY = "Use --format merged, and convert that folder with convert_hf_to_gguf.py of llama.cpp."
_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {f"{_CASELESS}\\p{{N}}{_TAIL}": "qwen2", f"{_CASELESS}\\p{{N}}{{1,3}}{_TAIL}": "llama-bpe"}
"""Regular expression of a tokenizer -> the name of its rule in llama.cpp."""
_WHOLE_WORDS_FIRST = "llama-bpe"
"""The rule under which a word that is a token is never merged from parts (`ignore_merges`)."""


def add_tokenizer(gguf: Any, writer: Any, folder: Path, rows: int) -> None:
    """Add the tokenizer of `folder` with template and special tokens to a GGUF writer.

    rows: of the embedding. Ids without a token become unused tokens. Raises for a tokenizer that GGUF cannot hold, and
    for a token without a row.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415 - heavy import, late

    with refusals_told(str(folder), str(folder), "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        specification = json.loads(tokenizer.backend_tokenizer.to_str())
    rule = splitting_rule(specification, str(folder))
    texts, kinds = _tokens(gguf, specification, folder, rows)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    merges = specification["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    for name in ("bos", "eos", "unk", "pad"):
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(tokenizer.bos_token_id in tokenizer("x")["input_ids"])
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        writer.add_chat_template(template)


def splitting_rule(specification: Any, place: str) -> str:
    """The name in llama.cpp of the rule by which a tokenizer (content of `tokenizer.json`) splits text.

    Raises if it is none of the known ones.
    """
    model, normalizer = specification["model"], specification.get("normalizer")
    if model["type"] != "BPE" or model.get("byte_fallback") or (normalizer or {"type": "NFC"})["type"] != "NFC":
        raise UnsupportedFeatureError(f"the tokenizer of {place} is not byte-level BPE, so it is not written", _REMEDY)
    split = specification["pre_tokenizer"] or {"type": "none"}
    parts = split["pretokenizers"] if split["type"] == "Sequence" else [split]
    name = _rule_of(parts)
    if name is None or bool(model.get("ignore_merges")) != (name == _WHOLE_WORDS_FIRST):
        raise UnsupportedFeatureError(f"the tokenizer of {place} splits text by a rule that is not known", _REMEDY)
    return name


def _rule_of(parts: list[dict[str, Any]]) -> str | None:
    match parts:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return "gpt-2"
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ]:
            return "smollm"
        case [
            {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            return _SPLITS.get(expression)
    return None


def _tokens(gguf: Any, specification: Any, folder: Path, rows: int) -> tuple[list[str], list[int]]:
    """Text and kind of every token id."""
    texts = {index: text for text, index in specification["model"]["vocab"].items()}
    kinds = dict.fromkeys(texts, gguf.TokenType.NORMAL)
    for added in specification["added_tokens"]:
        texts[added["id"]] = added["content"]
        kinds[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    if max(texts) >= rows:
        raise UserError(
            f"{folder}: token {max(texts)} has no row in the embedding of {rows}",
            "Save the model with the tokenizer that it was trained with.",
        )
    unused = gguf.TokenType.UNUSED
    return (
        [texts.get(index, f"[UNUSED{index}]") for index in range(rows)],
        [int(kinds.get(index, unused)) for index in range(rows)],
    )
