"""A model provider for Inspect (`inspect-ai`): its evaluations run on a steered model, in this process.

    inspect eval arc.py --model ws/out/pocket/sycophancy/lora/seed0 -M alpha=-1
    get_model("ws/out/pocket/sycophancy/lora/seed0", mix="0.3 honesty - 0.2 sycophancy")

The name after `ws/` is a run folder or a direction file. Without `alpha` and `mix` it is the unedited base model: give
one of them. Samples that Inspect asks for at the same time share the passes of one engine.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import anyio.to_thread
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    Logprobs,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    StopReason,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from ws.base.errors import UnsupportedFeatureError, UserError
from ws.model.chat import Message
from ws.serving import mix
from ws.serving.engine import Engine
from ws.serving.protocol import told_logprobs
from ws.serving.requests import Answer, Request
from ws.serving.shelf import open_shelf


class SteeredModel(ModelAPI):
    """A base model under a mix of directions. alpha: strength of the run; mix: an expression instead."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 - the interface of Inspect
        alpha: float | None = None,
        mix: str | None = None,
        slots: int = 32,
        **options: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        if options:
            raise UserError(f"there is no option {next(iter(options))!r}", "Known: alpha, mix, slots.")
        self._shelf = open_shelf([model_name])
        self._strengths = self._shelf.strengths(self._mix(alpha, mix), local=True)
        self._slots = slots
        self._engine = Engine(self._shelf.model, slots=slots).__enter__()

    def _mix(self, alpha: float | None, expression: str | None) -> dict[str, float]:
        if alpha is not None and expression is not None:
            raise UserError("alpha and mix are both given", "Give one of them.")
        if expression is not None:
            return mix.parse(str(expression))
        return {next(iter(self._shelf.directions)): float(alpha or 0.0)}

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """Answer a conversation; all choices of it share passes."""
        del tool_choice
        if tools:
            raise UnsupportedFeatureError("a steered model calls no tools here", "Use a task without tools.")
        prompt = tuple(self._shelf.model.chat.prompt(_messages(input)))
        top = (config.top_logprobs or 0) if config.logprobs else None
        limit = _fitting(config.max_tokens, self._engine.longest - len(prompt))
        ask = partial(
            Request, prompt, self._strengths, max_tokens=limit,
            temperature=1.0 if config.temperature is None else config.temperature,
            top_p=1.0 if config.top_p is None else config.top_p, seed=config.seed or 0,
            stops=tuple(config.stop_seqs or ()), top=top,
        )  # fmt: skip
        answers: list[Answer] = [None] * (config.num_choices or 1)  # type: ignore[list-item]

        async def one(number: int) -> None:
            answers[number] = await anyio.to_thread.run_sync(self._engine.answer, ask(key=str(number)))

        async with anyio.create_task_group() as group:
            for number in range(len(answers)):
                group.start_soon(one, number)
        written = sum(len(answer.tokens) for answer in answers)
        return ModelOutput(
            model=self.model_name, choices=[self._choice(answer, top) for answer in answers],
            usage=ModelUsage(input_tokens=len(prompt), output_tokens=written, total_tokens=len(prompt) + written),
        )  # fmt: skip

    def _choice(self, answer: Answer, top: int | None) -> ChatCompletionChoice:
        if answer.finish == "error":
            raise RuntimeError(f"the answer could not be written: {answer.problem}")
        ended: StopReason = "stop" if answer.finish == "stop" else "max_tokens"
        logprobs = None
        if top is not None:
            logprobs = Logprobs.model_validate(
                {"content": told_logprobs(answer.tokens, self._shelf.model.chat.tokenizer)}
            )
        message = ChatMessageAssistant(content=answer.text, source="generate", model=self.model_name)
        return ChatCompletionChoice(message=message, stop_reason=ended, logprobs=logprobs)

    def max_connections(self) -> int:
        """How many requests Inspect sends at the same time."""
        return self._slots

    def close(self) -> None:
        """Stop the engine."""
        self._engine.__exit__(None, None, None)


def _fitting(limit: int | None, room: int) -> int | None:
    """The limit of an answer; Inspect's tasks ask for more than a small context holds."""
    return None if limit is None else max(1, min(limit, room))


def _messages(given: list[ChatMessage]) -> list[Message]:
    """All system messages in one at the front, then the conversation."""
    system = "\n\n".join(turn.text for turn in given if turn.role == "system")
    first = [Message(role="system", content=system)] if system else []
    turns = [Message(role="assistant" if turn.role == "assistant" else "user", content=turn.text)
             for turn in given if turn.role != "system"]  # fmt: skip
    return [*first, *turns]
