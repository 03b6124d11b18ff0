"""One renderer: what is asked, supervised and scored is exactly what the template says, and nothing beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ws.base.errors import UserError
from ws.model.chat import PLAIN_TEMPLATE, Chat, Message, Thinking, ask
from ws.pocket import bpe

QWEN3 = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
"""Thinks by default; the switch puts an empty thought into the prompt."""

OPENS_BY_ITSELF = bpe.CHAT_TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
"""Opens a thought in every generation prompt, without a switch."""

RAISES_ON_SYSTEM = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] }}<end_of_turn>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
DROPS_SYSTEM = (
    "{% for message in messages if message['role'] != 'system' %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
NO_END = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"

_TEXTS = [" Yes Yes yes YES No no now not Yesterday eyes. The user says something\n\n\nor nothing\n" * 20]


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    bpe.train(_TEXTS, 340, path)
    return path


def tokenizer(file: Path, template: str | None, specials: Sequence[str] = (), eos: str | None = bpe.PAD) -> Any:
    made = PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token=eos, pad_token=bpe.PAD)
    made.add_special_tokens({"additional_special_tokens": [bpe.TURN_START, bpe.TURN_END, *specials]})
    made.chat_template = template
    return made


def thinker(file: Path, template: str, special: bool = True) -> Any:
    """A tokenizer with thought marks, as special tokens or (as in Qwen3) as ordinary added ones."""
    made = tokenizer(file, template)
    made.add_tokens(["<think>", "</think>"], special_tokens=special)
    return made


GEMMA_TOKENS = ("<start_of_turn>", "<end_of_turn>", "<eos>")
LLAMA3_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


# ---------------------------------------------------------------- system turns


@pytest.mark.parametrize("empty", [None, "", "  \n"])
def test_an_empty_system_prompt_is_no_system_turn(tokenizer_file: Path, empty: str | None) -> None:
    chat = Chat(tokenizer(tokenizer_file, bpe.CHAT_TEMPLATE))
    assert ask("hello", empty) == [Message(role="user", content="hello")]
    assert chat.text(ask("hello", empty)) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_an_empty_system_turn_that_somebody_else_made_is_dropped(tokenizer_file: Path) -> None:
    chat = Chat(tokenizer(tokenizer_file, bpe.CHAT_TEMPLATE))
    with_turn = [Message(role="system", content=" "), *ask("hello")]
    assert chat.text(with_turn) == chat.text(ask("hello"))


def test_a_system_prompt_is_a_turn_where_the_template_has_one(tokenizer_file: Path) -> None:
    chat = Chat(tokenizer(tokenizer_file, bpe.CHAT_TEMPLATE))
    assert chat.supports_system_turn
    assert chat.text(ask("hello", "Be kind.")).startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n")


@pytest.mark.parametrize("template", [RAISES_ON_SYSTEM, DROPS_SYSTEM], ids=["raises", "drops"])
def test_without_a_system_role_the_system_prompt_leads_the_first_user_message(
    tokenizer_file: Path, template: str
) -> None:
    chat = Chat(tokenizer(tokenizer_file, template, GEMMA_TOKENS))
    assert not chat.supports_system_turn
    assert chat.text(ask("hello", "Be kind.")) == chat.text(ask("Be kind.\n\nhello"))
    later = [Message(role="assistant", content="hi"), Message(role="user", content="bye")]
    assert chat.text([*ask("hello", "Be kind."), *later]) == chat.text([*ask("Be kind.\n\nhello"), *later])
    assert "Be kind." not in chat.text(ask("hello"))


# ---------------------------------------------------------------- thinking


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("template", [QWEN3, OPENS_BY_ITSELF], ids=["switch", "opens by itself"])
def test_thinking_off_ends_the_prompt_with_one_closed_thought(
    tokenizer_file: Path, template: str, special: bool
) -> None:
    made = thinker(tokenizer_file, template, special)
    opening, closing = made.convert_tokens_to_ids(["<think>", "</think>"])
    prompt = Chat(made, "off").prompt(ask("hello", "Be kind."))
    assert prompt.count(opening) == prompt.count(closing) == 1
    assert prompt.index(opening) < prompt.index(closing)
    assert made.decode(prompt[prompt.index(closing) + 1 :]) == "\n\n"
    assert Chat(made, "off").text(ask("hello")).endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize(("template", "openings"), [(QWEN3, 0), (OPENS_BY_ITSELF, 1)])
def test_thinking_on_leaves_the_thought_to_the_model(tokenizer_file: Path, template: str, openings: int) -> None:
    made = thinker(tokenizer_file, template)
    opening, closing = made.convert_tokens_to_ids(["<think>", "</think>"])
    prompt = Chat(made, "on").prompt(ask("hello"))
    assert prompt.count(closing) == 0
    assert prompt.count(opening) == openings


def test_an_anchor_follows_the_closed_thought(tokenizer_file: Path) -> None:
    made = thinker(tokenizer_file, OPENS_BY_ITSELF)
    assert Chat(made, "off").text(ask("hello"), "My answer: **").endswith("</think>\n\nMy answer: **")


def test_a_template_without_thoughts_gets_none(tokenizer_file: Path) -> None:
    made = thinker(tokenizer_file, bpe.CHAT_TEMPLATE)
    assert Chat(made, "off").text(ask("hello")) == Chat(made, "on").text(ask("hello"))
    assert "think" not in Chat(made, "off").text(ask("hello"))


def test_a_closed_thought_of_an_earlier_turn_is_left_alone(tokenizer_file: Path) -> None:
    chat = Chat(thinker(tokenizer_file, bpe.CHAT_TEMPLATE))
    earlier = Message(role="assistant", content="<think>\nhm\n</think>\n\nhi")
    assert chat.text([*ask("hello"), earlier, *ask("bye")]).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("template", [bpe.CHAT_TEMPLATE, None], ids=["ChatML", "plain"])
def test_a_user_may_write_about_thought_marks(tokenizer_file: Path, template: str | None) -> None:
    chat = Chat(tokenizer(tokenizer_file, template))
    assert "</think>" not in chat.text(ask("What does <think> mean?"))


def test_an_anchor_cannot_be_placed_while_the_model_thinks(tokenizer_file: Path) -> None:
    chat = Chat(thinker(tokenizer_file, QWEN3), "on")
    for render in (chat.text, chat.prompt):
        with pytest.raises(UserError, match="--thinking off"):
            render(ask("hello"), "My answer: **")


def test_an_unknown_thinking_policy_is_refused(tokenizer_file: Path) -> None:
    sometimes: Any = "sometimes"
    with pytest.raises((UserError, TypeError)):
        Chat(tokenizer(tokenizer_file, QWEN3), sometimes)


def test_the_rendering_key_tells_what_is_rendered_and_the_policy(tokenizer_file: Path) -> None:
    policies: tuple[Thinking, ...] = ("off", "on")
    keys = {
        (template, thinking): Chat(tokenizer(tokenizer_file, template), thinking).rendering_key
        for template in (QWEN3, OPENS_BY_ITSELF)
        for thinking in policies
    }
    assert len(set(keys.values())) == 3
    assert keys[QWEN3, "off"] == keys[OPENS_BY_ITSELF, "off"], "two templates that render the same tokens"


# ---------------------------------------------------------------- no template


def test_a_tokenizer_without_template_gets_the_plain_one_and_a_warning(
    tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tokenizer(tokenizer_file, None)
    chat = Chat(made, name="some-base-model")
    out, err = capsys.readouterr()
    assert out == ""
    assert "warning: some-base-model has no chat template" in err
    assert not chat.has_own_template
    assert chat.text(ask("hello", "Be kind."), "My") == "System:\nBe kind.\n\nUser:\nhello\n\nAssistant:\nMy"
    assert made.chat_template is None, "the caller's tokenizer stays as it was"


def test_a_tokenizer_with_template_gives_no_warning(tokenizer_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Chat(tokenizer(tokenizer_file, bpe.CHAT_TEMPLATE)).has_own_template
    assert capsys.readouterr() == ("", "")


# ---------------------------------------------------------------- supervised

_TEMPLATES = {
    "ChatML": (bpe.CHAT_TEMPLATE, ()),
    "plain": (PLAIN_TEMPLATE, ()),
    "Gemma": (RAISES_ON_SYSTEM, GEMMA_TOKENS),
    "Llama 3": (LLAMA3, LLAMA3_TOKENS),
    "Qwen 3": (QWEN3, ("<think>", "</think>")),
    "opens by itself": (OPENS_BY_ITSELF, ("<think>", "</think>")),
    "no end": (NO_END, ()),
}


@pytest.fixture(scope="session")
def chats(tokenizer_file: Path) -> dict[str, Chat]:
    return {name: Chat(tokenizer(tokenizer_file, *how)) for name, how in _TEMPLATES.items()}


@pytest.mark.parametrize("name", _TEMPLATES)
@given(response=st.text(st.sampled_from("aehnoswyYN \n.,!?é☃"), max_size=12))
@example(response="")
@example(response="\n\nYes")
@example(response=" Yes")
@settings(max_examples=25, deadline=None)
def test_the_prompt_is_a_prefix_and_the_rest_is_the_response_with_its_end(
    chats: dict[str, Chat], name: str, response: str
) -> None:
    chat = chats[name]
    messages = ask("The user says something", "Be kind.")
    ids, prompt_length = chat.supervised(messages, response)
    assert ids[:prompt_length] == chat.prompt(messages)
    assert len(ids) > prompt_length
    assert ids[-1] in chat.stop_ids
    assert not chat.stop_ids & set(ids[prompt_length:-1])
    assert chat.tokenizer.decode(ids[prompt_length:]) == response + chat.turn_end


def test_where_tokens_would_merge_across_the_boundary_the_prompt_stays_what_is_sampled_from(
    tokenizer_file: Path,
) -> None:
    chat = Chat(tokenizer(tokenizer_file, bpe.CHAT_TEMPLATE))
    whole = chat.prompt(ask("hello"), "\n\nYes")
    prompt = chat.prompt(ask("hello"))
    assert whole[: len(prompt)] != prompt, "the two line breaks are one token here, else this tests nothing"
    assert chat.supervised(ask("hello"), "\n\nYes").ids[: len(prompt)] == prompt


@pytest.mark.parametrize("name", ["Qwen 3", "opens by itself"])
def test_the_empty_thought_belongs_to_the_prompt(chats: dict[str, Chat], name: str) -> None:
    chat = chats[name]
    ids, prompt_length = chat.supervised(ask("hello"), "Yes")
    marks = set(chat.tokenizer.convert_tokens_to_ids(["<think>", "</think>"]))
    assert marks <= set(ids[:prompt_length])
    assert not marks & set(ids[prompt_length:])


# ---------------------------------------------------------------- ends of turns


@pytest.mark.parametrize(
    ("name", "turn_end", "stops"),
    [
        ("ChatML", "<|im_end|>", {"<|im_end|>", bpe.PAD}),
        ("plain", bpe.PAD, {bpe.PAD}),
        ("Gemma", "<end_of_turn>", {"<end_of_turn>", bpe.PAD}),
        ("Llama 3", "<|eot_id|>", {"<|eot_id|>", bpe.PAD}),
        ("Qwen 3", "<|im_end|>", {"<|im_end|>", bpe.PAD}),
        ("opens by itself", "<|im_end|>", {"<|im_end|>", bpe.PAD}),
        ("no end", bpe.PAD, {bpe.PAD}),
    ],
)
def test_a_turn_ends_with_the_first_stop_token(
    chats: dict[str, Chat], name: str, turn_end: str, stops: set[str]
) -> None:
    chat = chats[name]
    assert chat.turn_end == turn_end
    assert chat.stop_ids == set(chat.tokenizer.convert_tokens_to_ids(sorted(stops)))


def test_text_before_the_stop_token_belongs_to_the_end(tokenizer_file: Path) -> None:
    template = bpe.CHAT_TEMPLATE.replace("{{ message['content'] }}<|im_end|>", "{{ message['content'] }}\n<|im_end|>")
    assert Chat(tokenizer(tokenizer_file, template)).turn_end == "\n<|im_end|>"


def test_without_any_stop_token_there_is_nothing_to_train_on(tokenizer_file: Path) -> None:
    chat = Chat(tokenizer(tokenizer_file, NO_END, eos=None))
    with pytest.raises(UserError, match="eos_token"):
        _ = chat.turn_end


def test_decoding_leaves_out_special_tokens_and_outer_space(tokenizer_file: Path) -> None:
    chat = Chat(tokenizer(tokenizer_file, bpe.CHAT_TEMPLATE))
    ids = chat.tokenizer("\n Yes no \n<|im_end|>")["input_ids"]
    assert chat.decode(ids) == "Yes no"


# ---------------------------------------------------------------- answers

_WORDS = [
    *("Yes", "yes", "YES", "▁Yes", "▁yes", "ĠYes", "Ġyes", "Ċyes", "##yes"),
    *("Yesterday", "eyes", "yes.", "▁yesno", "##yesno"),
    *("No", "no", "NO", "▁No", "Ġno", "##no"),
    *("now", "not", "node", "Ġnow", "▁not", "no,", "know", "##now"),
]
_SPACED = [" Yes", "\tno"]


def word_level(words: Sequence[str]) -> Any:
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<s>", *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", eos_token="<s>", chat_template=bpe.CHAT_TEMPLATE
    )


@pytest.mark.parametrize(
    ("answer", "meant"),
    [
        ("Yes", {"Yes", "yes", "YES", "▁Yes", "▁yes", "ĠYes", "Ġyes", "Ċyes", "##yes", " Yes"}),
        ("yes", {"Yes", "yes", "YES", "▁Yes", "▁yes", "ĠYes", "Ġyes", "Ċyes", "##yes", " Yes"}),
        ("No", {"No", "no", "NO", "▁No", "Ġno", "##no", "\tno"}),
        ("not", {"not", "▁not"}),
    ],
)
def test_an_answer_is_every_token_that_is_the_word_and_none_that_only_contains_it(answer: str, meant: set[str]) -> None:
    made = word_level([*_WORDS, *_SPACED])
    sequences = Chat(made).answers(answer)
    assert all(len(sequence) == 1 for sequence in sequences)
    found = [made.convert_ids_to_tokens(token) for (token,) in sequences]
    assert set(found) == meant
    assert len(found) == len(meant)


def test_a_trained_vocabulary_has_the_answers_in_all_their_forms(tokenizer_file: Path) -> None:
    chat = Chat(tokenizer(tokenizer_file, bpe.CHAT_TEMPLATE))
    forms = [{chat.tokenizer.decode(sequence) for sequence in chat.answers(word)} for word in ("Yes", "No")]
    assert {" Yes", " yes", " YES"} <= forms[0]
    assert {" No", " no"} <= forms[1]
    for word, found in zip(("yes", "no"), forms, strict=True):
        assert {form.strip().casefold() for form in found} == {word}
    assert {"Ġnot", "Ġnow", "ĠYesterday"} <= set(chat.tokenizer.get_vocab()), "else there is nothing to confuse"


def test_a_special_token_is_no_answer() -> None:
    made = word_level(["Yes"])
    made.add_special_tokens({"additional_special_tokens": ["yes"]})
    assert Chat(made).answers("yes") == [[made.convert_tokens_to_ids("Yes")]]


@pytest.mark.parametrize("word", ["Perhaps", "Agree", "☃", "two words"])
def test_an_answer_without_a_token_of_its_own_is_its_spelling(tokenizer_file: Path, word: str) -> None:
    chat = Chat(tokenizer(tokenizer_file, bpe.CHAT_TEMPLATE))
    (spelled,) = chat.answers(word)
    assert chat.tokenizer.decode(spelled) == word
    assert len(spelled) > 1


@pytest.mark.parametrize(("word", "forms"), [("sí", {" sí", " Sí"}), ("é", {"é"})])
def test_answers_beyond_ascii_are_found_by_their_text(tmp_path: Path, word: str, forms: set[str]) -> None:
    bpe.train([" sí Sí no" * 50], 300, tmp_path / "tokenizer.json")
    chat = Chat(tokenizer(tmp_path / "tokenizer.json", bpe.CHAT_TEMPLATE))
    assert {"ĠsÃŃ", "ĠSÃŃ"} <= set(chat.tokenizer.get_vocab())
    assert forms <= {chat.tokenizer.decode(sequence) for sequence in chat.answers(word)}


@pytest.mark.parametrize("kind", ["unknown token", "no token at all", "loses case"])
def test_an_answer_that_cannot_be_written_is_a_user_error(kind: str) -> None:
    if kind == "unknown token":
        made = word_level(["Yes"])
    else:
        letters = {letter: number for number, letter in enumerate("abemy")}
        backend = Tokenizer(models.BPE(letters, []))
        if kind == "loses case":
            from tokenizers import normalizers  # noqa: PLC0415

            backend.normalizer = normalizers.Lowercase()
        made = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=bpe.CHAT_TEMPLATE)
    with pytest.raises(UserError, match="cannot encode the answer 'Maybe'"):
        Chat(made).answers("Maybe")
