"""What the model writes itself before it is measured: guided choices and greedy replies."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pytest
import torch
from torch import nn

from making import assert_one_line, random_direction
from test_chat import QWEN3, thinker
from ws.algebra.delta import Alpha
from ws.base.errors import UserError
from ws.edit.condition import Condition, Edit, Undo
from ws.edit.steering import steer
from ws.eval import side_effects
from ws.measure.divergence import distinct_ngrams
from ws.measure.probe import Probe, ProbeRow
from ws.measure.score import holds_json, score
from ws.model import loading
from ws.model.chat import Chat, ask
from ws.model.loading import ChatModel
from ws.pocket import bpe

QUESTIONS = ("Do cats like milk?", "I think that the moon is made of old bread. Do you agree?", "Why?", "Yes or No?")
ANCHOR = "My answer: **"
THOUGHT = 7


def choices() -> Probe:
    return Probe("own", "choice", tuple(ProbeRow(str(i), tuple(ask(q)), ANCHOR) for i, q in enumerate(QUESTIONS)))


@pytest.fixture(scope="module")
def thinking(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChatModel]:
    """The random Qwen3 model with a template and a token for thoughts, as Qwen3 has them."""
    folder = tmp_path_factory.mktemp("thinking") / "thinker"
    shutil.copytree(tiny_folders["qwen3"], folder)
    tokenizer = thinker(folder / "tokenizer.json", QWEN3, special=False)
    tokenizer.eos_token = bpe.TURN_END
    model = loading.load(str(tiny_folders["qwen3"]))
    model.network.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    yield ChatModel("thinker", model.network.requires_grad_(False), Chat(tokenizer, "off", "thinker"))


@dataclass(frozen=True, eq=False)
class Says:
    """An Effect that makes one token the most likely one everywhere."""

    token: int
    base: str

    @property
    def content_key(self) -> str:
        """What tells it apart."""
        return f"says {self.token} on {self.base}"

    def attach(self, network: nn.Module, alpha: Alpha) -> Undo:
        """Raise its logit."""

        def hook(_module: nn.Module, _inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            raised = output.clone()
            raised[..., self.token] += 50 * torch.as_tensor(alpha)
            return raised

        return network.get_output_embeddings().register_forward_hook(hook).remove  # type: ignore[no-any-return, operator]


def of(table: pl.DataFrame, metric: str, edit: str = "none") -> dict[str, float]:
    rows = table.filter((pl.col("metric") == metric) & (pl.col("edit") == edit))
    return dict(zip(rows["row"], rows["value"], strict=True))


def by_hand(model: ChatModel, question: str) -> tuple[float, float]:
    """One guided choice without the engine: think greedily, close, read; log-ratio and whether it was forced."""
    chat = model.chat
    prompt = chat.thinking_prompt(ask(question))
    ids = torch.tensor([prompt])
    end = chat.thought_end
    assert end is not None
    closed = False
    with torch.no_grad():
        for _ in range(THOUGHT):
            token = int(model.network(input_ids=ids).logits[0, -1].argmax())
            if token == end or token in chat.stop_ids:
                closed = token == end
                break
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        whole = [*prompt, *chat.close_thought(ids[0, len(prompt) :].tolist(), closed, ANCHOR)]
        logp = model.network(input_ids=torch.tensor([whole])).logits[0, -1].log_softmax(-1)
    yes, no = (torch.tensor([i for (i,) in chat.answers(word)]) for word in ("Yes", "No"))
    return float(logp[yes].logsumexp(0) - logp[no].logsumexp(0)), float(not closed)


def test_a_guided_choice_is_read_after_the_thought_that_the_model_writes(thinking: ChatModel) -> None:
    table = score(thinking, [choices().guided(THOUGHT)], [Condition()])
    for number, question in enumerate(QUESTIONS):
        ratio, forced = by_hand(thinking, question)
        assert of(table, "logratio")[str(number)] == pytest.approx(ratio, abs=1e-4)
        assert of(table, "forced")[str(number)] == forced
    assert set(of(table, "tokens").values()) == {float(THOUGHT)}


def test_the_thought_is_written_under_the_edit(thinking: ChatModel) -> None:
    direction = random_direction(thinking, relative_norm=0.5)
    table = score(thinking, [choices().guided(THOUGHT)], [Condition.of(Edit("d", direction), 1.0)])
    with steer(thinking, direction, 1.0):
        expected = [by_hand(thinking, question)[0] for question in QUESTIONS]
    assert list(of(table, "logratio", "d").values()) == pytest.approx(expected, abs=1e-4)
    assert of(table, "logratio", "d") != of(table, "logratio")


def test_a_model_that_ends_its_thought_is_not_forced(thinking: ChatModel) -> None:
    end = thinking.chat.thought_end
    assert end is not None
    ending = Edit("ends", Says(end, thinking.fingerprint))
    stopping = Edit("stops", Says(thinking.chat.tokenizer.eos_token_id, thinking.fingerprint))
    table = score(thinking, [choices().guided(THOUGHT)], [Condition.of(ending, 1.0), Condition.of(stopping, 1.0)])
    assert set(of(table, "forced", "ends").values()) == {0.0}
    assert set(of(table, "forced", "stops").values()) == {1.0}  # the turn ended, not the thought
    assert set(of(table, "tokens", "ends").values()) == set(of(table, "tokens", "stops").values()) == {0.0}


def test_the_end_of_a_thought_is_the_token_and_never_its_spelling(thinking: ChatModel) -> None:
    chat = thinking.chat
    for closed in (True, False):
        ids = chat.close_thought([5, 6], closed, ANCHOR)
        assert ids.count(chat.thought_end) == 1 and ids[:2] == [5, 6]
        assert chat.tokenizer.decode(ids).endswith(f"</think>\n\n{ANCHOR}")
    opened = chat.tokenizer.decode(chat.thinking_prompt(ask("Why?")))
    assert opened.endswith("<|im_start|>assistant\n<think>\n") and "</think>" not in opened


def test_a_model_that_does_not_think_is_led_in_words(qwen: ChatModel) -> None:
    assert qwen.chat.thought_end is None
    assert qwen.chat.tokenizer.decode(qwen.chat.thinking_prompt(ask("Why?"))).endswith("assistant\nLet me think.")
    assert qwen.chat.tokenizer.decode(qwen.chat.close_thought([], False, ANCHOR)) == f"\n{ANCHOR}"
    table = score(qwen, [choices().guided(THOUGHT)], [Condition()])
    assert set(of(table, "forced").values()) <= {0.0, 1.0} and len(of(table, "logratio")) == len(QUESTIONS)


@pytest.mark.parametrize("budget", [64, 4096])
def test_a_guided_row_does_not_depend_on_its_batch(thinking: ChatModel, budget: int) -> None:
    whole = score(thinking, [choices().guided(THOUGHT)], [Condition()], token_budget=budget)
    for row in choices().rows:
        alone = score(thinking, [Probe("own", "choice", (row,)).guided(THOUGHT)], [Condition()])
        assert of(whole, "logratio")[row.row] == pytest.approx(of(alone, "logratio")[row.row], abs=1e-4)


def test_only_choices_can_be_guided_and_only_written_probes_have_a_length() -> None:
    rows = (ProbeRow("0", tuple(ask("Why?")), "Because."),)
    with pytest.raises(UserError) as caught:
        Probe("text", "likelihood", rows).guided(5)
    assert_one_line(caught.value, "text", "not a choice probe")
    for kind, tokens in (("reply", 0), ("choice", 5)):
        with pytest.raises(UserError) as caught:
            Probe("text", kind, rows, tokens=tokens)  # type: ignore[arg-type]
        assert_one_line(caught.value, kind, str(tokens))


# -------------------------------------------------------------------- replies


def test_distinct_ngrams_count_repetition() -> None:
    assert distinct_ngrams([1, 2, 3, 4]) == 1.0
    assert distinct_ngrams([1, 1, 1, 1, 1]) == pytest.approx(1 / 3)
    assert distinct_ngrams([1, 2, 3, 1, 2, 3]) == pytest.approx(3 / 4)
    assert distinct_ngrams([1, 2]) == distinct_ngrams([]) == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1}', True),
        ('Here it is:\n```json\n{"a": {"b": [1, 2]}}\n```', True),
        ('{"a": 1', False),
        ("[1, 2]", False),
        ("{a: 1}", False),
        ("", False),
        ("} {", False),
    ],
)
def test_json_is_one_object_that_parses(text: str, expected: bool) -> None:
    assert holds_json(text) is expected


def test_a_reply_that_repeats_itself_shows(qwen: ChatModel) -> None:
    word = qwen.chat.tokenizer.encode(" bread", add_special_tokens=False)[0]
    edit = Edit("repeats", Says(word, qwen.fingerprint))
    probe = side_effects.text(6)
    table = score(qwen, [probe], [Condition.of(edit, 1.0)])
    length = probe.tokens
    assert set(of(table, "distinct3", "repeats").values()) == {1 / (length - 2)}
    assert set(of(table, "tokens", "repeats").values()) == {float(length)}
    assert set(of(table, "finished", "repeats").values()) == {0.0}
    assert len(of(table, "distinct3")) == 6 and min(of(table, "distinct3").values()) > 1 / (length - 2)


def test_only_models_that_write_json_are_asked_for_it(qwen: ChatModel) -> None:
    assert {row.group for row in side_effects.probes(qwen, 3)[-1].rows} == {"text"}
    asked = side_effects.text(3, with_json=True)
    table = score(qwen, [asked], [Condition()])
    assert set(of(table, "json").values()) == {0.0} and len(of(table, "json")) == 3
