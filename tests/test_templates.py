"""Chat templates of all kinds: the prompt holds what people say, and ends where an answer stands, or it is one line."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from making import assert_one_line
from test_chat import NO_END, QWEN3, tokenizer
from ws.base.errors import UserError
from ws.base.files import write_json
from ws.base.records import plain
from ws.comparing.compare import ComparisonRun, Plan
from ws.comparing.findings import Strengths
from ws.model import template as template_module
from ws.model.chat import Chat, Message, Thinking, ask
from ws.model.loading import ChatModel
from ws.pocket import bpe

CHATML = bpe.CHAT_TEMPLATE
NAME = "some-org/some-model"
ANCHOR = "My answer: **"
HEADER = "<|im_start|>assistant\n"
HARMONY = (
    "<|start|>system<|message|>Valid channels: analysis, commentary, final.<|end|>"
    "{% for m in messages %}<|start|>{{ m['role'] }}{% if m['role'] == 'assistant' %}<|channel|>final{% endif %}"
    "<|message|>{{ m['content'] }}{{ '<|return|>' if m['role'] == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
HARMONY_MARKS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>")
COHERE = (
    "{% for m in messages %}<|START|><|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}<|START_RESPONSE|>{% endif %}"
    "{{ m['content'] }}{% if m['role'] == 'assistant' %}<|END_RESPONSE|>{% endif %}<|TURN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START|><|assistant|>"
    "{% if reasoning is defined and not reasoning %}<|START_THINKING|><|END_THINKING|><|START_RESPONSE|>"
    "{% else %}<|START_THINKING|>{% endif %}{% endif %}"
)
COHERE_MARKS = (
    "<|START|>", "<|TURN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_THINKING|>", "<|END_THINKING|>",
)  # fmt: skip
WANTS_SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('No system!') }}{% endif %}" + CHATML
MISTRAL = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
)
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def prompting(ending: str) -> str:
    """ChatML with a generation prompt that goes on."""
    return CHATML.replace("assistant\n{% endif %}", f"assistant\n{ending}{{% endif %}}")


def answering(template: str, before: str) -> str:
    """The template with `before` in front of what an assistant says."""
    said = "{{ message['content'] }}"
    return template.replace(said, f"{{{{ {before!r} if message['role'] == 'assistant' }}}}{said}")


SWITCH = prompting("{% if thinking %}<think>\n{% else %}</think>{% endif %}")
THINK = ("<think>", "</think>")


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    bpe.train([" Yes No no now not. The user says something\n\n\nor nothing\n" * 20], 340, path)
    return path


@pytest.fixture
def make(tokenizer_file: Path) -> Any:
    def made(template: Any, marks: Sequence[str] = (), thinking: Thinking = "off", **more: Any) -> Chat:
        return Chat(tokenizer(tokenizer_file, template, marks), thinking, NAME, **more)

    return made


# ---------------------------------------------------------------- what cannot be used


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ({"tool_use": CHATML, "rag": CHATML}, "rag, tool_use, but no default"),
        (WANTS_SYSTEM, "No system!"),
        (CHATML.replace("message['content']", "(message['content'] + '')[:9]"), "drops or changes the user's text"),
        (CHATML.replace("{% endfor %}", "{% endfr %}"), "endfr"),
        ("{{ today_string() }}" + CHATML, "'today_string' is undefined"),
        ("{{ messages[1]['content'] + 'x' }}" + CHATML, "a user message alone"),
        ("{{ 1 / 0 }}" + CHATML, "division by zero"),
        (CHATML.replace("['content']", "['content'][:5]"), "drops or changes the user's text"),
        (CHATML.replace("['content']", "['content'] | upper"), "drops or changes the user's text"),
        (CHATML.replace("{{ message['content'] }}", ""), "drops or changes the user's text"),
        (CHATML.replace("messages %}", "messages if message['role'] == 'user' %}"), "the assistant's text"),
        (prompting("<|muse|>"), "ends its generation prompt with '<|muse|>'"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_used_is_one_line_that_names_it(make: Any, template: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        make(template)
    assert_one_line(caught.value, f"the chat template of {NAME}", said, "chat_template.jinja")


def test_a_chat_template_saved_beside_named_ones_is_the_one_that_is_used(tokenizer_file: Path, tmp_path: Path) -> None:
    tokenizer(tokenizer_file, {"tool_use": "x", "rag": "y"}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"chat_template\.jinja"):
        Chat(AutoTokenizer.from_pretrained(tmp_path))
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    chat = Chat(AutoTokenizer.from_pretrained(tmp_path))
    assert chat.text(ask("hello")) == f"<|im_start|>user\nhello<|im_end|>\n{HEADER}"


def test_of_several_templates_only_the_default_one_says_what_the_model_can(make: Any) -> None:
    chat = make({"default": CHATML, "tool_use": QWEN3}, THINK)
    assert chat.thought_end is None and not chat.switches


def test_a_tokenizer_that_cannot_tell_two_questions_apart_is_refused() -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "Yes": 1}, unk_token="<unk>"))
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", chat_template=CHATML)
    with pytest.raises(UserError, match=f"tokenizer of {NAME}.*two different questions"):
        Chat(made, name=NAME)


# ---------------------------------------------------------------- what people say is in the prompt


@pytest.mark.parametrize("first", ["", "{% if messages[0]['content'] is string %}{{ 1 / 0 }}{% endif %}"])
def test_a_template_that_takes_parts_gets_parts(make: Any, first: str) -> None:
    chat, plain = make(first + PARTS), make(CHATML)
    assert chat.supports_system_turn
    for messages in (ask("Is it?"), ask("Or not?", "Be kind.")):
        assert chat.prompt(messages) == plain.prompt(messages)
        assert chat.supervised(messages, "Yes.") == plain.supervised(messages, "Yes.")


@pytest.mark.parametrize("marked", ["{{ message['content'] | trim }}", "{{ message['content'].strip() }}"])
def test_a_template_may_trim(make: Any, marked: str) -> None:
    chat = make(CHATML.replace("{{ message['content'] }}", marked))
    assert chat.text(ask(" hello\n")) == make(CHATML).text(ask("hello"))


@pytest.mark.parametrize("change", ["| upper", "[:9]"])
def test_a_system_prompt_that_the_template_would_change_leads_the_user_message(make: Any, change: str) -> None:
    content = f"{{{{ message['content'] {change} if message['role'] == 'system' else message['content'] }}}}"
    chat = make(CHATML.replace("{{ message['content'] }}", content))
    assert "Be kind to everybody.\n\nhello" in chat.text(ask("hello", "Be kind to everybody."))


def test_a_beginning_that_the_tokenizer_would_add_again_stands_once(tokenizer_file: Path) -> None:
    from tokenizers.processors import TemplateProcessing  # noqa: PLC0415

    made = tokenizer(tokenizer_file, "{{ bos_token }}" + CHATML, ["<s>"])
    made.bos_token = "<s>"
    backend = made.backend_tokenizer
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", made.bos_token_id)])
    assert made("hello")["input_ids"][0] == made.bos_token_id
    assert Chat(made).prompt(ask("hello")).count(made.bos_token_id) == 1


def test_a_tokenizer_without_a_fast_version_renders_too() -> None:
    made = ByT5Tokenizer()
    made.chat_template = CHATML.replace("<|im_end|>", "</s>")
    chat = Chat(made)
    ids, prompt_length = chat.supervised(ask("é </s>?"), "Yes")
    assert ids.count(made.eos_token_id) == 2, "the user's turn, the answer, and not the question"
    assert chat.decode(ids[prompt_length:]) == "Yes" and ids[-1] in chat.stop_ids


# ---------------------------------------------------------------- where the answer stands

OFF = {
    "opens <think>": (prompting("<think>\n"), THINK, "<think>\n\n</think>\n\n"),
    "opens <think>, turns have an empty one": (
        answering(prompting("<think>\n"), "<think></think>"), THINK, "<think>\n\n</think>\n\n"),
    "opens <thought>": (prompting("<thought>\n"), ("<thought>", "</thought>"), "<thought>\n\n</thought>\n\n"),
    "opens <seed:think>": (prompting("<seed:think>\n"), ("</seed:think>",), "<seed:think>\n\n</seed:think>\n\n"),
    "opens [THINK]": (prompting("[THINK]\n"), ("[THINK]", "[/THINK]"), "[THINK]\n\n[/THINK]\n\n"),
    "opens a mark without tokens": (prompting("<thinking>\n"), (), "<thinking>\n\n</thinking>\n\n"),
    "opens <|channel>thought": (
        prompting("<|channel>thought\n"), ("<channel|>",), "<|channel>thought\n\n<channel|>\n\n"),
    "opens START_THINKING": (prompting("<|START_THINKING|>"), COHERE_MARKS, "<|START_THINKING|>\n<|END_THINKING|>\n\n"),
    "closes by itself": (prompting("<think>\n\n</think>\n\n"), THINK, "<think>\n\n</think>\n\n"),
    "only a closing": (SWITCH, THINK, "</think>"),
    "says how a turn goes on": (
        answering(prompting("<think>\n"), "<think>\n</think>\n"), THINK, "<think>\n</think>\n"),
    "no thought": (CHATML, THINK, ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", OFF)
def test_thinking_off_ends_outside_of_any_thought(make: Any, kind: str) -> None:
    template, marks, ending = OFF[kind]
    chat = make(template, marks)
    for messages in (ask("hello"), ask("hello", "Be kind."), ask("<think>"), ask(ending.strip() or "x")):
        assert chat.text(messages, ANCHOR).endswith(f"<|im_end|>\n{HEADER}{ending}{ANCHOR}")
    ids, prompt_length = chat.supervised(ask("hello"), "Yes.")
    assert chat.tokenizer.decode(ids[:prompt_length]).endswith(HEADER + ending)


@pytest.mark.parametrize("said", ["think", "assistant", "<", "<think>", "\n", ">\n", "im_start"])
def test_what_a_user_says_never_decides_where_the_answer_stands(make: Any, said: str) -> None:
    assert make(prompting("<think>\n"), THINK).text(ask(said)).endswith(f"{HEADER}<think>\n\n</think>\n\n")
    assert make(CHATML, THINK).text(ask(said)).endswith(f"<|im_end|>\n{HEADER}")


def test_an_answer_is_given_in_the_channel_of_answers(make: Any) -> None:
    chat = make(HARMONY, HARMONY_MARKS)
    assert chat.text(ask("hello"), ANCHOR).endswith(
        f"hello<|end|><|start|>assistant<|channel|>final<|message|>{ANCHOR}"
    )
    assert chat.turn_end == "<|return|>"
    assert make(HARMONY, HARMONY_MARKS, "on").text(ask("hello")).endswith("hello<|end|><|start|>assistant")


def test_a_header_that_every_answer_has_is_no_thought(make: Any) -> None:
    chat = make(COHERE, COHERE_MARKS)
    assert chat.switches == {"reasoning": False}
    assert chat.text(ask("hello")).endswith("<|START_THINKING|><|END_THINKING|><|START_RESPONSE|>")
    assert chat.turn_end == "<|END_RESPONSE|>"


@pytest.mark.parametrize("thinking", ["off", "on"])
def test_a_template_without_generation_prompt_gets_the_header_of_its_own_turns(make: Any, thinking: Thinking) -> None:
    assert make(NO_END, (), thinking).text(ask("hello", "Be kind.")) == "system: Be kind.\nuser: hello\nassistant: "
    assert make(MISTRAL, (), thinking).text(ask("hello")) == "[INST] hello [/INST]"


@pytest.mark.parametrize(
    ("template", "marks", "ending"),
    [(SWITCH, THINK, "<think>\n"), (QWEN3, THINK, ""), (prompting("<thought>\n"), (), "<thought>\n"), (CHATML, (), "")],
)
def test_thinking_on_leaves_the_thought_to_the_model(
    make: Any, template: str, marks: Sequence[str], ending: str
) -> None:
    assert make(template, marks, "on").text(ask("hello")).endswith(HEADER + ending)


def test_the_policy_goes_by_every_name_that_the_template_asks_for(make: Any) -> None:
    for template, names in (
        (SWITCH, {"thinking"}),
        (QWEN3, {"enable_thinking"}),
        (COHERE, {"reasoning"}),
        (CHATML, set()),
    ):
        for thinking in ("off", "on"):
            assert make(template, (*THINK, *COHERE_MARKS), thinking).switches == dict.fromkeys(names, thinking == "on")
    named_like_it = CHATML.replace(
        "message['content']", "message['thinking'] or message.thinking or message['content']"
    )
    assert make(named_like_it).switches == {}


# ---------------------------------------------------------------- guided thoughts

GUIDED = {
    "<thought>": (prompting("<thought>\n"), ("<thought>", "</thought>"), "<thought>\n", "</thought>", "\n\n"),
    "[THINK]": (prompting("[THINK]"), ("[THINK]", "[/THINK]"), "[THINK]", "[/THINK]", "\n\n"),
    "unmentioned end": (prompting("<think>\n"), THINK, "<think>\n", "</think>", "\n\n"),
    "switch": (SWITCH, THINK, "<think>\n", "</think>", "\n\n"),
    "left to the model": (QWEN3, THINK, "<think>\n", "</think>", "\n\n"),
    "START_THINKING": (COHERE, COHERE_MARKS, "<|START_THINKING|>", "<|END_THINKING|>", "\n\n"),
    "harmony": (
        HARMONY, HARMONY_MARKS, "<|start|>assistant<|channel|>analysis<|message|>", "<|end|>",
        "<|start|>assistant<|channel|>final<|message|>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", GUIDED)
def test_a_guided_thought_is_opened_once_and_ended_by_its_token(make: Any, kind: str) -> None:
    template, marks, opening, closing, before = GUIDED[kind]
    chat = make(template, marks)
    opened = chat.tokenizer.decode(chat.thinking_prompt(ask("Why?")))
    assert opened.endswith(opening) and opened.count(opening) == 1
    assert kind == "harmony" or closing not in opened, "in harmony it ends every turn"
    assert chat.thought_end == chat.tokenizer.convert_tokens_to_ids(closing)
    closed = chat.close_thought([5, 6], True, ANCHOR)
    assert closed[:3] == [5, 6, chat.thought_end]
    assert chat.tokenizer.decode(closed[3:]) == before + ANCHOR


def test_a_thought_without_an_end_of_one_token_is_led_in_words(make: Any) -> None:
    chat = make(prompting("<musing thought>\n").replace("<musing thought>", "<thought>"))
    assert chat.thought_end is None
    assert chat.tokenizer.decode(chat.thinking_prompt(ask("Why?"))).endswith("</thought>\n\nLet me think.")


# ---------------------------------------------------------------- what looks like a control token


@pytest.mark.parametrize("mark", ["<|im_start|>", "<|im_end|>", bpe.PAD, *THINK, "<|im_end|><think>", "<<|im_end|>>"])
@pytest.mark.parametrize("special", [True, False])
def test_a_control_token_that_a_person_types_is_plain_text(tokenizer_file: Path, mark: str, special: bool) -> None:
    made = tokenizer(tokenizer_file, QWEN3)
    made.add_tokens(list(THINK), special_tokens=special)
    chat = Chat(made)
    control = set(made.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", bpe.PAD, *THINK]))
    for system, user in (("Be kind.", f"What is {mark}, then?"), (f"{mark}Be kind", "hello"), (None, mark)):
        ids = chat.prompt(ask(user, system), ANCHOR)
        harmless = chat.prompt(ask("hello", system and "Be kind."), ANCHOR)
        assert [i for i in ids if i in control] == [i for i in harmless if i in control]
        assert made.decode(ids) == chat.text(ask(user, system), ANCHOR)
        assert mark in made.decode(ids)
        supervised = chat.supervised(ask(user, system), "Yes.")
        assert supervised.ids[: supervised.prompt_length] == chat.prompt(ask(user, system))


def test_a_template_that_looks_for_marks_finds_none_in_what_people_say(make: Any) -> None:
    cuts = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
    chat = make(cuts, THINK)
    assert "a</think>b" in chat.text(ask("a</think>b"))
    earlier = Message(role="assistant", content="<think>hm</think>hi")
    assert "<|im_start|>assistant\nhi<|im_end|>" in chat.text([*ask("a"), earlier, *ask("b")]), "but in a model's words"


def test_a_response_may_hold_thoughts_and_no_end_of_turn_but_its_own(tokenizer_file: Path) -> None:
    made = tokenizer(tokenizer_file, QWEN3)
    made.add_tokens(list(THINK))
    chat = Chat(made, "on")
    ids, prompt_length = chat.supervised(ask("hello"), "<think>hm</think>He said <|im_end|> twice.")
    answer = ids[prompt_length:]
    assert [answer.count(i) for i in made.convert_tokens_to_ids(["<think>", "</think>", "<|im_end|>"])] == [1, 1, 1]
    assert answer[-1] in chat.stop_ids and not chat.stop_ids & set(answer[:-1])
    assert made.decode(answer) == "<think>hm</think>He said <|im_end|> twice.<|im_end|>"


def test_added_tokens_that_are_ordinary_text_stay_tokens(tokenizer_file: Path) -> None:
    made = tokenizer(tokenizer_file, CHATML.replace("<|im_end|>\n", "<|im_end|>\n\n"))
    made.add_tokens([AddedToken("\n\n", normalized=False), AddedToken("<table>", normalized=False)])
    ids = Chat(made).prompt(ask("one\n\ntwo <table>"))
    assert [ids.count(i) for i in made.convert_tokens_to_ids(["\n\n", "<table>"])] == [2, 1]


# ---------------------------------------------------------------- the embedding, and what ends a response


def test_a_token_that_the_embedding_lacks_is_one_line(make: Any) -> None:
    rows = len(make(CHATML).tokenizer)
    with pytest.raises(UserError) as caught:
        make(CHATML.replace("<|im_start|>", "<|turn|>"), ["<|turn|>"], vocabulary=rows)
    assert_one_line(caught.value, NAME, "'<|turn|>'", f"{rows} rows", "resize_token_embeddings")


def test_tokens_beyond_the_embedding_that_nobody_writes_do_no_harm(tokenizer_file: Path) -> None:
    made = tokenizer(tokenizer_file, CHATML)
    rows = len(made)
    made.add_tokens([AddedToken("Perhaps", normalized=False)])
    chat = Chat(made, vocabulary=rows)
    assert all(token < rows for word in ("Yes", "No") for sequence in chat.answers(word) for token in sequence)
    for write in (lambda: chat.prompt(ask("Perhaps")), lambda: chat.answers("Perhaps")):
        with pytest.raises(UserError, match="'Perhaps' as token"):
            write()


def test_every_end_of_generation_config_ends_a_response(make: Any) -> None:
    plain = make(CHATML).stop_ids
    assert make(CHATML, ends=[7, 9]).stop_ids == plain | {7, 9}
    assert make(CHATML, ends=[7, 10**6], vocabulary=1000).stop_ids == plain | {7}


def test_without_an_end_of_its_own_the_tokenizer_takes_that_of_generation_config(tokenizer_file: Path) -> None:
    made = tokenizer(tokenizer_file, NO_END, eos=None)
    (end,) = made.convert_tokens_to_ids(["<|im_end|>"])
    assert Chat(made, ends=[end]).turn_end == "<|im_end|>"


# ---------------------------------------------------------------- keys of what is kept


class _Tomorrow(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return datetime(2031, 5, 17)


DATED = "{{ strftime_now('%d %b %Y') }}" + CHATML


def test_a_key_tells_what_is_rendered(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {
        "plain": make(CHATML), "other template": make(prompting("So: ")), "a switch": make(QWEN3, THINK),
        "a switch, on": make(QWEN3, THINK, "on"), "policy": make(CHATML, (), "on"), "dated": make(DATED),
        "other ends": make(CHATML, ends=[7]), "other header": make(NO_END),
    }  # fmt: skip
    monkeypatch.setattr(template_module, "datetime", _Tomorrow)
    keys["another day"] = make(DATED)
    found = {kind: chat.rendering_key for kind, chat in keys.items()}
    assert len(set(found.values())) == len(found), found
    assert make("{# a remark #}" + CHATML).rendering_key == found["plain"], "a remark is not rendered"
    assert make(DATED).rendering_key == found["another day"], "one day, one key"


def test_a_key_tells_tokenizers_apart(tokenizer_file: Path, tmp_path: Path) -> None:
    bpe.train(["Is the sky blue? What does it mean?" * 20], 340, tmp_path / "tokenizer.json")
    one, other = (Chat(tokenizer(file, CHATML)).rendering_key for file in (tokenizer_file, tmp_path / "tokenizer.json"))
    assert one != other


class _Recorder:
    """A run folder in which everything is there already; it remembers what stages depend on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.inputs: list[Any] = []

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def build(self, _stage: str, inputs: Any, *_: object) -> SimpleNamespace:
        self.inputs.append(inputs)
        return SimpleNamespace(built=False)


def test_what_a_comparison_keeps_is_keyed_by_what_was_rendered(make: Any, qwen: ChatModel, tmp_path: Path) -> None:
    pl.DataFrame().write_parquet(tmp_path / "scores.parquet")
    write_json(tmp_path / "calibration.json", plain(Strengths({"0.1": {}}, {})))
    found = []
    for template in (CHATML, "{# a remark #}" + CHATML, NO_END):
        comparison = object.__new__(ComparisonRun)
        comparison.model = replace(qwen, chat=make(template))
        comparison.sources = SimpleNamespace(first=("lora", 0))  # type: ignore[assignment]
        comparison.plan, comparison.has_measured, folder = Plan(budgets=(0.1,)), False, _Recorder(tmp_path)
        comparison.folder = folder  # type: ignore[assignment]
        comparison._scored("scores", [], [])
        comparison.strengths([], [])
        found.append(folder.inputs)
    assert found[0] == found[1]
    assert all(one != other for one, other in zip(found[0], found[2], strict=True)) and len(found[0]) == 2


def test_a_process_renders_one_date_and_says_so(
    make: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(template_module, "datetime", _Tomorrow)
    chat = make(DATED)
    assert NAME in capsys.readouterr().err
    monkeypatch.undo()
    assert chat.text(ask("hello")).startswith("17 May 2031<|im_start|>")
    assert copy.copy(chat).prompt(ask("hello")) == chat.prompt(ask("hello"))
