"""Train a small byte-level BPE tokenizer with a ChatML template, for models that are made here."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ws.base.files import atomic_file

PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train(texts: Iterable[str], vocabulary: int, path: Path) -> None:
    """Write `tokenizer.json`: `vocabulary` entries, the three turn tokens first, all bytes included."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415 - only here

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    with atomic_file(path) as temporary:
        tokenizer.save(str(temporary))


def load(path: Path, template: str | None = CHAT_TEMPLATE) -> Any:
    """The tokenizer of a `tokenizer.json` as transformers uses it; `template` None leaves it without one."""
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415 - heavy import, late

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token=TURN_END, pad_token=PAD)
    tokenizer.add_special_tokens({"additional_special_tokens": [TURN_START]})
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def as_turn(role: str, content: str) -> tuple[str, str, str]:
    """One turn as `CHAT_TEMPLATE` renders it, in pieces: header, content with its end, line break."""
    return f"{TURN_START}{role}\n", f"{content}{TURN_END}", "\n"
