"""OpenAI's protocol: request bodies to engine requests, answers to response bodies, problems to error bodies.

Additions: `steer`, the strengths of a request, as an object {"sycophancy": -0.8} or a mix expression; model names that
hold them, `pocket@sycophancy=-0.8` or `pocket@0.3 honesty - 0.2 sycophancy`; `ignore_eos`, as in vLLM. Responses repeat
the strengths that were applied. An argument that is not known is refused: a misspelled one must not be ignored in
silence.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from ws.base.errors import UserError
from ws.model.chat import Message
from ws.model.loading import ChatModel
from ws.serving import mix
from ws.serving.engine import ContextError, Engine
from ws.serving.requests import Answer, Piece, Request, Token
from ws.serving.shelf import NameTakenError, Shelf, UnknownDirectionError

MOST_CHOICES = 128
MOST_LIKELIEST = 20
MOST_STOPS = 16
_TOKENS_OF_A_COMPLETION = 16
"""OpenAI's default for `/v1/completions`."""
_WITHOUT_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
                   "parallel_tool_calls", "stream_options"}  # fmt: skip
_ONLY_AT_DEFAULT: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "tools": ([],), "tool_choice": ("none",),
    "functions": ([],), "response_format": ({"type": "text"},), "modalities": (["text"],), "best_of": (1,),
    "echo": (False,), "suffix": ("",), "reasoning_effort": ("none",),
}  # fmt: skip
"""Arguments that are accepted only with a value that changes nothing."""
_SHARED = {
    "model",
    "temperature",
    "top_p",
    "n",
    "seed",
    "stop",
    "stream",
    "max_tokens",
    "logprobs",
    "steer",
    "ignore_eos",
}
_CHAT = _SHARED | {"messages", "max_completion_tokens", "top_logprobs"}
_COMPLETION = _SHARED | {"prompt"}


class ApiError(Exception):
    """A refusal with its HTTP status and OpenAI's type, parameter and code."""

    def __init__(self, status: int, message: str, parameter: str | None = None, code: str | None = None) -> None:
        super().__init__(_writable(message))
        self.status, self.code = status, code
        self.parameter = parameter and _writable(parameter)

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        return {"error": {"message": str(self), "type": kind, "param": self.parameter, "code": self.code}}

    @classmethod
    def of(cls, error: UserError, parameter: str | None = None) -> ApiError:
        """What a user error is in the protocol."""
        if isinstance(error, ContextError):
            return cls(400, str(error), parameter, "context_length_exceeded")
        if isinstance(error, UnknownDirectionError):
            return cls(404, str(error), parameter, "direction_not_found")
        if isinstance(error, NameTakenError):
            return cls(409, str(error), parameter, "direction_exists")
        return cls(400, str(error), parameter)


# -------------------------------------------------------------------- bodies


class Body:
    """A JSON object whose values are read with their type and range. A null counts as absent."""

    def __init__(self, raw: bytes, known: set[str]) -> None:
        try:
            content = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body is not valid JSON ({error})") from None
        if not isinstance(content, dict):
            raise ApiError(400, "the body is not a JSON object")
        self._values = {name: value for name, value in content.items() if value is not None}
        for name, value in self._values.items():
            if name in _ONLY_AT_DEFAULT and name not in known:
                if value not in _ONLY_AT_DEFAULT[name]:
                    raise ApiError(400, f"{name} is not supported here", name, "unsupported_parameter")
            elif name not in known | _WITHOUT_EFFECT:
                raise ApiError(400, f"unrecognized request argument: {name!r}", name, "unknown_parameter")

    def get(self, name: str, default: Any = None) -> Any:
        """A value as it is."""
        return self._values.get(name, default)

    def text(self, name: str) -> str:
        """A string that must be there."""
        value = self.get(name)
        if not isinstance(value, str) or not value:
            raise ApiError(400, f"{name} must be a string" if name in self._values else f"{name} is missing", name)
        return value

    def flag(self, name: str) -> bool:
        """True or False; False if absent."""
        value = self.get(name, False)
        if not isinstance(value, bool):
            raise ApiError(400, f"{name} must be true or false", name)
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A number within limits."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ApiError(400, f"{name} must be a number from {low:g} to {high:g}", name)
        return float(value)

    def whole(self, name: str, default: int | None, low: int, high: int) -> int | None:
        """A whole number within limits."""
        value = self.get(name, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ApiError(400, f"{name} must be a whole number from {low} to {high}", name)
        return value


@dataclass(frozen=True)
class Call:
    """A parsed request: `choices` engine requests per prompt. `steer`: strengths by name, which responses repeat."""

    model: str
    steer: dict[str, float]
    requests: tuple[Request, ...]
    choices: int
    is_chat: bool
    streams: bool
    tells_usage: bool

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts; several choices of one prompt count once."""
        return sum(len(one.prompt) for one in self.requests[:: self.choices])


def chat_call(raw: bytes, shelf: Shelf, engine: Engine) -> Call:
    """The call that a body of `/v1/chat/completions` makes."""
    body = Body(raw, _CHAT)
    messages = _messages(body.get("messages"))
    try:
        prompt = tuple(shelf.model.chat.prompt(messages))
    except (UserError, TemplateError) as error:
        raise ApiError(400, f"the template of {shelf.model.name} refuses these messages: {error}", "messages") from None
    limit = body.whole("max_completion_tokens", body.whole("max_tokens", None, 1, engine.longest), 1, engine.longest)
    top = body.whole("top_logprobs", 0, 0, MOST_LIKELIEST) if body.flag("logprobs") else None
    if top is None and body.get("top_logprobs"):
        raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
    return _call(body, shelf, [prompt], limit, top, is_chat=True)


def completion_call(raw: bytes, shelf: Shelf, engine: Engine) -> Call:
    """The call that a body of `/v1/completions` makes."""
    body = Body(raw, _COMPLETION)
    limit = body.whole("max_tokens", _TOKENS_OF_A_COMPLETION, 1, engine.longest)
    top = body.whole("logprobs", None, 0, MOST_LIKELIEST)
    return _call(body, shelf, _prompts(body.get("prompt"), shelf.model), limit, top, is_chat=False)


def _call(
    body: Body, shelf: Shelf, prompts: Sequence[tuple[int, ...]], limit: int | None, top: int | None, *, is_chat: bool
) -> Call:
    model = body.text("model")
    steer = _steer(model, body.get("steer"), shelf)
    try:
        strengths = shelf.strengths(steer)
    except UserError as error:
        raise ApiError.of(error, "steer") from None
    choices = body.whole("n", 1, 1, MOST_CHOICES) or 1
    if len(prompts) * choices > MOST_CHOICES:
        raise ApiError(400, f"more than {MOST_CHOICES} answers in one call", "n")
    seed = body.whole("seed", None, -(2**63), 2**63 - 1)
    options = body.get("stream_options", {})
    if not isinstance(options, dict):
        raise ApiError(400, "stream_options must be an object", "stream_options")
    requests = tuple(
        Request(
            prompt, strengths, max_tokens=limit, temperature=body.number("temperature", 1.0, 0, 2),
            top_p=body.number("top_p", 1.0, 1e-6, 1), seed=secrets.randbits(62) if seed is None else seed,
            key=str(choice), stops=_stops(body.get("stop")), top=top, continues=not is_chat,
            ends=frozenset() if body.flag("ignore_eos") else None,
        )
        for prompt in prompts
        for choice in range(choices)
    )  # fmt: skip
    return Call(model, steer, requests, choices, is_chat, body.flag("stream"), options.get("include_usage") is True)


def _steer(model: str, given: Any, shelf: Shelf) -> dict[str, float]:
    """Strengths by name, from the model's name or from `steer`."""
    base, _, named = model.partition("@")
    if base not in (shelf.model.name, shelf.model.slug):
        raise ApiError(404, f"the model {base!r} does not exist; this server has {shelf.model.slug!r}", "model",
                       "model_not_found")  # fmt: skip
    if named and given is not None:
        raise ApiError(400, "strengths are given in the model's name and in steer; give them once", "steer")
    try:
        if named:
            return _named_strengths(named)
        if isinstance(given, str):
            return mix.parse(given)
    except UserError as error:
        raise ApiError(400, str(error), "model" if named else "steer") from None
    if given is None:
        return {}
    if not isinstance(given, dict) or any(type(value) not in (int, float) for value in given.values()):
        raise ApiError(400, 'steer must be like {"sycophancy": -0.8}, or a mix like "0.3 honesty - 0.2 sycophancy"',
                       "steer")  # fmt: skip
    try:
        return {name: float(value) for name, value in given.items()}
    except OverflowError:
        raise ApiError(400, "a strength in steer is too large; give a finite number", "steer") from None


def _named_strengths(text: str) -> dict[str, float]:
    """`sycophancy=-0.8,honesty=0.3`, or a mix expression."""
    if "=" not in text:
        return mix.parse(text)
    found = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            raise UserError(f"{part!r} in the model's name is not like sycophancy=-0.8") from None
    return found


def _messages(given: Any) -> list[Message]:
    if not isinstance(given, list) or not given:
        raise ApiError(400, "messages must be a list with at least one message", "messages")
    found = []
    for number, turn in enumerate(given):
        where = f"messages[{number}]"
        role = turn.get("role") if isinstance(turn, dict) else None
        if role not in ("system", "developer", "user", "assistant"):
            raise ApiError(400, f"{where} has the role {role!r}; known are system, user and assistant", where)
        content = turn.get("content")
        if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
            content = "".join(str(part.get("text", "")) for part in content)
        if not isinstance(content, str):
            raise ApiError(400, f"the content of {where} is not text", where)
        _require_text(content, where)
        found.append(Message(role="system" if role == "developer" else role, content=content))
    if any(turn["role"] == "system" for turn in found[1:]):
        raise ApiError(400, "only the first message may be a system message", "messages")
    return found


def _prompts(given: Any, model: ChatModel) -> list[tuple[int, ...]]:
    several = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
    if len(several) > MOST_CHOICES:
        raise ApiError(400, f"more than {MOST_CHOICES} prompts", "prompt")
    rows = len(model.network.get_input_embeddings().weight)
    found = []
    for one in several:
        if isinstance(one, str) and one:
            _require_text(one, "prompt")
            found.append(tuple(model.chat.tokenizer(one)["input_ids"]))
        elif isinstance(one, list) and one and all(type(token) is int and 0 <= token < rows for token in one):
            found.append(tuple(one))
        else:
            raise ApiError(400, f"prompt must be text or token ids from 0 to {rows - 1}, not empty", "prompt")
    return found


def _stops(given: Any) -> tuple[str, ...]:
    stops = [given] if isinstance(given, str) else [] if given is None else given
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise ApiError(400, f"stop must be a string or up to {MOST_STOPS} strings, none of them empty", "stop")
    return tuple(stops)


def _writable(text: str) -> str:
    """Text that a client sent, as it can be sent back: half of a character is escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def _require_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ApiError(400, f"{where} holds a lone surrogate (half of a character)", where) from None


# -------------------------------------------------------------------- responses


class Writer:
    """Response bodies of one call. `key`: identity of the base weights."""

    def __init__(self, call: Call, model: ChatModel) -> None:
        self.call, self._tokenizer = call, model.chat.tokenizer
        kind = "chat.completion" if call.is_chat else "text_completion"
        self._head = {
            "id": ("chatcmpl-" if call.is_chat else "cmpl-") + secrets.token_hex(12), "object": kind,
            "created": int(time.time()), "model": call.model, "system_fingerprint": model.fingerprint,
            "steer": call.steer,
        }  # fmt: skip

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The body that holds whole answers."""
        choices = []
        for index, answer in enumerate(answers):
            message = {"role": "assistant", "content": answer.text}
            said = {"message": message} if self.call.is_chat else {"text": answer.text}
            choices.append({"index": index, **said, "logprobs": self._logprobs(answer.tokens, index, 0),
                            "finish_reason": answer.finish})  # fmt: skip
        return {**self._head, "choices": choices, "usage": self.usage([len(answer.tokens) for answer in answers])}

    def chunk(self, index: int, piece: Piece, start: int, *, first: bool) -> dict[str, Any]:
        """The body of one streamed piece; `start`: characters that were streamed before it."""
        role = {"role": "assistant"} if first else {}
        content = {"content": piece.text} if first or piece.text else {}
        said = {"delta": role | content} if self.call.is_chat else {"text": piece.text}
        choice = {"index": index, **said, "logprobs": self._logprobs(piece.tokens, index, start),
                  "finish_reason": piece.finish}  # fmt: skip
        head = self._head | ({"object": "chat.completion.chunk"} if self.call.is_chat else {})
        return {**head, "choices": [choice]}

    def last(self, written: Sequence[int]) -> dict[str, Any]:
        """The streamed body that tells the usage."""
        head = self._head | ({"object": "chat.completion.chunk"} if self.call.is_chat else {})
        return {**head, "choices": [], "usage": self.usage(written)}

    def usage(self, written: Sequence[int]) -> dict[str, int]:
        """Tokens of the prompts, of the answers, and both."""
        prompts, answers = self.call.prompt_tokens, sum(written)
        return {"prompt_tokens": prompts, "completion_tokens": answers, "total_tokens": prompts + answers}

    def _logprobs(self, tokens: Sequence[Token], index: int, start: int) -> dict[str, Any] | None:
        if self.call.requests[index].top is None:
            return None
        if self.call.is_chat:
            return {"content": told_logprobs(tokens, self._tokenizer), "refusal": None}
        texts = [self._text(token.id) for token in tokens]
        offsets = [start + sum(map(len, texts[:number])) for number in range(len(texts))]
        likeliest = [{self._text(one): value for one, value in token.likeliest} for token in tokens]
        return {"tokens": texts, "token_logprobs": [token.logprob for token in tokens], "top_logprobs": likeliest,
                "text_offset": offsets}  # fmt: skip

    def _text(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))


def told_logprobs(tokens: Sequence[Token], tokenizer: Any) -> list[dict[str, Any]]:
    """The log-probabilities of an answer's tokens as OpenAI writes them."""

    def told(token: int, logprob: float | None) -> dict[str, Any]:
        text = str(tokenizer.decode([token]))
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return [
        {**told(token.id, token.logprob), "top_logprobs": [told(*one) for one in token.likeliest]} for token in tokens
    ]
