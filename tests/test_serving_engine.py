"""The engine: answers in a batch of any strengths are those of each request alone, and no state crosses strengths."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch

from making import hook_count, random_direction, weights_digest
from ws.algebra.direction import Direction
from ws.base.errors import UserError
from ws.edit.steering import steer
from ws.model import loading
from ws.model.loading import ChatModel
from ws.pocket import tiny
from ws.serving.engine import ContextError, Engine
from ws.serving.prefixes import Prefixes, Strengths, key_of
from ws.serving.requests import Answer, Piece, Request
from ws.serving.slots import States
from ws.serving.writing import Writing

NEVER: frozenset[int] = frozenset()
"""No token ends these answers, so they all have their full length."""


def direction_of(model: ChatModel, seed: int = 0) -> Direction:
    return random_direction(model, seed=seed, relative_norm=0.5)


def prompt_of(model: ChatModel, number: int, length: int | None = None) -> tuple[int, ...]:
    count = len(model.network.get_input_embeddings().weight)
    return tuple((11 * number + 7 * place + 3) % count for place in range(length or 3 + 5 * number % 19))


@torch.no_grad()
def written_alone(model: ChatModel, prompt: Sequence[int], strengths: Strengths, tokens: int) -> list[int]:
    """The slow twin: baked weights, and the whole text again for every token."""
    ids = list(prompt)
    with steer(model, dict(strengths), mode="baked"):
        for _ in range(tokens):
            ids.append(int(model.network(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def all_answers(engine: Engine, requests: Sequence[Request]) -> list[Answer]:
    """Answers of requests that are all submitted before the first is answered."""
    queues: list[SimpleQueue[Piece]] = [SimpleQueue() for _ in requests]
    for request, queue in zip(requests, queues, strict=True):
        engine.submit(request, queue.put)
    found = []
    for queue in queues:
        pieces = [queue.get(timeout=60)]
        while pieces[-1].finish is None:
            pieces.append(queue.get(timeout=60))
        found.append(Answer.of(pieces))
    return found


def ids(answer: Answer) -> list[int]:
    return [token.id for token in answer.tokens]


def requests_of(model: ChatModel, count: int, **options: object) -> list[Request]:
    """Prompts of different lengths at five different mixes of two directions."""
    one, two = direction_of(model, 1), direction_of(model, 2)
    mixes: list[Strengths] = [{}, {one: 1.0}, {one: -0.7}, {two: 0.4, one: 0.2}, {two: -1.0}]
    return [
        Request(prompt_of(model, number), mixes[number % len(mixes)], max_tokens=4 + number % 7, ends=NEVER, **options)  # type: ignore[arg-type]
        for number in range(count)
    ]


# ---------------------------------------------------------------- exactness


def test_every_answer_in_a_mixed_batch_is_what_the_steered_model_writes_alone(any_model: ChatModel) -> None:
    requests = requests_of(any_model, 12)
    with Engine(any_model, slots=5) as engine:  # fewer rows than requests: they join and leave as they end
        answers = all_answers(engine, requests)
    for request, answer in zip(requests, answers, strict=True):
        assert ids(answer) == written_alone(any_model, request.prompt, request.strengths, request.max_tokens or 0)


def test_answers_do_not_depend_on_slots_or_reuse(qwen: ChatModel) -> None:
    requests = [*requests_of(qwen, 20), *requests_of(qwen, 10, temperature=0.9, top_p=0.9, seed=3)]
    found = []
    for slots, memory in ((1, 0), (3, None), (32, None), (32, 0)):
        with Engine(qwen, slots=slots, memory=memory) as engine:
            found.append([ids(answer) for answer in all_answers(engine, requests)])
    assert found[0] == found[1] == found[2] == found[3]


def test_attention_windows_shorter_than_the_text_are_kept(tmp_path: Path) -> None:
    folder = tiny.make("gemma3", tmp_path / "gemma", layers=7) or tmp_path / "gemma"
    model = loading.load(str(folder))
    for layer in model.network.model.layers:
        layer.self_attn.sliding_window = 8 if layer.self_attn.is_sliding else None
    model.network.config.sliding_window = 8
    assert len(set(model.network.config.layer_types)) == 2
    requests = requests_of(model, 6)
    with Engine(model, slots=4) as engine:
        answers = all_answers(engine, requests)
    for request, answer in zip(requests, answers, strict=True):
        assert ids(answer) == written_alone(model, request.prompt, request.strengths, request.max_tokens or 0)


def test_sampled_answers_are_reproduced_by_seed_and_key(qwen: ChatModel) -> None:
    prompt = prompt_of(qwen, 3)

    def sampled(seed: int, key: str) -> Request:
        return Request(prompt, max_tokens=12, temperature=1.0, seed=seed, key=key, ends=NEVER)

    with Engine(qwen, slots=4) as engine:
        a, b, c, d = (ids(one) for one in all_answers(engine, [sampled(0, "0"), sampled(0, "0"), sampled(0, "1"),
                                                              sampled(1, "0")]))  # fmt: skip
    assert a == b and a != c and a != d


def test_the_model_is_left_as_it_was(qwen: ChatModel) -> None:
    before, hooks = weights_digest(qwen.network), hook_count(qwen.network)
    with Engine(qwen, slots=4) as engine:
        all_answers(engine, requests_of(qwen, 6))
    assert weights_digest(qwen.network) == before and hook_count(qwen.network) == hooks


# ---------------------------------------------------------------- no contamination


def test_a_conversation_at_another_strength_reuses_nothing_and_answers_as_if_it_were_new(qwen: ChatModel) -> None:
    direction = direction_of(qwen)
    prompt = prompt_of(qwen, 1, 24)
    with Engine(qwen, slots=2) as engine:
        first = engine.answer(Request(prompt, {direction: 1.0}, max_tokens=8, ends=NEVER))
        longer = (*prompt, *ids(first), *prompt_of(qwen, 2, 5))
        before = engine.counts.reused_tokens
        turned = engine.answer(Request(longer, {direction: -1.0}, max_tokens=8, ends=NEVER))
        assert engine.counts.reused_tokens == before
        same = engine.answer(Request(longer, {direction: 1.0}, max_tokens=8, ends=NEVER))
        assert engine.counts.reused_tokens >= before + len(prompt)
    assert ids(turned) == written_alone(qwen, longer, {direction: -1.0}, 8)
    assert ids(same) == written_alone(qwen, longer, {direction: 1.0}, 8)


def test_states_of_another_strength_would_change_the_answer(qwen: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: with strengths left out of the key, the answer is another one."""
    direction = direction_of(qwen)
    prompt = prompt_of(qwen, 1, 24)
    monkeypatch.setattr("ws.serving.engine.key_of", lambda strengths: frozenset())
    with Engine(qwen, slots=2) as engine:
        engine.answer(Request(prompt, {direction: 1.0}, max_tokens=8, ends=NEVER))
        mixed = engine.answer(Request((*prompt, 5), {direction: -1.0}, max_tokens=8, ends=NEVER))
    assert ids(mixed) != written_alone(qwen, (*prompt, 5), {direction: -1.0}, 8)


def test_equal_prompts_at_one_strength_are_computed_once(qwen: ChatModel) -> None:
    prompt = prompt_of(qwen, 1, 24)
    with Engine(qwen, slots=8) as engine:
        answers = all_answers(engine, [Request(prompt, max_tokens=5, ends=NEVER) for _ in range(8)])
        assert engine.counts.reused_tokens == 7 * (len(prompt) - 1)
    assert {tuple(ids(answer)) for answer in answers} == {tuple(written_alone(qwen, prompt, {}, 5))}


def test_a_direction_that_is_loaded_again_is_another_key(qwen: ChatModel) -> None:
    one, again = direction_of(qwen), direction_of(qwen)
    assert one.content_key == again.content_key
    assert key_of({one: 1.0}) != key_of({again: 1.0})
    assert key_of({one: 0.0}) == key_of({}) == frozenset()


def test_a_direction_that_is_unloaded_leaves_nothing_behind(qwen: ChatModel) -> None:
    direction, hooks = direction_of(qwen), hook_count(qwen.network)
    request = Request(prompt_of(qwen, 1, 24), {direction: 1.0}, max_tokens=4, ends=NEVER)
    with Engine(qwen) as engine:
        wanted = ids(engine.answer(request))
        assert engine.kept_bytes > 0 and hook_count(qwen.network) > hooks
        engine.forget(direction)
        engine.answer(Request(prompt_of(qwen, 2, 4), max_tokens=1, ends=NEVER))
        assert engine.kept_bytes == 0 and hook_count(qwen.network) == hooks
        assert ids(engine.answer(request)) == wanted  # who still holds the direction may ask for it again


def test_prefixes_forget_the_oldest_and_what_a_direction_made(qwen: ChatModel) -> None:
    direction = direction_of(qwen)
    states = States([torch.zeros(2, 16, 4)], [torch.zeros(2, 16, 4)])
    kept = Prefixes(3 * states.nbytes)
    texts = [tuple(range(start, start + 16)) for start in range(0, 80, 16)]
    for text in texts[:3]:
        kept.keep(text, key_of({}), states)
    assert kept.find([*texts[0], 1], key_of({})) is not None  # the first is now the last used
    kept.keep(texts[3], key_of({direction: 1.0}), states)
    assert kept.find([*texts[1], 1], key_of({})) is None
    assert kept.find([*texts[0], 1], key_of({})) is not None
    assert kept.find([*texts[3], 1], key_of({})) is None
    kept.forget(direction)
    assert kept.find([*texts[3], 1], key_of({direction: 1.0})) is None
    assert kept.nbytes == 2 * states.nbytes


# ---------------------------------------------------------------- what a request asks for


def test_log_probabilities_are_those_of_the_steered_model(qwen: ChatModel) -> None:
    direction, prompt = direction_of(qwen), prompt_of(qwen, 2)
    with Engine(qwen) as engine:
        request = Request(prompt, {direction: 0.5}, max_tokens=3, top=4, watched=(5, 9), ends=NEVER)
        answer = engine.answer(request)
    text = [*prompt, *ids(answer)]
    with steer(qwen, direction, 0.5), torch.no_grad():
        wanted = torch.log_softmax(qwen.network(input_ids=torch.tensor([text])).logits[0], dim=-1)[len(prompt) - 1 :]
    assert answer.watched == pytest.approx(wanted[0, [5, 9]].tolist(), abs=1e-4)
    for token, row in zip(answer.tokens, wanted[:-1], strict=True):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
        assert [one for one, _ in token.likeliest] == row.topk(4).indices.tolist()


def test_an_answer_ends_before_its_stop_string_and_streams_to_the_same_text(qwen: ChatModel) -> None:
    prompt = prompt_of(qwen, 4)
    with Engine(qwen) as engine:
        whole = engine.answer(Request(prompt, max_tokens=30, ends=NEVER))
        assert whole.finish == "length" and len(whole.tokens) == 30
        stop = whole.text[len(whole.text) // 2 :][:3]
        pieces = list(engine.stream(Request(prompt, max_tokens=30, stops=(stop, "@never@"), ends=NEVER)))
    streamed = Answer.of(pieces)
    assert streamed.finish == "stop"
    assert streamed.text == whole.text[: whole.text.index(stop)]
    assert len(pieces) > 1


def test_an_end_token_ends_an_answer_and_is_not_part_of_it(qwen: ChatModel) -> None:
    prompt = prompt_of(qwen, 4)
    free = written_alone(qwen, prompt, {}, 6)
    with Engine(qwen) as engine:
        answer = engine.answer(Request(prompt, max_tokens=20, ends=frozenset({free[5]})))
    assert ids(answer) == free[: free.index(free[5])] and answer.finish == "stop"


def test_a_cancelled_request_frees_its_row(qwen: ChatModel) -> None:
    endless = Request(prompt_of(qwen, 1), max_tokens=400, ends=NEVER)
    with Engine(qwen, slots=1) as engine:
        for piece in engine.stream(endless):
            assert piece.finish is None
            break
        after = engine.answer(Request(prompt_of(qwen, 2), max_tokens=3, ends=NEVER))
        assert engine.counts.requests["cancelled"] == 1
        assert engine.counts.written_tokens < 400
    assert ids(after) == written_alone(qwen, prompt_of(qwen, 2), {}, 3)


def test_a_failure_ends_the_requests_in_flight_and_not_the_engine(
    qwen: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request(prompt_of(qwen, 1), max_tokens=3, ends=NEVER)
    with Engine(qwen) as engine:
        with monkeypatch.context() as broken:
            broken.setattr(engine._slots, "logits", lambda *_: 1 / 0)
            failed = engine.answer(request)
        assert failed.finish == "error" and "ZeroDivisionError" in failed.problem
        assert engine.answer(request).finish == "length"


@pytest.mark.parametrize(
    ("request_", "kind"),
    [
        (Request(()), UserError),
        (Request((1,) * 65), ContextError),
        (Request((1,) * 60, max_tokens=5), ContextError),
        (Request((1,), max_tokens=0), UserError),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_at_once(qwen: ChatModel, request_: Request, kind: type) -> None:
    with pytest.raises(kind):
        Engine(qwen, longest=64).submit(request_, lambda _: None)


def test_a_full_context_can_be_written(qwen: ChatModel) -> None:
    with Engine(qwen, slots=2, longest=40) as engine:
        long, short = all_answers(engine, [Request(prompt_of(qwen, 1, 20), ends=NEVER),
                                           Request(prompt_of(qwen, 2, 39), ends=NEVER)])  # fmt: skip
    assert ids(long) == written_alone(qwen, prompt_of(qwen, 1, 20), {}, 20) and long.finish == "length"
    assert ids(short) == written_alone(qwen, prompt_of(qwen, 2, 39), {}, 1)


def test_many_threads_may_ask_at_once(qwen: ChatModel) -> None:
    requests = requests_of(qwen, 16)
    found: dict[int, list[int]] = {}
    with Engine(qwen, slots=4) as engine:

        def ask(number: int) -> None:
            found[number] = ids(engine.answer(requests[number]))

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(requests))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert [found[number] for number in range(16)] == [ids(engine.answer(request)) for request in requests]


# ---------------------------------------------------------------- text


@pytest.mark.parametrize("stops", [(), ("ll",), ("é ✓", "漢"), ("never",), ("done.",)])
def test_pieces_make_the_text_up_to_the_stop(qwen: ChatModel, stops: tuple[str, ...]) -> None:
    tokenizer = qwen.chat.tokenizer
    text = "The answer is héllo é ✓ 漢字 and done."
    writing, pieces = Writing(tokenizer, stops), []
    for token in tokenizer(text)["input_ids"]:
        pieces.append(writing.add(token))
        if writing.stopped:
            break
    pieces.append(writing.end())
    cuts = [text.index(stop) for stop in stops if stop in text]
    assert "".join(pieces) == (text[: min(cuts)] if cuts else text)
    assert writing.stopped == bool(cuts)


def test_half_a_character_waits_and_is_marked_at_the_end(qwen: ChatModel) -> None:
    first, *_ = qwen.chat.tokenizer("漢")["input_ids"]
    writing = Writing(qwen.chat.tokenizer)
    assert writing.add(first) == "" and writing.end() == "�"
